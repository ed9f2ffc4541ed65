"""The k best explanations equal enumeration of all induced trees."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from query_cases import RELATIVE, compiled_with_evidence

import circuits as ct


def explanations(pc, node, unit, factors, memo):
    """Return all (log-score, assignment as sorted tuple of (variable, value)) of one unit, with repetitions."""
    key = node, unit
    if key in memo:
        return memo[key]
    if isinstance(node, ct.Input):
        scores = pc.log_weights(node)[:, unit] + factors[node.var, : node.distribution.num_values]
        found = [(score, ((node.var, v),)) for v, score in enumerate(scores.tolist())]
    elif isinstance(node, ct.Product):
        if node.mode == "outer":
            units = torch.unravel_index(torch.tensor(unit), [c.num_units for c in node.children])
        else:
            units = [unit] * len(node.children)
        parts = [explanations(pc, c, int(u), factors, memo) for c, u in zip(node.children, units, strict=True)]
        found = [
            (sum(score for score, _ in parts), tuple(sorted(pair for _, x in parts for pair in x)))
            for parts in itertools.product(*parts)
        ]
    else:
        weights = iter(pc.log_weights(node)[unit].tolist())
        found = [
            (weight + score, x)
            for child in node.children
            for k in (range(child.num_units) if node.unit is None else [node.unit])
            for weight in [next(weights)]
            for score, x in explanations(pc, child, k, factors, memo)
        ]
    memo[key] = [(score, x) for score, x in found if score > -torch.inf]
    return memo[key]


def multiset(scored):
    return sorted((round(score, 9), x) for score, x in scored)


@given(compiled_with_evidence(max_vars=3, max_units=2, max_categories=3), st.integers(1, 12))
def test_k_best_are_the_best_enumerated_explanations(case, k):
    pc, evidence = case
    factors = evidence.dense(max(pc.circuit.num_categories), torch.float64)
    all_of = [
        sorted(explanations(pc, pc.circuit.root, 0, factors[b], {}), key=lambda found: -found[0]) for b in range(2)
    ]
    if not all(all_of):
        with pytest.raises(ct.ImpossibleEvidenceError):
            ct.queries.k_best(pc, k, evidence)
        return
    assignment, log_score = ct.queries.k_best(pc, k, evidence)
    assert assignment.shape == (2, k, pc.circuit.num_vars)
    for b, expected in enumerate(all_of):
        count = min(k, len(expected))
        best = torch.tensor([score for score, _ in expected[:count]], dtype=torch.float64)
        torch.testing.assert_close(log_score[b, :count], best, **RELATIVE)
        assert (log_score[b, count:] == -torch.inf).all()
        assert (assignment[b, count:] == -1).all()
        found = [
            (score, tuple(enumerate(x)))
            for score, x in zip(log_score[b, :count].tolist(), assignment[b, :count].tolist(), strict=True)
        ]
        worst = best[-1].item() + 1e-8  # ties with the last one may be broken either way
        assert multiset(f for f in found if f[0] > worst) == multiset(e for e in expected if e[0] > worst)
        remaining = multiset(expected)
        for one in multiset(found):
            remaining.remove(one)


def test_the_best_one_is_the_mpe(generator):
    pc = ct.compile(ct.structures.hmm(6, 3, 4), dtype=torch.float64, seed=0)
    evidence = ct.Evidence.soft(torch.randn(4, 6, 4, dtype=torch.float64, generator=generator))
    best = ct.queries.k_best(pc, 5, evidence)
    single = ct.queries.mpe(pc, evidence)
    assert torch.equal(best.assignment[:, 0], single.assignment)
    torch.testing.assert_close(best.log_score[:, 0], single.log_score)
    assert (best.log_score.diff(dim=1) <= 0).all()
    assert type(best) is ct.queries.KBestExplanations


def test_deterministic_circuits_give_the_best_assignments():
    pc = ct.compile(ct.structures.fully_factorized(3, 3), dtype=torch.float64, seed=0)
    best = ct.queries.k_best(pc, 30)
    assert type(best) is ct.queries.KBestAssignments
    joint = ct.testing.enumerate_joint(pc).flatten().sort(descending=True)
    torch.testing.assert_close(best.log_score[0, :27], joint.values, **RELATIVE)
    assert len(best.assignment[0, :27].unique(dim=0)) == 27


def test_long_products_and_equal_scores():
    """Uniform leaves: all explanations tie, and only distinct ranks tell them apart."""
    leaves = [ct.inputs(i, 1, ct.Categorical(2), weights=torch.full((2, 1), 0.5)) for i in range(7)]
    pc = ct.compile(ct.Circuit(ct.product(*leaves)), dtype=torch.float64)
    best = ct.queries.k_best(pc, 128)
    assert len(best.assignment[0].unique(dim=0)) == 128


def test_a_wrong_k_is_named():
    with pytest.raises(ct.ArgumentError, match="k: expected an integer >= 1, got 0"):
        ct.queries.k_best(ct.compile(ct.structures.hmm(2, 2, 2), seed=0), 0)
