"""Steps by flows on the coupled objective: Anemone's where the evidence says nothing, the gradient's when small."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import circuits as ct
import diffusion as df
from diffusion.training.circuit import CacheTraining, coupled_loss

pytestmark = pytest.mark.usefixtures("one_thread")
V, L, N = 4, 3, 60


def cache_of(log_q=None, masked=None, seed=0):
    """Blocks whose neighbours are often equal, and predictions of them: by default noise that leans to the truth."""
    random = np.random.default_rng(seed)
    tokens = np.repeat(random.integers(V, size=(N, 1)), L, 1)
    tokens = np.where(random.random((N, L)) < 0.2, random.integers(V, size=(N, L)), tokens)
    if log_q is None:
        log_q = random.normal(size=(N, L, V)) + np.eye(V)[tokens]
    masked = random.random((N, L)) < 0.7 if masked is None else masked
    return df.LogitCache(tokens, masked, log_q.astype(np.float32), None, V, "a digest")


def head_of(**options):
    pc = ct.compile(ct.structures.hmm(L, 3, V, homogeneous=False), seed=1, dtype=torch.float64)
    return df.CoupledHead(pc, **options)


def config_of(**options):
    return df.CircuitTraining(**{"optimizer": "anemone", "batch_size": N, "momentum": 0.0, "steps": 10**6} | options)


def linear(pc):
    return {name: weights.linear.detach().clone() for name, weights in pc.weights().own.items()}


def test_without_evidence_the_step_is_that_of_anemone_on_the_true_tokens():
    blank = cache_of(np.zeros((N, L, V)), np.ones((N, L), dtype=bool))
    ours, theirs = head_of(), head_of()
    CacheTraining(ours, blank, None, config_of(step_size=0.3)).update(0)
    flows, _ = ct.learning.expected_flows(theirs.pc, torch.from_numpy(blank.tokens))
    ct.learning.anemone_step(theirs.pc, flows, N, step_size=0.3, momentum=0.0)
    for name, weights in linear(theirs.pc).items():
        torch.testing.assert_close(linear(ours.pc)[name], weights, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("normalization", ["global", "local"])
@pytest.mark.parametrize("weighting", ["masked_mean", "uniform"])
def test_a_small_step_goes_down_the_gradient_of_every_unit(normalization, weighting):
    """D_n (w' - w) / s is the gradient in the unnormalised log-weights, of a positive factor D_n for each unit."""
    cache, head = cache_of(), head_of(normalization=normalization)
    batch = cache.batch(slice(None))
    loss = -batch.distribution(head).log_prob(batch.tokens)
    if weighting == "masked_mean":
        loss = loss[batch.masked.any(1)] / batch.masked.sum(1)[batch.masked.any(1)]
    before = linear(head.pc)
    gradients = dict(zip(head.pc.bank, torch.autograd.grad(loss.sum(), list(head.pc.bank.values())), strict=True))
    CacheTraining(head, cache, None, config_of(step_size=1e-3, weighting=weighting)).update(0)
    for name, weights in linear(head.pc).items():
        axis = -1 if name in head.pc.sum_banks else -2
        moved = (weights - before[name]).movedim(axis, -1).flatten(0, -2)
        descent = -gradients[name].movedim(axis, -1).flatten(0, -2)
        cosines = torch.nn.functional.cosine_similarity(moved, descent, dim=-1)[descent.norm(dim=-1) > 1e-3]
        assert len(cosines)
        assert float(cosines.min()) > 0.99


@pytest.mark.parametrize("normalization", ["global", "local"])
def test_full_batches_raise_the_objective_at_every_step(normalization):
    cache, head = cache_of(), head_of(normalization=normalization)
    training = CacheTraining(head, cache, None, config_of(step_size=0.3))
    losses = [coupled_loss(head, cache)]
    for step in range(12):
        training.update(step)
        losses.append(coupled_loss(head, cache))
    assert all(after < before + 1e-9 for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0] - 0.1


def test_it_comes_where_adam_comes():
    cache = cache_of()
    losses = {}
    for name in ("adam", "anemone"):
        head = head_of()
        df.fit_coupled(
            head, cache, config=config_of(optimizer=name, steps=60, learning_rate=0.1, momentum=0.5), progress=False
        )
        losses[name] = coupled_loss(head, cache)
    assert losses["anemone"] < losses["adam"] + 0.03
    assert losses["anemone"] < coupled_loss(head_of(), cache) - 0.1


def test_conditioners_are_trained_beside_it():
    calibration = df.NoiseCalibration(V)
    head, before = head_of(conditioners=[calibration]), [one.detach().clone() for one in calibration.parameters()]
    df.fit_coupled(head, cache_of(), config=config_of(steps=3), progress=False)
    assert any(not torch.equal(old, new) for old, new in zip(before, calibration.parameters(), strict=True))


def test_an_interrupted_run_ends_like_one_that_was_not(tmp_path, monkeypatch):
    cache, config = cache_of(), config_of(steps=9, batch_size=20, momentum=0.9, checkpoint_every=2)
    straight, resumed, path = head_of(), head_of(), tmp_path / "fit.safetensors"
    curve = df.fit_coupled(straight, cache, config=config, progress=False)
    update = CacheTraining.update

    def stopping(self, step):
        if step == 5:
            raise KeyboardInterrupt
        return update(self, step)

    monkeypatch.setattr(CacheTraining, "update", stopping)
    with pytest.raises(KeyboardInterrupt):
        df.fit_coupled(head_of(), cache, config=config, checkpoint_path=path, progress=False)
    monkeypatch.undo()
    assert df.fit_coupled(resumed, cache, config=config, checkpoint_path=path, progress=False).train == curve.train
    for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_blocks_without_a_mask_move_nothing():
    head = head_of()
    before = linear(head.pc)
    cache = cache_of(masked=np.zeros((N, L), dtype=bool))
    assert math.isnan(coupled_loss(head, cache))
    CacheTraining(head, cache, None, config_of(step_size=1.0)).update(0)
    for name, weights in linear(head.pc).items():
        assert torch.equal(weights, before[name])


def test_what_has_no_flows_is_refused():
    pc = head_of().pc
    gates = df.TransitionGates.for_hmm(pc, num_features=2, num_tables=2)
    cache = replace(cache_of(), features=np.zeros((N, L, 2), dtype=np.float16))
    with pytest.raises(df.errors.ArgumentError, match="optimizer: expected adam for a head whose transitions"):
        df.fit_coupled(df.CoupledHead(pc, conditioners=[gates]), cache, config=config_of(), progress=False)
    for name, value in (("optimizer", "em"), ("step_size", 0.0), ("momentum", 1.0)):
        with pytest.raises(df.errors.ArgumentError, match=f"{name}: expected"):
            df.CircuitTraining(**{name: value})


def test_an_update_asks_for_numerator_and_normaliser_once_each(monkeypatch):
    asked, log_partition = [], ct.CompiledCircuit.log_partition

    def watched(self, *arguments, **options):
        asked.append(self)
        return log_partition(self, *arguments, **options)

    monkeypatch.setattr(ct.CompiledCircuit, "log_partition", watched)
    CacheTraining(head_of(), cache_of(), None, config_of()).update(0)
    assert len(asked) == 2


def test_with_a_constant_normaliser_the_gradient_is_that_of_the_numerator():
    """log p_hat(x) = log p(x) + sum_i log q_i(x_i) - log Z: the second sum has no weights in it, all is masked."""
    head, cache = head_of(), cache_of(masked=np.ones((N, L), dtype=bool))
    batch = cache.batch(slice(None))
    dist = batch.distribution(head)
    log_prob = dist.log_prob(batch.tokens, log_partition=dist.log_partition.detach())
    torch.testing.assert_close(log_prob, dist.log_prob(batch.tokens))
    found = torch.autograd.grad(log_prob.sum(), list(head.pc.parameters()))
    expected = torch.autograd.grad(head.pc(batch.tokens).sum(), list(head.pc.parameters()))
    torch.testing.assert_close(found, expected)
