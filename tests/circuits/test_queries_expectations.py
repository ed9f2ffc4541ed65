"""Expectations and moments equal enumeration."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from query_cases import RELATIVE, all_assignments, compiled_with_evidence, posterior_or_error, soft_function

import circuits as ct


def drawn_table(circuit, seed, *extra):
    shape = (circuit.num_vars, max(circuit.num_categories), *extra)
    table = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return table * (table.abs() > 0.3)  # some exact zeros


def at_assignments(circuit, table):
    """Return f_i(x_i) of every assignment: (A, D, ...)."""
    return table[torch.arange(circuit.num_vars), all_assignments(circuit)]


@given(compiled_with_evidence(max_vars=5), st.integers(0, 100))
def test_expectations_of_sums_and_products(case, seed):
    pc, evidence = case
    functions = drawn_table(pc.circuit, seed, 3)
    posterior = posterior_or_error(pc, evidence, lambda: ct.queries.expectation(pc, functions, evidence, of="product"))
    if posterior is None:
        return
    at_x = at_assignments(pc.circuit, functions)  # (A, D, M)
    for of, total in (("sum", at_x.sum(1)), ("product", at_x.prod(1))):
        result = ct.queries.expectation(pc, functions, evidence, of=of)
        torch.testing.assert_close(result, posterior @ total, **RELATIVE)
        single = ct.queries.expectation(pc, functions[..., 0], evidence, of=of)
        torch.testing.assert_close(single, result[:, 0], **RELATIVE)


@given(compiled_with_evidence(max_vars=5), st.integers(0, 100), st.integers(1, 4))
def test_moments_are_the_enumerated_ones(case, seed, order):
    pc, evidence = case
    posterior = posterior_or_error(pc, evidence, lambda: ct.queries.covariance(pc, evidence))
    if posterior is None:
        return
    x = all_assignments(pc.circuit).double()
    torch.testing.assert_close(ct.queries.mean(pc, evidence), posterior @ x, **RELATIVE)
    torch.testing.assert_close(ct.queries.moments(pc, order, evidence), posterior @ x**order, **RELATIVE)
    centred = x - (posterior @ x).unsqueeze(1)  # (B, A, D)
    central = (posterior.unsqueeze(2) * centred**order).sum(1)
    torch.testing.assert_close(ct.queries.moments(pc, order, evidence, about="mean"), central, **RELATIVE)
    values = drawn_table(pc.circuit, seed)
    y = at_assignments(pc.circuit, values)
    centred = y - (posterior @ y).unsqueeze(1)
    expected = torch.einsum("ba,bai,baj->bij", posterior, centred, centred)
    result = ct.queries.covariance(pc, evidence, values=values)
    torch.testing.assert_close(result, expected, **RELATIVE)
    with torch.no_grad():
        torch.testing.assert_close(ct.queries.covariance(pc, evidence, values=values), expected, **RELATIVE)
    torch.testing.assert_close(
        ct.queries.variance(pc, evidence, values=values), expected.diagonal(dim1=1, dim2=2), **RELATIVE
    )


def test_gradients_of_expectations(generator):
    pc = ct.compile(ct.structures.hmm(3, 2, 2), dtype=torch.float64, seed=1)
    factors = torch.randn(2, 3, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    functions = torch.randn(3, 2, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    for of in ("sum", "product"):
        assert torch.autograd.gradcheck(
            lambda f, g, of=of: ct.queries.expectation(pc, f, ct.Evidence.soft(g), of=of, differentiable=True),
            (functions, factors),
            atol=1e-6,
        )
    for query in (ct.queries.mean, ct.queries.variance, ct.queries.covariance):
        assert torch.autograd.gradcheck(soft_function(pc, partial(query, differentiable=True)), factors, atol=1e-6)


def test_products_of_zeros_have_finite_gradients():
    pc = ct.compile(ct.structures.hmm(3, 2, 2), dtype=torch.float64, seed=1)
    functions = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    result = ct.queries.expectation(pc, functions, of="product", differentiable=True)
    assert result.item() == 0.0
    grads = torch.autograd.grad(result.sum(), [functions, *pc.parameters()], allow_unused=True)
    assert all(grad is None or grad.isfinite().all() for grad in grads)


def test_wrong_arguments_are_named():
    pc = ct.compile(ct.structures.hmm(3, 2, 2), seed=0)
    with pytest.raises(ct.ArgumentError, match=r"functions: expected real numbers of shape \(3, 2\) or \(3, 2, M\)"):
        ct.queries.expectation(pc, torch.zeros(2, 2))
    with pytest.raises(ct.ArgumentError, match="functions: expected finite numbers"):
        ct.queries.expectation(pc, torch.full((3, 2), torch.nan))
    with pytest.raises(ct.ArgumentError, match="of: expected 'sum' or 'product', got 'mean'"):
        ct.queries.expectation(pc, torch.zeros(3, 2), of="mean")
    with pytest.raises(ct.ArgumentError, match="order: expected an integer >= 1, got 0"):
        ct.queries.moments(pc, 0)
    with pytest.raises(ct.ArgumentError, match="about: expected 'zero' or 'mean'"):
        ct.queries.moments(pc, 1, about="median")
