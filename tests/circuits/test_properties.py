"""Structural properties: on known circuits, and against enumeration of supports on random ones."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import circuits as ct
from circuits.queries.alignment import can_align
from circuits.queries.structural import chain_breaker


def block(*variables, num_units=2):
    return ct.sum(ct.product(*(ct.inputs(v, num_units, ct.Bernoulli()) for v in variables)), num_units=num_units)


def of_blocks(*blocks):
    return ct.Circuit(ct.sum(ct.product(*(block(*b) for b in blocks)), num_units=1))


def test_compatible_circuits_split_alike():
    first, second = of_blocks((0, 1), (2, 3)), of_blocks((0, 2), (1, 3))
    assert ct.properties.compatible(first, of_blocks((2, 3), (1, 0)))
    assert not ct.properties.compatible(first, second)
    for circuit in (first, second):
        assert ct.properties.compatible(circuit, ct.structures.mixture(4, 2, 3))
        assert ct.properties.is_structured_decomposable(circuit)
        assert circuit.is_structured_decomposable
    assert not ct.properties.compatible(first, ct.structures.mixture(4, 3, 3))
    both = ct.Circuit(ct.sum(first.root, second.root, num_units=1))
    assert not both.is_structured_decomposable


@given(st.data())
def test_a_circuit_aligns_with_itself_exactly_if_no_scopes_cross(data):
    """Mixtures of nested partitions of the same variables, walked pair by pair on the other side."""

    def split(variables):
        if len(variables) == 1:
            return ct.inputs(variables[0], 1, ct.Bernoulli())
        at = data.draw(st.integers(1, len(variables) - 1))
        return ct.sum(ct.product(split(variables[:at]), split(variables[at:])), num_units=1)

    orders = [data.draw(st.permutations(range(4))) if data.draw(st.booleans()) else range(4) for _ in range(2)]
    circuit = ct.Circuit(ct.sum(*map(split, orders), num_units=1))
    assert circuit.is_structured_decomposable == can_align(circuit.root, circuit.root)


def test_chains_have_an_order():
    assert ct.properties.chain_order(ct.structures.hmm(5, 2, 2)) == (0, 1, 2, 3, 4)
    assert ct.properties.is_chain(ct.structures.mixture(4, 2, 3))
    assert ct.properties.chain_order(ct.structures.fully_factorized(1, 2)) == (0,)
    assert not ct.properties.is_chain(of_blocks((0, 1), (2, 3)))
    rest = block(3, 1)
    for var in (0, 2):
        rest = ct.sum(ct.product(rest, ct.inputs(var, 2, ct.Bernoulli())), num_units=2)
    circuit = ct.Circuit(ct.sum(rest, num_units=1))
    assert ct.properties.chain_order(circuit) == (2, 0, 1, 3)
    assert chain_breaker(circuit, (0, 2, 1, 3)).scope == {0, 1, 2, 3}
    assert chain_breaker(circuit, (2, 0, 3, 1)) is None


def supports_are_disjoint(pc):
    """Return by enumeration whether no sum unit mixes two child units that share an assignment."""
    tables = {}
    shape = pc.circuit.num_categories
    for node in pc.circuit.nodes:
        if isinstance(node, ct.Input):
            table = pc.log_weights(node).t() > -torch.inf
            own = [c if v == node.var else 1 for v, c in enumerate(shape)]
            tables[node] = table.reshape(-1, *own).expand(-1, *shape)
        elif isinstance(node, ct.Product):
            table = tables[node.children[0]]
            for child in node.children[1:]:
                other = tables[child]
                table = (table.unsqueeze(1) & other).flatten(0, 1) if node.mode == "outer" else table & other
            tables[node] = table
        else:
            used = pc.log_weights(node) > -torch.inf
            children = node.mixed([tables[child] for child in node.children])
            mixed = used.reshape(*used.shape, *[1] * len(shape)) & children
            if bool((mixed.sum(1) > 1).any()):
                return False
            tables[node] = mixed.any(1)
    return True


def sparse(draw, node):
    """Draw 0/1 weights with few ones for a node's parameters."""
    rows, columns = node.parameter_shape
    kept = torch.tensor([[draw(st.integers(0, 3)) == 0 for _ in range(columns)] for _ in range(rows)])
    axis = 1 if isinstance(node, ct.Sum) else 0
    kept.select(axis, 0)[~kept.any(axis)] = True
    weights = kept.double()
    return weights / weights.sum(axis, keepdim=True)


@given(st.data())
def test_determinism_by_weights_is_proven_by_enumeration(data):
    circuit = data.draw(ct.testing.circuits(max_vars=3, max_units=2, max_categories=3, families="table"))
    pc = ct.compile(circuit, dtype=torch.float64, seed=0)
    for node in [*circuit.inputs, *circuit.sums]:
        if node.tied_to is None:
            pc.set_weights(node, sparse(data.draw, node))
    is_disjoint = supports_are_disjoint(pc)
    claimed = ct.properties.is_deterministic(pc)
    assert claimed <= is_disjoint
    if ct.properties.is_structured_decomposable(circuit):
        assert claimed == is_disjoint
    if claimed:
        enumerated = ct.testing.enumerate_joint(pc)
        torch.testing.assert_close(ct.testing.enumerate_explanations(pc), enumerated)


def test_determinism_without_a_common_structure():
    """Branches on x0 that split the rest in crossing ways: told apart by the support of x0 alone."""
    branches = []
    for value, blocks in enumerate((((1, 2), (3, 4)), ((1, 3), (2, 4)))):
        rest = [block(*variables, num_units=1) for variables in blocks]
        one_hot = torch.eye(2, dtype=torch.float64)[:, [value]]
        branches.append(ct.product(ct.inputs(0, 1, ct.Bernoulli(), weights=one_hot), *rest))
    pc = ct.compile(ct.Circuit(ct.sum(*branches, num_units=1)), dtype=torch.float64, seed=0)
    assert not pc.circuit.is_structured_decomposable
    assert ct.properties.is_deterministic(pc)
    joint = ct.testing.enumerate_joint(pc)
    torch.testing.assert_close(ct.testing.enumerate_explanations(pc), joint)
    torch.testing.assert_close(ct.queries.entropy(pc)[0], -torch.special.xlogy(joint.exp(), joint.exp()).sum())
    for node in pc.circuit.inputs:
        pc.set_weights(node, torch.full(node.parameter_shape, 0.5))
    assert not ct.properties.is_deterministic(pc)


def test_every_circuit_is_smooth_and_decomposable():
    circuit = ct.structures.hmm(3, 2, 2)
    assert ct.properties.is_smooth(circuit)
    assert ct.properties.is_decomposable(circuit)
    assert not ct.properties.is_deterministic(circuit)
    assert ct.properties.is_deterministic(ct.structures.fully_factorized(3, 2))
