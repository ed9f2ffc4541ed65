"""The cache of what stands before a block, from the command line: the same text where attention is block-causal."""

import json

import pytest
import torch

from diffusion import LogitCache, TransformerDenoiser
from diffusion.app import workspace
from diffusion.denoisers.layers import PrefixCache
from diffusion.errors import CorpusError
from diffusion.text.corpus import load_corpus
from diffusion.training.denoiser import DenoiserTraining

SMALL = workspace.Recipe(
    denoiser=workspace.DenoiserRecipe(
        width=16, num_layers=2, num_heads=2, context_length=16, block_length=8, max_length=128,
        training=DenoiserTraining(steps=4, batch_size=4),
    )
)  # fmt: skip


@pytest.fixture
def run(monkeypatch, run_program):
    monkeypatch.setitem(workspace.PRESETS, "tiny", SMALL)

    return run_program


@pytest.fixture
def reused(monkeypatch):
    """The calls that found their window in the cache."""
    counts = []

    class Watched(PrefixCache):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "num_reused" and value:
                counts.append(value)

    monkeypatch.setattr(TransformerDenoiser, "new_cache", lambda self: Watched())
    return counts


def trained(run, tmp_path, *options):
    corpus, out = tmp_path / "corpus.txt", tmp_path / "models"
    corpus.write_text(
        "\n\n".join(f"The {i}th text says that {i} and {i + 1} make {2 * i + 1}. " * 4 for i in range(40))
    )
    code, _, error = run("train", "--corpus", corpus, "--out", out, "--preset", "tiny", "--quiet", *options)
    assert code == 0, error
    denoiser = workspace.Workspace(out).denoiser()
    with torch.no_grad():  # so that what is attended to matters
        for parameter in denoiser.parameters():
            parameter.mul_(3.0)
    denoiser.save(out / "denoiser")
    return out


def test_a_block_causal_model_writes_the_same_text_with_a_cache(run, tmp_path, reused):
    out = trained(run, tmp_path, "--attention", "block_causal")
    assert workspace.Workspace(out).denoiser().config.attention == "block_causal"
    assert json.loads((out / "recipe.json").read_text())["recipe"]["denoiser"]["attention"] == "block_causal"
    for temperature in (0, 1):
        options = ("--out", out, "--no-circuit", "--temperature", temperature, "--samples", 2, "--logits-eos-inf")
        generate = ("generate", "--prompt", "The 3th text", "--length", 32, "--num-steps", 16, *options)
        code, without, error = run(*generate, "--no-cache")
        assert code == 0, error
        assert not reused
        assert run(*generate) == (0, without, error)  # none, by default
        assert not reused
        assert run(*generate, "--cache") == (0, without, error)
        assert len(reused) > 8
        reused.clear()
    infill = ("infill", "The ___ text says that _____ and 4 make.", *options)
    assert run(*infill, "--cache")[:2] == run(*infill)[:2]


def test_attention_is_bidirectional_unless_asked_for(run, tmp_path):
    out = trained(run, tmp_path)
    assert workspace.Workspace(out).denoiser().config.attention == "bidirectional"
    again = ("train", "--corpus", tmp_path / "corpus.txt", "--out", out, "--preset", "tiny", "--quiet")
    code, _, error = run(*again, "--attention", "block_causal")
    assert code
    assert "expected a folder that was made with this denoiser" in error
    code, _, error = run(*again, "--attention", "sparse")
    assert code
    assert "attention: expected one of bidirectional, block_causal, got 'sparse'" in error


def test_a_denoiser_without_a_cache_is_named(run, tmp_path, monkeypatch):
    out = trained(run, tmp_path)
    monkeypatch.delattr(TransformerDenoiser, "new_cache")
    options = ("--out", out, "--no-circuit")
    for command in (("generate", "--prompt", "The", "--length", 8), ("infill", "The ___ text")):
        code, text, error = run(*command, *options, "--cache")
        assert (code, text) == (2, "")
        assert (
            "cache: expected a denoiser with a method new_cache, got TransformerDenoiser; decode without a cache"
            in error
        )
        assert "Traceback" not in error
        assert run(*command, *options)[0] == 0


def test_predictions_of_texts_with_prompts_are_cached_in_shards(run, tmp_path, monkeypatch):
    out, texts, to = trained(run, tmp_path), tmp_path / "pairs.jsonl", tmp_path / "cache"
    records = [{"prompt": f"The {i}th text ", "text": f"says that {i} and more."[: 6 + i]} for i in range(6)]
    texts.write_text("".join(json.dumps(record) + "\n" for record in records))
    command = ("cache-logits", "--out", out, "--text", texts, "--to", to, "--context", 12, "--suffix", 8, "--quiet")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        code, _, error = run(*command)
        assert code == 0, error
    cache = LogitCache.open(to)
    assert len(cache) == sum(-(-len(record["text"]) // 8) for record in records)
    tokenizer = workspace.Workspace(out).tokenizer()
    found = sorted(tokenizer.decode([t for t in row if t != tokenizer.eos_id]) for row in cache.tokens.tolist())
    expected = sorted(record["text"][at : at + 8] for record in records for at in range(0, len(record["text"]), 8))
    assert found == expected
    assert run("cache-logits", "--out", out, "--text", texts)[0] == 2
    assert "to: expected a folder" in run("cache-logits", "--out", out, "--text", texts)[2]


def test_sequences_of_fasta_are_documents(tmp_path):
    path = tmp_path / "chains.fasta"
    path.write_text(">one heavy\nEVQL\nVESG\n>two\nQVQLQ\n")
    assert load_corpus(path, held_out_fraction=0.0).train == ("EVQLVESG", "QVQLQ")
    path.write_text("EVQL\n>one\nEVQL\n")
    with pytest.raises(CorpusError, match="expected FASTA"):
        load_corpus(path)
