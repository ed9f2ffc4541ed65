"""Where nodes and parameters go when a circuit is compiled: layers of equal nodes, banks of equal weights.

Nodes are sorted into topological layers; nodes of one layer with the same kind and shapes are folded together. Weights
of equal shape lie in one *bank*, whose rows the layers select, so tied nodes share a row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from circuits.engine.gathering import Address
from circuits.families import Categorical, Distribution
from circuits.symbolic import Circuit, Input, Node, ParametricNode, Product, Sum, parameter_owner


@dataclass(frozen=True, eq=False)
class Folding:
    """The layers and banks of a circuit; see :func:`fold`."""

    layers: Sequence[Sequence[Node]]
    """Nodes that one tensor operation evaluates: input layers first, every layer after those of its children."""
    addresses: dict[Node, Address]
    """Where each node is evaluated."""
    bank_shapes: dict[str, tuple[int, int, int]]
    """Shapes (P, O, I) of the banks, in the order of use; P counts distinct parameters."""
    bank_addresses: dict[ParametricNode, tuple[str, int]]
    """Bank and row of every node that owns parameters."""
    families: dict[str, Distribution]
    """The input families of the banks of inputs."""

    @property
    def layer_sizes(self) -> list[tuple[int, int]]:
        """(F, K) of every layer: nodes, and units of each."""
        return [(len(nodes), nodes[0].num_units) for nodes in self.layers]

    @property
    def last_uses(self) -> list[list[int]]:
        """Per layer, the layers whose outputs nobody needs after it."""
        last_user: dict[int, int] = {}
        for position, nodes in enumerate(self.layers):
            for node in nodes:
                for child in node.children:
                    last_user[self.addresses[child][0]] = position
        spent: list[list[int]] = [[] for _ in self.layers]
        for layer, user in last_user.items():
            spent[user].append(layer)
        return spent


def fold(circuit: Circuit) -> Folding:
    """Fold a circuit's nodes into layers, and give every owner of parameters a row in a bank."""
    layers = _layers(circuit)
    addresses = {node: (position, row) for position, nodes in enumerate(layers) for row, node in enumerate(nodes)}
    bank_addresses: dict[ParametricNode, tuple[str, int]] = {}
    families: dict[str, Distribution] = {}
    shapes: dict[str, tuple[int, int, int]] = {}
    for node in (node for nodes in layers for node in nodes if isinstance(node, ParametricNode)):
        owner = parameter_owner(node)
        if owner in bank_addresses:
            continue
        rows, columns = owner.parameter_shape
        name = f"sum_{rows}x{columns}"
        if isinstance(owner, Input):
            name = _input_bank(owner.distribution.stored_as, f"{rows}x{columns}", families)
        used = shapes.get(name, (0, rows, columns))[0]
        bank_addresses[owner] = (name, used)
        shapes[name] = (used + 1, rows, columns)
    return Folding(layers, addresses, shapes, bank_addresses, families)


def _layers(circuit: Circuit) -> list[list[Node]]:
    """Group the nodes into layers of equal shape, input layers first, every layer after those of its children."""
    siblings: dict[Hashable, list[Node]] = defaultdict(list)
    for mixture in circuit.sums:
        siblings[mixture.children, mixture.unit, mixture.num_units].append(mixture)
    depth: dict[Node, int] = {}
    groups: dict[tuple[int, Hashable], list[Node]] = defaultdict(list)
    for node in circuit.nodes:
        depth[node] = 1 + max((depth[child] for child in node.children), default=-1)
        if not isinstance(node, Sum):
            groups[depth[node], _shape_key(node)].append(node)
            continue
        same = siblings[node.children, node.unit, node.num_units]
        if node is same[0]:  # the others follow it, so that the layer can stack them
            groups[depth[node], (*_shape_key(node), len(same))].extend(same)
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


def _shape_key(node: Node) -> tuple[Hashable, ...]:
    child_units = tuple(child.num_units for child in node.children)
    if isinstance(node, Input):
        return "input", node.distribution.stored_as, node.parameter_shape
    if isinstance(node, Product):
        return "product", node.mode, child_units
    return "sum", isinstance(node, Sum) and node.unit is not None, node.num_units, child_units


def _input_bank(family: Distribution, size: str, families: dict[str, Distribution]) -> str:
    """Return the bank of a family's parameters, and enter it into ``families``."""
    name = f"input_{size}" if isinstance(family, Categorical) else f"input_{family.family}_{size}"
    base, number = name, 1
    while families.setdefault(name, family) != family:
        number += 1
        name = f"{base}_{number}"
    return name
