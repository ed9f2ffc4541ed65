"""What can be built, and what every invalid structure is told."""

import copy
import io
import pickle

import pytest
import torch

import circuits as ct


def leaf(var=0, units=2, categories=3, **options):
    return ct.inputs(var, units, ct.Categorical(categories), **options)


def test_a_valid_circuit_knows_its_shape():
    a, b = leaf(0), leaf(1)
    circuit = ct.Circuit(ct.sum(ct.product(a, b), num_units=1))
    assert circuit.scope == {0, 1}
    assert circuit.num_vars == 2
    assert circuit.num_categories == (3, 3)
    assert circuit.num_units == 7
    assert circuit.num_parameters == 6 + 6 + 2
    assert circuit.is_smooth
    assert circuit.is_decomposable
    assert not circuit.is_deterministic
    assert [type(node).__name__ for node in circuit.nodes] == ["Input", "Input", "Product", "Sum"]


def test_nodes_are_immutable():
    node = leaf()
    with pytest.raises(AttributeError, match="immutable"):
        node.num_units = 5


def not_decomposable():
    return ct.product(leaf(0), ct.product(leaf(0), leaf(1)))


def not_smooth():
    return ct.sum(leaf(0), leaf(1), num_units=1)


def unit_mismatch():
    return ct.product(leaf(0, units=2), leaf(1, units=3))


def tied_shape_mismatch():
    return leaf(1, units=3, tied_to=leaf(0, units=2))


def tied_family_mismatch():
    return ct.inputs(1, 2, ct.Bernoulli(), tied_to=ct.inputs(0, 2, ct.Categorical(2)))


def tied_kind_mismatch():
    return ct.sum(leaf(0), num_units=2, tied_to=leaf(0))


def weights_mismatch():
    return leaf(0, weights=torch.full((2, 2), 0.5))


def two_root_units():
    return ct.Circuit(ct.sum(leaf(0), num_units=2))


def two_roots():
    return ct.Circuit([ct.sum(leaf(0), num_units=1), ct.sum(leaf(0), num_units=1)])


def variable_beyond_the_last():
    return ct.Circuit(ct.sum(ct.product(leaf(0), leaf(5)), num_units=1), num_vars=3)


def variable_that_is_missing():
    return ct.Circuit(ct.sum(ct.product(leaf(0), leaf(2)), num_units=1))


def categories_that_disagree():
    return ct.Circuit(ct.sum(leaf(0, categories=2), leaf(0, categories=3), num_units=1))


def same_name_twice():
    return ct.Circuit(ct.sum(leaf(0, name="a"), leaf(0, name="a"), num_units=1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (not_decomposable, r"not decomposable: Input\(.*scope=\{0\}\) and Product\(.*scope=\{0, 1\}\) share"),
        (not_smooth, r"not smooth: Input\(.*scope=\{0\}\) and Input\(.*scope=\{1\}\)"),
        (unit_mismatch, r"unit mismatch .*Input\(num_units=2, scope=\{0\}\).*Input\(num_units=3, scope=\{1\}\)"),
        (tied_shape_mismatch, r"tied_to: expected .* for Input\(num_units=3.* of Input\(num_units=2"),
        (tied_family_mismatch, r"tied_to: expected the family of Input"),
        (tied_kind_mismatch, r"its own kind of node"),
        (weights_mismatch, r"weights: expected floating-point weights of shape \(3, 2\) for Input"),
        (two_root_units, r"no single root: Sum\(num_units=2, scope=\{0\}\).*over Input\(num_units=2, scope=\{0\}\)"),
        (two_roots, r"no single root: got 2 nodes \[Sum\(.*Sum\("),
        (variable_beyond_the_last, r"unknown variable 5: Input\(num_units=2, scope=\{5\}\) is below Sum\("),
        (variable_that_is_missing, r"unknown variables \{1\}: .* Sum\(.*covers \{0, 2\}"),
        (
            categories_that_disagree,
            r"variable 0: .*, got values from 0 to 1 in Input.* and values from 0 to 2 in Input",
        ),
        (same_name_twice, r"two nodes are called 'a'"),
        (lambda: leaf(-1), r"unknown variable -1"),
        (lambda: leaf("x"), r"unknown variable 'x'"),
    ],
)
def test_an_invalid_structure_names_what_is_wrong(build, message):
    with pytest.raises(ct.StructureError, match=message):
        build()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: leaf(0, units=0), "num_units: expected an integer >= 1, got 0"),
        (lambda: leaf(0, units=True), "num_units: expected an integer >= 1, got True"),
        (lambda: ct.Categorical(0), "num_categories: expected an integer >= 1"),
        (lambda: ct.inputs(0, 1, "categorical"), "distribution: expected an input family"),
        (lambda: ct.sum(num_units=1), "expected at least one child"),
        (lambda: ct.product([leaf(0), leaf(1)]), "pass them as separate arguments"),
        (lambda: ct.product(leaf(0), leaf(1), mode="inner"), "mode: expected 'elementwise' or 'outer'"),
        (lambda: leaf(0, weights=torch.full((3, 2), 0.5)), "sum to 1 along axis 0"),
        (lambda: leaf(0, weights=torch.full((3, 2), 1 / 3), tied_to=leaf(0)), "give the weights to that node"),
        (lambda: ct.Circuit("root"), "root: expected a node"),
        (lambda: ct.compile("circuit"), "circuit: expected ct.Circuit"),
        (lambda: ct.structures.hmm(0, 2, 3), "seq_length: expected an integer >= 1, got 0"),
        (lambda: ct.structures.mixture(2, [3], 2), "num_categories: expected one number or num_vars=2"),
        (
            lambda: ct.structures.hmm(3, 2, 3).node("no"),
            "one of the 6 names of nodes, got .no.; some are emission0, emission1, emission2",
        ),
    ],
)
def test_a_wrong_argument_names_itself(build, message):
    with pytest.raises(ct.ArgumentError, match=message):
        build()


def test_the_repr_of_a_circuit_is_the_code_that_builds_it():
    from hypothesis import given

    @given(ct.testing.circuits())
    def check(circuit):
        namespace = {}
        exec(repr(circuit), namespace)
        rebuilt = namespace["circuit"]
        assert repr(rebuilt) == repr(circuit)
        pc, again = (ct.compile(c, dtype=torch.float64, seed=0) for c in (circuit, rebuilt))
        for name, bank in again.bank.items():
            assert bank.shape == pc.bank[name].shape

    check()


def test_a_chain_of_ten_thousand_steps_builds_and_evaluates():
    pc = ct.compile(ct.structures.hmm(10_000, 2, 2), dtype=torch.float64, seed=0)
    log_p = pc(torch.zeros(1, 10_000, dtype=torch.int64))
    assert log_p.isfinite().all()
    assert log_p < -1000


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def loaded_by_torch(value):
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, loaded_by_torch], ids=lambda f: f.__name__)
def test_the_copy_of_a_long_chain_is_the_same_function(copied):
    """Copies do not go from node to node by recursion, which would end at about a hundred steps."""
    pc = ct.compile(ct.structures.hmm(400, 2, 3, initial=torch.tensor([0.25, 0.75])), seed=0)
    x = torch.randint(3, (2, 400), generator=torch.Generator().manual_seed(0))
    other = copied(pc)
    assert torch.equal(other(x), pc(x))
    assert repr(other.circuit) == repr(pc.circuit)  # ties and names
    assert torch.equal(other.circuit.root.weights, pc.circuit.root.weights)
    assert len(list(other.parameters())) == len(list(pc.parameters()))
    assert torch.equal(
        other.log_weights(other.circuit.node("transition7")), pc.log_weights(pc.circuit.node("transition7"))
    )


def test_averaged_weights_of_a_long_chain():
    pc = ct.compile(ct.structures.hmm(400, 2, 3), seed=0)
    x = torch.zeros(1, 400, dtype=torch.int64)
    averaged = torch.optim.swa_utils.AveragedModel(pc)
    averaged.update_parameters(pc)
    assert torch.equal(averaged(x), pc(x))


def test_pickled_nodes_stay_the_nodes_of_their_circuit():
    circuit = ct.structures.hmm(300, 2, 3)
    node, same, root = pickled([circuit.node("transition150"), circuit, circuit.root])
    assert same.node("transition150") is node
    assert same.root is root is same.nodes[-1]


def test_a_sum_of_one_unit_of_each_child_has_a_weight_for_each():
    children = [leaf(0, units=3), leaf(0, units=3)]
    node = ct.sum(*children, num_units=2, unit=1)
    assert node.parameter_shape == (2, 2)
    weights = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    pc = ct.compile(ct.Circuit(ct.sum(*children, num_units=2, unit=1, weights=weights), num_classes=2), seed=0)
    first, second = (pc.log_weights(child).exp()[:, 1] for child in pc.circuit.root.children)
    torch.testing.assert_close(pc(torch.arange(3)[:, None]).exp(), torch.stack([first, second], 1) @ weights.T)
    again = pickle.loads(pickle.dumps(pc.circuit))
    assert again.root.unit == 1
    assert "num_units=2, unit=1" in repr(again)


@pytest.mark.parametrize(("sizes", "unit"), [((2, 3), 0), ((2, 2), 2), ((1,), 1)])
def test_a_sum_mixes_a_unit_that_all_its_children_have(sizes, unit):
    with pytest.raises(ct.StructureError, match="unit: expected "):
        ct.sum(*(leaf(0, units=size) for size in sizes), num_units=1, unit=unit)
    with pytest.raises(ct.ArgumentError, match="unit: expected an integer >= 0, got -1"):
        ct.sum(leaf(0), num_units=1, unit=-1)


def test_what_a_pickled_node_is_tied_to_goes_with_it():
    """Also where the owner of the parameters is above its user, or outside of the circuit."""
    outside = leaf(7, weights=torch.full((3, 2), 1 / 3), name="outside")
    user, alone = leaf(0, tied_to=outside), leaf(1)
    shared = ct.sum(ct.product(user, alone), num_units=2)
    late = ct.sum(ct.product(shared, ct.sum(leaf(2), num_units=2, tied_to=shared)), num_units=1)
    again = pickled(late)
    first, second = again.children[0].children
    assert second.tied_to is first
    owner = first.children[0].children[0].tied_to
    assert (owner.name, owner.var, owner.scope) == ("outside", 7, {7})
    assert torch.equal(owner.weights, outside.weights)
    with pytest.raises(AttributeError, match="immutable"):
        owner.num_units = 5


def test_the_deep_copy_of_a_node_is_the_node():
    node = leaf()
    assert copy.deepcopy(node) is node


def test_a_prefix_renames_and_nothing_else():
    circuit = ct.structures.hmm(4, 2, 3, initial=torch.tensor([0.25, 0.75]))
    left = circuit.with_prefix("left_")
    assert {node.name for node in left.nodes if node.name} == {f"left_{n.name}" for n in circuit.nodes if n.name}
    assert repr(left).replace("left_", "") == repr(circuit)
    assert torch.equal(left.root.weights, circuit.root.weights)
    assert not set(left.nodes) & set(circuit.nodes)
    x = torch.randint(3, (5, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(ct.compile(left, seed=0)(x), ct.compile(circuit, seed=0)(x))
    with pytest.raises(ct.ArgumentError, match="prefix: expected a string, got 3"):
        circuit.with_prefix(3)


def test_given_weights_of_an_owner_outside_of_the_circuit_stay_under_a_prefix():
    outside = leaf(7, weights=torch.tensor([[0.5, 0.1], [0.2, 0.2], [0.3, 0.7]]))
    pair = ct.product(leaf(0, tied_to=outside, name="a"), leaf(1, tied_to=outside))
    circuit = ct.Circuit(ct.sum(pair, num_units=1, weights=torch.tensor([[0.5, 0.5]])))
    x = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    torch.testing.assert_close(ct.compile(circuit.with_prefix("b_"))(x), ct.compile(circuit)(x))


def test_a_mixture_of_hidden_markov_models_is_the_mean_of_its_parts():
    tables = [ct.testing.enumerate_joint(ct.compile(ct.structures.hmm(3, 2, 2), seed=seed)).exp() for seed in range(2)]
    parts = [ct.structures.hmm(3, 2, 2).with_prefix(f"part{i}_") for i in range(2)]
    pc = ct.compile(ct.Circuit(ct.sum(*(part.root for part in parts), num_units=1)), seed=0)
    for seed, part in enumerate(parts):
        alone = ct.compile(ct.structures.hmm(3, 2, 2), seed=seed)
        for node, own in zip(part.nodes, alone.circuit.nodes, strict=True):
            if isinstance(node, ct.Sum | ct.Input):
                pc.set_weights(node, alone.parameters_of(own))
    pc.set_weights(pc.circuit.root, torch.tensor([[0.3, 0.7]]))
    torch.testing.assert_close(ct.testing.enumerate_joint(pc).exp(), 0.3 * tables[0] + 0.7 * tables[1])


def test_free_parameters_are_those_of_the_textbook():
    hmm = ct.structures.hmm
    assert hmm(20, 3, 5).num_free_parameters == 2 + 3 * 2 + 3 * 4
    assert ct.compile(hmm(20, 3, 5)).num_free_parameters == 20
    assert hmm(20, 3, 5, homogeneous=False).num_free_parameters == 2 + 19 * 3 * 2 + 20 * 3 * 4
    assert ct.structures.fully_factorized(4, 3).num_free_parameters == 4 * 2
    assert hmm(5, 2, ct.Gaussian()).num_free_parameters == 1 + 2 + 2 * 2
    assert hmm(5, 2, ct.Poisson()).num_free_parameters == 1 + 2 + 2
    assert hmm(5, 2, ct.Binomial(9)).num_free_parameters == 1 + 2 + 2
    assert hmm(5, 2, ct.Bernoulli()).num_free_parameters == 1 + 2 + 2
    assert hmm(5, 2, ct.DiscretizedLogistic(9)).num_free_parameters == 1 + 2 + 2 * 2
    assert hmm(5, 2, ct.DiscretizedLogistic(2)).num_free_parameters == 1 + 2 + 2
    assert ct.structures.naive_bayes(3, 2, 4).num_free_parameters == 3 + 3 * 4  # the indicators of the class are fixed


def test_weights_of_zero_are_not_free():
    bakis = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
    circuit = ct.structures.hmm(6, 3, 4, transition=bakis)
    assert circuit.num_free_parameters == 2 + 2 + 3 * 3
    pc = ct.compile(circuit)
    assert pc.num_free_parameters == 2 + 2 + 3 * 3
    pc.set_weights(pc.circuit.node("emission0"), torch.eye(4)[:, :3])
    assert pc.num_free_parameters == 2 + 2


def test_free_parameters_of_a_low_rank_table_are_the_rank_of_its_jacobian():
    """C = 5 logits of K = 4 units from vectors of R = 2 numbers, each unit's up to a constant."""
    family = ct.EmbeddingCategorical(5, 2)
    raw = family.initial((1, *family.parameter_shape(4)), torch.Generator().manual_seed(0)).double()
    jacobian = torch.autograd.functional.jacobian(family.read, raw).reshape(5 * 4, -1)
    assert int(torch.linalg.matrix_rank(jacobian, rtol=1e-9)) == family.num_free_parameters(4) == 12
