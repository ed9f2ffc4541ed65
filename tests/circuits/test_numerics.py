"""Extreme numbers: no NaN in value or gradient, -inf exactly where nothing is possible."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuits as ct
from circuits.algebra import logspace

EXTREME = st.sampled_from([0.0, -1.0, -50.0, -100.0, -800.0, -1e4, -torch.inf])


@st.composite
def log_products(draw):
    outs, terms, columns = (draw(st.integers(1, 3)) for _ in range(3))
    w = torch.tensor(draw(st.lists(EXTREME, min_size=outs * terms, max_size=outs * terms))).reshape(1, outs, terms)
    numbers = st.one_of(EXTREME, st.floats(-1e4, 1e4))
    x = draw(st.lists(numbers, min_size=terms * columns, max_size=terms * columns))
    return w, torch.tensor(x).reshape(1, terms, columns)


def exact_product(w, x):
    terms = w.double().unsqueeze(-1) + x.double().unsqueeze(1)
    return torch.logsumexp(terms, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [logspace.log_matmul, logspace.contract_plain])
@given(case=log_products())
def test_log_products_are_exact_where_linear_ones_underflow(function, dtype, case):
    w, x = (part.to(dtype).requires_grad_() for part in case)
    out = function(w, x)
    expected = exact_product(w.detach(), x.detach())
    torch.testing.assert_close(out.detach().double(), expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(out[out > -torch.inf].sum(), (w, x))
    assert all(grad.isfinite().all() for grad in grads)
    shares = torch.exp(w.detach().double().unsqueeze(-1) + x.detach().double().unsqueeze(1) - expected.unsqueeze(2))
    shares = shares.nan_to_num(0.0)  # where nothing is possible: -inf minus -inf
    for grad, wanted in zip(grads, (shares.sum(3), shares.sum(1)), strict=True):
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-3, atol=1e-3)


@given(case=log_products())
def test_listed_products_are_exact_too(case):
    w, x = case
    log_table, factors = w[0].t().contiguous().requires_grad_(), x[0].t().contiguous()
    values = torch.arange(log_table.shape[0]).expand(len(factors), -1).contiguous()
    out = logspace.log_mix(log_table, values, factors)
    torch.testing.assert_close(out.detach().double(), exact_product(w, x)[0].t(), rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(out[out > -torch.inf].sum(), log_table)
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_weights_and_logits_give_no_nan(dtype, generator):
    pc = ct.compile(ct.structures.hmm(6, 4, 5), dtype=dtype, seed=0)
    with torch.no_grad():
        for bank in pc.bank.values():
            bank.copy_(torch.where(torch.rand(bank.shape, generator=generator) < 0.5, -1e4, bank))
    logits = (1e4 * torch.randn(8, 6, 5, generator=generator, dtype=dtype)).requires_grad_()
    x = torch.randint(5, (8, 6), generator=generator)
    for value in (pc(ct.Evidence.soft(logits)), pc(x)):
        assert value.isfinite().all()
        grads = torch.autograd.grad(value.sum(), [logits, *pc.parameters()], allow_unused=True)
        assert all(grad is None or grad.isfinite().all() for grad in grads)
    double = ct.compile(pc.circuit, dtype=torch.float64)
    double.load_state_dict(pc.state_dict())
    torch.testing.assert_close(pc(x).double(), double(x), rtol=1e-4, atol=1e-3)
    joint = ct.testing.enumerate_joint(double)
    torch.testing.assert_close(double(x).detach(), joint[tuple(x.t())], rtol=1e-9, atol=1e-9)


def deterministic_chain():
    """A left-to-right HMM: state i stays or moves to i + 1, and says i."""
    transition = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
    initial = torch.tensor([1.0, 0.0, 0.0])
    return ct.compile(ct.structures.hmm(4, 3, 3, initial=initial, transition=transition, emission=torch.eye(3)))


def test_impossible_evidence_is_minus_infinity_with_zero_gradients():
    pc = deterministic_chain()
    x = torch.tensor([[0, 1, 2, 2], [0, 2, 2, 2], [1, 1, 1, 1]])
    log_p = pc(x)
    assert log_p[0].isfinite()
    assert (log_p[1:] == -torch.inf).all()
    grads = torch.autograd.grad(log_p[1:].sum(), list(pc.parameters()))
    assert all((grad == 0).all() for grad in grads)
    unknown = torch.zeros(3, 4, dtype=torch.bool)
    for query in (
        lambda: ct.queries.marginals(pc, ct.Evidence.observe(x)),
        lambda: ct.queries.sample(pc, 2, ct.Evidence.observe(x)),
        lambda: ct.queries.mpe(pc, ct.Evidence.observe(x)),
        lambda: ct.queries.log_conditional(pc, x, ~unknown),
    ):
        with pytest.raises(ct.ImpossibleEvidenceError, match="2 of 3 queries has probability zero"):
            query()


def test_ruled_out_values_are_impossible_evidence():
    pc = ct.compile(ct.structures.hmm(3, 2, 2), seed=0)
    nothing_allowed = ct.Evidence.soft(torch.full((1, 3, 2), -torch.inf))
    assert ct.queries.log_partition(pc, nothing_allowed).item() == -torch.inf


def test_zero_weights_stay_zero_under_an_optimizer():
    pc = deterministic_chain()
    zero = pc.bank["sum_3x3"] == -torch.inf
    optimizer = torch.optim.Adam(pc.parameters(), lr=0.1)
    x = torch.tensor([[0, 1, 2, 2], [0, 0, 1, 2]])
    for _ in range(3):
        optimizer.zero_grad()
        (-pc(x).mean()).backward()
        optimizer.step()
    assert torch.equal(pc.bank["sum_3x3"] == -torch.inf, zero)
    assert pc(x).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_likelihoods_far_below_the_smallest_number(dtype):
    pc = ct.compile(ct.structures.hmm(2000, 3, 50), dtype=dtype, seed=0)
    x = torch.randint(50, (2, 2000), generator=torch.Generator().manual_seed(0))
    log_p = pc(x)
    assert (log_p < -5000).all()
    log_p.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in pc.parameters())
