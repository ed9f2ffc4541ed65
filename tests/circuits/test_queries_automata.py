"""Probabilities of automata and of orders equal enumeration, on random chains read forwards and backwards."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from query_cases import (
    RELATIVE,
    all_assignments,
    chains,
    log_posterior,
    posterior_or_error,
    run_weight,
    soft_function,
)

import circuits as ct


@given(chains(), st.integers(1, 3), st.integers(0, 1000))
def test_weighted_automata(case, num_states, seed):
    pc, evidence = case
    generator = torch.Generator().manual_seed(seed)
    num_values = max(pc.circuit.num_categories) + 1
    shapes = (num_states, num_values, num_states), (num_states,), (num_states,)
    weights = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    automaton = ct.queries.Automaton(*(w.masked_fill(w.abs() < 0.3, -torch.inf) for w in weights))
    posterior = posterior_or_error(pc, evidence, lambda: ct.queries.automaton_log_probability(pc, automaton, evidence))
    if posterior is None:
        return
    log_weights = torch.stack([run_weight(automaton, x) for x in all_assignments(pc.circuit).tolist()])
    result = ct.queries.automaton_log_probability(pc, automaton, evidence)
    torch.testing.assert_close(result, torch.logsumexp(posterior.log() + log_weights, 1), **RELATIVE)


@given(chains(), st.booleans())
def test_probability_that_the_values_are_in_order(case, strict):
    pc, evidence = case
    posterior = posterior_or_error(pc, evidence, lambda: ct.queries.order_log_probability(pc, evidence))
    if posterior is None:
        return
    steps = all_assignments(pc.circuit).diff(dim=1)
    in_order = ((steps > 0) if strict else (steps >= 0)).all(1)
    result = ct.queries.order_log_probability(pc, evidence, strict=strict)
    torch.testing.assert_close(result.exp(), (posterior * in_order).sum(1), **RELATIVE)


def chain(order, num_categories):
    """Build a chain that splits off the variables in the given order."""
    *front, last = order
    rest = ct.inputs(last, 2, ct.Categorical(num_categories))
    for var in reversed(front):
        rest = ct.sum(ct.product(ct.inputs(var, 2, ct.Categorical(num_categories)), rest), num_units=2)
    return ct.Circuit(ct.sum(rest, num_units=1))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_orders_read_forwards_and_backwards(order, strict, generator):
    pc = ct.compile(chain(order, 4), dtype=torch.float64, seed=0)
    evidence = ct.Evidence.soft(torch.randn(2, 3, 4, dtype=torch.float64, generator=generator))
    log_p, _ = log_posterior(pc, evidence)
    steps = all_assignments(pc.circuit).diff(dim=1)
    in_order = ((steps > 0) if strict else (steps >= 0)).all(1)
    result = ct.queries.order_log_probability(pc, evidence, strict=strict)
    torch.testing.assert_close(result.exp(), (log_p.exp() * in_order).sum(1), **RELATIVE)


def contains_two_ones():
    """Accepts binary sequences with 1, 1 in a row."""
    return ct.queries.Automaton.deterministic(torch.tensor([[0, 1], [0, 2], [2, 2]]), [2])


def test_deterministic_automata_and_their_complement():
    pc = ct.compile(ct.structures.hmm(8, 3, 2), dtype=torch.float64, seed=0)
    accepted = torch.tensor(["11" in "".join(map(str, x)) for x in all_assignments(pc.circuit).tolist()])
    log_p, _ = log_posterior(pc, ct.Evidence.nothing(1, 8))
    result = ct.queries.automaton_log_probability(pc, contains_two_ones())
    torch.testing.assert_close(result.exp(), (log_p.exp() * accepted).sum(1), **RELATIVE)
    complement = ct.queries.Automaton.deterministic(torch.tensor([[0, 1], [0, -1]]), [0, 1])
    without = ct.queries.automaton_log_probability(pc, complement)
    torch.testing.assert_close(result.exp() + without.exp(), torch.ones(1, dtype=torch.float64), **RELATIVE)


def test_gradients_of_automata_and_orders(generator):
    pc = ct.compile(ct.structures.hmm(3, 2, 2), dtype=torch.float64, seed=1)
    factors = torch.randn(2, 3, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    automaton = contains_two_ones()
    query = soft_function(pc, lambda pc, e: ct.queries.automaton_log_probability(pc, automaton, e))
    assert torch.autograd.gradcheck(query, factors, atol=1e-6)
    assert torch.autograd.gradcheck(soft_function(pc, ct.queries.order_log_probability), factors, atol=1e-6)
    for strict in (False, True):  # strictly increasing is impossible with two values
        log_p = ct.queries.order_log_probability(pc, ct.Evidence.soft(factors), strict=strict)
        assert bool((log_p == -torch.inf).all()) == strict
        grads = torch.autograd.grad(log_p.sum(), [factors, *pc.parameters()])
        assert all(grad.isfinite().all() for grad in grads)


def test_long_chains_stay_in_range():
    pc = ct.compile(ct.structures.hmm(600, 2, 3), seed=0)
    automaton = ct.queries.Automaton.deterministic(torch.tensor([[0, -1, -1]]), [0])  # only zeros
    only_zeros = ct.queries.log_likelihood(pc, torch.zeros(1, 600, dtype=torch.int64))
    torch.testing.assert_close(ct.queries.automaton_log_probability(pc, automaton), only_zeros, rtol=1e-4, atol=1e-3)
    assert ct.queries.order_log_probability(pc) >= only_zeros


def tree():
    halves = [
        ct.sum(ct.product(*(ct.inputs(v, 2, ct.Bernoulli()) for v in variables)), num_units=2)
        for variables in ((0, 1), (2, 3))
    ]
    return ct.Circuit(ct.sum(ct.product(*halves, name="halves"), num_units=1))


def test_missing_properties_and_wrong_arguments_are_named():
    pc = ct.compile(tree(), seed=0)
    for query in (
        lambda: ct.queries.automaton_log_probability(pc, contains_two_ones()),
        lambda: ct.queries.order_log_probability(pc),
    ):
        with pytest.raises(ct.PropertyError, match=r"expected a chain circuit.*got Product\(.*name='halves'\)"):
            query()
    hmm = ct.compile(ct.structures.hmm(2, 2, 3), seed=0)
    with pytest.raises(ct.ArgumentError, match="automaton: expected one over at least 3 values, got 2"):
        ct.queries.automaton_log_probability(hmm, contains_two_ones())
    with pytest.raises(ct.ArgumentError, match="transition: expected states from -1 to 0"):
        ct.queries.Automaton.deterministic(torch.tensor([[1]]), [0])
    with pytest.raises(ct.ArgumentError, match="accepting: expected a state from 0 to 0, got 3"):
        ct.queries.Automaton.deterministic(torch.tensor([[0]]), [3])
    with pytest.raises(ct.ArgumentError, match=r"log_transition: expected shape \(S, C, S\)"):
        ct.queries.Automaton(torch.zeros(2, 2, 3), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ct.ArgumentError, match=r"log_start: expected shape \(2,\)"):
        ct.queries.Automaton(torch.zeros(2, 2, 2), torch.zeros(3), torch.zeros(2))
    with pytest.raises(ct.ArgumentError, match="log_accept: expected log-weights below"):
        ct.queries.Automaton(torch.zeros(2, 2, 2), torch.zeros(2), torch.full((2,), torch.nan))
