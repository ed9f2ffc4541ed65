"""The shipped models: what is packed, how it is unpacked, and what the demonstration shows with it."""

import gzip
import hashlib
import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from diffusion.app import cli, packing
from diffusion.app.commands import demo
from diffusion.app.recipe import PRESETS, CircuitRecipe, DenoiserRecipe, Recipe, TextRecipe
from diffusion.app.showing import fill_hole
from diffusion.app.workspace import Workspace
from diffusion.conditioners import LatentPotentials, NoiseCalibration
from diffusion.errors import ArgumentError, CheckpointError, CorpusError
from diffusion.text import gsm8k
from diffusion.text.corpus import load_corpus
from diffusion.training.circuit import CircuitTraining
from diffusion.training.denoiser import DenoiserTraining


def answers():
    for i in range(1, 121):
        yield f"She has {i} + {i} = <<{i}+{i}={2 * i}>>{2 * i} eggs.\nShe sells {i} of them.\n#### {i}"


def small(path):
    return Recipe(
        text=TextRecipe(corpus=str(path), field="answer", tokenizer="bpe", vocab_size=300),
        denoiser=DenoiserRecipe(
            context_length=16, block_length=16, width=16, num_layers=1, num_heads=2, max_length=128,
            training=DenoiserTraining(steps=4, batch_size=4),
        ),
        circuit=CircuitRecipe(
            num_states=3, likelihood_blocks=64, likelihood_epochs=1, cached_blocks=32, has_potentials=True,
            training=CircuitTraining(steps=3, batch_size=16),
        ),
        gap_windows=6,
        texts=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps({"question": "?", "answer": answer}) + "\n" for answer in answers()))
    workspace = Workspace(folder / "models", progress=False)
    workspace.train(small(path))
    workspace.fit(small(path))
    workspace.evaluate_gap(small(path))
    return workspace


@pytest.fixture(scope="module")
def packed(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "shipped"
    return folder, packing.pack(trained, folder, documents=10)


def test_a_packed_folder_has_half_the_weights_and_none_of_the_training_text(trained, packed):
    folder, size = packed
    stored, learnt = load_file(folder / "denoiser" / "model.safetensors"), trained.denoiser().state_dict()
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    loaded = Workspace(folder).denoiser().state_dict()
    for name, tensor in learnt.items():
        assert loaded[name].dtype == torch.float32
        torch.testing.assert_close(loaded[name], tensor, rtol=2**-11, atol=2**-24)
    for name, tensor in trained.head().state_dict().items():
        assert torch.equal(Workspace(folder).head().state_dict()[name], tensor), name
    corpus = load_corpus(trained.recipe().text.corpus, field="answer")
    kept = [
        json.loads(line)["text"] for line in gzip.decompress((folder / "held_out.jsonl.gz").read_bytes()).splitlines()
    ]
    assert len(kept) == 10
    assert set(kept) <= set(corpus.held_out)
    assert Workspace(folder).held_out(Workspace(folder).recipe()) == tuple(kept)
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert size == len(everything) < packing.LARGEST
    assert str(trained.path.parent).encode() not in everything  # no path of this machine
    assert Workspace(folder).recipe().text == TextRecipe(
        corpus="gsm8k", field="answer", tokenizer="bpe", vocab_size=300
    )


def test_the_head_has_what_the_recipe_says(trained):
    calibration, potentials = trained.head().conditioners
    assert isinstance(calibration, NoiseCalibration)
    assert isinstance(potentials, LatentPotentials)
    assert potentials.linear.weight.abs().sum() > 0


def test_the_model_card_says_how_it_was_made_and_measured(trained, packed):
    card = (packed[0] / "MODEL_CARD.md").read_text()
    assert f"{trained.denoiser().num_parameters:,}\n  parameters" in card
    assert "3 states over a block of 16 tokens, with its prediction calibrated" in card
    assert "10 documents that training never saw" in card
    assert (trained.results / "gap.txt").read_text() in card
    assert "Copyright (c) 2021 OpenAI" in card
    assert "The same again: `unfactor demo --from-scratch`" in card


def test_what_is_too_large_is_not_packed(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "LARGEST", 1000)
    with pytest.raises(ArgumentError, match="expected at most 1,000 bytes to ship"):
        packing.pack(trained, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_shipped_models_are_unpacked_once_and_into_nothing_else(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "SHIPPED", packed[0])
    packing.unpack(tmp_path / "out")
    (tmp_path / "out" / "results" / "mine.txt").write_text("kept")
    packing.unpack(tmp_path / "out")
    assert (tmp_path / "out" / "results" / "mine.txt").read_text() == "kept"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("precious")
    with pytest.raises(CheckpointError, match="expected an empty folder or one of unfactor"):
        packing.unpack(tmp_path / "other")
    path = tmp_path / "out" / "recipe.json"
    content = json.loads(path.read_text().replace('"seed": 0', '"seed": 1'))
    path.write_text(json.dumps({key: content[key] for key in content.keys() - {"sha256"}}))
    with pytest.raises(CheckpointError, match="expected the models that are shipped, got others"):
        packing.unpack(tmp_path / "out")
    monkeypatch.setattr(packing, "SHIPPED", tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="unfactor demo --from-scratch"):
        packing.unpack(tmp_path / "new")


def test_the_demonstration_shows_everything_in_its_order(packed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packing, "SHIPPED", packed[0])
    monkeypatch.setattr(demo, "_STEPS", (1, 2))

    def shown(*arguments):
        monkeypatch.setattr(sys, "argv", ["unfactor", "demo", "--quiet", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code, capsys.readouterr().err
        return capsys.readouterr().out

    out = tmp_path / "demo"
    text = shown("--out", str(out))
    titles = (
        *("The same 16 tokens in one call", "16 tokens in few calls", "few_steps.png", "annotations that are right"),
        *("Perplexity of masked tokens", "A hole in a held-out text", "\nShown:", "\nFiles:", "\nNext:"),
    )
    places = [text.find(title) for title in titles]
    assert -1 not in places, text[3000:]
    assert places == sorted(places)
    assert len(text[places[-3] :].strip().splitlines()) == 3
    names = {f"{name}.{kind}" for name in ("gap", "few_steps", "annotations") for kind in ("json", "png", "txt")}
    assert {path.name for path in (out / "results").iterdir()} == {*names, "report.html"}
    page = (out / "results" / "report.html").read_text()
    headings = (
        "One call",
        "Step by step",
        "Text in few calls",
        "Annotations that are right",
        "The gap",
        "A hole under",
    )
    assert [page.find(f"<h2>{heading}") > 0 for heading in headings] == [True] * 6
    fillings = json.loads(page.split('id="fillings">')[1].split("</script>")[0])
    assert [len(one["sides"]) for one in fillings] == [2] * 3
    assert shown("--out", str(out)) == text  # nothing in it is left to chance


def test_a_hole_under_its_constraint_matches_the_pattern(packed):
    workspace = Workspace(packed[0], progress=False)
    infilled = fill_hole(workspace, workspace.recipe())
    assert re.fullmatch(infilled.pattern, infilled.constrained)
    assert re.fullmatch(infilled.pattern, infilled.truth)
    whole = infilled.before + infilled.truth + infilled.after
    assert any(document.startswith(whole) for document in workspace.held_out(workspace.recipe()))


def test_what_from_scratch_trains():
    def chosen(corpus=None, field=None, preset=None):
        recipe = demo._chosen_recipe(corpus, field, preset)
        (name,) = [name for name, one in PRESETS.items() if replace(one, text=recipe.text) == recipe]
        return name, recipe.text.corpus.rpartition("/")[2], recipe.text.field

    assert chosen() == ("gsm8k", "gsm8k", "answer")
    assert chosen(corpus="train.jsonl.gz") == ("gsm8k", "train.jsonl.gz", "answer")
    assert chosen(corpus="mine.txt") == ("gsm8k", "mine.txt", None)
    assert chosen(corpus="arithmetic") == ("default", "arithmetic", None)
    assert chosen(preset="tiny") == ("tiny", "embedded", None)
    assert chosen(corpus="train.jsonl", field="question", preset="large") == ("large", "train.jsonl", "question")


def test_gsm8k_is_fetched_once_and_known_by_its_hash(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    there = tmp_path / "train.jsonl"
    with pytest.raises(CorpusError, match=r"got no answer .*--corpus PATH"):
        gsm8k.gsm8k_train(url=there.as_uri())
    there.write_text("".join(json.dumps({"answer": answer}) + "\n" for answer in answers()))
    with pytest.raises(CorpusError, match="expected a file with SHA-256"):
        gsm8k.gsm8k_train(url=there.as_uri())
    assert not gsm8k.cached_path().exists()
    monkeypatch.setattr(gsm8k, "SHA256", hashlib.sha256(there.read_bytes()).hexdigest())
    assert gsm8k.gsm8k_train(url=there.as_uri()).read_bytes() == there.read_bytes()
    found, expected = load_corpus("gsm8k"), load_corpus(there, field="answer")  # now without the network
    assert (found.train, found.held_out, found.digest) == (expected.train, expected.held_out, expected.digest)
    gsm8k.cached_path().write_text("damaged")
    with pytest.raises(CorpusError, match="got no answer"):
        gsm8k.gsm8k_train(url=(tmp_path / "gone").as_uri())


def test_the_shipped_models_are_those_of_their_card():
    if not (packing.SHIPPED / "recipe.json").exists():
        pytest.skip("this copy of the project came without the shipped models")
    workspace = Workspace(packing.SHIPPED)
    size = sum(path.stat().st_size for path in packing.SHIPPED.rglob("*") if path.is_file())
    assert size <= packing.LARGEST
    card = (packing.SHIPPED / "MODEL_CARD.md").read_text()
    assert f"{workspace.denoiser().num_parameters:,}" in card
    assert gsm8k.LICENCE in card
    assert workspace.head().block_length == workspace.recipe().denoiser.block_length
    assert len(workspace.held_out(workspace.recipe())) >= 256
    assert workspace.tokenizer().vocab_size == workspace.denoiser().spec.vocab_size
