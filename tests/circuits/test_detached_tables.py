"""Tables come detached; asked to be differentiable they have the gradients of what they are the table of."""

import pytest
import torch

import circuits as ct

FUNCTIONS = torch.arange(6.0, dtype=torch.float64).view(3, 2)
TABLES = {
    "covariance": ct.queries.covariance,
    "expectation": lambda pc, e, **options: ct.queries.expectation(pc, FUNCTIONS, e, **options),
    "latent_marginals": lambda pc, e, **options: ct.queries.latent_marginals(pc, e, ["initial"], **options)["initial"],
    "listed_marginals": lambda pc, e, **options: ct.queries.listed_marginals(
        pc, ct.Evidence.sparse(torch.zeros(2, 3, 1, dtype=torch.int64), e.log_factors[..., :1]), **options
    ),
    "marginals": ct.queries.marginals,
    "mean": ct.queries.mean,
    "moments": lambda pc, e, **options: ct.queries.moments(pc, 3, e, **options),
    "mutual_information": ct.queries.mutual_information,
    "pairwise_marginals": ct.queries.pairwise_marginals,
    "variance": ct.queries.variance,
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_table_is_detached_unless_it_is_to_be_differentiable(table):
    pc = ct.compile(ct.structures.hmm(3, 2, 2), dtype=torch.float64, seed=0)
    factors = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = table(pc, ct.Evidence.soft(factors))
    recorded = table(pc, ct.Evidence.soft(factors), differentiable=True)
    assert not found.requires_grad
    assert recorded.requires_grad
    torch.testing.assert_close(found, recorded.detach())
    assert torch.autograd.grad(recorded.square().sum(), list(pc.parameters()))[0].isfinite().all()


def test_a_differentiable_marginal_has_the_slope_of_the_log_conditional():
    """The derivative of p(x_0 = 1 | e) in log e_1(v) is the covariance of the two events."""
    pc = ct.compile(ct.structures.hmm(2, 2, 2), dtype=torch.float64, seed=0)
    factors = torch.randn(1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    evidence = ct.Evidence.soft(factors)
    table = ct.queries.marginals(pc, evidence, differentiable=True)
    (slope,) = torch.autograd.grad(table[0, 0, 1], factors)
    joint = (ct.testing.enumerate_joint(pc) + factors[0, 0][:, None] + factors[0, 1]).flatten().softmax(0).view(2, 2)
    expected = joint[1] - joint[1].sum() * joint.sum(0)
    torch.testing.assert_close(slope[0, 1], expected.detach())


def test_what_is_computed_upward_stays_differentiable():
    pc = ct.compile(ct.structures.hmm(3, 2, 2), seed=0)
    evidence = ct.Evidence.observe(torch.zeros(1, 3, dtype=torch.int64))
    assert ct.queries.log_partition(pc, evidence).requires_grad
    assert ct.queries.latent_entropy(pc, evidence).requires_grad
    assert ct.CircuitDistribution(pc, evidence).marginal_probs.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "circuit",
    [
        ct.structures.hmm(9, 3, 2),
        ct.structures.hmm(5, 2, 2, homogeneous=False),
        ct.structures.hmm(6, 2, 2, num_classes=2),
        ct.structures.block_sparse_hmm(4, [1, 2], 2, [[True, True], [True, False]]),
        ct.structures.rat_spn(8, 2, 2, 3, ct.Categorical(2)),
    ],
    ids=["chain", "own tables", "classes", "groups", "regions"],
)
def test_posteriors_of_latents_are_the_derivatives_of_log_z(circuit, dtype):
    """Of every sum node, with factors on some latents already, by the rule of differentiation itself."""
    pc = ct.compile(circuit, seed=0, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    evidence = ct.Evidence.soft(torch.randn(3, circuit.num_vars, 2, generator=generator, dtype=dtype))
    if circuit.num_classes:
        evidence = evidence.with_class_prior(torch.tensor([0.3, 0.7]).log())
    nodes = list(circuit.sums)
    given = nodes[len(nodes) // 2]
    extra = torch.randn(3, given.parameter_shape[1], generator=generator, dtype=dtype)
    found = ct.queries.latent_marginals(pc, evidence.with_latents({given: extra}))
    factors = {node: torch.zeros(3, node.parameter_shape[1], dtype=dtype) for node in nodes}
    factors = {node: (f + extra if node is given else f).requires_grad_() for node, f in factors.items()}
    expected = torch.autograd.grad(pc(evidence.with_latents(factors)).sum(), list(factors.values()))
    for node, derivative in zip(nodes, expected, strict=True):
        torch.testing.assert_close(found[node], derivative, rtol=1e-4, atol=1e-5)
