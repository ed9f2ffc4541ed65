"""The posterior of single variables, asked in part, against enumeration of all assignments."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuits as ct
from circuits.algebra import logspace
from circuits.errors import ArgumentError, ImpossibleEvidenceError, PropertyError

DOUBLE = torch.float64
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def every(known):
    """Return all variables of all queries."""
    return torch.ones_like(known).nonzero(as_tuple=True)


def enumerated(pc, factors):
    """Return p(x_i = v | e) of every variable from the table of p(x) prod_i e_i(x_i), (B, D, C)."""
    joint = ct.testing.enumerate_joint(pc).detach().exp().numpy()
    found = np.zeros(factors.shape)
    for b, query in enumerate(factors.exp().numpy()):
        table = joint
        for i, e in enumerate(query):
            table = table * e[: joint.shape[i]].reshape([-1 if j == i else 1 for j in range(joint.ndim)])
        for i in range(joint.ndim):
            found[b, i, : joint.shape[i]] = table.sum(tuple(j for j in range(joint.ndim) if j != i)) / table.sum()
    return torch.from_numpy(found)


@st.composite
def problems(draw):
    """Draw a circuit of finite families, factors of all values, and which variables become known with which values."""
    circuit = draw(ct.testing.circuits(max_vars=4, max_categories=3))
    pc = ct.compile(circuit, dtype=DOUBLE, seed=draw(st.integers(0, 100)))
    num_vars, counts, seed = circuit.num_vars, torch.tensor(circuit.num_categories), draw(st.integers(0, 100))
    generator = torch.Generator().manual_seed(seed)
    factors = 3 * torch.randn(2, num_vars, int(counts.max()), dtype=DOUBLE, generator=generator)
    x = (torch.rand(2, num_vars, generator=generator) * counts).long()
    observed = torch.rand(2, num_vars, generator=generator) < 0.4
    return pc, factors.masked_fill(torch.arange(factors.shape[2]) >= counts.unsqueeze(1), -torch.inf), x, observed


def hmm(seed=0, **options):
    return ct.compile(ct.structures.hmm(4, 3, 5, **options), dtype=DOUBLE, seed=seed)


def listed(generator, batch_size=3):
    values = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(4 * batch_size)])
    factors = 2 * torch.randn(batch_size, 4, 3, dtype=DOUBLE, generator=generator)
    return ct.Evidence.sparse(values.reshape(batch_size, 4, 3), factors)


@settings(max_examples=20)
@given(problems())
def test_what_became_known_is_conditioned_on(problem):
    pc, factors, x, observed = problem
    known = factors.masked_fill(observed.unsqueeze(2), -torch.inf)
    known = torch.where(observed.unsqueeze(2), known.scatter(2, x.unsqueeze(2), 0.0), factors)
    try:
        posterior = ct.queries.posterior(pc, ct.Evidence.soft(factors)).given(x, observed)
        found = posterior.probs_at(*every(observed))
    except ImpossibleEvidenceError:
        assert bool((pc.log_partition(ct.Evidence.soft(known)) == -torch.inf).any())
        return
    torch.testing.assert_close(found.reshape(factors.shape), enumerated(pc, known), **CLOSE)
    torch.testing.assert_close(posterior.log_partition, pc.log_partition(ct.Evidence.soft(known)).detach(), **CLOSE)


@pytest.mark.parametrize("homogeneous", [True, False])
def test_listed_values_have_their_probability_among_those_listed(generator, homogeneous):
    pc, evidence = hmm(homogeneous=homogeneous), listed(generator)
    posterior = ct.queries.posterior(pc, evidence)
    exact = enumerated(pc, evidence.dense(5, DOUBLE)).gather(2, evidence.values)
    found = posterior.probs_at(*every(posterior.known)).reshape(exact.shape)
    torch.testing.assert_close(found, exact, **CLOSE)
    query, variable, which = torch.tensor([2, 0]), torch.tensor([1, 3]), torch.tensor([[2, 0], [1, 1]])
    torch.testing.assert_close(posterior.probs_at(query, variable, which), exact[query, variable].gather(1, which))


def test_evidence_that_is_relative_stays_so_where_nothing_became_known(generator):
    """Given x_0, the rest is the conditional of the same joint: leaves divided by what they were divided by."""
    pc, factors = hmm(), torch.randn(2, 4, 5, dtype=DOUBLE, generator=generator)
    evidence = ct.Evidence.soft(factors).relative_to(ct.Evidence.soft(factors))
    x, observed = torch.tensor([[3, 0, 0, 0], [1, 0, 0, 0]]), torch.tensor([[True, False, False, False]] * 2)
    found = ct.queries.posterior(pc, evidence).given(x, observed).probs_at(*every(observed)).reshape(2, 4, 5)
    for b in range(2):
        only = torch.full((5,), -torch.inf, dtype=DOUBLE).index_fill(0, x[b, :1], 0.0)
        told = factors[b : b + 1].clone()
        told[0, 0] = only
        again = ct.Evidence.soft(told).relative_to(ct.Evidence.soft(factors[b : b + 1]))
        torch.testing.assert_close(found[b : b + 1], ct.queries.marginals(pc, again).detach(), **CLOSE)


@settings(max_examples=20)
@given(problems())
def test_the_distance_bounds_the_total_variation_of_every_variable(problem):
    pc, factors, x, observed = problem
    try:
        before = ct.queries.posterior(pc, ct.Evidence.soft(factors))
        after = before.given(x, observed)
        moved = (after.probs_at(*every(observed)) - before.probs_at(*every(observed))).abs().sum(1) / 2
    except ImpossibleEvidenceError:
        return
    bound = after.distance(before)
    assert bool(((moved.reshape(bound.shape) <= bound + 1e-12) | observed).all())


def test_rows_are_queries_that_may_come_more_than_once(generator):
    pc, evidence = hmm(), listed(generator).with_latents({"transition1": torch.randn(3, 3, generator=generator)})
    posterior, index = ct.queries.posterior(pc, evidence), torch.tensor([2, 0, 2, 1])
    found = posterior.rows(index).probs_at(*every(posterior.known[index])).reshape(4, 4, 3)
    exact = posterior.probs_at(*every(posterior.known)).reshape(3, 4, 3)
    torch.testing.assert_close(found, exact[index], **CLOSE)
    torch.testing.assert_close(exact, ct.queries.listed_marginals(pc, evidence).detach(), **CLOSE)


def test_sums_that_a_product_would_lose_are_found_again(generator):
    """Every listed value is a million times less probable than float32 can add to the best one's unit."""
    pc = ct.compile(ct.structures.hmm(3, 2, 4), seed=0)
    factors = torch.tensor([0.0, -200.0, -400.0, -torch.inf]).expand(2, 3, 4)
    with torch.no_grad():
        pc.set_weights(pc.circuit.inputs[0], torch.tensor([[0.5, 0.0], [0.2, 0.3], [0.2, 0.3], [0.1, 0.4]]))
    evidence = ct.Evidence.soft(factors)
    posterior = ct.queries.posterior(pc, evidence)
    with torch.no_grad():
        expected = ct.queries.marginals(pc, evidence)
    torch.testing.assert_close(posterior.probs_at(*every(posterior.known)).reshape(2, 3, 4), expected)
    tilted = ct.queries.posterior(pc, evidence.with_latents({"initial": torch.tensor([[-torch.inf, 0.0]] * 2)}))
    first = tilted.probs_at(torch.tensor([0]), torch.tensor([0]))[0]  # the state that never has the value 0
    torch.testing.assert_close(first, torch.tensor([0.0, 1.0, 0.0, 0.0]))


@pytest.mark.parametrize("columns", [1, 2, 8, 9])
@pytest.mark.parametrize("shape", [(1, 256, 128), (20, 32, 32), (1, 3, 5)])
def test_products_are_the_same_in_either_order(generator, shape, columns):
    weights = torch.rand(*shape, dtype=DOUBLE, generator=generator)
    x = torch.rand(shape[0], shape[2], columns, dtype=DOUBLE, generator=generator)
    expected = torch.from_numpy(np.einsum("foi,fib->fob", weights.numpy(), x.numpy()))
    torch.testing.assert_close(logspace.product(weights, x), expected)
    torch.testing.assert_close(logspace.product(weights.mT.contiguous().mT, x), expected)


def test_what_cannot_be_asked_in_part_is_refused():
    pc, x = hmm(), torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(PropertyError, match=r"posterior: expected factors on all values .* use ct.queries.marginals"):
        ct.queries.posterior(pc, ct.Evidence.observe(x))
    weights = pc.weights(external={pc.circuit.inputs[0]: torch.zeros(5, 3)})
    with pytest.raises(PropertyError, match="no external weights of input nodes"):
        ct.queries.posterior(pc, ct.Evidence.soft(torch.zeros(1, 4, 5)), weights=weights)
    gaussian = ct.compile(ct.structures.hmm(4, 3, ct.Gaussian()), seed=0)
    with pytest.raises(PropertyError, match="finitely many values"):
        ct.queries.posterior(gaussian, ct.Evidence.soft(torch.zeros(1, 4, 5)))
    posterior = ct.queries.posterior(pc, ct.Evidence.soft(torch.zeros(1, 4, 5)))
    with pytest.raises(ArgumentError, match="from 0 to 4, got 5"):
        posterior.given(x + 5, torch.ones(1, 4, dtype=torch.bool))
