"""Samples follow the enumerated distribution (chi-square, fixed seeds) and obey their evidence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import circuits as ct

NUM_SAMPLES = 4000


def chi_square_p_value(samples, log_probs):
    """Compare int64 samples (S, D) with a table of log-probabilities; cells with small expectations are pooled."""
    strides = torch.tensor(log_probs.stride())
    counts = torch.bincount((samples * strides).sum(1), minlength=log_probs.numel()).double()
    expected = log_probs.flatten().exp() * len(samples)
    assert counts[expected == 0].sum() == 0
    small = expected < 5
    pooled = [torch.cat([cells[~small], cells[small].sum().reshape(1)]) for cells in (counts, expected)]
    keep = pooled[1] > 0
    if int(keep.sum()) < 2:
        return 1.0
    return stats.chisquare(pooled[0][keep].numpy(), (pooled[1][keep] / pooled[1].sum() * len(samples)).numpy()).pvalue


@settings(max_examples=25)
@given(ct.testing.circuits(max_vars=3), st.integers(0, 20))
def test_unconditional_samples_follow_the_joint(circuit, seed):
    pc = ct.compile(circuit, dtype=torch.float64, seed=seed)
    samples = ct.queries.sample(pc, NUM_SAMPLES, generator=torch.Generator().manual_seed(seed))
    assert samples.shape == (NUM_SAMPLES, circuit.num_vars)
    assert chi_square_p_value(samples, ct.testing.enumerate_joint(pc).contiguous()) > 1e-4


@settings(max_examples=25)
@given(st.data())
def test_conditional_samples_follow_the_posterior(data):
    circuit = data.draw(ct.testing.circuits(max_vars=3))
    pc = ct.compile(circuit, dtype=torch.float64, seed=data.draw(st.integers(0, 20)))
    evidence = data.draw(ct.testing.evidence(circuit))
    joint = ct.testing.enumerate_joint(pc)
    if bool((ct.testing.enumerated_log_partition(joint, evidence) == -torch.inf).any()):
        with pytest.raises(ct.ImpossibleEvidenceError):
            ct.queries.sample(pc, 3, evidence)
        return
    samples = ct.queries.sample(pc, NUM_SAMPLES, evidence, torch.Generator().manual_seed(1))
    assert samples.shape == (NUM_SAMPLES, 2, circuit.num_vars)
    factors = evidence.dense(max(circuit.num_categories), torch.float64)
    for query in range(2):
        posterior = joint.clone()
        for var, count in enumerate(circuit.num_categories):
            shape = [count if other == var else 1 for other in range(circuit.num_vars)]
            posterior = posterior + factors[query, var, :count].reshape(shape)
        posterior = (posterior - torch.logsumexp(posterior.flatten(), 0)).contiguous()
        assert chi_square_p_value(samples[:, query], posterior) > 1e-4


def test_the_same_seed_gives_the_same_samples():
    pc = ct.compile(ct.structures.hmm(6, 3, 4), seed=0)
    first, second = (ct.queries.sample(pc, 50, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, ct.queries.sample(pc, 50, generator=torch.Generator().manual_seed(4)))


def test_samples_in_several_passes_are_all_there(monkeypatch):
    monkeypatch.setattr(ct.queries.explanations, "_MAX_REACHED", 100)
    pc = ct.compile(ct.structures.hmm(6, 3, 4), seed=0)
    evidence = ct.Evidence.observe(torch.zeros(2, 6, dtype=torch.int64), torch.eye(6, dtype=torch.bool)[:2])
    samples = ct.queries.sample(pc, 33, evidence)
    assert samples.shape == (33, 2, 6)
    assert (samples[:, 0, 0] == 0).all()
    assert (samples[:, 1, 1] == 0).all()


@pytest.mark.parametrize("num_samples", [0, 1.5, True])
def test_a_wrong_number_of_samples_is_named(num_samples):
    with pytest.raises(ct.ArgumentError, match=f"num_samples: expected an integer >= 1, got {num_samples}"):
        ct.queries.sample(ct.compile(ct.structures.hmm(2, 2, 2), seed=0), num_samples)
