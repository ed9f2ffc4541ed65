"""Queries under evidence on latents and on classes: it is respected, or refused with a clear error."""

import pytest
import torch

import circuits as ct
from circuits.transforms import condition

DOUBLE = torch.float64


def class_tree(num_classes):
    leaves = [ct.inputs(var, 2, ct.Categorical(3)) for var in range(3)]
    left = ct.sum(ct.product(leaves[0], leaves[1], mode="outer"), num_units=2, name="left")
    root = ct.sum(ct.product(left, leaves[2]), num_units=num_classes or 1, name="root")
    return ct.Circuit(root, num_classes=num_classes)


QUERIES = {
    "log_cdf": lambda pc, e, **o: ct.queries.log_cdf(pc, torch.tensor([[1, 0, 2], [2, 1, 1]]), e, **o),
    "latent_entropy": ct.queries.latent_entropy,
    "pairwise_marginals": ct.queries.pairwise_marginals,
    "mutual_information": ct.queries.mutual_information,
    "variance": ct.queries.variance,
    "covariance": ct.queries.covariance,
    "product": lambda pc, e: ct.queries.expectation(pc, torch.arange(-4.0, 5.0).reshape(3, 3), e, of="product"),
    "k_best": lambda pc, e, **o: ct.queries.k_best(pc, 7, e, **o).log_score,
    "k_best assignments": lambda pc, e, **o: ct.queries.k_best(pc, 7, e, **o).assignment,
    "mpe": lambda pc, e, **o: ct.queries.mpe(pc, e, **o).log_score,
    "without replacement": lambda pc, e: (
        ct.queries.sample_without_replacement(pc, 5, e, torch.Generator().manual_seed(0)).log_prob
    ),
}
WITH_WEIGHTS = ("log_cdf", "latent_entropy", "k_best", "k_best assignments", "mpe")


def folded(pc, name, factors):
    """The circuit whose node has the weights ``exp(factors_i) w_ki``, where they sum to the same for all its units."""
    node = pc.sum_node(name)
    new = ct.compile(pc.circuit, dtype=DOUBLE, seed=0)
    new.set_weights(node, torch.softmax(pc.log_weights(node).detach() + factors, 1))
    return new


@pytest.mark.parametrize("name", QUERIES)
def test_latent_evidence_on_the_root_is_other_weights(name, generator):
    pc = ct.compile(class_tree(None), dtype=DOUBLE, seed=0)
    factors = torch.randn(2, 2, dtype=DOUBLE, generator=generator)
    soft = ct.Evidence.soft(torch.randn(2, 3, 3, dtype=DOUBLE, generator=generator))
    conditioned = soft.with_latents({"root": factors})
    shift = torch.logsumexp(pc.log_weights(pc.circuit.root).detach() + factors, 1)
    found = QUERIES[name](pc, conditioned)
    for query in range(2):
        if name == "without replacement":  # one query's draws are the same in the same batch only
            alone = slice(query, query + 1)
            found = {query: QUERIES[name](pc, conditioned.rows(alone))[0]}
            expected = QUERIES[name](folded(pc, "root", factors[query]), soft.rows(alone))[0]
        else:
            expected = QUERIES[name](folded(pc, "root", factors[query]), soft)[query]
        if name in ("k_best", "mpe"):
            expected = expected + shift[query]
        torch.testing.assert_close(found[query], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_external_weights_in_further_queries(name, generator):
    pc = ct.compile(class_tree(None), dtype=DOUBLE, seed=0)
    given = {"left": torch.randn(2, 2, 4, dtype=DOUBLE, generator=generator)}
    soft = ct.Evidence.soft(torch.randn(2, 3, 3, dtype=DOUBLE, generator=generator))
    found = QUERIES[name](pc, soft, weights=pc.weights(external=given))
    for query in range(2):
        own = ct.compile(pc.circuit, dtype=DOUBLE, seed=0)
        own.set_weights(own.sum_node("left"), given["left"][query].softmax(1))
        torch.testing.assert_close(found[query], QUERIES[name](own, soft)[query], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", QUERIES)
def test_a_named_class_is_the_circuit_of_that_class(name, generator):
    pc = ct.compile(class_tree(3), dtype=DOUBLE, seed=0)
    soft = ct.Evidence.soft(torch.randn(2, 3, 3, dtype=DOUBLE, generator=generator))
    of_class = ct.compile(class_tree(None), dtype=DOUBLE, seed=0)
    named = {node.name: node for node in of_class.circuit.nodes if node.name}
    inputs = zip(of_class.circuit.inputs, pc.circuit.inputs, strict=True)
    for new, old in [*inputs, (named["left"], pc.sum_node("left"))]:
        of_class.set_weights(new, pc.log_weights(old).exp().detach())
    root = pc.log_weights(pc.circuit.root).exp().detach()
    of_class.set_weights(of_class.circuit.root, root[1:2])
    expected = QUERIES[name](of_class, soft)
    found = QUERIES[name](pc, soft.with_class(1))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    # a mixture of classes is the circuit whose root mixes their weights
    prior = torch.tensor([0.2, 0.5, 0.3], dtype=DOUBLE)
    of_class.set_weights(of_class.circuit.root, prior.unsqueeze(0) @ root)
    mixed = QUERIES[name](pc, soft.with_class_prior(prior.log()))
    if name in ("log_cdf", "pairwise_marginals", "mutual_information", "variance", "covariance", "product"):
        torch.testing.assert_close(mixed, QUERIES[name](of_class, soft), rtol=1e-9, atol=1e-9)
    with pytest.raises(ct.PropertyError, match="with_class"):
        QUERIES[name](pc, soft)


def test_k_best_ranks_the_classes_together(generator):
    pc = ct.compile(class_tree(3), dtype=DOUBLE, seed=0)
    soft = ct.Evidence.soft(torch.randn(2, 3, 3, dtype=DOUBLE, generator=generator))
    prior = torch.tensor([0.2, 0.5, 0.3], dtype=DOUBLE).log()
    best = ct.queries.k_best(pc, 9, soft.with_class_prior(prior))
    singles = [ct.queries.k_best(pc, 9, soft.with_class(r)) for r in range(3)]
    scores = torch.cat([single.log_score + prior[r] for r, single in enumerate(singles)], 1)
    expected, order = scores.sort(1, descending=True)
    torch.testing.assert_close(best.log_score, expected[:, :9], rtol=1e-9, atol=1e-9)
    assignments = torch.cat([single.assignment for single in singles], 1)
    assert torch.equal(best.assignment, assignments.gather(1, order[:, :9, None].expand(-1, -1, 3)))


@pytest.mark.parametrize(
    "query",
    [
        lambda pc, e: ct.queries.entropy_bounds(pc, e),
        lambda pc, e: ct.queries.log_inner_product(pc, pc, e),
        lambda pc, e: ct.queries.order_log_probability(pc, e),
    ],
)
def test_queries_on_nodes_refuse_latents_and_classes(query):
    chain = ct.compile(ct.structures.hmm(3, 2, 3), seed=0)
    given = ct.Evidence.nothing(1, 3)
    node = chain.circuit.sums[0]
    with pytest.raises(ct.PropertyError, match="variables only"):
        query(chain, given.with_latents({node: torch.zeros(1, node.parameter_shape[1])}))
    classes = ct.structures.rat_spn(3, 1, 1, 2, 3, num_classes=2, seed=0)
    classes = ct.compile(classes, seed=0)
    with pytest.raises(ct.PropertyError, match=r"transforms\.condition|one per class"):
        query(classes, given.with_class(0))
    query(ct.transforms.condition(classes, given.with_class(0)), given)


def test_transformations_refuse_latents():
    single = ct.compile(class_tree(None), seed=0)
    with pytest.raises(ct.ArgumentError, match="latents"):
        condition(single, ct.Evidence.nothing(1, 3).with_latents({"root": torch.zeros(1, 2)}))


def test_the_distribution_of_a_class(generator):
    pc = ct.compile(class_tree(3), dtype=DOUBLE, seed=0)
    with pytest.raises(ct.PropertyError, match="with_class"):
        ct.CircuitDistribution(pc)
    evidence = ct.Evidence.soft(torch.randn(2, 3, 3, dtype=DOUBLE, generator=generator)).with_class(2)
    x = torch.cartesian_prod(*[torch.arange(3)] * 3).unsqueeze(1).expand(-1, 2, -1)
    log_p = ct.CircuitDistribution(pc, evidence).log_prob(x)
    torch.testing.assert_close(log_p.exp().sum(0), torch.ones(2, dtype=DOUBLE))


def test_evidence_with_conditions_prints_as_code():
    evidence = ct.Evidence.observe(torch.tensor([[0, 1]])).with_latents({"a": torch.tensor([[0.5, -torch.inf]])})
    for given in (evidence.with_class(1), evidence.with_class_prior(torch.tensor([0.5, -torch.inf]))):
        rebuilt = eval(repr(given), {"ct": ct, "torch": torch})
        assert torch.equal(rebuilt.latents["a"], given.latents["a"])
        assert torch.equal(rebuilt.classes, given.classes)


def test_joined_evidence_keeps_latents_and_the_class():
    known, on_latents = torch.tensor([True, False]), {"a": torch.zeros(1, 2)}
    one, other = (ct.Evidence.observe(torch.tensor([[value, value]])) for value in (0, 1))
    joined = ct.Evidence.where(known, one, other.with_latents(on_latents).with_class(1))
    assert set(joined.latents) == {"a"}
    assert torch.equal(joined.classes, torch.tensor([1]))
    assert joined.pick(torch.tensor([0]), torch.tensor([1])).dense(2).tolist() == [[[-torch.inf, 0.0]]]
    with pytest.raises(ct.ArgumentError, match="names the class"):
        ct.Evidence.where(known, one.with_class(0), other.with_class(1))
