"""Every structure is a normalised distribution, is what its formula says, and names what a wrong argument is."""

import itertools

import networkx
import pytest
import torch

import circuits as ct
from circuits import structures
from circuits.batteries import learnspn
from circuits.region_graphs import chow_liu

FAMILIES = [ct.Categorical(2), ct.Bernoulli(), ct.Categorical(3), ct.Categorical(2)]
FOLLOWS = torch.tensor([[True, False, True], [True, True, False], [False, True, True]])


def data(num_rows=200, num_vars=5, num_categories=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(num_categories, (num_rows, num_vars), generator=generator)
    keep = torch.rand(num_rows, num_vars, generator=generator) < 0.6
    out = noise.clone()
    for var in range(1, num_vars):  # variable i copies variable (i - 1) // 2 most of the time
        out[:, var] = torch.where(keep[:, var], out[:, (var - 1) // 2], noise[:, var])
    return out


STRUCTURES = {
    "fully factorized": lambda: structures.fully_factorized(4, FAMILIES),
    "mixture": lambda: structures.mixture(4, FAMILIES, 3),
    "naive Bayes": lambda: structures.naive_bayes(4, FAMILIES, 3),
    "hmm": lambda: structures.hmm(5, 3, 3),
    "hmm, one step": lambda: structures.hmm(1, 3, 3),
    "hmm, not homogeneous": lambda: structures.hmm(5, 3, 3, homogeneous=False),
    "hmm of a family": lambda: structures.hmm(5, 3, ct.Bernoulli()),
    "hmm of two variables a step": lambda: structures.hmm(3, 2, [3, ct.Bernoulli()]),
    "hmm of two variables a step, not homogeneous": lambda: structures.hmm(2, 2, [2, 3], False),
    "low-rank hmm of two variables a step": lambda: structures.low_rank_hmm(3, 3, [2, ct.Bernoulli()], 2),
    "block-sparse hmm of two variables a step": lambda: structures.block_sparse_hmm(2, [2, 2, 1], [3, 2], FOLLOWS),
    "second-order hmm of two variables a step": lambda: structures.second_order_hmm(3, 2, [2, ct.Bernoulli()]),
    "low-rank hmm": lambda: structures.low_rank_hmm(5, 4, 3, 2),
    "low-rank hmm, not homogeneous": lambda: structures.low_rank_hmm(5, 4, 3, 2, homogeneous=False),
    "block-sparse hmm": lambda: structures.block_sparse_hmm(5, [2, 2, 1], 3, FOLLOWS),
    "block-sparse hmm with a rank": lambda: structures.block_sparse_hmm(5, [2, 2, 1], 3, FOLLOWS, rank=2),
    "block-sparse hmm, not homogeneous": lambda: structures.block_sparse_hmm(5, [2, 2, 1], 3, FOLLOWS, False),
    "Monarch hmm": lambda: structures.monarch_hmm(5, (2, 3), 3),
    "Monarch hmm, one step": lambda: structures.monarch_hmm(1, (2, 3), 3),
    "Monarch hmm, not homogeneous": lambda: structures.monarch_hmm(4, (3, 2), 3, False),
    "Monarch hmm of two variables a step": lambda: structures.monarch_hmm(3, (2, 2), [2, ct.Bernoulli()]),
    "second-order hmm": lambda: structures.second_order_hmm(5, 2, 3),
    "second-order hmm, one step": lambda: structures.second_order_hmm(1, 2, 3),
    "second-order hmm, two steps": lambda: structures.second_order_hmm(2, 2, 3),
    "second-order hmm, three steps": lambda: structures.second_order_hmm(3, 2, 3),
    "second-order hmm, not homogeneous": lambda: structures.second_order_hmm(5, 2, 3, homogeneous=False),
    "hclt": lambda: structures.hclt(data(), 3, 3),
    "hclt, mixture of trees": lambda: structures.hclt(data(), 3, 3, num_trees=3, seed=0),
    "hclt, one variable": lambda: structures.hclt(data(num_vars=1), 3, 3),
    "latent tree": lambda: structures.latent_tree([(0, 1), (1, 2), (1, 3)], 3, FAMILIES),
    "latent tree with a purely hidden root": lambda: structures.latent_tree(
        [("top", "a"), ("top", "b"), ("b", "c")], 2, 3, variables={"a": 0, "b": 1, "c": 2}, root="top"
    ),
    "latent tree with a purely hidden link": lambda: structures.latent_tree(
        [("a", "link"), ("link", "b"), ("b", "c")], 2, 3, variables={"a": 0, "b": 1, "c": 2}, root="a"
    ),
    "latent tree of one variable": lambda: structures.latent_tree([], 2, 3),
    "rat_spn": lambda: structures.rat_spn(5, 2, 2, 2, 3, seed=0),
    "rat_spn, cp": lambda: structures.rat_spn(5, 2, 2, 2, 3, sum_product="cp", num_input_units=3, seed=0),
    "poon_domingos": lambda: structures.poon_domingos((2, 3), 1, 2, 2),
    "quad_tree": lambda: structures.quad_tree((2, 3), 2, 2),
    "quad_tree, four splits": lambda: structures.quad_tree((3, 2), 2, 2, num_splits=4),
    "quad_graph": lambda: structures.quad_graph((3, 2), 2, 2),
    "quad_graph with channels": lambda: structures.quad_graph((2, 2, 2), 2, 2),
    "linear_tree": lambda: structures.linear_tree(4, 2, FAMILIES),
    "learn_spn": lambda: ct.batteries.learn_spn(data(), min_rows=20, seed=0),
    "learn_spn, three clusters": lambda: ct.batteries.learn_spn(data(), num_clusters=3, min_rows=20, seed=0),
    "linear_tree, repeated": lambda: structures.linear_tree(4, 2, FAMILIES, num_repetitions=2, seed=0),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_agrees_with_enumeration(name):
    circuit = STRUCTURES[name]()
    pc = ct.compile(circuit, dtype=torch.float64, seed=0)
    joint = ct.testing.enumerate_joint(pc)
    assert joint.exp().sum() == pytest.approx(1, rel=1e-12)
    x = torch.cartesian_prod(*(torch.arange(count) for count in circuit.num_categories)).reshape(-1, circuit.num_vars)
    torch.testing.assert_close(pc(x), joint.flatten(), rtol=1e-9, atol=0)
    observed = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    evidence = ct.Evidence.observe(x, observed)
    expected = ct.testing.enumerated_log_partition(joint, evidence)
    torch.testing.assert_close(ct.queries.log_partition(pc, evidence), expected, rtol=1e-9, atol=1e-12)
    possible = evidence.rows(expected > -torch.inf)
    torch.testing.assert_close(
        ct.queries.marginals(pc, possible), ct.testing.enumerated_marginals(joint, possible), rtol=1e-9, atol=1e-12
    )
    score = ct.queries.mpe(pc).log_score
    torch.testing.assert_close(score[0], ct.testing.enumerate_explanations(pc).max(), rtol=1e-9, atol=0)
    (-pc(x[:4]).sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in pc.parameters())


def stochastic(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.1
    return draw / draw.sum(-1, keepdim=True)


def forward_algorithm(x, initial, transitions, emissions):
    """Return log p(x) by the forward recursion in probabilities: transitions (L - 1, N, N), emissions (L, N, C)."""
    alpha = initial * emissions[0, :, x[0]]
    for step in range(1, len(x)):
        alpha = (alpha @ transitions[step - 1]) * emissions[step, :, x[step]]
    return alpha.sum().log()


L, N, C = 5, 4, 3


def assert_is_hmm(circuit, initial, transitions, emissions):
    pc = ct.compile(circuit, dtype=torch.float64, seed=0)
    x = torch.randint(C, (20, L), generator=torch.Generator().manual_seed(1))
    states = len(initial)
    transitions, emissions = transitions.expand(L - 1, states, states), emissions.expand(L, states, C)
    expected = torch.stack([forward_algorithm(row, initial, transitions, emissions) for row in x])
    torch.testing.assert_close(pc(x), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("homogeneous", [True, False])
def test_hmm_is_the_forward_algorithm(homogeneous):
    steps = (1, 1) if homogeneous else (L - 1, L)
    initial, transition, emission = stochastic(N), stochastic(steps[0], N, N), stochastic(steps[1], N, C)
    tables = (transition[0], emission[0]) if homogeneous else (transition, emission)
    circuit = structures.hmm(L, N, C, homogeneous, initial=initial, transition=tables[0], emission=tables[1])
    assert_is_hmm(circuit, initial, transition, emission)


@pytest.mark.parametrize("homogeneous", [True, False])
def test_hmm_of_several_variables_a_step_is_the_forward_algorithm_with_their_product(homogeneous):
    steps = (1, 1) if homogeneous else (L - 1, L)
    initial, transition, table = stochastic(N), stochastic(steps[0], N, N), stochastic(steps[1], N, C)
    means = torch.randn(steps[1], N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    normal = torch.stack([means, 0.5 + means.square()], -1)
    pick = (lambda given: given[0]) if homogeneous else (lambda given: given)
    circuit = structures.hmm(
        L,
        N,
        [ct.Gaussian(), C],
        homogeneous,
        initial=initial,
        transition=pick(transition),
        emission=[pick(normal), pick(table)],
    )
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(20, L, generator=generator, dtype=torch.float64)
    values = torch.randint(C, (20, L), generator=generator)
    x = torch.stack([numbers, values.double()], -1).flatten(1)
    pc = ct.compile(circuit, dtype=torch.float64)
    density = torch.distributions.Normal(normal[..., 0], normal[..., 1]).log_prob(numbers.unsqueeze(-1)).exp()
    for row, found in enumerate(pc(x)):
        joint = density[row].unsqueeze(2) * table.expand(L, N, C)  # (L, N, C), of this row's numbers
        expected = forward_algorithm(values[row], initial, transition.expand(L - 1, N, N), joint)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    names = {node.name for node in circuit.inputs}
    assert names == {f"emission{step}_{position}" for step in range(L) for position in range(2)}
    assert circuit.node("emission3_1").var == 7


HMMS = {
    "hmm": lambda **options: structures.hmm(3, 2, 3, **options),
    "low-rank": lambda **options: structures.low_rank_hmm(3, 3, 3, 2, **options),
    "block-sparse": lambda **options: structures.block_sparse_hmm(3, [1, 2, 1], 3, FOLLOWS, **options),
    "Monarch": lambda **options: structures.monarch_hmm(3, (2, 3), 3, **options),
    "second-order": lambda **options: structures.second_order_hmm(3, 2, 3, **options),
}


@pytest.mark.parametrize("name", HMMS)
def test_a_class_conditional_hmm_is_one_hmm_per_class(name):
    circuit = HMMS[name](num_classes=2)
    pc = ct.compile(circuit, dtype=torch.float64, seed=0)
    x = torch.cartesian_prod(*(torch.arange(3),) * 3)
    for label in range(2):
        single = ct.compile(HMMS[name](), dtype=torch.float64)
        for node in single.circuit.nodes:
            if node.name and not isinstance(node, ct.Product):
                single.set_weights(node, pc.parameters_of(circuit.node(f"class{label}_{node.name}")))
        torch.testing.assert_close(pc(x)[:, label], single(x), rtol=1e-9, atol=0)
    assert circuit.num_free_parameters == 2 * HMMS[name]().num_free_parameters


def test_a_class_conditional_hmm_learns_each_class_from_its_own_samples():
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randint(3, (60, 4), generator=generator), torch.randint(2, (60,), generator=generator)
    tables = {"initial": stochastic(2), "transition": stochastic(2, 2), "emission": stochastic(2, 3)}
    options = {"optimizer": "em", "num_epochs": 5, "pseudocount": 0.1, "progress": False}
    both = ct.compile(structures.hmm(4, 2, 3, num_classes=2, **tables), dtype=torch.float64)
    ct.learning.fit(both, x, labels=labels, **options)
    for label in range(2):
        alone = ct.compile(structures.hmm(4, 2, 3, **tables), dtype=torch.float64)
        ct.learning.fit(alone, x[labels == label], **options)
        torch.testing.assert_close(both(x)[:, label], alone(x), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("homogeneous", [True, False])
def test_low_rank_hmm_has_the_product_of_its_tables_as_transition(homogeneous):
    steps = (1, 1) if homogeneous else (L - 1, L)
    initial, emission = stochastic(N), stochastic(steps[1], N, C)
    left, right = stochastic(steps[0], N, 2, seed=1), stochastic(steps[0], 2, N, seed=2)
    given = (left[0], right[0], emission[0]) if homogeneous else (left, right, emission)
    circuit = structures.low_rank_hmm(L, N, C, 2, homogeneous, initial=initial, transition=given[:2], emission=given[2])
    assert_is_hmm(circuit, initial, left @ right, emission)


@pytest.mark.parametrize("homogeneous", [True, False])
def test_block_sparse_hmm_is_a_dense_one_with_zeros(homogeneous):
    steps = (1, 1) if homogeneous else (L - 1, L)
    sizes = [1, 2, 1]
    pattern = FOLLOWS.repeat_interleave(torch.tensor(sizes), 0).repeat_interleave(torch.tensor(sizes), 1)
    weights = stochastic(steps[0], N, N) * pattern
    initial, transition, emission = stochastic(N), weights / weights.sum(-1, keepdim=True), stochastic(steps[1], N, C)
    tables = (transition[0], emission[0]) if homogeneous else (transition, emission)
    circuit = structures.block_sparse_hmm(
        L, sizes, C, FOLLOWS, homogeneous, initial=initial, transition=tables[0], emission=tables[1]
    )
    assert_is_hmm(circuit, initial, transition, emission)
    num_allowed = int(pattern.sum())
    assert circuit.num_parameters == N + (num_allowed + N * C if homogeneous else (L - 1) * num_allowed + L * N * C)


@pytest.mark.parametrize("homogeneous", [True, False])
def test_block_sparse_hmm_with_a_rank_is_a_dense_one(homogeneous):
    steps = (1, 1) if homogeneous else (L - 1, L)
    sizes, rank = [1, 2, 1], 2
    pattern = FOLLOWS.repeat_interleave(torch.tensor(sizes), 0).repeat_interleave(torch.tensor(sizes), 1)
    both = stochastic(steps[0], N, N + rank) * torch.cat([pattern, torch.ones(N, rank)], 1)
    blocks, left = (both / both.sum(-1, keepdim=True)).split([N, rank], -1)
    initial, right, emission = stochastic(N), stochastic(steps[0], rank, N, seed=2), stochastic(steps[1], N, C)
    given = (blocks[0], left[0], right[0]) if homogeneous else (blocks, left, right)
    circuit = structures.block_sparse_hmm(
        L,
        sizes,
        C,
        FOLLOWS,
        homogeneous,
        initial=initial,
        transition=given,
        emission=emission[0] if homogeneous else emission,
        rank=rank,
    )
    assert_is_hmm(circuit, initial, blocks + left @ right, emission)
    num_allowed = int(pattern.sum()) + 2 * N * rank
    assert circuit.num_parameters == N + (num_allowed + N * C if homogeneous else (L - 1) * num_allowed + L * N * C)


@pytest.mark.parametrize("homogeneous", [True, False])
def test_monarch_hmm_moves_one_half_of_its_state_after_the_other(homogeneous):
    A, B = 3, 2
    steps = (1, 1) if homogeneous else (L - 1, L)
    right, left = stochastic(steps[0], A, B, B, seed=1), stochastic(steps[0], B, A, A, seed=2)
    initial, emission = stochastic(A * B), stochastic(steps[1], A * B, C)
    transition = torch.zeros(steps[0], A, B, A, B, dtype=torch.float64)
    for a, b, after_a, after_b in itertools.product(range(A), range(B), range(A), range(B)):
        transition[:, a, b, after_a, after_b] = right[:, a, b, after_b] * left[:, after_b, a, after_a]
    given = (right[0], left[0], emission[0]) if homogeneous else (right, left, emission)
    circuit = structures.monarch_hmm(
        L, (A, B), C, homogeneous, initial=initial, transition=given[:2], emission=given[2]
    )
    assert_is_hmm(circuit, initial, transition.reshape(-1, A * B, A * B), emission)
    num_weights = A * B**2 + B * A**2
    assert circuit.num_parameters == A * B + steps[0] * num_weights + steps[1] * A * B * C


def test_a_monarch_hmm_learns_the_rows_that_expected_paths_give():
    """One update of EM, against expected transitions of the dense chain, summed over what the factors share."""
    A, B = 2, 3
    right, left, emission = stochastic(A, B, B, seed=1), stochastic(B, A, A, seed=2), stochastic(A * B, 3)
    start = stochastic(A * B)
    circuit = structures.monarch_hmm(4, (A, B), 3, initial=start, transition=(right, left), emission=emission)
    pc = ct.compile(circuit, dtype=torch.float64)
    transition = torch.einsum("abd,dac->abcd", right, left).reshape(A * B, A * B)
    x = torch.randint(3, (50, 4), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(A * B, A * B, dtype=torch.float64)
    for row in x:
        ahead, behind = [start * emission[:, row[0]]], [torch.ones(A * B, dtype=torch.float64)]
        for value in row[1:]:
            ahead.append(ahead[-1] @ transition * emission[:, value])
        for value in row.flip(0)[:-1]:
            behind.insert(0, transition @ (emission[:, value] * behind[0]))
        for step in range(3):
            joint = ahead[step].unsqueeze(1) * transition * (emission[:, row[step + 1]] * behind[step + 1])
            counts += joint / ahead[-1].sum()
    counts = counts.reshape(A, B, A, B)
    ct.learning.fit(pc, x, optimizer="em", num_epochs=1, pseudocount=0.0, progress=False)
    for a in range(A):
        expected = counts[a].sum(1)
        found = pc.parameters_of(f"transition0_{a}")
        torch.testing.assert_close(found, expected / expected.sum(1, keepdim=True), rtol=1e-8, atol=1e-10)
    for b in range(B):
        expected = counts[:, :, :, b].sum(1)
        found = pc.parameters_of(f"factor0_{b}")
        torch.testing.assert_close(found, expected / expected.sum(1, keepdim=True), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("homogeneous", [True, False])
def test_second_order_hmm_is_a_sum_over_all_paths(homogeneous):
    states = 3
    initial, first = stochastic(states), stochastic(states, states, seed=1)
    steps = (1, 1) if homogeneous else (L - 2, L)
    transition, emission = stochastic(steps[0], states, states, states), stochastic(steps[1], states, C)
    tables = (transition[0], emission[0]) if homogeneous else (transition, emission)
    circuit = structures.second_order_hmm(
        L, states, C, homogeneous, initial=initial, first_transition=first, transition=tables[0], emission=tables[1]
    )
    pc = ct.compile(circuit, dtype=torch.float64, seed=0)
    x = torch.randint(C, (5, L), generator=torch.Generator().manual_seed(1))
    transition, emission = transition.expand(L - 2, -1, -1, -1), emission.expand(L, -1, -1)
    expected = torch.zeros(len(x), dtype=torch.float64)
    for path in itertools.product(range(states), repeat=L):
        weight = initial[path[0]] * first[path[0], path[1]]
        for step in range(2, L):
            weight = weight * transition[step - 2, path[step - 2], path[step - 1], path[step]]
        emitted = torch.stack([emission[step, path[step], x[:, step]] for step in range(L)]).prod(0)
        expected += weight * emitted
    torch.testing.assert_close(pc(x), expected.log(), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "build",
    [
        lambda length: structures.hmm(length, 3, 2),
        lambda length: structures.low_rank_hmm(length, 3, 2, 2),
        lambda length: structures.block_sparse_hmm(length, [2, 2, 1], 2, FOLLOWS),
        lambda length: structures.monarch_hmm(length, (2, 3), 2),
        lambda length: structures.second_order_hmm(length, 2, 2),
    ],
)
def test_homogeneous_models_of_all_lengths_have_the_same_parameters(build):
    assert build(4).num_parameters == build(9).num_parameters


def test_naive_bayes_classifies_by_bayes_rule():
    pc = ct.compile(structures.naive_bayes(3, 2, 4), dtype=torch.float64, seed=0)
    x = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]])
    observed = torch.tensor([True, True, True, False]).expand(2, 4)
    posterior = ct.queries.marginals(pc, ct.Evidence.observe(x, observed))[:, 3]
    prior = pc.log_weights(pc.circuit.node("prior"))[0]
    scores = torch.stack(
        [prior + sum(pc.log_weights(leaf)[x[b, leaf.var]] for leaf in pc.circuit.inputs[:3]) for b in range(2)]
    )
    torch.testing.assert_close(posterior, scores.softmax(1))


def mutual_information_by_hand(x, i, j, counts, pseudocount, weights):
    joint = torch.full((counts[i], counts[j]), pseudocount / (counts[i] * counts[j]), dtype=torch.float64)
    for row, weight in zip(x.tolist(), weights.tolist(), strict=True):
        joint[row[i], row[j]] += weight
    joint /= weights.sum() + pseudocount
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return (joint * (joint / independent).log()).sum()


@pytest.mark.parametrize("max_elements", [1 << 24, 64])
@pytest.mark.parametrize("weighted", [False, True])
def test_mutual_information_is_that_of_smoothed_counts(max_elements, weighted, monkeypatch):
    monkeypatch.setattr(chow_liu, "_MAX_ELEMENTS", max_elements)
    x = data(num_rows=50)
    x[:, 3] = x[:, 3].clamp_max(1)
    counts = [3, 3, 4, 2, 3]
    weights = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = weights if weighted else torch.ones(50, dtype=torch.float64)
    found = structures.empirical_mutual_information(
        x, num_categories=counts, pseudocount=0.5, weights=weights if weighted else None
    )
    for i, j in itertools.combinations(range(5), 2):
        expected = mutual_information_by_hand(x, i, j, counts, 0.5, weights)
        assert found[i, j] == pytest.approx(float(expected), rel=1e-9)
        assert found[j, i] == found[i, j]
    own = torch.bincount(x[:, 0], weights, minlength=3) + 0.5 / 3
    assert found[0, 0] == pytest.approx(float(torch.distributions.Categorical(own).entropy()))


@pytest.mark.parametrize("max_elements", [1 << 24, 64])
def test_mutual_information_of_incomplete_data_is_that_of_the_complete_pairs(max_elements, monkeypatch):
    monkeypatch.setattr(chow_liu, "_MAX_ELEMENTS", max_elements)
    x = data(num_rows=50)
    generator = torch.Generator().manual_seed(0)
    observed = torch.rand(x.shape, generator=generator) < 0.6
    observed[:, 4] = False
    weights = torch.rand(50, dtype=torch.float64, generator=generator)
    garbage = x.masked_fill(~observed, 99)
    found = structures.empirical_mutual_information(
        garbage, num_categories=3, pseudocount=0.0, weights=weights, observed=observed
    )
    for i, j in itertools.combinations(range(4), 2):
        rows = observed[:, i] & observed[:, j]
        alone = structures.empirical_mutual_information(
            x[rows], num_categories=3, pseudocount=0.0, weights=weights[rows]
        )
        assert found[i, j] == pytest.approx(float(alone[i, j]), rel=1e-9)
    assert not bool(found[4].any())
    with pytest.raises(ct.ArgumentError, match="observed: expected bool of the shape of data"):
        structures.hclt(x, 2, 3, observed=observed[:3])


def test_nan_is_missing_and_truth_values_are_categories():
    x = data()
    observed = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    expected = repr(structures.hclt(x, 2, observed=observed))
    gaps = x.double().masked_fill(~observed, torch.nan)
    assert repr(structures.hclt(gaps, 2)) == expected
    assert repr(structures.hclt(gaps, 2, observed=observed)) == expected
    information = structures.empirical_mutual_information
    assert torch.equal(information(gaps), information(x, observed=observed))
    assert repr(structures.hclt(x > 0, 2)) == repr(structures.hclt((x > 0).long(), 2))
    assert structures.hclt(torch.tensor([[0.0, torch.nan], [1.0, 1.0]]), 2).num_categories == (2, 2)


def test_bins_merge_neighbouring_values():
    x = data(num_categories=8)
    found = structures.empirical_mutual_information(x, num_categories=8, num_bins=4)
    torch.testing.assert_close(found, structures.empirical_mutual_information(x // 2, num_categories=4))


@pytest.mark.parametrize("seed", range(5))
def test_the_chow_liu_tree_has_the_maximum_total_mutual_information(seed):
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    x = data(num_vars=12, seed=seed)[:, shuffled]
    information = structures.empirical_mutual_information(x)
    edges = structures.maximum_spanning_tree(information)
    assert networkx.is_tree(networkx.Graph(edges))
    graph = networkx.Graph()
    graph.add_weighted_edges_from(
        (i, j, float(information[i, j])) for i, j in itertools.combinations(range(x.shape[1]), 2)
    )
    peer = networkx.maximum_spanning_tree(graph)
    total = sum(float(information[edge]) for edge in edges)
    assert total == pytest.approx(peer.size(weight="weight"), rel=1e-12)


def test_hclt_finds_the_tree_that_made_the_data():
    circuit = structures.hclt(data(num_rows=4000, num_vars=7), 2, 3)
    expected = structures.latent_tree([((var - 1) // 2, var) for var in range(1, 7)], 2, 3)
    assert {node.scope for node in circuit.sums} == {node.scope for node in expected.sums}


def test_the_root_of_a_tree_is_its_centre_unless_another_is_asked_for():
    path = [(var, var + 1) for var in range(8)]
    circuit = structures.latent_tree(path, 2, 2)
    assert {node.scope for node in circuit.root.children[0].children} >= {frozenset({4})}
    asked = structures.latent_tree(path, 2, 2, root=0)
    assert {node.scope for node in asked.root.children[0].children} == {frozenset({0}), frozenset(range(1, 9))}
    assert structures.latent_tree(networkx.Graph(path), 2, 2).num_parameters == circuit.num_parameters


def test_row_weights_stand_for_repeated_rows():
    x = data(num_rows=30)
    times = torch.randint(0, 4, (30,), generator=torch.Generator().manual_seed(0))
    weighted = structures.empirical_mutual_information(x, weights=times.double(), num_categories=3)
    repeated = structures.empirical_mutual_information(x.repeat_interleave(times, 0), num_categories=3)
    torch.testing.assert_close(weighted, repeated, rtol=1e-9, atol=1e-12)


def test_trees_of_bootstrap_samples_follow_the_seed():
    x = data(num_rows=20, num_vars=8)
    one, same, other = (repr(structures.hclt(x, 2, 3, num_trees=4, seed=seed)) for seed in (0, 0, 1))
    assert one == same
    assert one != other


def test_linear_tree_with_cp_is_a_tensor_train():
    pc = ct.compile(structures.linear_tree(3, 2, 2), dtype=torch.float64, seed=0)
    assert [len(node.scope) for node in pc.circuit.nodes if isinstance(node, ct.Product)] == [2, 3]


@pytest.mark.parametrize("sum_product", ["cp", "cp_shared", "tucker"])
def test_a_class_conditional_model_has_one_root_unit_per_class(sum_product):
    options = {"sum_product": sum_product, "num_classes": 3}
    for circuit in (
        structures.rat_spn(5, 2, 2, 2, 3, seed=0, **options),
        structures.quad_graph((2, 2), 2, 2, **options),
        structures.from_region_graph(ct.RegionGraph.fully_factorized(1), 2, 2, **options),
    ):
        assert (circuit.num_classes, circuit.root.num_units) == (3, 3)


@pytest.mark.parametrize("graph", ["quad_graph", "quad_tree"])
def test_cp_shared_ties_the_sums_of_one_height_and_position(graph):
    build = getattr(ct.RegionGraph, graph)
    circuit = structures.from_region_graph(build((4, 4)), 2, 2, sum_product="cp_shared")
    own = structures.from_region_graph(build((4, 4)), 2, 2)
    assert circuit.num_parameters < own.num_parameters
    owners = {node.tied_to or node for node in circuit.sums if node.num_units == 2 and len(node.children) == 1}
    assert len(owners) == 4 * 2  # four heights, two positions


def test_tucker_has_one_dense_sum_per_region():
    circuit = structures.quad_tree((2, 2), 3, 2, sum_product="tucker")
    assert [node.parameter_shape for node in circuit.sums] == [(3, 9), (3, 9), (1, 9)]


def test_units_of_leaves_may_differ():
    circuit = structures.quad_graph((2, 2), 3, 2, num_input_units=5)
    assert {node.num_units for node in circuit.inputs} == {5}
    assert {node.parameter_shape for node in circuit.sums} == {(3, 5), (3, 3), (1, 6)}


def clustered(num_rows, seed=0):
    """Draw rows of a mixture of two far components with independent variables."""
    generator = torch.Generator().manual_seed(seed)
    component = torch.rand(num_rows, 1, generator=generator) < 0.3
    chance = torch.where(component, 0.9, 0.1).expand(num_rows, 6)
    return (torch.rand(num_rows, 6, generator=generator) < chance).long()


def test_learn_spn_finds_a_mixture():
    circuit = ct.batteries.learn_spn(clustered(2000), seed=0)
    assert sorted(circuit.root.weights.flatten().tolist()) == pytest.approx([0.3, 0.7], abs=0.03)
    assert all(isinstance(child, ct.Product) and len(child.children) == 6 for child in circuit.root.children)
    held_out = clustered(500, seed=1)
    learned, independent = (
        ct.compile(fitted, dtype=torch.float64)(held_out).mean()
        for fitted in (circuit, ct.batteries.learn_spn(clustered(2000), min_rows=2001))
    )
    assert learned > independent + 0.5


@pytest.mark.parametrize("seed", range(10))
def test_learn_spn_tells_dependent_variables_apart_from_independent_ones_for_every_seed(seed):
    """Rows repeat in discrete data: two equal ones are no start for two clusters."""
    x = torch.tensor([[0, 0], [1, 1]]).repeat(100, 1)
    pc = ct.compile(ct.batteries.learn_spn(x, seed=seed))
    assert bool(pc(torch.tensor([[0, 1]])).exp() < 0.01)


def test_learn_spn_splits_independent_groups():
    x = torch.cat([clustered(1000), clustered(1000, seed=1)], 1)
    circuit = ct.batteries.learn_spn(x, seed=0)
    groups = {child.scope for child in circuit.root.children[0].children}
    assert groups == {frozenset(range(6)), frozenset(range(6, 12))}


@pytest.mark.parametrize("significance", [0.05, 0.3])
def test_learn_spn_splits_two_variables_where_scipys_g_test_does(significance):
    from scipy.stats import chi2_contingency

    for seed in range(20):
        x = torch.randint(3, (100, 2), generator=torch.Generator().manual_seed(seed))
        table = torch.zeros(3, 3).index_put_((x[:, 0], x[:, 1]), torch.ones(100), accumulate=True)
        p_value = chi2_contingency(table.numpy(), correction=False, lambda_="log-likelihood").pvalue
        circuit = ct.batteries.learn_spn(x, significance=significance, seed=0)
        assert (len(circuit.root.children) == 1) == (p_value >= significance)


def test_learn_spn_takes_the_smoothed_frequencies_of_one_variable():
    x = torch.tensor([[0], [0], [2], [0]])
    pc = ct.compile(ct.batteries.learn_spn(x, num_categories=4, smoothing=0.5), dtype=torch.float64)
    expected = torch.tensor([3.5, 0.5, 1.5, 0.5], dtype=torch.float64) / 6
    torch.testing.assert_close(ct.testing.enumerate_joint(pc).exp(), expected)


def test_learn_spn_follows_the_seed_and_bounds_its_memory(monkeypatch):
    x = data(num_rows=300, num_vars=8)
    one, other = (ct.compile(ct.batteries.learn_spn(x, seed=0, min_rows=20))(x) for _ in range(2))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    monkeypatch.setattr(learnspn, "_MAX_ELEMENTS", 64)
    torch.testing.assert_close(ct.compile(ct.batteries.learn_spn(x, seed=0, min_rows=20))(x), one)


def test_learn_spn_ends_where_all_rows_are_the_same():
    circuit = ct.batteries.learn_spn(torch.ones(100, 3, dtype=torch.int64))
    assert {len(node.scope) for node in circuit.nodes} == {1, 3}


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: structures.hmm(3, 0, 2), ct.ArgumentError, "num_states: expected an integer >= 1, got 0"),
        (lambda: structures.hmm(3, 2, "x"), ct.ArgumentError, "num_categories: expected a number of categories or an"),
        (
            lambda: structures.hmm(3, 2, 2, transition=torch.ones(3, 3) / 3),
            ct.StructureError,
            r"transition: expected a table of shape \(2, 2\), got \(3, 3\)",
        ),
        (
            lambda: structures.hmm(3, 2, 2, False, emission=torch.ones(2, 2, 2) / 2),
            ct.StructureError,
            r"emission: expected a table of shape \(2, 2\) or, one a step, \(3, 2, 2\), got \(2, 2, 2\)",
        ),
        (lambda: structures.hmm(3, 2, 2, initial=torch.ones(3) / 3), ct.StructureError, "initial: expected a table"),
        (lambda: structures.hmm(3, 2, 2, initial=[0.5, 0.5]), ct.ArgumentError, "initial: .* tensor .*, got list"),
        (
            lambda: structures.hmm(3, 2, [2, 3], emission=torch.ones(2, 2) / 2),
            ct.ArgumentError,
            "emission: expected one table or None for each of the 2 variables of a step .*, got Tensor",
        ),
        (lambda: structures.hmm(3, 2, []), ct.ArgumentError, "expected one table or None for each of the 0 variables"),
        (lambda: structures.hmm(3, 2, [2, "x"]), ct.ArgumentError, "num_categories: expected a number of categories"),
        (lambda: structures.hmm(3, 2, 2, num_classes=0), ct.ArgumentError, "num_classes: expected an integer >= 1"),
        (lambda: structures.low_rank_hmm(3, 2, 2, 0), ct.ArgumentError, "rank: expected an integer >= 1, got 0"),
        (
            lambda: structures.low_rank_hmm(3, 2, 2, 1, transition=torch.ones(2, 2) / 2),
            ct.ArgumentError,
            r"transition: expected two tables, \(2, 1\) and \(1, 2\), got Tensor",
        ),
        (
            lambda: structures.monarch_hmm(3, 4, 2),
            ct.ArgumentError,
            "num_states: expected two numbers, of the states a and b, got 4",
        ),
        (
            lambda: structures.monarch_hmm(3, (2, 0), 2),
            ct.ArgumentError,
            r"num_states\[1\]: expected an integer >= 1, got 0",
        ),
        (
            lambda: structures.monarch_hmm(3, (2, 1), 2, transition=(torch.ones(2, 1, 1), torch.ones(2, 2, 2) / 2)),
            ct.StructureError,
            r"transition\[1\]: expected a table of shape \(1, 2, 2\), got \(2, 2, 2\)",
        ),
        (
            lambda: structures.block_sparse_hmm(3, [1, 1], 2, torch.eye(2).bool(), transition=torch.eye(2), rank=1),
            ct.ArgumentError,
            "transition: expected a table, or W, U and V with a rank, got tensor",
        ),
        (
            lambda: structures.block_sparse_hmm(3, [1, 1], 2, torch.eye(2).bool(), rank=0),
            ct.ArgumentError,
            "rank: expected an integer >= 1, got 0",
        ),
        (
            lambda: structures.block_sparse_hmm(3, [2, 0], 2, torch.ones(2, 2).bool()),
            ct.ArgumentError,
            r"group_sizes\[1\]: expected an integer >= 1, got 0",
        ),
        (
            lambda: structures.block_sparse_hmm(3, [1, 1], 2, torch.ones(2, 2)),
            ct.ArgumentError,
            r"follows: expected bool of shape \(2, 2\).*got torch.float32",
        ),
        (
            lambda: structures.block_sparse_hmm(3, [1, 1], 2, [[True], [True, True]]),
            ct.ArgumentError,
            r"follows: expected bool of shape \(2, 2\).*got \[\[True\]",
        ),
        (
            lambda: structures.block_sparse_hmm(3, [1, 1], 2, [[True, True], [False, False]]),
            ct.ArgumentError,
            "follows: no group may follow group 1",
        ),
        (
            lambda: structures.block_sparse_hmm(
                3, [1, 1], 2, [[True, False], [True, True]], transition=torch.full((2, 2), 0.5)
            ),
            ct.StructureError,
            "expected zeros outside of the pattern `follows`, got 0.5 from state 0 to state 1",
        ),
        (lambda: structures.latent_tree([(0, 1), (1, 2), (2, 0)], 2, 2), ct.StructureError, "expected a tree, got 3"),
        (lambda: structures.latent_tree([(0, 1), (2, 3)], 2, 2), ct.StructureError, "expected a tree, got 2 edges"),
        (lambda: structures.latent_tree([(0, 2)], 2, 2), ct.StructureError, "variables 0 to 1, each once"),
        (lambda: structures.latent_tree([(0, 1)], 2, 2, root=5), ct.ArgumentError, "root: expected a node of the tree"),
        (lambda: structures.latent_tree([0, 1], 2, 2), ct.ArgumentError, "tree: expected pairs of nodes, got 0"),
        (
            lambda: structures.latent_tree([("a", "b")], 2, 2, variables={"a": 0}, root="a"),
            ct.StructureError,
            "the leaf 'b' of the tree observes nothing",
        ),
        (
            lambda: structures.latent_tree([("a", "b")], 2, 2, variables={"a": 0, "b": 1, "c": 2}),
            ct.ArgumentError,
            "variables: 'c' is not a node of the tree",
        ),
        (lambda: structures.hclt(torch.rand(3, 2), 2), ct.ArgumentError, "data: expected whole numbers, and NaN"),
        (lambda: structures.hclt(torch.full((3, 2), torch.inf), 2), ct.ArgumentError, "data: expected whole numbers"),
        (lambda: ct.batteries.learn_spn(torch.rand(3, 2)), ct.ArgumentError, "data: expected an int64 tensor"),
        (lambda: ct.batteries.learn_spn(data(), num_clusters=1), ct.ArgumentError, "num_clusters: .* >= 2, got 1"),
        (
            lambda: ct.batteries.learn_spn(data(), significance=0),
            ct.ArgumentError,
            "significance: expected a number above",
        ),
        (lambda: ct.batteries.learn_spn(data(), smoothing=-1), ct.ArgumentError, "smoothing: expected a number"),
        (lambda: structures.hclt([[1]], 2), ct.ArgumentError, "data: expected an int64 tensor"),
        (lambda: structures.hclt(data(), 2, 2), ct.ArgumentError, "data: expected values from 0 to 1, got 2"),
        (lambda: structures.hclt(data(), 2, weights=torch.ones(3)), ct.ArgumentError, "weights: expected numbers of"),
        (lambda: structures.hclt(data(), 2, weights=-torch.ones(200)), ct.ArgumentError, "weights: .*>= 0, not all 0"),
        (lambda: structures.hclt(data(), 2, pseudocount=-1), ct.ArgumentError, "pseudocount: expected a finite number"),
        (lambda: structures.hclt(data(), 2, num_trees=0), ct.ArgumentError, "num_trees: expected an integer >= 1"),
        (
            lambda: structures.from_region_graph("graph", 2, 2),
            ct.ArgumentError,
            "region_graph: expected a ct.RegionGraph, got str",
        ),
        (lambda: structures.quad_tree((2, 2), 2, 2, sum_product="c"), ct.ArgumentError, "sum_product: expected 'cp'"),
        (lambda: structures.quad_tree((2, 2), 2, [2, 2]), ct.ArgumentError, "distribution: expected one number or"),
        (lambda: structures.quad_tree((1, 2), 2, {0: 2}), ct.ArgumentError, "got none for variable 1"),
        (
            lambda: structures.from_region_graph(ct.RegionGraph.fully_factorized(30), 2, 2, sum_product="tucker"),
            ct.StructureError,
            "'tucker' would multiply 30 parts into 1073741824 units",
        ),
    ],
)
def test_a_wrong_argument_of_a_structure_names_itself(build, error, message):
    with pytest.raises(error, match=message):
        build()
