"""Texts of Parquet files and of datasets: what stands in their columns, as it comes; what is no text is refused."""

import builtins
import json

import numpy as np
import pytest
import torch
from tiny_folders import make_folder

from diffusion import LogitCache
from diffusion.app.recipe import TextRecipe
from diffusion.app.workspace import Workspace
from diffusion.errors import ArgumentError, CorpusError
from diffusion.text.corpus import load_corpus
from diffusion.text.tables import open_table

PAIRS = [(f"The {i}th text ", f"says that {i} and more."[: 6 + i]) for i in range(6)]
COLUMNS = {"question": [prompt for prompt, _ in PAIRS], "text": [text for _, text in PAIRS], "number": list(range(6))}


def parquet(path, columns=COLUMNS, **options):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pyarrow.table(columns), path, **options)
    return path


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A dataset in a folder, with a split for training and one for tests."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "owner" / "texts"
    folder.mkdir(parents=True)
    parquet(folder / "train.parquet")
    parquet(folder / "test.parquet", {**COLUMNS, "text": ["A text for tests."] * 6})
    return folder


def test_rows_are_those_of_the_columns_that_are_asked_for(tmp_path):
    table = open_table(str(parquet(tmp_path / "texts.parquet", row_group_size=2)))
    assert list(table.texts("question", "text")) == PAIRS
    assert list(table.texts("text")) == [(text,) for _, text in PAIRS]


def test_a_table_is_read_a_group_of_rows_at_a_time(tmp_path):
    """What is damaged further on does not keep the first rows from being read; then it is said."""
    letters = np.random.default_rng(0).choice(list("abcdefgh"), size=(3000, 100))
    texts = ["".join(row) for row in letters]
    path = parquet(tmp_path / "texts.parquet", {"text": texts}, row_group_size=1000, compression="gzip")
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2 : len(whole) // 2 + 99] = bytes(99)
    path.write_bytes(whole)
    rows = open_table(str(path)).texts("text")
    assert [next(rows)[0] for _ in range(1000)] == texts[:1000]
    with pytest.raises(CorpusError, match=r"expected rows to its end, got .*; copy it again"):
        list(rows)


def test_a_column_is_a_corpus(tmp_path):
    path = parquet(tmp_path / "texts.parquet")
    assert load_corpus(path, held_out_fraction=0.0).train == tuple(COLUMNS["text"])
    assert load_corpus(path, field="question", held_out_fraction=0.0).train == tuple(COLUMNS["question"])
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in COLUMNS["text"]))
    assert load_corpus(lines, field="text").digest == load_corpus(path).digest  # split alike too


def test_a_dataset_of_a_folder_is_a_corpus(dataset):
    assert load_corpus(f"dataset:{dataset}", held_out_fraction=0.0).train == tuple(COLUMNS["text"])
    assert open_table(f"dataset:{dataset}@test").columns == tuple(COLUMNS)
    assert list(open_table(f"dataset:{dataset}:default@test").texts("text")) == [("A text for tests.",)] * 6
    with pytest.raises(CorpusError, match=r"got ValueError: Unknown split.*take a \.parquet or \.jsonl file"):
        open_table(f"dataset:{dataset}@validation")


def test_a_name_of_the_hub_is_asked_for_there(monkeypatch):
    datasets, asked = pytest.importorskip("datasets"), []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("dataset:owner/name", "dataset:owner/name:main@test"):
        with pytest.raises(CorpusError, match="got ConnectionError: no network"):
            open_table(name)
    assert asked == [(("owner/name", None), {"split": "train"}), (("owner/name", "main"), {"split": "test"})]


def test_sources_mean_the_same_in_every_folder(dataset, monkeypatch):
    monkeypatch.chdir(dataset.parent.parent)
    for given, kept in (
        ("texts.parquet", f"{dataset.parent.parent}/texts.parquet"),
        ("dataset:owner/texts:default@test", f"dataset:{dataset}:default@test"),
        ("dataset:owner/other@test", "dataset:owner/other@test"),
        ("arithmetic", "arithmetic"),
    ):
        assert TextRecipe(corpus=given).corpus == kept


@pytest.mark.parametrize("kind", ["parquet", "dataset", "jsonl"])
def test_predictions_of_columns_are_cached(kind, dataset, tmp_path, run_program):
    out, to = make_folder(tmp_path, fits=False), tmp_path / "to"
    source = {"parquet": dataset / "train.parquet", "dataset": f"dataset:{dataset}", "jsonl": tmp_path / "pairs.jsonl"}
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"question": prompt, "text": text}) + "\n" for prompt, text in PAIRS)
    )
    command = ("cache-logits", "--out", out, "--text", source[kind], "--to", to, "--context", 20, "--block", 8)
    code, _, error = run_program(*command, "--prompt-field", "question", "--quiet")
    assert code == 0, error
    tokenizer, cache = Workspace(out).tokenizer(), LogitCache.open(to)
    found = [tokenizer.decode([t for t in row if t != tokenizer.eos_id]) for row in cache.tokens.tolist()]
    assert found == [text[at : at + 8] for _, text in PAIRS for at in range(0, len(text), 8)]
    code, _, error = run_program(*command, "--field", "answer", "--quiet")
    assert code == 2
    assert "'answer'" in error


def test_a_folder_is_trained_on_a_column(tmp_path, run_program):
    texts = [f"The {i}th text says that {i} and {i} make {2 * i}. " * 6 for i in range(40)]
    path, out = parquet(tmp_path / "texts.parquet", {"answer": texts}), tmp_path / "models"
    command = (
        "train",
        "--corpus",
        path,
        "--field",
        "answer",
        "--out",
        out,
        "--preset",
        "tiny",
        "--steps",
        2,
        "--quiet",
    )
    assert run_program(*command)[0] == 0
    assert Workspace(out).recipe().text == TextRecipe(corpus=str(path), field="answer")
    assert torch.equal(
        Workspace(out).held_out_stream(Workspace(out).recipe()),
        Workspace(out).stream(load_corpus(path, field="answer").held_out),
    )


@pytest.mark.parametrize(
    ("columns", "field", "message"),
    [
        ({"text": ["a"]}, "answer", "expected a column 'answer', got text; name one of them"),
        ({"text": ["a", None]}, "text", "row 2: text: expected text, got None"),
        ({"text": ["a"], "number": [1]}, "number", "row 1: number: expected text, got 1"),
        ({"text": ["", " "]}, "text", "expected text, got none; give a file that has some"),
    ],
)
def test_what_is_no_text_is_refused(columns, field, message, tmp_path):
    with pytest.raises(CorpusError, match=message):
        load_corpus(parquet(tmp_path / "texts.parquet", columns), field=field)


def test_a_table_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="expected a file, got none there"):
        load_corpus(tmp_path / "none.parquet")


def test_a_name_that_two_columns_have_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet files are read by pyarrow")
    from pyarrow.parquet import write_table

    columns = [pyarrow.array(["one", "two"]), pyarrow.array(["three", "four"]), pyarrow.array(["five", "six"])]
    path = tmp_path / "texts.parquet"
    write_table(pyarrow.Table.from_arrays(columns, names=["text", "text", "other"]), path)
    with pytest.raises(CorpusError, match="expected one column 'text', got 2; rename all but one"):
        list(open_table(str(path)).texts("text"))
    assert list(open_table(str(path)).texts("other")) == [("five",), ("six",)]


def test_what_is_no_table_is_refused(tmp_path):
    pytest.importorskip("pyarrow", reason="Parquet files are read by pyarrow")
    (tmp_path / "text.parquet").write_text("a text")
    with pytest.raises(CorpusError, match=r"expected a whole Parquet file, got .*; copy it again"):
        load_corpus(tmp_path / "text.parquet")


@pytest.mark.parametrize(
    ("package", "source", "way_out"),
    [("pyarrow", "a.parquet", "pip install pyarrow"), ("datasets", "dataset:a", r"pip install 'unfactor\[hf\]'")],
)
def test_a_package_that_is_missing_is_named(package, source, way_out, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").touch()
    imported = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == package:
            raise ImportError(f"no {name}")
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ArgumentError, match=f"{package}: expected the package to be installed.*{way_out}"):
        load_corpus(source)
