"""Early stopping of a coupled fit, and losses apart by the share of a block that is masked."""

import itertools

import numpy as np
import pytest
import torch

import circuits as ct
from diffusion import CircuitTraining, CoupledHead, LogitCache, fit_coupled
from diffusion.errors import ArgumentError
from diffusion.training.circuit import coupled_loss, losses_by_ratio

V, L = 3, 4


def made_cache(tokens, masked, *, seed):
    logits = np.random.default_rng(seed).normal(size=(*tokens.shape, V))
    log_q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return LogitCache(tokens, masked, log_q.astype(np.float32), None, V, f"digest {seed}")


def random_cache(num_blocks, *, seed):
    source = np.random.default_rng(seed)
    return made_cache(source.integers(0, V, (num_blocks, L)), source.random((num_blocks, L)) < 0.6, seed=seed)


def new_head():
    return CoupledHead(ct.compile(ct.structures.hmm(L, 3, V), seed=1))


@pytest.fixture(scope="module")
def caches():
    """Few blocks to fit, and others that have nothing to do with them: what is learnt soon hurts."""
    return random_cache(8, seed=1), random_cache(40, seed=2)


def settings(**changes):
    return CircuitTraining(steps=60, batch_size=8, learning_rate=0.1, validate_every=2, **changes)


def test_a_fit_ends_early_with_the_weights_that_were_best_on_held_out_blocks(caches):
    head = new_head()
    curve = fit_coupled(head, *caches, config=settings(patience=3), progress=False)
    best = int(np.argmin(curve.held_out))
    assert curve.steps[-1] < 60
    assert len(curve.steps) == best + 1 + 3
    assert best > 0
    assert coupled_loss(head, caches[1]) == pytest.approx(curve.held_out[best], abs=1e-6)
    shorter = new_head()
    fit_coupled(shorter, *caches, config=settings(), progress=False)
    assert coupled_loss(shorter, caches[1]) > curve.held_out[best] + 1e-3


def test_early_stopping_is_the_same_after_an_interruption(caches, tmp_path):
    whole, parts = new_head(), new_head()
    curve = fit_coupled(whole, *caches, config=settings(patience=3), progress=False)
    config = settings(patience=3, checkpoint_every=3)
    path = tmp_path / "fit.safetensors"
    assert fit_coupled(parts, *caches, config=config, checkpoint_path=path, progress=False) == curve
    again = new_head()
    assert fit_coupled(again, *caches, config=config, checkpoint_path=path, progress=False) == curve
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_early_stopping_needs_held_out_blocks(caches):
    with pytest.raises(ArgumentError, match=r"^patience: .*give held_out"):
        fit_coupled(new_head(), caches[0], config=settings(patience=3), progress=False)
    with pytest.raises(ArgumentError, match=r"^patience: expected"):
        settings(patience=0)


def test_losses_by_ratio_are_those_of_enumeration():
    tokens = np.array([[0, 1, 2, 1], [2, 2, 0, 0], [1, 0, 1, 2], [0, 0, 2, 1]])
    masked = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]], dtype=bool)
    cache, head = made_cache(tokens, masked, seed=3), new_head()
    texts = np.array(list(itertools.product(range(V), repeat=L)))
    with torch.no_grad():
        p = ct.queries.log_likelihood(head.pc, torch.from_numpy(texts)).double().exp().numpy()

    def loss(row):
        factors = np.where(masked[row], np.exp(cache.log_q[row][np.arange(L), texts]), texts == tokens[row])
        joint = p * factors.prod(-1)
        return -np.log(joint[(texts == tokens[row]).all(-1)][0] / joint.sum()) / masked[row].sum()

    found = losses_by_ratio(head, cache, num_bins=4)
    np.testing.assert_allclose(found, [np.nan, (loss(0) + loss(3)) / 2, np.nan, loss(1)], rtol=1e-5)
