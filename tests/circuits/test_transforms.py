"""A transformation is exact: the enumerated joint distributions before and after it are related as it says."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transform_cases import CLOSE, assert_same, compiled, joint_of, small_circuits

import circuits as ct
from circuits.learning import expected_flows


def samples(pc, count=20, seed=0):
    return ct.queries.sample(pc, count, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def mean_loss(pc, pruned, data):
    return float((pc(data) - pruned(data)).mean())


@given(small_circuits(), st.data())
@settings(max_examples=40)
def test_permute_permutes_the_axes_of_the_joint(circuit, data):
    pc = compiled(circuit)
    order = data.draw(st.permutations(range(circuit.num_vars)))
    permuted = ct.transforms.permute(pc, order)
    assert_same(joint_of(permuted), joint_of(pc).permute(*order))
    x = samples(pc, 5)
    torch.testing.assert_close(permuted(x[:, order]), pc(x), **CLOSE)
    assert permuted.circuit.num_parameters == circuit.num_parameters  # tied parameters stay tied


@given(small_circuits(min_vars=2), st.data())
@settings(max_examples=40)
def test_marginalize_sums_axes_of_the_joint(circuit, data):
    pc = compiled(circuit)
    removed = data.draw(st.sets(st.integers(0, circuit.num_vars - 1), max_size=circuit.num_vars - 1))
    marginal = ct.transforms.marginalize(pc, removed)
    expected = torch.logsumexp(joint_of(pc), sorted(removed)) if removed else joint_of(pc)
    assert_same(joint_of(marginal), expected)
    if not removed:
        assert marginal.circuit.num_parameters == circuit.num_parameters


@given(small_circuits(), st.data())
def test_condition_renormalises_the_joint(circuit, data):
    pc = compiled(circuit)
    evidence = data.draw(ct.testing.evidence(circuit, batch_size=1, largest=3.0))
    joint = joint_of(pc)
    factors = evidence.dense(max(circuit.num_categories), torch.float64)[0]
    for var, count in enumerate(circuit.num_categories):
        joint = joint + factors[var, :count].reshape([count if v == var else 1 for v in range(circuit.num_vars)])
    log_z = torch.logsumexp(joint.flatten(), 0)
    if log_z == -torch.inf:
        with pytest.raises(ct.ImpossibleEvidenceError):
            ct.transforms.condition(pc, evidence, variables="all")
        return
    posterior = joint - log_z
    assert_same(joint_of(ct.transforms.condition(pc, evidence, variables="all")), posterior)
    missing = torch.zeros(circuit.num_vars, dtype=torch.bool) if evidence.missing is None else evidence.missing[0]
    fixed = ((factors > -torch.inf).sum(1) == 1) & ~missing
    if bool(fixed.all()):
        with pytest.raises(ct.ArgumentError, match="variables='all'"):
            ct.transforms.condition(pc, evidence)
        return
    values = [int(factors[v].argmax()) if fixed[v] else slice(None) for v in range(circuit.num_vars)]
    assert_same(joint_of(ct.transforms.condition(pc, evidence)), posterior[tuple(values)])


def test_condition_takes_one_query():
    pc = compiled(ct.structures.hmm(3, 2, 2))
    with pytest.raises(ct.ArgumentError, match="B = 2"):
        ct.transforms.condition(pc, ct.Evidence.nothing(2, 3))
    with pytest.raises(ct.ArgumentError, match="remaining"):
        ct.transforms.condition(pc, ct.Evidence.nothing(1, 3), variables="some")


@given(small_circuits(), st.integers(0, 3))
@settings(max_examples=40)
def test_a_circuit_times_another_of_its_structure(circuit, seed):
    one = compiled(circuit, seed)
    other = compiled(circuit, seed + 10)
    total = joint_of(one) + joint_of(other)
    log_z = torch.logsumexp(total.flatten(), 0)
    try:
        if log_z == -torch.inf:
            with pytest.raises(ct.ImpossibleEvidenceError):
                ct.transforms.multiply(one, other)
            return
        result = ct.transforms.multiply(one, other)
    except ct.PropertyError:
        assume(False)  # not structured-decomposable
    torch.testing.assert_close(result.log_partition, log_z, **CLOSE)
    assert_same(joint_of(result.pc), total - log_z)


def tree(parts, num_units, mode="elementwise"):
    """A product over nested tuples of variables, with sums in between."""
    if isinstance(parts, int):
        return ct.inputs(parts, num_units, ct.Categorical(3))
    node = ct.product(*(tree(part, num_units, mode) for part in parts), mode=mode)
    return ct.sum(node, num_units=num_units)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (((0, 1), (2, 3)), ((2, 3), (0, 1))),
        ((0, 1, 2, 3), ((0, 1), (2, 3))),
        ((0, 1, 2, 3), (3, (0, (1, 2)))),
        (((0, 1), (2, 3)), (0, 1, 2, 3)),
        ((0, (1, 2), 3), ((0, 3), (1, 2))),
    ],
)
@pytest.mark.parametrize("modes", [("elementwise", "outer"), ("outer", "outer"), ("elementwise", "elementwise")])
def test_multiply_lines_up_products_that_split_more_finely(left, right, modes):
    one = compiled(ct.Circuit(ct.sum(tree(left, 2, modes[0]), num_units=1)), 1)
    other = compiled(ct.Circuit(ct.sum(tree(right, 3 if modes[1] == "elementwise" else 2, modes[1]), num_units=1)), 2)
    result = ct.transforms.multiply(one, other)
    total = joint_of(one) + joint_of(other)
    log_z = torch.logsumexp(total.flatten(), 0)
    torch.testing.assert_close(result.log_partition, log_z, **CLOSE)
    assert_same(joint_of(result.pc), total - log_z)


def test_multiply_keeps_names_and_the_ties_of_inputs():
    """The product of two homogeneous HMMs has one emission table, of the pairs of states, whatever its length."""
    one, two = (compiled(ct.structures.hmm(5, num_states, 7), seed=num_states) for num_states in (3, 2))
    result = ct.transforms.multiply(one, two)
    assert {node.name for node in result.pc.circuit.sums} == {"initial", *(f"transition{t}" for t in range(4))}
    assert {node.name for node in result.pc.circuit.inputs} == {f"emission{t}" for t in range(5)}
    assert [node.tied_to is None for node in result.pc.circuit.inputs].count(True) == 1
    assert result.pc.circuit.num_parameters == 7 * 6 + 4 * 6 * 6 + 6
    assert_same(joint_of(result.pc), joint_of(one) + joint_of(two) - result.log_partition)


def test_multiply_joins_two_names_and_gives_none_twice():
    def mixture(*names):
        leaves = [ct.inputs(var, 2, ct.Categorical(2), name=name) for var, name in enumerate(names)]
        return compiled(ct.Circuit(ct.sum(ct.product(*leaves), num_units=1, name="root")))

    one = mixture("left", None)
    product = ct.transforms.multiply(one, mixture("right", "second")).pc.circuit
    assert {node.name for node in (*product.inputs, *product.sums)} == {"left*right", "second", "root"}
    leaves = [ct.inputs(0, 1, ct.Categorical(2), name="same"), ct.inputs(0, 1, ct.Categorical(2), name="other")]
    two = compiled(ct.Circuit(ct.sum(*leaves, num_units=1)))
    squared = ct.transforms.multiply(two, compiled(ct.Circuit(ct.inputs(0, 1, ct.Categorical(2))))).pc.circuit
    assert sorted(node.name for node in squared.inputs) == ["other", "same"]
    names = [node.name for node in ct.transforms.multiply(two, two).pc.circuit.inputs]
    assert len(set(names) - {None}) == len([name for name in names if name])


def test_multiply_refuses_circuits_that_are_not_compatible():
    one = compiled(ct.Circuit(ct.sum(tree(((0, 1), (2, 3)), 2), num_units=1)))
    other = compiled(ct.Circuit(ct.sum(tree(((0, 2), (1, 3)), 2), num_units=1)))
    with pytest.raises(ct.PropertyError, match=r"not compatible.*\{0, 1\}, \{2, 3\}.*\{0, 2\}, \{1, 3\}"):
        ct.transforms.multiply(one, other)
    with pytest.raises(ct.ArgumentError, match="categories"):
        ct.transforms.multiply(one, compiled(ct.structures.hmm(4, 2, 2)))


def test_the_product_of_long_chains_does_not_recurse():
    one, other = (compiled(ct.structures.hmm(1050, 1, 1), seed) for seed in (0, 1))
    result = ct.transforms.multiply(one, other)
    assert len(result.pc.circuit.nodes) == len(one.circuit.nodes)
    torch.testing.assert_close(result.log_partition, torch.zeros((), dtype=torch.float64), **CLOSE)


@given(small_circuits(), st.integers(1, 3))
@settings(max_examples=40)
def test_growing_without_noise_changes_nothing(circuit, num_copies):
    pc = compiled(circuit)
    grown = ct.transforms.grow(pc, num_copies=num_copies, noise=0.0)
    assert_same(joint_of(grown), joint_of(pc))


@given(small_circuits(zero_weights=False))
def test_growing_with_noise_is_normalised_and_seeded(circuit):
    pc = compiled(circuit)
    one, other = (ct.transforms.grow(pc, noise=0.3, seed=3) for _ in range(2))
    assert math.isclose(float(joint_of(one).exp().sum()), 1.0, rel_tol=1e-9)
    assert all(torch.equal(one.bank[name], other.bank[name]) for name in one.bank)


def test_growing_doubles_units_and_keeps_ties():
    pc = compiled(ct.structures.hmm(4, 3, 5))
    grown = ct.transforms.grow(pc, noise=0.1, seed=0)
    assert {node.num_units for node in grown.circuit.nodes} == {6, 1}
    assert grown.circuit.num_parameters == 6 + 6 * 6 + 6 * 5
    copies = grown.log_weights(grown.circuit.node("emission0"))
    assert not torch.allclose(copies[:, :3], copies[:, 3:])


@given(small_circuits(), st.floats(0, 1), st.integers(0, 3))
@settings(max_examples=40)
def test_pruning_loses_at_most_the_bound(circuit, fraction, seed):
    pc = compiled(circuit, seed)
    data = samples(pc, 12)
    pruned = ct.transforms.prune(pc, data, fraction=fraction, batch_size=5)
    assert math.isclose(float(joint_of(pruned.pc).exp().sum()), 1.0, rel_tol=1e-9)
    assert mean_loss(pc, pruned.pc, data) <= pruned.max_loss + 1e-9
    assert pruned.pc.circuit.num_units <= circuit.num_units
    if pruned.num_removed == 0:
        assert_same(joint_of(pruned.pc), joint_of(pc))


@given(small_circuits(), st.sampled_from([0.0, 0.01, 0.1, 1.0]))
@settings(max_examples=40)
def test_pruning_to_a_bound_keeps_it_and_goes_as_far_as_it_allows(circuit, max_loss):
    pc = compiled(circuit)
    data = samples(pc, 12)
    pruned = ct.transforms.prune(pc, data, max_loss=max_loss)
    assert pruned.max_loss <= max_loss
    assert mean_loss(pc, pruned.pc, data) <= max_loss + 1e-9


def test_the_bound_is_at_most_that_of_the_paper():
    pc = compiled(ct.structures.hmm(4, 6, 3, homogeneous=False))
    data = samples(pc, 30)
    num_positive = sum(pc.bank[name].numel() for name in pc.sum_banks)
    pruned = ct.transforms.prune(pc, data, fraction=0.2)
    assert pruned.num_removed == int(0.2 * num_positive)
    per_sample = [expected_flows(pc, x.unsqueeze(0)).flows for x in data]
    flat = torch.stack([torch.cat([flows[name].flatten() for name in pc.sum_banks]) for flows in per_sample])
    edges = flat.sum(0).argsort()[: pruned.num_removed]
    of_the_paper = -torch.log1p(-flat[:, edges].sum(1).clamp_max(1.0)).mean()
    assert 0 < pruned.max_loss <= float(of_the_paper)


def test_pruned_units_disappear():
    transition = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    initial = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    pc = compiled(ct.structures.hmm(4, 3, 2, initial=initial, transition=transition))
    trimmed = ct.transforms.trim(pc)
    assert {node.num_units for node in trimmed.circuit.nodes} == {2, 1}
    assert trimmed.circuit.num_parameters == 2 + 2 * 2 + 2 * 2  # still homogeneous
    assert_same(joint_of(trimmed), joint_of(pc))


@pytest.mark.parametrize(
    "options", [{}, {"fraction": 0.5, "max_loss": 0.1}, {"fraction": 1.5}, {"max_loss": -1}, {"fraction": math.nan}]
)
def test_prune_checks_its_options(options):
    pc = compiled(ct.structures.hmm(3, 2, 2))
    with pytest.raises(ct.ArgumentError, match=r"fraction|max_loss"):
        ct.transforms.prune(pc, samples(pc), **options)


def test_prune_refuses_impossible_data():
    emission = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    pc = compiled(ct.structures.hmm(3, 2, 2, emission=emission))
    with pytest.raises(ct.ImpossibleEvidenceError, match="data"):
        ct.transforms.prune(pc, torch.ones(1, 3, dtype=torch.int64), fraction=0.5)


@given(small_circuits())
@settings(max_examples=40)
def test_trimming_changes_nothing(circuit):
    pc = compiled(circuit)
    trimmed = ct.transforms.trim(pc)
    assert_same(joint_of(trimmed), joint_of(pc))
    assert trimmed.circuit.num_units <= circuit.num_units
    assert trimmed.circuit.num_parameters <= circuit.num_parameters


@given(small_circuits(), st.integers(1, 2))
@settings(max_examples=40)
def test_merging_changes_nothing_and_undoes_growing(circuit, num_copies):
    pc = ct.transforms.grow(compiled(circuit), num_copies=num_copies, noise=0.0)
    merged = ct.transforms.merge_equal_units(pc)
    assert_same(joint_of(merged), joint_of(pc))
    assert merged.circuit.num_parameters <= pc.circuit.num_parameters


def test_merging_undoes_the_growing_of_a_chain():
    pc = compiled(ct.structures.hmm(4, 3, 5))
    merged = ct.transforms.merge_equal_units(ct.transforms.grow(pc, num_copies=3, noise=0.0))
    assert repr(merged.circuit) == repr(pc.circuit)
    assert_same(joint_of(merged), joint_of(pc))


@given(small_circuits())
def test_untying_changes_nothing_and_leaves_no_tie(circuit):
    pc = compiled(circuit)
    untied = ct.transforms.untie_parameters(pc)
    assert_same(joint_of(untied), joint_of(pc))
    assert all(node.tied_to is None for node in (*untied.circuit.inputs, *untied.circuit.sums))


def test_sharing_averages_and_undoes_untying():
    pc = compiled(ct.structures.hmm(4, 3, 5))
    untied = ct.transforms.untie_parameters(pc, ["emission0", "emission1"])
    assert untied.circuit.num_parameters == pc.circuit.num_parameters + 2 * 15
    shared = ct.transforms.share_parameters(untied, [[f"emission{step}" for step in range(4)]])
    assert shared.circuit.num_parameters == pc.circuit.num_parameters
    assert_same(joint_of(shared), joint_of(pc))
    free = compiled(ct.structures.hmm(3, 2, 4, homogeneous=False))
    tied = ct.transforms.share_parameters(free, [["transition0", free.circuit.node("transition1")]])
    steps = [free.log_weights(free.circuit.node(name)).exp() for name in ("transition0", "transition1")]
    for name in ("transition0", "transition1"):
        torch.testing.assert_close(tied.log_weights(tied.circuit.node(name)).exp(), (steps[0] + steps[1]) / 2, **CLOSE)
    with pytest.raises(ct.StructureError, match="expected one kind of node"):
        ct.transforms.share_parameters(free, [["transition0", "emission0"]])
    with pytest.raises(ct.ArgumentError, match="two groups"):
        ct.transforms.share_parameters(free, [["transition0", "transition1"], ["transition1"]])


def enumerated_chain(chain):
    joint = chain.initial.log()
    for step, emission in enumerate(chain.emission):
        if step:
            joint = torch.logsumexp(joint.unsqueeze(-1) + chain.transition[step - 1].log(), -2)
        joint = joint.unsqueeze(-2) + emission.log().t()
    return torch.logsumexp(joint, -1).permute(*torch.tensor(chain.order).argsort().tolist())


def mixed_chain():
    last = ct.product(*(ct.inputs(var, 3, ct.Categorical(3)) for var in (0, 3)))
    middle = ct.product(ct.sum(last, num_units=2), ct.sum(ct.inputs(1, 4, ct.Bernoulli()), num_units=2))
    first = ct.product(ct.sum(ct.sum(middle, num_units=3), num_units=2), ct.inputs(2, 2, ct.Categorical(2)))
    return ct.Circuit(ct.sum(first, num_units=1))


@pytest.mark.parametrize(
    "circuit",
    [
        ct.structures.hmm(4, 3, 2),
        ct.structures.hmm(1, 3, 2),
        ct.structures.mixture(4, [2, 3, 1, 2], 3),
        ct.structures.fully_factorized(3, 2),
        mixed_chain(),
    ],
    ids=["hmm", "one step", "naive Bayes", "independent", "mixed"],
)
def test_a_chain_has_the_distribution_of_its_circuit(circuit):
    pc = compiled(circuit)
    assert_same(enumerated_chain(ct.transforms.to_chain(pc)), joint_of(pc))


def test_a_conditioned_hmm_is_a_chain_that_builds_an_hmm_again():
    pc = compiled(ct.structures.hmm(4, 3, 2))
    evidence = ct.Evidence.soft(torch.randn(1, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    chain = ct.transforms.to_chain(ct.transforms.condition(pc, evidence))
    tables = {"initial": chain.initial, "transition": torch.stack(chain.transition)}
    rebuilt = ct.structures.hmm(4, 3, 2, homogeneous=False, emission=torch.stack(chain.emission), **tables)
    posterior = ct.testing.enumerated_marginals(joint_of(pc), evidence)
    torch.testing.assert_close(ct.queries.marginals(compiled(rebuilt), ct.Evidence.nothing(1, 4)), posterior, **CLOSE)


@pytest.mark.parametrize(
    ("circuit", "problem"),
    [
        (ct.Circuit(ct.sum(tree(((0, 1), (2, 3)), 2), num_units=1)), r"branches into .*\{0, 1\}.* and .*\{2, 3\}"),
        (ct.Circuit(ct.sum(tree((0, 1), 2, "outer"), num_units=1)), "outer product"),
        (ct.Circuit(ct.sum(tree((0, 1), 2), tree((0, 1), 2), num_units=1)), "mixes 2 nodes"),
    ],
)
def test_what_is_no_chain_says_where(circuit, problem):
    with pytest.raises(ct.PropertyError, match=problem):
        ct.transforms.to_chain(compiled(circuit))


def test_what_keeps_the_units_keeps_the_tables_of_a_monarch_chain():
    pc = compiled(ct.structures.monarch_hmm(4, (2, 3), 2))
    x, observed = torch.tensor([[0, 1, 1, 0]]), torch.tensor([[False, True, False, False]])
    given = ct.transforms.condition(pc, ct.Evidence.observe(x, observed), variables="all")
    turned = ct.transforms.permute(pc, [3, 2, 1, 0])
    for made in (given, turned, ct.transforms.marginalize(pc, [0])):
        assert {node.parameter_shape for node in made.circuit.sums} == {(2, 2), (3, 3), (1, 6)}
    assert turned.circuit.num_parameters == pc.circuit.num_parameters
    halves = ct.transforms.grow(pc, noise=0.0)
    assert_same(joint_of(halves), joint_of(pc))
    assert max(node.parameter_shape[1] for node in halves.circuit.sums) == 2 * 6
    pruned = ct.transforms.trim(ct.transforms.multiply(pc, pc).pc)
    assert_same(joint_of(pruned), joint_of(ct.transforms.multiply(turned, turned).pc).permute(3, 2, 1, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_kept(dtype):
    pc = ct.compile(ct.structures.hmm(4, 2, 3), dtype=dtype, seed=0)
    x = samples(pc, 5)
    results = [
        ct.transforms.permute(pc, [3, 1, 2, 0]),
        ct.transforms.marginalize(pc, [1]),
        ct.transforms.condition(pc, ct.Evidence.observe(x[:1], torch.tensor([[True, False, False, True]]))),
        ct.transforms.multiply(pc, pc).pc,
        ct.transforms.grow(pc),
        ct.transforms.prune(pc, x, fraction=0.3).pc,
        ct.transforms.merge_equal_units(pc),
        ct.transforms.untie_parameters(pc),
    ]
    assert all(result.dtype == dtype for result in results)


def nested_outer_products():
    """Products of products, so that units of what is left are spread over units of what was."""
    pair = ct.product(ct.inputs(0, 2, ct.Categorical(2)), ct.inputs(1, 3, ct.Categorical(2)), mode="outer")
    triple = ct.product(pair, ct.inputs(2, 2, ct.Categorical(3)), mode="outer")
    again = ct.product(triple, ct.inputs(3, 12, ct.Bernoulli()))
    return ct.Circuit(ct.sum(again, num_units=1))


def test_products_of_products_are_transformed_too():
    pc = compiled(nested_outer_products())
    joint = joint_of(pc)
    for removed in ([0], [1], [2], [3], [1, 3], [0, 1], [1, 2]):
        assert_same(joint_of(ct.transforms.marginalize(pc, removed)), torch.logsumexp(joint, removed))
    assert_same(joint_of(ct.transforms.grow(pc, noise=0.0)), joint)
    assert_same(joint_of(ct.transforms.merge_equal_units(pc)), joint)
    other = compiled(nested_outer_products(), seed=1)
    result = ct.transforms.multiply(pc, other)
    assert_same(joint_of(result.pc), joint + joint_of(other) - result.log_partition)


def test_every_unit_keeps_the_edge_of_its_greatest_flow():
    pc = compiled(ct.structures.hmm(4, 3, 2, homogeneous=False))
    pruned = ct.transforms.prune(pc, samples(pc), fraction=1.0)
    for node in pruned.pc.circuit.sums:
        assert ((pruned.pc.log_weights(node) > -torch.inf).sum(1) == 1).all()


def real_and_counted(seed=0):
    """A mixture over a Gaussian, a Poisson and a categorical variable."""
    families = [ct.Gaussian(), ct.Poisson(), ct.Categorical(3)]
    leaves = [ct.inputs(var, 2, family) for var, family in enumerate(families)]
    return compiled(ct.Circuit(ct.sum(ct.product(*leaves), num_units=1)), seed)


def test_families_of_infinitely_many_values_pass_through_or_say_so():
    pc = real_and_counted()
    x = torch.tensor([[0.3, 2.0, 1.0], [-1.4, 0.0, 2.0]], dtype=torch.float64)
    nothing = torch.full_like(x[:, :1], torch.nan)
    for transform in (
        ct.transforms.trim,
        ct.transforms.merge_equal_units,
        ct.transforms.untie_parameters,
        lambda pc: ct.transforms.grow(pc, noise=0.0),
    ):
        torch.testing.assert_close(transform(pc)(x), pc(x), **CLOSE)
    torch.testing.assert_close(ct.transforms.permute(pc, [2, 0, 1])(x[:, [2, 0, 1]]), pc(x), **CLOSE)
    without_count = torch.cat([x[:, :1], nothing, x[:, 2:]], 1)
    torch.testing.assert_close(ct.transforms.marginalize(pc, [1])(x[:, [0, 2]]), pc(without_count), **CLOSE)
    real_only = torch.cat([x[1:, :1], nothing[:1], nothing[:1]], 1)
    rest = ct.transforms.condition(pc, ct.Evidence.observe(real_only))
    torch.testing.assert_close(rest(x[1:, 1:]), pc(x[1:]) - pc(real_only), **CLOSE)
    box = ct.Evidence.where(
        torch.tensor([True, False, False]),
        ct.Evidence.observe(real_only),
        ct.Evidence.where(
            torch.tensor([False, False, True]),
            ct.Evidence.interval(torch.zeros(1, 3), torch.ones(1, 3)),
            ct.Evidence.nothing(1, 3),
        ),
    )
    rest = ct.transforms.condition(pc, box)
    torch.testing.assert_close(
        rest(x[1:, 1:2]), pc(torch.tensor([[-1.4, 0.0, 1.0]], dtype=torch.float64)) - pc.log_partition(box), **CLOSE
    )
    for operation in (
        lambda: ct.transforms.condition(pc, ct.Evidence.interval(torch.zeros(1, 3), torch.ones(1, 3))),
        lambda: ct.transforms.condition(pc, ct.Evidence.observe(real_only), variables="all"),
        lambda: ct.transforms.multiply(pc, pc),
    ):
        with pytest.raises(ct.PropertyError, match=r"finitely many values.*scope=\{[01]\}.*(Gaussian|Poisson)"):
            operation()


def test_the_product_of_gaussian_circuits():
    circuit = ct.Circuit(
        ct.sum(ct.product(*(ct.inputs(var, 2, ct.Gaussian()) for var in range(2)), mode="outer"), num_units=1)
    )
    one, other = compiled(circuit, 1), compiled(circuit, 2)
    other.set_weights(circuit.inputs[0], torch.tensor([[0.5, -1.0], [1e-3, 0.7]]))
    product = ct.transforms.multiply(one, other)
    x = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(product.pc(x), one(x) + other(x) - product.log_partition, **CLOSE)
    nothing = ct.Evidence.nothing(1, 2)
    torch.testing.assert_close(product.pc.log_partition(nothing), torch.zeros(1, dtype=torch.float64), **CLOSE)
    axis = torch.linspace(-9, 9, 1801, dtype=torch.float64)
    other.set_weights(circuit.inputs[0], torch.tensor([[0.5, -1.0], [0.3, 0.7]]))
    grid = torch.cartesian_prod(axis, axis)
    total = torch.logsumexp(one(grid) + other(grid), 0) + 2 * math.log(0.01)
    torch.testing.assert_close(ct.transforms.multiply(one, other).log_partition, total, **CLOSE)


def test_tables_take_the_place_of_finite_families():
    leaves = [ct.inputs(0, 2, ct.Binomial(2)), ct.inputs(1, 2, ct.Literal(3, (2, 0)))]
    pc = compiled(ct.Circuit(ct.sum(ct.product(*leaves), num_units=1)))
    soft = ct.Evidence.soft(torch.tensor([[[0.0, 1.0, -1.0], [0.0, 0.5, 2.0]]], dtype=torch.float64))
    families = {node.distribution for node in ct.transforms.condition(pc, soft).circuit.inputs}
    assert families == {ct.Categorical(3)}
    assert {node.distribution for node in ct.transforms.multiply(pc, pc).pc.circuit.inputs} == families


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda pc, x: ct.transforms.permute(pc, torch.tensor([0, 2, 1, 3])), "order: expected a permutation"),
        (lambda pc, x: ct.transforms.permute(pc, [0.0, 1.0, 2.0, 3.0]), "order: expected a permutation"),
        (lambda pc, x: ct.transforms.marginalize(pc, 1), "variables: expected integers in a list"),
        (lambda pc, x: ct.transforms.grow(pc, noise="0.1"), "noise: expected a standard deviation"),
        (lambda pc, x: ct.transforms.prune(pc, x[:0], max_loss=0.1), "data: expected at least one sample"),
        (lambda pc, x: ct.transforms.prune(pc, x, fraction="0.1"), "fraction: expected a share"),
        (lambda pc, x: ct.transforms.prune(pc, x, max_loss="0.1"), "max_loss: expected nats"),
    ],
)
def test_nonsense_is_refused_by_name(transform, message):
    pc = ct.compile(ct.structures.hmm(4, 2, 2), seed=0)
    with pytest.raises(ct.ArgumentError, match=message):
        transform(pc, torch.zeros(5, 4, dtype=torch.int64))
