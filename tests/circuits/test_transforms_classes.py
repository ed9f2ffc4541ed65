"""Transformations of circuits with classes are exact for every class: joints below are (R, C_0, ..., C_D-1)."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transform_cases import CLOSE, assert_same, compiled, joint_of, small_circuits

import circuits as ct

class_circuits = small_circuits(max_classes=3)


def flat(joint):
    """Log-probabilities of all assignments, (R, N)."""
    return joint.flatten(1)


def per_class(numbers, joint):
    """Numbers of the classes, (R,), in a shape that broadcasts with their tables."""
    return numbers.reshape(-1, *[1] * (joint.dim() - 1))


def with_evidence(joint, circuit, evidence):
    """The classes' tables times the factors of one query."""
    factors = evidence.dense(max(circuit.num_categories), torch.float64)[0]
    for var, count in enumerate(circuit.num_categories):
        joint = joint + factors[var, :count].reshape([count if v == var else 1 for v in range(circuit.num_vars)])
    return joint


@given(class_circuits, st.data())
@settings(max_examples=40)
def test_permute_permutes_the_axes_of_every_class(circuit, data):
    pc = compiled(circuit)
    order = data.draw(st.permutations(range(circuit.num_vars)))
    permuted = ct.transforms.permute(pc, order)
    assert permuted.circuit.num_classes == circuit.num_classes
    assert_same(joint_of(permuted), joint_of(pc).permute(0, *(1 + var for var in order)))


@given(class_circuits, st.data())
@settings(max_examples=40)
def test_marginalize_sums_axes_of_every_class(circuit, data):
    pc = compiled(circuit)
    removed = data.draw(st.sets(st.integers(0, circuit.num_vars - 1), max_size=circuit.num_vars - 1))
    marginal = ct.transforms.marginalize(pc, removed)
    axes = [1 + var for var in sorted(removed)]
    assert_same(joint_of(marginal), torch.logsumexp(joint_of(pc), axes) if axes else joint_of(pc))


@given(class_circuits, st.data())
def test_condition_renormalises_every_class(circuit, data):
    pc = compiled(circuit)
    evidence = data.draw(ct.testing.evidence(circuit, batch_size=1, largest=3.0))
    joint = with_evidence(joint_of(pc), circuit, evidence)
    log_z = torch.logsumexp(flat(joint), 1)
    if bool((log_z == -torch.inf).any()):
        with pytest.raises(ct.ImpossibleEvidenceError):
            ct.transforms.condition(pc, evidence, variables="all")
        return
    given_evidence = ct.transforms.condition(pc, evidence, variables="all")
    assert given_evidence.circuit.num_classes == circuit.num_classes
    assert_same(joint_of(given_evidence), joint - per_class(log_z, joint))


@given(class_circuits, st.data())
def test_evidence_that_names_the_class_leaves_one_distribution(circuit, data):
    pc = compiled(circuit)
    evidence = data.draw(ct.testing.evidence(circuit, batch_size=1, largest=3.0))
    label = data.draw(st.integers(0, circuit.num_classes - 1))
    joint = with_evidence(joint_of(pc), circuit, evidence)[label]
    log_z = torch.logsumexp(joint.flatten(), 0)
    if log_z == -torch.inf:
        with pytest.raises(ct.ImpossibleEvidenceError):
            ct.transforms.condition(pc, evidence.with_class(label), variables="all")
        return
    of_class = ct.transforms.condition(pc, evidence.with_class(label), variables="all")
    assert of_class.circuit.num_classes is None
    assert_same(joint_of(of_class), joint - log_z)
    assert_same(joint_of(ct.transforms.trim(of_class)), joint - log_z)


@given(class_circuits, st.data())
def test_evidence_with_a_prior_of_the_classes_leaves_their_mixture(circuit, data):
    pc = compiled(circuit)
    evidence = data.draw(ct.testing.evidence(circuit, batch_size=1, largest=3.0))
    factor = st.one_of(st.floats(-3, 3), st.just(-math.inf))
    prior = torch.tensor(data.draw(st.lists(factor, min_size=circuit.num_classes, max_size=circuit.num_classes)))
    joint = with_evidence(joint_of(pc), circuit, evidence)
    mixed = torch.logsumexp(joint + per_class(prior.double(), joint), 0)
    log_z = torch.logsumexp(mixed.flatten(), 0)
    if log_z == -torch.inf:
        with pytest.raises(ct.ImpossibleEvidenceError):
            ct.transforms.condition(pc, evidence.with_class_prior(prior), variables="all")
        return
    mixture = ct.transforms.condition(pc, evidence.with_class_prior(prior.double()), variables="all")
    assert mixture.circuit.num_classes is None
    assert_same(joint_of(mixture), mixed - log_z)


def test_a_class_alone_is_as_large_as_a_circuit_of_its_own():
    pc = compiled(ct.structures.quad_graph((2, 2), 3, ct.Categorical(3), num_classes=4))
    one = compiled(ct.structures.quad_graph((2, 2), 3, ct.Categorical(3)))
    of_class = ct.transforms.condition(pc, ct.Evidence.nothing(1, 4).with_class(2))
    assert repr(of_class.circuit) == repr(one.circuit)


def test_evidence_that_a_class_excludes_says_which_and_what_to_do():
    leaf = ct.inputs(0, 3, ct.Categorical(2), weights=torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]]))
    other = ct.inputs(1, 3, ct.Categorical(2))
    pc = compiled(ct.Circuit(ct.product(leaf, other), num_classes=3))
    first_is_zero = ct.Evidence.observe(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[True, False]]))
    with pytest.raises(ct.ImpossibleEvidenceError, match=r"1 of 3 classes.*first is 1.*with_class"):
        ct.transforms.condition(pc, first_is_zero)
    assert_same(joint_of(ct.transforms.condition(pc, first_is_zero.with_class(2))), joint_of(pc)[2, 0].log_softmax(0))
    with pytest.raises(ct.ImpossibleEvidenceError, match="probability zero, so"):
        ct.transforms.condition(pc, first_is_zero.with_class(1))
    with pytest.raises(ct.ArgumentError, match="from 0 to 2"):
        ct.transforms.condition(pc, first_is_zero.with_class(3))


@given(class_circuits, st.integers(0, 3), st.booleans())
@settings(max_examples=40)
def test_multiply_multiplies_class_by_class(circuit, seed, is_reversed):
    one, other = compiled(circuit, seed), compiled(circuit, seed + 10)
    alone = ct.transforms.condition(other, ct.Evidence.nothing(1, circuit.num_vars).with_class(0))
    for factor, table in ((other, joint_of(other)), (alone, joint_of(alone).unsqueeze(0))):
        total = joint_of(one) + table
        log_z = torch.logsumexp(flat(total), 1)
        factors = (factor, one) if is_reversed else (one, factor)
        try:
            if bool((log_z == -torch.inf).any()):
                with pytest.raises(ct.ImpossibleEvidenceError, match="for a class"):
                    ct.transforms.multiply(*factors)
                continue
            result = ct.transforms.multiply(*factors)
        except ct.PropertyError:
            assume(False)  # not structured-decomposable
        assert result.pc.circuit.num_classes == circuit.num_classes
        torch.testing.assert_close(result.log_partition, log_z, **CLOSE)
        assert_same(joint_of(result.pc), total - per_class(log_z, total))


def test_a_product_of_two_has_no_units_for_pairs_of_different_classes():
    pc = compiled(ct.structures.rat_spn(4, 2, 1, 2, 2, num_classes=5, seed=0))
    assert ct.transforms.multiply(pc, pc).pc.circuit.root.parameter_shape[0] == 5


def test_multiply_needs_the_same_classes():
    two, three = (compiled(ct.structures.rat_spn(3, 1, 1, 2, 3, num_classes=count, seed=0)) for count in (2, 3))
    with pytest.raises(ct.ArgumentError, match="classes of pc, 2, or none, got 3"):
        ct.transforms.multiply(two, three)


def test_the_product_of_gaussian_classes():
    leaves = [ct.inputs(var, 2, ct.Gaussian()) for var in range(2)]
    one, other = (compiled(ct.Circuit(ct.product(*leaves), num_classes=2), seed) for seed in (1, 2))
    x = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    product = ct.transforms.multiply(one, other)
    torch.testing.assert_close(product.pc(x), one(x) + other(x) - product.log_partition, **CLOSE)
    torch.testing.assert_close(ct.testing.evaluate_slowly(product.pc, x), product.pc(x), **CLOSE)


@given(class_circuits, st.integers(1, 3))
@settings(max_examples=40)
def test_growing_without_noise_changes_no_class(circuit, num_copies):
    pc = compiled(circuit)
    grown = ct.transforms.grow(pc, num_copies=num_copies, noise=0.0)
    assert grown.circuit.num_classes == circuit.num_classes
    assert_same(joint_of(grown), joint_of(pc))


@given(class_circuits)
@settings(max_examples=40)
def test_smaller_and_untied_circuits_are_the_same_in_every_class(circuit):
    pc = compiled(circuit)
    for transform in (ct.transforms.trim, ct.transforms.merge_equal_units, ct.transforms.untie_parameters):
        result = transform(pc)
        assert result.circuit.num_classes == circuit.num_classes
        assert_same(joint_of(result), joint_of(pc))


@pytest.mark.parametrize("mode", ["elementwise", "outer"])
def test_merging_keeps_classes_that_are_equal_apart(mode):
    table = torch.tensor([[0.3, 0.3], [0.7, 0.7]])
    leaves = [ct.inputs(var, 2, ct.Categorical(2), weights=table) for var in range(2)]
    root = ct.product(*leaves, mode=mode)
    pc = compiled(ct.Circuit(root, num_classes=root.num_units))
    merged = ct.transforms.merge_equal_units(pc)
    assert_same(joint_of(merged), joint_of(pc))
    mixed = ct.sum(root, num_units=3, weights=torch.ones(3, root.num_units) / root.num_units)
    pc = compiled(ct.Circuit(mixed, num_classes=3))
    merged = ct.transforms.merge_equal_units(pc)
    assert_same(joint_of(merged), joint_of(pc))
    assert merged.circuit.num_units == 3 + 3  # three classes over one unit of each other node


def test_an_outer_product_of_classes_is_transformed_too():
    pair = ct.product(ct.inputs(0, 2, ct.Categorical(2)), ct.inputs(1, 3, ct.Categorical(2)), mode="outer")
    pc = compiled(ct.Circuit(ct.product(pair, ct.inputs(2, 2, ct.Categorical(3)), mode="outer"), num_classes=12))
    joint = joint_of(pc)
    for removed in ([0], [2], [0, 1], [0, 2]):
        expected = torch.logsumexp(joint, [1 + var for var in removed])
        assert_same(joint_of(ct.transforms.marginalize(pc, removed)), expected)
    for transform in (
        lambda pc: ct.transforms.grow(pc, num_copies=3, noise=0.0),
        ct.transforms.merge_equal_units,
        ct.transforms.trim,
        lambda pc: ct.transforms.condition(pc, ct.Evidence.nothing(1, 3)),
    ):
        assert_same(joint_of(transform(pc)), joint)
    product = ct.transforms.multiply(pc, pc)
    assert_same(joint_of(product.pc), 2 * joint - per_class(product.log_partition, joint))


def drawn(pc, count):
    """Samples of all classes in turn, and their labels."""
    labels = torch.arange(count) % pc.circuit.num_classes
    evidence = ct.Evidence.nothing(count, pc.circuit.num_vars).with_class(labels)
    return ct.queries.sample(pc, 1, evidence, torch.Generator().manual_seed(0))[0], labels


@torch.no_grad()
def losses(pc, pruned, data, labels):
    """The drop of every sample's log-likelihood under its own class, (N,)."""
    rows = torch.arange(len(data))
    return pc(data)[rows, labels] - pruned(data)[rows, labels]


@given(class_circuits, st.floats(0, 1), st.integers(0, 3))
@settings(max_examples=40)
def test_pruning_loses_at_most_the_bound_under_the_samples_own_classes(circuit, fraction, seed):
    pc = compiled(circuit, seed)
    data, labels = drawn(pc, 12)
    pruned = ct.transforms.prune(pc, data, labels=labels, fraction=fraction, batch_size=5)
    assert pruned.pc.circuit.num_classes == circuit.num_classes
    torch.testing.assert_close(joint_of(pruned.pc).exp().flatten(1).sum(1), torch.ones(circuit.num_classes).double())
    drops = losses(pc, pruned.pc, data, labels)
    assert drops.mean() <= pruned.max_loss + 1e-9
    for label in labels.unique():
        share = (labels == label).double().mean()
        assert drops[labels == label].mean() * share <= pruned.max_loss + 1e-9
    if pruned.num_removed == 0:
        assert_same(joint_of(pruned.pc), joint_of(pc))


@given(class_circuits, st.sampled_from([0.0, 0.01, 0.1, 1.0]))
@settings(max_examples=40)
def test_pruning_classes_to_a_bound_keeps_it(circuit, max_loss):
    pc = compiled(circuit)
    data, labels = drawn(pc, 12)
    pruned = ct.transforms.prune(pc, ct.Evidence.observe(data).with_class(labels), max_loss=max_loss)
    assert pruned.max_loss <= max_loss
    assert losses(pc, pruned.pc, data, labels).mean() <= max_loss + 1e-9


def test_pruning_removes_what_a_samples_own_class_does_not_use():
    """Unit r of the leaves is the value r, and class r of the data is the value r: the other weights have no flow."""
    leaves = [ct.inputs(var, 3, ct.Categorical(3), weights=0.1 / 3 + 0.9 * torch.eye(3)) for var in range(4)]
    pc = compiled(ct.Circuit(ct.sum(ct.product(*leaves), num_units=3), num_classes=3))
    labels = torch.arange(30) % 3
    pruned = ct.transforms.prune(pc, labels.unsqueeze(1).expand(-1, 4), labels=labels, fraction=2 / 3)
    weights = pruned.pc.log_weights(pruned.pc.circuit.root).exp()
    torch.testing.assert_close(weights, torch.eye(3, dtype=torch.float64), **CLOSE)


def test_prune_asks_for_labels():
    pc = compiled(ct.structures.rat_spn(3, 1, 1, 2, 3, num_classes=2, seed=0))
    data, labels = drawn(pc, 6)
    with pytest.raises(ct.ArgumentError, match=r"labels: .*give the class of every sample"):
        ct.transforms.prune(pc, data, fraction=0.5)
    with pytest.raises(ct.ArgumentError, match="names the classes already"):
        ct.transforms.prune(pc, ct.Evidence.observe(data).with_class(labels), labels=labels, fraction=0.5)
    with pytest.raises(ct.ArgumentError, match="from 0 to 1"):
        ct.transforms.prune(pc, data, labels=labels + 1, fraction=0.5)
    with pytest.raises(ct.ArgumentError, match="has no classes"):
        ct.transforms.prune(compiled(ct.structures.hmm(3, 2, 3)), data, labels=labels, fraction=0.5)


def test_sharing_parameters_keeps_the_classes():
    pc = compiled(ct.structures.rat_spn(4, 1, 1, 2, 3, num_classes=2, seed=0))
    shared = ct.transforms.share_parameters(pc, [pc.circuit.inputs])
    assert shared.circuit.num_classes == 2
    assert len({id(ct.symbolic.parameter_owner(node)) for node in shared.circuit.inputs}) == 1
    untied = ct.transforms.untie_parameters(shared)
    assert_same(joint_of(untied), joint_of(shared))


def class_chain(is_sum):
    """A chain over three steps whose first state is drawn per class, or is the class itself."""
    emissions = [ct.inputs(step, 3, ct.Categorical(2)) for step in range(3)]
    node = ct.product(emissions[1], ct.sum(emissions[2], num_units=3))
    node = ct.product(emissions[0], ct.sum(node, num_units=3))
    root = ct.sum(node, num_units=2) if is_sum else node
    return ct.Circuit(root, num_classes=root.num_units)


@pytest.mark.parametrize("is_sum", [True, False])
def test_a_chain_with_classes_has_an_initial_distribution_per_class(is_sum):
    pc = compiled(class_chain(is_sum))
    chain = ct.transforms.to_chain(pc)
    assert chain.initial.shape == (pc.circuit.num_classes, 3)
    (one, two), (first, second, third) = chain.transition, chain.emission
    joint = torch.einsum("ri,ia,ij,jb,jk,kc->rabc", chain.initial, first, one, second, two, third)
    assert chain.order == (0, 1, 2)
    assert_same(joint.log(), joint_of(pc))
