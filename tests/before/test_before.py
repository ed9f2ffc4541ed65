"""What was written before there were manifests still loads, and says the same numbers.

The folders beside this file were written by version 0.1.0; ``expected.json`` has what it computed with them.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import circuits as ct
import diffusion as df
from circuits.store import MANIFEST
from diffusion.decoding.baselines import load_head
from diffusion.text.tokenizer import TextTokenizer

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "expected.json").read_text())
X = torch.arange(8).view(2, 4) % 6


def test_a_circuit():
    assert ct.load(HERE / "circuit")(X).tolist() == pytest.approx(EXPECTED["circuit"], rel=1e-5)


def test_a_head():
    head = df.CoupledHead.load(HERE / "head")
    logits, masked = torch.arange(72.0).view(2, 4, 9).sin(), torch.ones(2, 4, dtype=torch.bool)
    found = head.conditional_log_likelihood(logits, X, masked)
    assert found.tolist() == pytest.approx(EXPECTED["head"], rel=1e-5)
    assert (head.activation_threshold, head.top_k, head.decoding) == (0.75, 5, {"decode": "marginal"})


def test_a_denoiser():
    windows = torch.randint(6, (6, 8), generator=torch.Generator().manual_seed(0))
    logits = df.TransformerDenoiser.load(HERE / "denoiser").logits(windows[:1])
    assert logits[0, 0].tolist() == pytest.approx(EXPECTED["denoiser"], rel=1e-4, abs=1e-6)


def test_a_baseline_a_tokenizer_and_a_cache():
    assert load_head(HERE / "baseline").kind == "copula"
    assert TextTokenizer.load(HERE / "tokenizer.json").encode("cab") == EXPECTED["tokenizer"]
    cache = df.LogitCache.open(HERE / "cache")
    assert [cache.digest, float(cache.log_q.astype(float).sum())] == EXPECTED["cache"]


@pytest.mark.parametrize(
    ("name", "load"), [("circuit", ct.load), ("head", df.CoupledHead.load), ("denoiser", df.TransformerDenoiser.load)]
)
def test_saving_again_gives_it_a_manifest_and_nothing_else_changes(name, load, tmp_path):
    shutil.copytree(HERE / name, tmp_path / name)
    model = load(tmp_path / name)
    model.save(tmp_path / name) if name != "circuit" else ct.save(model, tmp_path / name)
    assert (tmp_path / name / MANIFEST).exists()
    again, expected = load(tmp_path / name).state_dict(), model.state_dict()
    assert all(torch.equal(again[key], expected[key]) for key in expected)
    assert again.keys() == expected.keys()
