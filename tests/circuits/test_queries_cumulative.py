"""The joint cumulative distribution equals enumeration."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from query_cases import RELATIVE, all_assignments, compiled_with_evidence, posterior_or_error

import circuits as ct


@given(compiled_with_evidence(max_vars=5), st.data())
def test_log_cdf_is_the_enumerated_one(case, data):
    pc, evidence = case
    bounds = torch.tensor([[data.draw(st.integers(-1, c)) for c in pc.circuit.num_categories] for _ in range(2)])
    below = (all_assignments(pc.circuit) <= bounds.unsqueeze(1)).all(2)  # (B, A)
    prior = ct.testing.enumerate_joint(pc).flatten().exp()
    torch.testing.assert_close(ct.queries.log_cdf(pc, bounds).exp(), (below * prior).sum(1), **RELATIVE)
    posterior = posterior_or_error(pc, evidence, lambda: ct.queries.log_cdf(pc, bounds, evidence))
    if posterior is not None:
        expected = (below * posterior).sum(1)
        torch.testing.assert_close(ct.queries.log_cdf(pc, bounds, evidence).exp(), expected, **RELATIVE)


def test_gradients_of_the_cdf_reach_the_weights():
    pc = ct.compile(ct.structures.hmm(3, 2, 3), dtype=torch.float64, seed=1)
    x = torch.tensor([[0, 1, 2], [1, 1, 1], [-1, 0, 0]])
    log_p = ct.queries.log_cdf(pc, x)
    assert log_p[2] == -torch.inf
    grads = torch.autograd.grad(log_p.sum(), list(pc.parameters()))
    assert all(grad.isfinite().all() for grad in grads)


def test_wrong_bounds_are_named():
    pc = ct.compile(ct.structures.hmm(3, 2, 2), seed=0)
    with pytest.raises(ct.ArgumentError, match=r"x: expected integers of shape \(B, 3\)"):
        ct.queries.log_cdf(pc, torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ct.ArgumentError, match="evidence: expected 3 queries"):
        ct.queries.log_cdf(pc, torch.zeros(3, 3, dtype=torch.int64), ct.Evidence.nothing(2, 3))
