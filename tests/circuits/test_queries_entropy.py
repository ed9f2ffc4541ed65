"""Entropies equal enumeration; bounds hold."""

import pytest
import torch
from hypothesis import given
from query_cases import RELATIVE, compiled_with_evidence, posterior_or_error, soft_function

import circuits as ct


def entropy_of(p):
    return -torch.special.xlogy(p, p).sum(-1)


def explanation_scores(pc, node, unit, factors):
    """Return the log-scores of all explanations of one unit, 1-D: every latent choice and value."""
    if isinstance(node, ct.Input):
        return pc.log_weights(node)[:, unit].detach() + factors[node.var, : node.distribution.num_values]
    if isinstance(node, ct.Product):
        units = [unit] * len(node.children)
        if node.mode == "outer":
            units = torch.unravel_index(torch.tensor(unit), [c.num_units for c in node.children])
        total = torch.zeros(1, dtype=torch.float64)
        for child, k in zip(node.children, units, strict=True):
            total = (total.unsqueeze(1) + explanation_scores(pc, child, int(k), factors)).flatten()
        return total
    mixed = [(c, k) for c in node.children for k in range(c.num_units) if node.unit in (None, k)]
    weights = pc.log_weights(node)[unit].detach()
    return torch.cat([w + explanation_scores(pc, *of, factors) for w, of in zip(weights, mixed, strict=True)])


@given(compiled_with_evidence(max_vars=3, max_units=2, max_categories=3))
def test_latent_entropy_is_that_of_the_enumerated_explanations(case):
    pc, evidence = case
    posterior = posterior_or_error(pc, evidence, lambda: ct.queries.latent_entropy(pc, evidence))
    if posterior is None:
        return
    factors = evidence.dense(max(pc.circuit.num_categories), torch.float64)
    scores = [explanation_scores(pc, pc.circuit.root, 0, factors[b]) for b in range(2)]
    expected = torch.stack([entropy_of(torch.softmax(s, 0)) for s in scores])
    torch.testing.assert_close(ct.queries.latent_entropy(pc, evidence), expected, **RELATIVE)


def decision_tree():
    """p(x0) p(x1 | x0) p(x2 | x0, x1), as a deterministic circuit whose branches split in different orders."""
    one_hot = [torch.eye(2)[:, [value]].double() for value in range(2)]
    zero, one = (
        ct.product(
            ct.inputs(0, 1, ct.Bernoulli(), weights=one_hot[value]),
            ct.sum(
                *(
                    ct.product(ct.inputs(first, 1, ct.Bernoulli(), weights=w), ct.inputs(second, 1, ct.Bernoulli()))
                    for w in one_hot
                ),
                num_units=1,
            ),
        )
        for value, (first, second) in enumerate([(1, 2), (2, 1)])
    )
    return ct.Circuit(ct.sum(zero, one, num_units=1))


def test_the_entropy_of_deterministic_circuits_is_exact(generator):
    pc = ct.compile(decision_tree(), dtype=torch.float64, seed=0)
    evidence = ct.Evidence.soft(torch.randn(3, 3, 2, dtype=torch.float64, generator=generator))
    posterior = posterior_or_error(pc, evidence, lambda: None)
    torch.testing.assert_close(ct.queries.entropy(pc, evidence), entropy_of(posterior), **RELATIVE)
    independent = ct.compile(ct.structures.fully_factorized(4, 3), dtype=torch.float64, seed=0)
    joint = ct.testing.enumerate_joint(independent).flatten().exp()
    torch.testing.assert_close(ct.queries.entropy(independent)[0], entropy_of(joint), **RELATIVE)


def test_the_entropy_of_other_circuits_is_refused():
    pc = ct.compile(ct.structures.hmm(3, 2, 2), seed=0)
    with pytest.raises(ct.PropertyError, match=r"entropy: expected a det.*Sum\(num_units=2, scope=\{2\}"):
        ct.queries.entropy(pc)


def test_gradients_of_entropies(generator):
    pc = ct.compile(ct.structures.hmm(3, 2, 2), dtype=torch.float64, seed=1)
    factors = torch.randn(2, 3, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(soft_function(pc, ct.queries.latent_entropy), factors, atol=1e-6)
    grads = torch.autograd.grad(ct.queries.latent_entropy(pc).sum(), list(pc.parameters()))
    assert all(grad.isfinite().all() and bool((grad != 0).any()) for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropy_where_linear_weights_underflow(dtype):
    weights = torch.tensor([[1.0, 0.0]]).double()
    leaves = ct.inputs(0, 2, ct.Categorical(2), weights=torch.eye(2).double())
    pc = ct.compile(ct.Circuit(ct.sum(leaves, num_units=1, weights=weights)), dtype=dtype)
    with torch.no_grad():
        pc.bank["sum_1x2"].copy_(torch.tensor([[[0.0, -900.0]]]))
    evidence = ct.Evidence.soft(torch.tensor([[[-900.0, 0.0]], [[-torch.inf, 0.0]]], dtype=dtype))
    expected = torch.tensor([2.0, 1.0], dtype=dtype).log()
    torch.testing.assert_close(ct.queries.latent_entropy(pc, evidence), expected, rtol=1e-4, atol=1e-4)


@given(compiled_with_evidence(max_vars=4))
def test_entropy_lies_between_its_bounds(case):
    pc, evidence = case
    posterior = posterior_or_error(pc, evidence, lambda: ct.queries.entropy_bounds(pc, evidence))
    if posterior is None:
        return
    exact = entropy_of(posterior)
    lower, upper = ct.queries.entropy_bounds(pc, evidence)
    assert (lower <= exact + 1e-9).all()
    assert (exact <= upper + 1e-9).all()
    assert (upper <= ct.queries.latent_entropy(pc, evidence) + 1e-9).all()


@pytest.mark.parametrize("structure", ["hmm", "mixture", "outer"])
def test_bounds_are_closer_than_those_from_the_latents_alone(structure, generator):
    if structure == "outer":
        parts = [
            ct.sum(ct.product(*(ct.inputs(v, 3, ct.Categorical(3)) for v in block)), num_units=2)
            for block in ((0, 1), (2, 3))
        ]
        circuit = ct.Circuit(ct.sum(ct.product(*parts, mode="outer"), num_units=1))
    else:
        circuit = ct.structures.hmm(4, 3, 3) if structure == "hmm" else ct.structures.mixture(4, 3, 3)
    pc = ct.compile(circuit, dtype=torch.float64, seed=0)
    evidence = ct.Evidence.soft(3 * torch.randn(20, 4, 3, dtype=torch.float64, generator=generator))
    exact = entropy_of(posterior_or_error(pc, evidence, lambda: None))
    lower, upper = ct.queries.entropy_bounds(pc, evidence)
    assert (lower <= exact).all()
    assert (exact <= upper).all()
    assert (upper < ct.queries.latent_entropy(pc, evidence) - 1e-3).any()
    assert (exact - lower).mean() < 0.5 * exact.mean()


def test_bounds_meet_where_components_are_disjoint_or_equal():
    disjoint = ct.compile(decision_tree(), dtype=torch.float64, seed=0)
    exact = ct.queries.entropy(disjoint)
    for bound in ct.queries.entropy_bounds(disjoint):
        torch.testing.assert_close(bound, exact, **RELATIVE)
    weights = torch.tensor([[0.2, 0.2], [0.8, 0.8]], dtype=torch.float64)
    equal = ct.compile(
        ct.Circuit(ct.sum(ct.inputs(0, 2, ct.Bernoulli(), weights=weights), num_units=1)), dtype=torch.float64
    )
    for bound in ct.queries.entropy_bounds(equal):
        torch.testing.assert_close(bound, entropy_of(weights[:, 0])[None], **RELATIVE)


def test_gradients_of_the_bounds(generator):
    pc = ct.compile(ct.structures.hmm(3, 2, 3), dtype=torch.float64, seed=1)
    factors = torch.randn(2, 3, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(soft_function(pc, ct.queries.entropy_bounds), factors, atol=1e-6)
    grads = torch.autograd.grad(sum(ct.queries.entropy_bounds(pc)).sum(), list(pc.parameters()))
    assert all(grad.isfinite().all() for grad in grads)
    evidence = ct.Evidence.observe(torch.zeros(2, 3, dtype=torch.int64), torch.eye(3, dtype=torch.bool)[:2])
    grads = torch.autograd.grad(sum(ct.queries.entropy_bounds(pc, evidence)).sum(), list(pc.parameters()))
    assert all(grad.isfinite().all() for grad in grads)
