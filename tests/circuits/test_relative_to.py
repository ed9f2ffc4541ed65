"""Evidence relative to other evidence: every input unit divided by its value under the other, against enumeration."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import circuits as ct
from circuits.learning import viterbi_flows

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
DOUBLE = torch.float64


@st.composite
def problems(draw, **options):
    circuit = draw(ct.testing.circuits(max_vars=4, **options))
    pc = ct.compile(circuit, dtype=DOUBLE, seed=draw(st.integers(0, 100)))
    return pc, draw(ct.testing.evidence(circuit)), draw(ct.testing.evidence(circuit))


def explained(pc, evidence, other, query, plus, latents=None, classes=None):
    """Tabulate ``p(x) prod_i e_i(x_i)``, input units divided by their values under ``other``; ``plus`` adds dim 1."""
    counts = pc.circuit.num_categories
    e = evidence.dense(max(counts), DOUBLE)[query]
    o = None if other is None else other.dense(max(counts), DOUBLE)[query]
    tables = {}
    for node in pc.circuit.nodes:
        if isinstance(node, ct.Input):
            count = counts[node.var]
            table = pc.log_weights(node).detach().t()[:, :count] + e[node.var, :count]
            if o is not None:
                divisor = torch.logsumexp(pc.log_weights(node).detach().t()[:, :count] + o[node.var, :count], 1)
                table = table - divisor.masked_fill(divisor == -torch.inf, 0.0).unsqueeze(1)
            shape = [count if var == node.var else 1 for var in range(len(counts))]
            tables[node] = table.reshape(-1, *shape)
        elif isinstance(node, ct.Product):
            table = tables[node.children[0]]
            for child in node.children[1:]:
                right = tables[child]
                table = (table.unsqueeze(1) + right).flatten(0, 1) if node.mode == "outer" else table + right
            tables[node] = table
        else:
            children = node.mixed([tables[child] for child in node.children])
            weights = pc.log_weights(node).detach()
            if latents and node.name in latents:
                weights = weights + latents[node.name][query]
            tables[node] = plus(weights.reshape(*weights.shape, *[1] * len(counts)) + children)
    root = tables[pc.circuit.root]
    if classes is None:
        return root[0]
    return plus((root + classes[query].reshape(-1, *[1] * len(counts))).unsqueeze(0))[0]


def summed(terms):
    return torch.logsumexp(terms, 1)


def best(terms):
    return terms.amax(1)


def log_partitions(pc, evidence, other, **conditions):
    return torch.stack([explained(pc, evidence, other, q, summed, **conditions).flatten().logsumexp(0) for q in (0, 1)])


@given(problem=problems())
def test_log_z_is_the_enumerated_one(problem):
    pc, evidence, other = problem
    found = ct.queries.log_partition(pc, evidence.relative_to(other)).detach()
    torch.testing.assert_close(found, log_partitions(pc, evidence, other), **CLOSE)


@given(problem=problems())
def test_marginals_and_the_best_explanation_are_the_enumerated_ones(problem):
    pc, evidence, other = problem
    relative = evidence.relative_to(other)
    if bool((log_partitions(pc, evidence, other) == -torch.inf).any()):
        with pytest.raises(ct.ImpossibleEvidenceError):
            ct.queries.marginals(pc, relative)
        return
    marginals, mpe = ct.queries.marginals(pc, relative).detach(), ct.queries.mpe(pc, relative)
    for query in range(2):
        law = torch.softmax(explained(pc, evidence, other, query, summed).flatten(), 0)
        table = law.reshape(pc.circuit.num_categories)
        for var, count in enumerate(pc.circuit.num_categories):
            expected = table.movedim(var, 0).reshape(count, -1).sum(1)
            torch.testing.assert_close(marginals[query, var, :count], expected, **CLOSE)
        scores = explained(pc, evidence, other, query, best)
        torch.testing.assert_close(mpe.log_score[query], scores.max(), **CLOSE)
        torch.testing.assert_close(scores[tuple(mpe.assignment[query])], scores.max(), **CLOSE)


@given(problem=problems(zero_weights=False))
def test_evidence_relative_to_itself_has_every_input_unit_at_one(problem):
    pc, evidence, _ = problem
    log_z = ct.queries.log_partition(pc, evidence.relative_to(evidence)).detach()
    torch.testing.assert_close(log_z, torch.zeros(2, dtype=DOUBLE), **CLOSE)


QUERIES = {
    "mpe": lambda pc, e: ct.queries.mpe(pc, e).log_score,
    "k_best": lambda pc, e: ct.queries.k_best(pc, 9, e).log_score,
    "latent_entropy": ct.queries.latent_entropy,
    "variance": ct.queries.variance,
    "covariance": ct.queries.covariance,
    "pairwise_marginals": ct.queries.pairwise_marginals,
    "mutual_information": ct.queries.mutual_information,
    "log_cdf": lambda pc, e: ct.queries.log_cdf(pc, torch.tensor([[1, 0, 2, 1]]), e),
    "latent_marginals": lambda pc, e: ct.queries.latent_marginals(pc, e, ["transition1"])["transition1"],
    "product": lambda pc, e: ct.queries.expectation(pc, torch.arange(12.0).reshape(4, 3) - 3, e, of="product"),
}


@pytest.mark.parametrize("name", QUERIES)
def test_soft_evidence_relative_to_itself_is_a_circuit_with_other_leaves(name, generator):
    """Leaves ``p(v | n) q_i(v) / Z_n`` as the weights of a circuit, asked without evidence."""
    pc = ct.compile(ct.structures.hmm(4, 2, 3), dtype=DOUBLE, seed=0)
    q = ct.Evidence.soft(torch.randn(1, 4, 3, dtype=DOUBLE, generator=generator))
    other = ct.compile(ct.structures.hmm(4, 2, 3, homogeneous=False), dtype=DOUBLE, seed=0)
    for leaf in other.circuit.inputs:
        shared = next(node for node in pc.circuit.inputs if node.var == leaf.var)
        weights = pc.log_weights(shared).detach() + q.log_factors[0, leaf.var].unsqueeze(1)
        other.set_weights(leaf, torch.softmax(weights, 0))
    for node in other.circuit.sums:
        other.set_weights(node, pc.log_weights(pc.sum_node(node.name)).detach().exp())
    expected = QUERIES[name](other, ct.Evidence.nothing(1, 4))
    torch.testing.assert_close(QUERIES[name](pc, q.relative_to(q)), expected, **CLOSE)


def test_draws_follow_the_enumerated_law(generator):
    pc = ct.compile(ct.structures.hmm(3, 3, 3), dtype=DOUBLE, seed=1)
    evidence, other = (ct.Evidence.soft(torch.randn(2, 3, 3, dtype=DOUBLE, generator=generator)) for _ in range(2))
    draws = ct.queries.sample(pc, 20_000, evidence.relative_to(other), generator)
    for query in range(2):
        law = torch.softmax(explained(pc, evidence, other, query, summed).flatten(), 0)
        counts = torch.bincount((draws[:, query] * torch.tensor([9, 3, 1])).sum(-1), minlength=27)
        assert stats.chisquare(counts, law * len(draws)).pvalue > 1e-3


def test_draws_among_listed_values_follow_the_enumerated_law(generator):
    pc = ct.compile(ct.structures.hmm(3, 3, 4), dtype=DOUBLE, seed=1)
    values = torch.rand(2, 3, 4, generator=generator).argsort(-1)[..., :3]
    evidence = ct.Evidence.sparse(values, torch.randn(2, 3, 3, dtype=DOUBLE, generator=generator))
    draws = ct.queries.sample(pc, 20_000, evidence, generator)
    for query in range(2):
        law = torch.softmax(explained(pc, evidence, None, query, summed).flatten(), 0)
        counts = torch.bincount((draws[:, query] * torch.tensor([16, 4, 1])).sum(-1), minlength=64)
        assert counts[law == 0].sum() == 0
        assert stats.chisquare(counts[law > 0], law[law > 0] * len(draws)).pvalue > 1e-3


def test_latents_and_missing_values_stay_what_they_are(generator):
    pc = ct.compile(ct.structures.hmm(3, 2, 3), dtype=DOUBLE, seed=0)
    latents = {"transition0": torch.randn(2, 2, dtype=DOUBLE, generator=generator)}
    observed = torch.tensor([[True, False, True], [False, False, True]])
    evidence = ct.Evidence.observe(torch.tensor([[0, 1, 2], [2, 0, 1]]), observed)
    other = ct.Evidence.soft(torch.randn(2, 3, 3, dtype=DOUBLE, generator=generator))
    expected = log_partitions(pc, evidence, other, latents=latents)
    before, after = evidence.relative_to(other).with_latents(latents), evidence.with_latents(latents).relative_to(other)
    for relative in (before, after, evidence.with_latents(latents).relative_to(other.with_latents(latents))):
        torch.testing.assert_close(ct.queries.log_partition(pc, relative).detach(), expected, **CLOSE)


def test_classes_stay_what_they_are(generator):
    leaves = [ct.inputs(var, 2, ct.Categorical(3)) for var in range(2)]
    pc = ct.compile(ct.Circuit(ct.sum(ct.product(*leaves), num_units=2), num_classes=2), dtype=DOUBLE, seed=0)
    evidence, other = (ct.Evidence.soft(torch.randn(2, 2, 3, dtype=DOUBLE, generator=generator)) for _ in range(2))
    prior = torch.randn(2, 2, dtype=DOUBLE, generator=generator)
    relative = evidence.relative_to(other).with_class_prior(prior)
    expected = log_partitions(pc, evidence, other, classes=prior)
    torch.testing.assert_close(ct.queries.log_partition(pc, relative).detach(), expected, **CLOSE)


def test_weights_at_run_time_are_those_of_both_values(generator):
    pc = ct.compile(ct.structures.hmm(3, 2, 3, homogeneous=False), dtype=DOUBLE, seed=0)
    leaf = pc.circuit.inputs[0]
    evidence, other = (ct.Evidence.soft(torch.randn(2, 3, 3, dtype=DOUBLE, generator=generator)) for _ in range(2))
    given_weights = torch.log_softmax(torch.randn(2, 3, 2, dtype=DOUBLE, generator=generator), 1)
    weights = pc.weights(external={leaf: given_weights})
    found = ct.queries.log_partition(pc, evidence.relative_to(other), weights=weights).detach()
    for query in range(2):
        pc.set_weights(leaf, given_weights[query].exp())
        torch.testing.assert_close(found[query], log_partitions(pc, evidence, other)[query], **CLOSE)


def test_it_is_differentiable_in_both_evidences_and_the_weights(generator):
    pc = ct.compile(ct.structures.hmm(2, 2, 3), dtype=DOUBLE, seed=0)
    e, o = (torch.randn(2, 2, 3, dtype=DOUBLE, generator=generator, requires_grad=True) for _ in range(2))

    def log_z(e, o, *_):
        return pc.log_partition(ct.Evidence.soft(e).relative_to(ct.Evidence.soft(o)))

    assert torch.autograd.gradcheck(log_z, (e, o))
    parameter = pc.bank["input_3x2"]
    (grad,) = torch.autograd.grad(log_z(e, o).sum(), parameter)
    for index in [(0, 0, 0), (0, 2, 1)]:
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter[index] += step
                values.append(log_z(e, o).sum())
                parameter[index] -= step
        torch.testing.assert_close(grad[index], (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-8)


@given(problem=problems(), condition=st.lists(st.booleans(), min_size=4, max_size=4))
def test_joined_evidence_is_relative_variable_by_variable(problem, condition):
    pc, first, other = problem
    here = torch.tensor(condition[: pc.circuit.num_vars])
    nothing = ct.Evidence.nothing(2, pc.circuit.num_vars)
    joined = ct.Evidence.where(here, first.relative_to(other), other)
    expected = log_partitions(pc, ct.Evidence.where(here, first, other), ct.Evidence.where(here, other, nothing))
    torch.testing.assert_close(ct.queries.log_partition(pc, joined).detach(), expected, **CLOSE)
    swapped = ct.Evidence.where(~here, other, first.relative_to(other))
    torch.testing.assert_close(ct.queries.log_partition(pc, swapped).detach(), expected, **CLOSE)


@given(problem=problems())
def test_rows_and_code_build_the_same_evidence(problem):
    pc, evidence, other = problem
    relative = evidence.relative_to(other)
    log_z = ct.queries.log_partition(pc, relative)
    again = eval(repr(relative), {"ct": ct, "torch": torch})
    torch.testing.assert_close(ct.queries.log_partition(pc, again), log_z, **CLOSE)
    flipped = ct.queries.log_partition(pc, relative.rows(torch.tensor([1, 0, 1])).to("cpu"))
    torch.testing.assert_close(flipped, log_z[[1, 0, 1]], **CLOSE)


def test_a_distribution_scores_many_samples_under_it(generator):
    pc = ct.compile(ct.structures.hmm(2, 2, 3), dtype=DOUBLE, seed=0)
    evidence, other = (ct.Evidence.soft(torch.randn(2, 2, 3, dtype=DOUBLE, generator=generator)) for _ in range(2))
    dist = ct.CircuitDistribution(pc, evidence.relative_to(other))
    x = torch.cartesian_prod(torch.arange(3), torch.arange(3)).unsqueeze(1).expand(-1, 2, -1)
    for query in range(2):
        expected = torch.log_softmax(explained(pc, evidence, other, query, summed).flatten(), 0)
        torch.testing.assert_close(dist.log_prob(x)[:, query].detach(), expected, **CLOSE)
        torch.testing.assert_close(dist.log_prob(x[3])[query].detach(), expected[3], **CLOSE)


def test_what_it_cannot_mean_is_refused(generator):
    pc = ct.compile(ct.structures.hmm(3, 2, 3), seed=0)
    soft = ct.Evidence.soft(torch.randn(1, 3, 3, generator=generator))
    relative = soft.relative_to(soft)
    for bad, message in (
        (3, "got int"),
        (ct.Evidence.nothing(2, 3), r"expected evidence for \(1, 3\)"),
        (relative, "not relative"),
    ):
        with pytest.raises(ct.ArgumentError, match=message):
            soft.relative_to(bad)
    with pytest.raises(ct.ArgumentError, match="not relative"):
        relative.relative_to(soft)
    with pytest.raises(ct.ArgumentError, match="log_factors: expected at least 3 values"):
        ct.queries.log_partition(pc, soft.relative_to(ct.Evidence.soft(torch.zeros(1, 3, 2))))
    with pytest.raises(ct.PropertyError, match="relative to no other"):
        ct.queries.order_log_probability(pc, relative)
    for flows in (ct.learning.expected_flows, viterbi_flows):
        with pytest.raises(ct.PropertyError, match="relative to no other"):
            flows(pc, relative)
    with pytest.raises(ct.ArgumentError, match="relative to no other"):
        ct.transforms.condition(pc, relative)
    with pytest.raises(ct.ArgumentError, match="no input units"):
        ct.testing.enumerated_log_partition(ct.testing.enumerate_joint(pc), relative)
