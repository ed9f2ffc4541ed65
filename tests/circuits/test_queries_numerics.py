"""Every query in float32 is close to float64, and extreme evidence gives no NaN in value or gradient."""

from functools import partial

import pytest
import torch

import circuits as ct

AUTOMATON = ct.queries.Automaton.deterministic(torch.tensor([[0, 1, 1, 0], [1, -1, 0, 0]]), [0])
FUNCTIONS = torch.randn(4, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

QUERIES = {
    "automaton": lambda pc, e: ct.queries.automaton_log_probability(pc, AUTOMATON, e),
    "cauchy_schwarz": lambda pc, e: ct.queries.cauchy_schwarz_divergence(pc, other_like(pc), e),
    "covariance": partial(ct.queries.covariance, differentiable=True),
    "cross_entropy": lambda pc, e: ct.queries.cross_entropy(pc, independent_like(pc), e),
    "entropy_bounds": lambda pc, e: torch.stack(ct.queries.entropy_bounds(pc, e)),
    "inner_product": lambda pc, e: ct.queries.log_inner_product(pc, other_like(pc), e),
    "latent_entropy": ct.queries.latent_entropy,
    "log_cdf": lambda pc, e: ct.queries.log_cdf(pc, torch.full((6, 4), 2), e),
    "moments": lambda pc, e: ct.queries.moments(pc, 3, e, differentiable=True),
    "mutual_information": partial(ct.queries.mutual_information, differentiable=True),
    "order": ct.queries.order_log_probability,
    "pairwise_marginals": partial(ct.queries.pairwise_marginals, differentiable=True),
    "product": lambda pc, e: ct.queries.expectation(pc, FUNCTIONS, e, of="product", differentiable=True),
    "renyi": lambda pc, e: ct.queries.renyi_divergence(pc, independent_like(pc), 2, e),
    "sum": lambda pc, e: ct.queries.expectation(pc, FUNCTIONS, e, differentiable=True),
}


def compiled(dtype):
    return ct.compile(ct.structures.hmm(4, 3, 4), dtype=dtype, seed=0)


def other_like(pc):
    return ct.compile(ct.structures.hmm(4, 2, 4), dtype=pc.dtype, seed=1)


def independent_like(pc):
    return ct.compile(ct.structures.fully_factorized(4, 4), dtype=pc.dtype, seed=2)


@pytest.mark.parametrize("name", QUERIES)
def test_float32_is_close_to_float64(name, generator):
    evidence = ct.Evidence.soft(2 * torch.randn(6, 4, 4, generator=generator))
    single, double = (QUERIES[name](compiled(dtype), evidence) for dtype in (torch.float32, torch.float64))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", QUERIES)
def test_extreme_evidence_and_weights_give_no_nan(name, dtype, generator):
    pc = compiled(dtype)
    with torch.no_grad():
        for bank in pc.bank.values():
            bank.copy_(torch.where(torch.rand(bank.shape, generator=generator) < 0.5, -1e3, bank))
    logits = 1e3 * torch.randn(6, 4, 4, generator=generator, dtype=dtype)
    logits[0, 0, :3] = -torch.inf
    logits.requires_grad_()
    value = QUERIES[name](pc, ct.Evidence.soft(logits))
    assert not value.isnan().any()
    grads = torch.autograd.grad(value[value.isfinite()].sum(), [logits, *pc.parameters()], allow_unused=True)
    assert all(grad is None or not grad.isnan().any() for grad in grads)


def test_extreme_evidence_of_choosing_queries(generator):
    pc = compiled(torch.float32)
    evidence = ct.Evidence.soft(1e3 * torch.randn(6, 4, 4, generator=generator))
    best = ct.queries.k_best(pc, 4, evidence)
    assert not best.log_score.isnan().any()
    drawn = ct.queries.sample_without_replacement(pc, 4, evidence, generator)
    assert not drawn.log_prob.isnan().any()
    assert not drawn.perturbed.isnan().any()
    assert torch.equal(drawn.assignment[:, 0], ct.queries.mpe(pc, evidence).assignment)
