"""Logit cache and coupled fitting: what is cached is what the denoiser says, and interrupted work continues exactly."""

import json
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch

import circuits as ct
from diffusion import (
    CircuitTraining,
    CoupledHead,
    DenoiserSpec,
    LogitCache,
    TransformerConfig,
    TransformerDenoiser,
    cache_logits,
    fit_coupled,
)
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.training.circuit import coupled_loss

V, CONTEXT, L = 9, 4, 4


@pytest.fixture(scope="module")
def denoiser():
    config = TransformerConfig(
        vocab_size=V, mask_id=8, pad_id=7, eos_id=6, forbidden_ids=(7, 8), context_length=CONTEXT, block_length=L,
        width=16, num_layers=1, num_heads=2,
    )  # fmt: skip
    return TransformerDenoiser(config, seed=0).eval()


@pytest.fixture(scope="module")
def windows():
    return torch.randint(0, 6, (50, CONTEXT + L), generator=torch.Generator().manual_seed(0))


def cached(denoiser, windows, path, **options):
    return cache_logits(denoiser, windows, path, block_length=L, batch_size=16, progress=False, **options)


def test_a_cache_holds_the_denoisers_log_probabilities(denoiser, windows, tmp_path):
    cache = cached(denoiser, windows, tmp_path / "cache", masks_per_window=2)
    assert len(cache) == 100
    batch = cache.batch(slice(0, 50))
    assert torch.equal(batch.tokens, windows[:, CONTEXT:])
    canvas = windows.clone()
    canvas[:, CONTEXT:] = canvas[:, CONTEXT:].masked_fill(batch.masked, 8)
    with torch.no_grad():
        expected = denoiser.logits(canvas, window=(CONTEXT, CONTEXT + L))
    expected[..., 7:] = -torch.inf
    expected = torch.log_softmax(expected, -1)
    torch.testing.assert_close(batch.log_q.exp(), expected.exp(), rtol=0, atol=2e-3)  # float16
    assert (batch.log_q[..., 7:] < -5e4).all()
    assert not torch.equal(batch.masked, cache.batch(slice(50, 100)).masked)


def test_top_k_keeps_the_true_token_and_the_best_others(denoiser, windows, tmp_path):
    whole = cached(denoiser, windows, tmp_path / "all").batch(slice(None))
    listed = cached(denoiser, windows, tmp_path / "listed", top_k=3).batch(slice(None))
    assert listed.values.shape == (50, L, 4)
    assert (listed.values == listed.tokens.unsqueeze(-1)).any(-1).all()
    assert torch.equal(whole.log_q.gather(2, listed.values), listed.log_q)
    others = whole.log_q.scatter(2, whole.tokens.unsqueeze(-1), -torch.inf).topk(3).values
    assert torch.equal(listed.log_q[..., 1:], others)
    pc = ct.compile(ct.structures.hmm(L, 2, V), seed=0)
    assert listed.distribution(CoupledHead(pc)).log_prob(listed.tokens).isfinite().all()


def test_an_interrupted_cache_continues_to_the_same_arrays(denoiser, windows, tmp_path):
    class Interrupted(Exception):
        pass

    class Unreliable:
        spec = denoiser.spec
        calls = 0

        def logits(self, tokens, **options):
            self.calls += 1
            if self.calls == 4:  # the first call is the fingerprint's
                raise Interrupted
            return denoiser.logits(tokens, **options)

    with pytest.raises(Interrupted):
        cached(Unreliable(), windows, tmp_path / "cache")
    with pytest.raises(CheckpointError, match="expected 50 examples, got 32"):
        LogitCache.open(tmp_path / "cache")
    continued, straight = (cached(denoiser, windows, tmp_path / name) for name in ("cache", "straight"))
    for name in ("tokens", "masked", "log_q"):
        np.testing.assert_array_equal(getattr(continued, name), getattr(straight, name))
    assert continued.digest == straight.digest


def test_a_cache_of_something_else_is_refused(denoiser, windows, tmp_path):
    cached(denoiser, windows, tmp_path / "cache")
    with pytest.raises(CheckpointError, match="one of another seed"):
        cached(denoiser, windows, tmp_path / "cache", seed=1)
    with pytest.raises(CheckpointError, match="another windows"):
        cached(denoiser, windows.flip(0), tmp_path / "cache")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("precious")
    with pytest.raises(CheckpointError, match="expected an empty folder or a logit cache"):
        cached(denoiser, windows, tmp_path / "other")


@pytest.mark.parametrize("damage", ["truncate", "header", "meta", "version", "missing"])
def test_a_damaged_cache_is_refused(damage, denoiser, windows, tmp_path):
    cached(denoiser, windows, tmp_path)
    array, meta = tmp_path / "log_q.npy", tmp_path / "meta.json"
    if damage == "truncate":
        array.write_bytes(array.read_bytes()[:500])
    elif damage == "header":
        array.write_bytes(b"not numpy" + array.read_bytes()[9:])
    elif damage == "meta":
        meta.write_text("[1, 2")
    elif damage == "version":
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "format_version": 99}))
    else:
        array.unlink()
    with pytest.raises(CheckpointError):
        LogitCache.open(tmp_path)


@pytest.fixture
def cache(denoiser, windows, tmp_path):
    return cached(denoiser, windows, tmp_path / "cache", masks_per_window=4)


def new_head(**options):
    return CoupledHead(ct.compile(ct.structures.hmm(L, 4, V), seed=0), **options)


@pytest.mark.parametrize("normalization", ["global", "local"])
def test_the_coupled_loss_falls_below_the_denoisers_own(normalization, cache):
    head = new_head(normalization=normalization)
    before = coupled_loss(head, cache)
    curve = fit_coupled(head, cache, cache, config=CircuitTraining(steps=60, batch_size=50), progress=False)
    after = coupled_loss(head, cache)
    assert after < before - 0.1
    assert curve.held_out[-1] == pytest.approx(after)
    batch = cache.batch(slice(None))
    own = batch.log_q.gather(2, batch.tokens.unsqueeze(-1)).squeeze(-1)
    own_loss = -((own * batch.masked).sum(1) / batch.masked.sum(1))[batch.masked.any(1)].mean()
    assert after < own_loss


class Uniform:
    """Knows nothing: each of six tokens has the same probability."""

    spec = DenoiserSpec(vocab_size=V, mask_id=8, eos_ids=(6,), pad_id=7, forbidden_ids=(6, 7, 8), max_length=64)

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        return torch.zeros(len(tokens), window[1] - window[0], V)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_block_without_a_mask_is_not_one_without_loss(batch_size, windows, tmp_path):
    """Six equally probable tokens cost log 6 each, and five of six blocks of 4 have a mask."""
    cache = cached(Uniform(), windows, tmp_path, masks_per_window=4)
    num_masked = torch.from_numpy(np.array(cache.masked)).sum(1)
    assert (num_masked == 0).sum() > 10
    pc = ct.compile(ct.structures.fully_factorized(L, V), seed=0)
    for leaf in pc.circuit.inputs:
        pc.set_weights(leaf, torch.full((V, 1), 1 / V))
    head = CoupledHead(pc)
    loss = coupled_loss(head, cache, batch_size=batch_size)
    assert loss == pytest.approx(np.log(6), abs=1e-3)  # float16
    per_block = coupled_loss(head, cache, weighting="uniform", batch_size=batch_size)
    assert per_block == pytest.approx(float(num_masked.double().mean()) * loss, rel=1e-5)
    config = CircuitTraining(steps=4, batch_size=64, learning_rate=1e-9)
    assert fit_coupled(head, cache, cache, config=config, progress=False).train[0] == pytest.approx(loss, rel=1e-5)


def test_a_cache_without_masks_has_no_loss_per_token(windows, tmp_path):
    cache = replace(cached(Uniform(), windows, tmp_path), masked=np.zeros((len(windows), L), dtype=bool))
    assert np.isnan(coupled_loss(new_head(), cache))
    assert coupled_loss(new_head(), cache, weighting="uniform") == pytest.approx(0.0, abs=1e-5)


def test_an_unknown_weighting_is_named(cache):
    with pytest.raises(ArgumentError, match="weighting: expected one of masked_mean, uniform, got 'elbo'"):
        coupled_loss(new_head(), cache, weighting="elbo")


def test_a_killed_fit_ends_like_one_that_was_not(cache, tmp_path):
    config = CircuitTraining(steps=30, batch_size=16, checkpoint_every=7, validate_every=10)
    straight = new_head()
    curve = fit_coupled(straight, cache, config=config, progress=False)
    script = f"""
        import os
        import circuits as ct
        from diffusion import CircuitTraining, CoupledHead, LogitCache, fit_coupled
        from diffusion.training import circuit as circuit_training
        original, calls = circuit_training._rows_of, []
        def killing(*arguments):
            calls.append(None)
            if len(calls) == 18:
                os.kill(os.getpid(), 9)
            return original(*arguments)
        circuit_training._rows_of = killing
        head = CoupledHead(ct.compile(ct.structures.hmm({L}, 4, {V}), seed=0))
        fit_coupled(head, LogitCache.open({str(tmp_path / "cache")!r}),
                    config=CircuitTraining(steps=30, batch_size=16, checkpoint_every=7, validate_every=10),
                    checkpoint_path={str(tmp_path / "fit.safetensors")!r}, progress=False)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False).returncode == -9
    resumed = new_head()
    again = fit_coupled(resumed, cache, config=config, checkpoint_path=tmp_path / "fit.safetensors", progress=False)
    assert again.train == curve.train
    for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_fit_does_not_continue_on_another_cache(denoiser, windows, cache, tmp_path):
    """The same blocks count as another cache if masks or predictions differ, so does another held-out cache."""
    config, path = CircuitTraining(steps=2, batch_size=16), tmp_path / "fit.safetensors"
    fit_coupled(new_head(), cache, cache, config=config, checkpoint_path=path, progress=False)
    other_denoiser = TransformerDenoiser(denoiser.config, seed=1).eval()
    others = [
        cached(denoiser, windows, tmp_path / "masks", masks_per_window=4, seed=1),
        cached(other_denoiser, windows, tmp_path / "predictions", masks_per_window=4),
    ]
    for other in others:
        assert np.array_equal(other.tokens, cache.tokens)
        with pytest.raises(CheckpointError, match="expected this run, got one with a different cache;"):
            fit_coupled(new_head(), other, cache, config=config, checkpoint_path=path, progress=False)
        with pytest.raises(CheckpointError, match="expected this run, got one with a different held-out cache;"):
            fit_coupled(new_head(), cache, other, config=config, checkpoint_path=path, progress=False)


def test_equal_caches_have_one_digest_and_any_other_number_has_another(denoiser, windows, tmp_path):
    class Nudged:
        """Another denoiser on the first batch alone, which its fingerprint does not show."""

        spec = denoiser.spec
        calls = 0

        def logits(self, tokens, **options):
            self.calls += 1
            logits = denoiser.logits(tokens, **options)
            return logits + 0.1 * torch.eye(V)[0] if self.calls == 2 else logits  # the first call is the fingerprint's

    first, second, nudged = (
        cached(model, windows, tmp_path / name)
        for name, model in (("first", denoiser), ("second", denoiser), ("nudged", Nudged()))
    )
    assert first.digest == second.digest
    assert nudged.digest != first.digest


def test_a_circuit_of_another_shape_is_refused(cache):
    head = CoupledHead(ct.compile(ct.structures.hmm(L + 1, 2, V), seed=0))
    with pytest.raises(ArgumentError, match="cache: blocks of 4 tokens from 9 do not fit"):
        fit_coupled(head, cache, progress=False)
