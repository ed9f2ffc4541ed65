"""Samples without replacement follow the sequential distribution (chi-square, fixed seeds)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from query_cases import RELATIVE, all_assignments, compiled_with_evidence, log_posterior, posterior_or_error
from scipy import stats

import circuits as ct

NUM_REPEATS = 3000


def index_of(circuit, assignment):
    """Return the position of each assignment (..., D) among all of them."""
    strides = torch.empty(circuit.num_categories, device="meta").contiguous().stride()
    return (assignment * torch.tensor(strides)).sum(-1)


@settings(max_examples=25)
@given(compiled_with_evidence(max_vars=3, max_categories=3), st.integers(0, 20))
def test_ordered_pairs_follow_the_sequential_distribution(case, seed):
    pc, evidence = case
    evidence = evidence.rows(slice(0, 1))
    posterior = posterior_or_error(pc, evidence, lambda: ct.queries.sample_without_replacement(pc, 2, evidence))
    if posterior is None:
        return
    p = posterior[0]
    repeated = evidence.rows(torch.zeros(NUM_REPEATS, dtype=torch.int64))
    generator = torch.Generator().manual_seed(seed)
    assignment, log_prob, perturbed = ct.queries.sample_without_replacement(pc, 2, repeated, generator)
    first, second = index_of(pc.circuit, assignment).unbind(1)
    assert (perturbed[:, 0] >= perturbed[:, 1]).all()
    torch.testing.assert_close(log_prob[:, 0], p[first].log(), **RELATIVE)
    if int((p > 0).sum()) == 1:
        assert (log_prob[:, 1] == -torch.inf).all()
        assert (assignment[:, 1] == -1).all()
        return
    assert (first != second).all()
    torch.testing.assert_close(log_prob[:, 1], p[second].log(), **RELATIVE)
    pairs = p.unsqueeze(1) * p / (1 - p).clamp_min(1e-300).unsqueeze(1)
    pairs.fill_diagonal_(0.0)
    counts = torch.bincount(first * len(p) + second, minlength=len(p) ** 2).double()
    expected = pairs.flatten() * NUM_REPEATS
    assert counts[expected == 0].sum() == 0
    small = expected < 5
    counts, expected = (torch.cat([t[~small], t[small].sum().reshape(1)]) for t in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    if len(expected) > 1:
        assert stats.chisquare(counts.numpy(), (expected / expected.sum() * counts.sum()).numpy()).pvalue > 1e-4


def test_as_many_samples_as_assignments_are_all_of_them():
    pc = ct.compile(ct.structures.hmm(3, 2, 3), dtype=torch.float64, seed=0)
    samples = ct.queries.sample_without_replacement(pc, 30, generator=torch.Generator().manual_seed(0))
    found = samples.assignment[0, :27]
    assert len(found.unique(dim=0)) == 27
    assert (samples.assignment[0, 27:] == -1).all()
    log_p, _ = log_posterior(pc, ct.Evidence.nothing(1, 3))
    torch.testing.assert_close(samples.log_prob[0, :27], log_p[0][index_of(pc.circuit, found)], **RELATIVE)
    assert torch.equal(all_assignments(pc.circuit)[index_of(pc.circuit, found)], found)


def test_the_same_seed_gives_the_same_samples():
    pc = ct.compile(ct.structures.hmm(6, 3, 4), seed=0)
    first, second = (
        ct.queries.sample_without_replacement(pc, 5, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first.assignment, second.assignment)


def test_a_wrong_number_of_samples_is_named():
    with pytest.raises(ct.ArgumentError, match="num_samples: expected an integer >= 1"):
        ct.queries.sample_without_replacement(ct.compile(ct.structures.hmm(2, 2, 2), seed=0), 0)
