"""Latents that are chosen, marginals of listed values, and distributions with weights at run time."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from query_cases import compiled_with_evidence
from scipy import stats

import circuits as ct
from circuits.precision import own_sum_of_rows

DOUBLE = torch.float64
L, N, V = 3, 2, 3


@pytest.fixture
def pc():
    return ct.compile(ct.structures.hmm(L, N, V, homogeneous=False), dtype=DOUBLE, seed=0)


@pytest.fixture
def soft(generator):
    return ct.Evidence.soft(torch.randn(2, L, V, dtype=DOUBLE, generator=generator))


def emission(pc, step):
    return next(leaf for leaf in pc.circuit.inputs if leaf.var == step)


def state_posterior(pc, factors):
    """Return p(z | e) of the N ** L state sequences, by enumeration."""
    initial = pc.log_weights(pc.sum_node("initial")).detach()[0]
    scores = []
    for states in itertools.product(range(N), repeat=L):
        score = initial[states[0]]
        for step in range(L):
            if step:
                score = (
                    score
                    + pc.log_weights(pc.sum_node(f"transition{step - 1}")).detach()[states[step - 1], states[step]]
                )
            emitted = pc.log_weights(emission(pc, step)).detach()[:, states[step]]
            score = score + torch.logsumexp(emitted + factors[step], 0)
        scores.append(score)
    return torch.softmax(torch.stack(scores), 0)


def states_of(pc, log_weights):
    """Return the state of every step whose emissions these are, (n, L)."""
    tables = torch.stack([pc.log_weights(emission(pc, step)).detach().t() for step in range(L)])
    return (tables == log_weights.unsqueeze(2)).all(-1).int().argmax(-1)


def test_latents_are_drawn_from_their_posterior_and_the_best_has_the_most_of_it(pc, soft, generator):
    chosen = ct.queries.sample_latents(pc, 8000, soft, generator)
    code = (states_of(pc, chosen.log_weights()) * torch.tensor([4, 2, 1])).sum(-1)
    best = (states_of(pc, ct.queries.best_latents(pc, soft).log_weights()) * torch.tensor([4, 2, 1])).sum(-1)
    for query in range(2):
        law = state_posterior(pc, soft.log_factors[query])
        counts = torch.bincount(code[chosen.query == query], minlength=N**L)
        assert stats.chisquare(counts, law * 8000).pvalue > 1e-3
        assert best[query] == law.argmax()


def test_weights_of_some_values_are_those_among_all(pc, soft, generator):
    values = torch.rand(2, L, V, generator=generator).argsort(-1)[..., :2]
    latents = ct.queries.best_latents(pc, soft)
    assert torch.equal(latents.log_weights(values), latents.log_weights().gather(2, values))
    with pytest.raises(ct.ArgumentError, match="values: expected values from 0 to 2"):
        latents.log_weights(values + 3)


def test_weights_at_run_time_are_what_the_chosen_units_have(pc, soft, generator):
    given_weights = torch.log_softmax(torch.randn(2, V, N, dtype=DOUBLE, generator=generator), 1)
    latents = ct.queries.best_latents(pc, soft, weights=pc.weights(external={emission(pc, 1): given_weights}))
    for query in range(2):
        pc.set_weights(emission(pc, 1), given_weights[query].exp())
        expected = ct.queries.best_latents(pc, soft.rows(slice(query, query + 1)))
        torch.testing.assert_close(latents.log_weights()[query], expected.log_weights()[0])
        values = torch.tensor([[[2, 0], [0, 1], [1, 2]]]).expand(2, -1, -1)
        torch.testing.assert_close(latents.log_weights(values)[query], expected.log_weights(values[:1])[0])


def test_values_that_a_variable_does_not_have_are_impossible(generator):
    leaves = [ct.inputs(0, 2, ct.Categorical(2)), ct.inputs(1, 2, ct.Categorical(3))]
    pc = ct.compile(ct.Circuit(ct.sum(ct.product(*leaves), num_units=1)), seed=0)
    log_weights = ct.queries.sample_latents(pc, 3, generator=generator).log_weights()
    assert log_weights.shape == (3, 2, 3)
    assert (log_weights[:, 0, 2] == -torch.inf).all()
    torch.testing.assert_close(log_weights.exp().sum(-1), torch.ones(3, 2))


@given(problem=compiled_with_evidence(max_vars=4))
def test_listed_marginals_are_the_marginals_of_the_listed_values(problem):
    pc, evidence = problem
    if evidence.values is None or evidence.log_factors is None or evidence.missing is None:
        with pytest.raises(ct.ArgumentError, match="evidence: expected listed values with factors"):
            ct.queries.listed_marginals(pc, evidence)
        return
    listed = ct.Evidence.sparse(evidence.values, evidence.log_factors)
    try:
        expected = ct.queries.marginals(pc, listed)
    except ct.ImpossibleEvidenceError:
        with pytest.raises(ct.ImpossibleEvidenceError):
            ct.queries.listed_marginals(pc, listed)
        return
    found = ct.queries.listed_marginals(pc, listed)
    torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:2], dtype=DOUBLE))
    spread = torch.zeros_like(expected).scatter_add(2, listed.values, found)
    torch.testing.assert_close(spread, expected)


@pytest.mark.parametrize("with_evidence", [False, True])
def test_a_distribution_with_weights_at_run_time_is_that_of_the_circuit_with_them(with_evidence, pc, soft, generator):
    external = torch.log_softmax(torch.randn(2, N, N, dtype=DOUBLE, generator=generator), -1)
    evidence = soft if with_evidence else None
    dist = ct.CircuitDistribution(pc, evidence, weights=pc.weights(external={"transition0": external}))
    assert dist.batch_shape == (2,)
    x = torch.tensor(list(itertools.product(range(V), repeat=L))).unsqueeze(1).expand(-1, 2, -1)
    log_prob, marginals, draws = dist.log_prob(x), dist.marginal_probs, dist.sample((3000,), generator=generator)
    for query in range(2):
        pc.set_weights(pc.sum_node("transition0"), external[query].exp())
        joint = ct.testing.enumerate_joint(pc)
        if with_evidence:
            factors = soft.log_factors[query]
            joint = joint + factors[0][:, None, None] + factors[1][None, :, None] + factors[2][None, None, :]
        law = torch.softmax(joint.flatten(), 0)
        torch.testing.assert_close(log_prob[:, query].exp().detach(), law)
        torch.testing.assert_close(marginals[query, 1].detach(), law.reshape(V, V, V).sum((0, 2)))
        values = np.arange(V)
        mean = law.reshape(V, V, V).sum((0, 1)).numpy() @ values
        assert dist.mean[query, 2].item() == pytest.approx(mean)
        variance = law.reshape(V, V, V).sum((0, 1)).numpy() @ (values - mean) ** 2
        assert dist.variance[query, 2].item() == pytest.approx(variance)
        code = (draws[:, query] * torch.tensor([9, 3, 1])).sum(-1)
        assert stats.chisquare(torch.bincount(code, minlength=V**L), law * 3000).pvalue > 1e-3
        alone = None if evidence is None else evidence.rows(slice(query, query + 1))
        assert torch.equal(dist.mode[query], ct.queries.mpe(pc, alone).assignment[0])
    entropy = dist.query(ct.queries.latent_entropy)
    assert entropy.shape == (2,)
    with pytest.raises(ct.ArgumentError, match="weights: expected weights for 3 queries"):
        ct.CircuitDistribution(pc, ct.Evidence.nothing(3, L), weights=dist.weights)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_sums_of_rows_can_be_differentiated_twice(needs):
    generator = torch.Generator().manual_seed(0)
    table, shares = (torch.rand(5, 3, dtype=DOUBLE, generator=generator).requires_grad_(need) for need in needs)
    index = torch.randint(5, (5, 3), generator=generator)
    assert torch.autograd.gradcheck(lambda t, s: own_sum_of_rows(t, index, s), (table, shares))
    assert torch.autograd.gradgradcheck(lambda t, s: own_sum_of_rows(t, index, s), (table, shares))


def test_a_sum_of_rows_that_was_differentiated_is_so_again_and_keeps_no_inner_graph():
    table, shares = torch.rand(4, 2).requires_grad_(), torch.rand(3, 2).requires_grad_()
    total = own_sum_of_rows(table, torch.randint(4, (3, 2)), shares)
    first = torch.autograd.grad(total.sum(), [table, shares], retain_graph=True)
    assert total.grad_fn.first is None
    for one, other in zip(first, torch.autograd.grad(total.sum(), [table, shares]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_gradients_of_listed_marginals_are_those_of_the_marginals():
    pc = ct.compile(ct.structures.hmm(3, 3, 4), dtype=DOUBLE, seed=0)
    factors = torch.randn(2, 3, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    found = []
    for listed in (False, True):
        log_e = factors.clone().requires_grad_()
        if listed:
            evidence = ct.Evidence.sparse(torch.arange(4).expand(2, 3, 4), log_e)
            probs = ct.queries.listed_marginals(pc, evidence, differentiable=True)
        else:
            probs = ct.queries.marginals(pc, ct.Evidence.soft(log_e), differentiable=True)
        found.append(torch.autograd.grad((probs**2).sum(), [log_e, *pc.parameters()]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
