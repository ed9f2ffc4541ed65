from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.errors import ArgumentError, CorpusError
from diffusion.text import corpus as corpus_module
from diffusion.text.corpus import (
    arithmetic_documents,
    check_arithmetic,
    join_documents,
    load_corpus,
    random_windows,
    windows,
)

EOS = 99


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz"])
def test_text_documents_are_separated_by_blank_lines(tmp_path: Path, name: str) -> None:
    corpus = load_corpus(write(tmp_path / name, "one\ntwo\r\n\r\nthree\n \t\n\n four\n"), held_out_fraction=0.3)
    assert sorted(corpus.train + corpus.held_out) == [" four\n", "one\ntwo", "three"]
    assert len(corpus.held_out) == 1


@pytest.mark.parametrize("name", ["text.jsonl", "text.jsonl.gz"])
def test_jsonl_documents_are_one_field_of_each_line(tmp_path: Path, name: str) -> None:
    lines = "\n".join(json.dumps({"question": "?", "answer": f"é {i}\n\n{i}"}) for i in range(20)) + "\n\n"
    corpus = load_corpus(write(tmp_path / name, lines), field="answer")
    assert {*corpus.train, *corpus.held_out} == {f"é {i}\n\n{i}" for i in range(20)}
    assert len(corpus.held_out) == 2


@pytest.mark.parametrize("source", ["embedded", "arithmetic"])
def test_built_in_corpora_have_text_on_both_sides(source: str) -> None:
    corpus = load_corpus(source)
    assert sum(map(len, corpus.train)) > 250_000
    assert sum(map(len, corpus.held_out)) > 10_000
    assert not set(corpus.train) & set(corpus.held_out)


def test_split_depends_on_the_seed_and_on_nothing_else(tmp_path: Path) -> None:
    documents = [f"document {i}" for i in range(50)]
    forward = write(tmp_path / "forward.txt", "\n\n".join(documents))
    backward = write(tmp_path / "backward.txt", "\n\n".join(documents[::-1]))
    assert set(load_corpus(forward).held_out) == set(load_corpus(backward).held_out)
    assert set(load_corpus(forward).held_out) != set(load_corpus(forward, seed=1).held_out)
    assert load_corpus(forward, held_out_fraction=0).held_out == ()


def test_copies_of_a_document_stay_on_one_side(tmp_path: Path) -> None:
    path = write(tmp_path / "copies.txt", "\n\n".join(["same", "same", "other"] * 20 + ["third", "fourth"]))
    for seed in range(5):
        corpus = load_corpus(path, seed=seed)
        assert not set(corpus.train) & set(corpus.held_out)
        assert len(corpus.train) + len(corpus.held_out) == 62


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "expected a file, got none there"),
        ("empty.txt", "", "expected text, got none"),
        ("blank.txt", " \n\n\t\n", "expected text, got none"),
        ("one.txt", "only one document", "expected at least two different documents"),
        ("latin.txt", b"caf\xe9 au lait", "expected UTF-8 text, got byte 3"),
        ("null.txt", b"a\0b\n\nc", "null characters"),
        ("table.csv", "a,b", r"corpus: expected 'embedded'.* got .*table.csv"),
        ("broken.jsonl", '{"text": "a"}\n{"text": \n', "line 2: expected JSON"),
        ("list.jsonl", "[1]", "line 1: expected an object"),
        ("digits.jsonl", '{"text": ' + "1" * 5000 + "}", "line 1: expected JSON"),
        (
            "surrogate.jsonl",
            '{"text": "a"}\n{"text": "\\ud800"}',
            "line 2: text: expected text, got half of a surrogate pair",
        ),
        ("a" * 300 + ".txt", None, "expected a file that can be read"),
        ("number.jsonl", '{"text": 3}', "text: expected text, got 3"),
        ("keys.jsonl", '{"question": "?", "answer": "!"}', "expected a key 'text', got question, answer"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path, name: str, content: str | bytes | None, message: str):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(CorpusError, match=message) as caught:
        load_corpus(path, field="text" if name.endswith(".jsonl") else None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"plain text", lambda data: b""])
def test_damaged_gzip_is_a_corpus_error(tmp_path: Path, damage) -> None:
    path = tmp_path / "text.txt.gz"
    path.write_bytes(damage(gzip.compress(b"one\n\ntwo " * 50)))
    with pytest.raises(CorpusError):
        load_corpus(path)


def test_folder_is_not_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(CorpusError, match="no regular file"):
        load_corpus(tmp_path / "folder.txt")


def test_text_that_gzip_made_a_thousand_times_shorter_is_not_unpacked(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(corpus_module, "_FEW_BYTES", 1 << 16)
    zeros = gzip.compress(b"a" * (1 << 20))
    (tmp_path / "bomb.txt.gz").write_bytes(zeros)
    with pytest.raises(CorpusError, match=f"at most {64 * len(zeros)} bytes of text"):
        load_corpus(tmp_path / "bomb.txt.gz")


def test_field_goes_with_jsonl_only(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="field: expected the key"):
        load_corpus(tmp_path / "text.jsonl")
    with pytest.raises(ArgumentError, match="leave it out"):
        load_corpus("embedded", field="text")


def test_generated_arithmetic_is_true_and_reproducible() -> None:
    documents = arithmetic_documents(50, seed=3)
    assert documents == arithmetic_documents(50, seed=3) != arithmetic_documents(50, seed=4)
    for document in documents:
        check = check_arithmetic("", document)
        assert check.ok
        assert 10 <= check.num_lines == check.num_well_formed == check.num_correct <= 40


@given(st.integers(0, 400))
def test_true_text_stays_ok_wherever_it_is_cut(cut: int) -> None:
    document = arithmetic_documents(1, seed=0)[0] * 4
    context, text = document[:cut], document[cut : cut + 32]
    check = check_arithmetic(context, text)
    assert check.num_lines == text.count("\n")
    assert check.ok == ("\n" in text)


@pytest.mark.parametrize(
    ("context", "text", "lines", "well_formed", "correct"),
    [
        ("1+1=2\n5+", "6=11\n1+1=2\n", 2, 2, 2),
        ("1+1=2\n5+", "6=12\n1+1=2\n", 2, 2, 1),
        ("", "5+6=11", 0, 0, 0),
        ("5+6=11", "\n", 1, 1, 1),
        ("5+6=11\n", "\n1+1=2\n", 2, 1, 1),
        ("6+6=3\n", "1+1=2\n6+6=3", 1, 1, 1),
        ("", "5+6=11\n5++6=11\n5+6=011\n15+6=21\n0+6=6\n\uff15+6=11\n", 6, 1, 1),
    ],
)
def test_lines_are_judged_as_documented(context: str, text: str, lines: int, well_formed: int, correct: int) -> None:
    check = check_arithmetic(context, text)
    assert (check.num_lines, check.num_well_formed, check.num_correct) == (lines, well_formed, correct)
    assert check.ok == (lines > 0 and lines == correct)


@given(st.lists(st.lists(st.integers(0, 50), max_size=9), max_size=6))
def test_joining_ends_every_document_once(token_docs: list[list[int]]) -> None:
    stream = join_documents(token_docs, eos_id=EOS)
    assert stream.dtype == torch.int64
    assert stream.tolist() == [token for tokens in token_docs for token in [*tokens, EOS]]


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 20))
def test_windows_tile_the_stream_in_order(num_tokens: int, length: int, limit: int) -> None:
    stream = torch.arange(num_tokens)
    if num_tokens < length:
        with pytest.raises(CorpusError, match="expected at least one window"):
            windows(stream, length=length)
        return
    tiles = windows(stream, length=length)
    assert torch.equal(tiles.flatten(), stream[: num_tokens // length * length])
    some = windows(stream, length=length, max_windows=limit)
    assert len(some) == min(limit, len(tiles))
    assert bool((some[:, 0].diff() > 0).all())
    assert bool((some[:, 0] % length == 0).all())


def test_fewer_windows_are_spread_evenly() -> None:
    assert windows(torch.arange(30), length=3, max_windows=3)[:, 0].tolist() == [0, 9, 18]


def test_random_windows_are_stretches_of_the_stream_and_reach_all_of_it() -> None:
    stream = torch.arange(20)
    drawn = random_windows(stream, length=5, num_windows=500, generator=torch.Generator().manual_seed(0))
    assert bool((drawn.diff(dim=1) == 1).all())
    assert set(drawn[:, 0].tolist()) == set(range(16))


def test_bad_window_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match="length"):
        windows(torch.arange(5), length=0)
    with pytest.raises(ArgumentError, match="max_windows"):
        windows(torch.arange(5), length=1, max_windows=0)
    with pytest.raises(ArgumentError, match="stream: expected a vector of int64"):
        random_windows(torch.zeros(5), length=1, num_windows=1)
