"""Entropies equal enumeration; bounds hold."""

import pytest
import torch
from hypothesis import given, settings
from query_cases import RELATIVE, compiled_with_evidence, posterior_or_error, soft_function

import circuits as ct


def entropy_of(p):
    return -torch.special.xlogy(p, p).sum(-1)


def explanation_scores(pc, node, unit, factors):
    """Return the log-scores of all explanations of one unit, 1-D: every latent choice and value."""
    if isinstance(node, ct.Input):
        return pc.log_weights(node)[:, unit].detach() + factors[node.var, : node.distribution.num_categories]
    if isinstance(node, ct.Product):
        units = [unit] * len(node.children)
        if node.mode == "outer":
            units = torch.unravel_index(torch.tensor(unit), [c.num_units for c in node.children])
        total = torch.zeros(1, dtype=torch.float64)
        for child, k in zip(node.children, units, strict=True):
            total = (total.unsqueeze(1) + explanation_scores(pc, child, int(k), factors)).flatten()
        return total
    weights = iter(pc.log_weights(node)[unit].detach())
    return torch.cat(
        [next(weights) + explanation_scores(pc, c, k, factors) for c in node.children for k in range(c.num_units)]
    )


@settings(max_examples=40)
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
    with pytest.raises(ct.PropertyError, match=r"entropy needs a deterministic circuit.*Sum\(num_units=2, scope=\{2\}"):
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
