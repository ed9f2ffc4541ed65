"""Pairwise marginals and mutual information equal enumeration."""

from functools import partial

import pytest
import torch
from hypothesis import given
from query_cases import RELATIVE, all_assignments, compiled_with_evidence, posterior_or_error, soft_function

import circuits as ct
from circuits.queries import common as _common


def enumerated_pairs(pc, posterior):
    num_vars, num_values = pc.circuit.num_vars, max(pc.circuit.num_categories)
    tables = posterior.new_zeros(len(posterior), num_vars, num_vars, num_values, num_values)
    x = all_assignments(pc.circuit)
    for i in range(num_vars):
        for j in range(num_vars):
            for a, assignment in enumerate(x.tolist()):
                tables[:, i, j, assignment[i], assignment[j]] += posterior[:, a]
    return tables


def entropies(tables):
    return -torch.special.xlogy(tables, tables).sum((-1, -2))


@given(compiled_with_evidence(max_vars=4, max_categories=3))
def test_pairwise_marginals_and_mutual_information_are_the_enumerated_ones(case):
    pc, evidence = case
    posterior = posterior_or_error(pc, evidence, lambda: ct.queries.pairwise_marginals(pc, evidence))
    if posterior is None:
        with pytest.raises(ct.ImpossibleEvidenceError):
            ct.queries.mutual_information(pc, evidence)
        return
    expected = enumerated_pairs(pc, posterior)
    torch.testing.assert_close(ct.queries.pairwise_marginals(pc, evidence), expected, **RELATIVE)
    pairs = torch.tensor([[0, pc.circuit.num_vars - 1], [pc.circuit.num_vars - 1, 0], [0, 0]])
    torch.testing.assert_close(
        ct.queries.pairwise_marginals(pc, evidence, pairs), expected[:, pairs[:, 0], pairs[:, 1]], **RELATIVE
    )
    joint = entropies(expected)
    own = joint.diagonal(dim1=1, dim2=2)
    with torch.no_grad():
        information = ct.queries.mutual_information(pc, evidence)
    torch.testing.assert_close(information, own.unsqueeze(2) + own.unsqueeze(1) - joint, rtol=1e-9, atol=1e-11)


def test_small_passes_give_the_same(monkeypatch):
    pc = ct.compile(ct.structures.hmm(5, 3, 4), dtype=torch.float64, seed=0)
    evidence = ct.Evidence.observe(torch.zeros(3, 5, dtype=torch.int64), torch.eye(5, dtype=torch.bool)[:3])
    whole = ct.queries.mutual_information(pc, evidence)
    monkeypatch.setattr(_common, "MAX_NUMBERS", 1)
    torch.testing.assert_close(ct.queries.mutual_information(pc, evidence), whole)


def test_gradients_of_pairwise_queries(generator):
    pc = ct.compile(ct.structures.hmm(3, 2, 2), dtype=torch.float64, seed=1)
    factors = torch.randn(2, 3, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    pairs = torch.tensor([[0, 2]])
    assert torch.autograd.gradcheck(
        lambda f: ct.queries.pairwise_marginals(pc, ct.Evidence.soft(f), pairs, differentiable=True), factors, atol=1e-6
    )
    assert torch.autograd.gradcheck(
        soft_function(pc, partial(ct.queries.mutual_information, differentiable=True)), factors, atol=1e-6
    )


def test_wrong_pairs_are_named():
    pc = ct.compile(ct.structures.hmm(3, 2, 2), seed=0)
    with pytest.raises(ct.ArgumentError, match="pairs: expected variables from 0 to 2"):
        ct.queries.pairwise_marginals(pc, pairs=torch.tensor([[0, 3]]))
    with pytest.raises(ct.ArgumentError, match=r"pairs: expected int64 of shape \(P, 2\)"):
        ct.queries.pairwise_marginals(pc, pairs=torch.tensor([0, 3]))
