"""Symbolic circuits as plain JSON records, children first, and back. Records that are read are not trusted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

from circuits.errors import ArgumentError, CheckpointError, StructureError
from circuits.families import FAMILIES, Distribution
from circuits.reading import check_keys, short
from circuits.symbolic import Circuit, Input, Node, ParametricNode, Product, Sum, inputs, parameter_owner, product, sum

_MAX_SCOPE_BYTES = 1 << 32
_MAX_UNITS = 1 << 31
_MAX_DERIVED = 1 << 28
_MAX_DEPTH, _MAX_EDGES = 1 << 17, 1 << 21
"""What compiling takes less than half a minute for."""

AnyNode = TypeVar("AnyNode", bound=Node)


def records_of(circuit: Circuit) -> list[dict[str, Any]]:
    """Return one record per node; nodes are referred to by their positions.

    Which nodes share parameters is all that ties mean, so the first of them stands for their owner, which may lie
    outside of the circuit or come later.
    """
    position = {node: i for i, node in enumerate(circuit.nodes)}
    first_users: dict[Node, Node] = {}
    records = []
    for node in circuit.nodes:
        record = _record_of(node, position)
        if isinstance(node, ParametricNode):
            first_user = first_users.setdefault(parameter_owner(node), node)
            if first_user is not node:
                record["tied_to"] = position[first_user]
        if node.name is not None:
            record["name"] = node.name
        records.append(record)
    return records


def circuit_of(records: Any, num_vars: Any, num_classes: Any = None) -> Circuit:
    """Return the circuit that the records describe.

    Raises:
        CheckpointError: the records are not what :func:`records_of` returns for some circuit.
    """
    if not isinstance(records, list) or not records:
        raise CheckpointError(f"nodes: expected a list that is not empty, got {short(records)}")
    num_vars = _integer({"num_vars": num_vars}, "num_vars", 1, len(records))  # every variable has a node of its own
    if num_vars * len(records) // 8 > _MAX_SCOPE_BYTES:
        raise CheckpointError(
            f"nodes: expected scopes of at most {_MAX_SCOPE_BYTES} bytes, got {len(records)} over {num_vars} variables"
        )
    nodes: list[Node] = []
    budget = _Budget()
    for position, record in enumerate(records):
        try:
            nodes.append(_node_of(record, nodes, num_vars))
        except (StructureError, ArgumentError, CheckpointError) as error:
            raise CheckpointError(f"node {position}: {error}") from error
        problem = budget.exceeded_by(nodes[-1])
        if problem is not None:
            raise CheckpointError(f"node {position}: {problem}")
    try:
        circuit = Circuit(nodes[-1], num_vars=num_vars, num_classes=num_classes)
    except (StructureError, ArgumentError) as error:
        raise CheckpointError(f"nodes: {error}") from error
    if len(circuit.nodes) != len(nodes):
        raise CheckpointError(
            f"nodes: expected all {len(nodes)} below the last one, got {len(nodes) - len(circuit.nodes)} elsewhere"
        )
    return circuit


def too_large(nodes: Sequence[Node]) -> str | None:
    """Say why nodes, children first, are more than a file may hold; None where they are not."""
    budget = _Budget()
    return next(filter(None, map(budget.exceeded_by, nodes)), None)


class _Budget:
    """What all nodes together may take, in time or memory that the size of their file does not bound."""

    def __init__(self) -> None:
        self.depth: dict[Node, int] = {}
        self.num_edges, self.num_derived = 0, 0

    def exceeded_by(self, node: Node) -> str | None:
        """Count a node whose children were counted; say what there is too much of then."""
        depth = self.depth[node] = 1 + max((self.depth[child] for child in node.children), default=0)
        self.num_edges += len(node.children)
        self.num_derived += _num_derived(node)
        if self.num_derived > _MAX_DERIVED:
            return f"expected at most {_MAX_DERIVED} numbers that are derived from it, got more with {node}"
        if depth > _MAX_DEPTH:
            return f"expected at most {_MAX_DEPTH} nodes on one path, got more"
        if self.num_edges > _MAX_EDGES:
            return f"expected at most {_MAX_EDGES} children in all, got more"
        return None


def _num_derived(node: Node) -> int:
    """Return how many numbers a node stands for without having them in a file."""
    if isinstance(node, Product):
        return node.num_units
    if not isinstance(node, Input):
        return 0
    rows, columns = node.distribution.parameter_shape(node.num_units)
    return node.distribution.num_values * node.num_units if rows * columns < node.distribution.num_values else 0


def _record_of(node: Node, position: Mapping[Node, int]) -> dict[str, Any]:
    children = [position[child] for child in node.children]
    if isinstance(node, Product):
        return {"kind": "product", "children": children, "mode": node.mode}
    if isinstance(node, Sum):
        unit = {} if node.unit is None else {"unit": node.unit}
        return {"kind": "sum", "children": children, "num_units": node.num_units, **unit}
    assert isinstance(node, Input)
    family = {"family": node.distribution.family, **dataclasses.asdict(cast(Any, node.distribution))}
    return {"kind": "input", "var": node.var, "num_units": node.num_units, **family}


def _node_of(record: Any, nodes: Sequence[Node], num_vars: int) -> Node:
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind == "input":
        distribution = _family_of(record)
        fields = {field.name for field in dataclasses.fields(cast(Any, distribution))}
        check_keys(record, {"kind", "var", "num_units", "family"}, {"tied_to", "name"} | fields)
        num_units = _integer(record, "num_units", 1, _MAX_UNITS)
        return inputs(
            _integer(record, "var", 0, num_vars - 1),
            num_units,
            distribution,
            tied_to=_owner_of(record, nodes, Input),
            name=_name_of(record),
        )
    if kind == "product":
        check_keys(record, {"kind", "children", "mode"}, {"name"})
        children, mode = _children_of(record, nodes), record["mode"]
        if mode not in ("elementwise", "outer"):
            raise CheckpointError(f"mode: expected elementwise or outer, got {short(mode)}")
        if mode == "outer":
            _check_outer_units(children)
        return product(*children, mode=mode, name=_name_of(record))
    if kind == "sum":
        check_keys(record, {"kind", "children", "num_units"}, {"unit", "tied_to", "name"})
        return sum(
            *_children_of(record, nodes),
            num_units=_integer(record, "num_units", 1, _MAX_UNITS),
            unit=_integer(record, "unit", 0, _MAX_UNITS) if "unit" in record else None,
            tied_to=_owner_of(record, nodes, Sum),
            name=_name_of(record),
        )
    raise CheckpointError(f"kind: expected input, product or sum, got {short(kind)} in {short(record)}")


def _family_of(record: Mapping[str, Any]) -> Distribution:
    name = record.get("family")
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(f"family: expected one of {', '.join(FAMILIES)}, got {short(name)}")
    fields = dataclasses.fields(cast(Any, FAMILIES[name]))
    return FAMILIES[name](**{field.name: _family_argument(record, field.name) for field in fields})


def _family_argument(record: Mapping[str, Any], key: str) -> Any:
    """Return a number, or a tuple of integers; what the family does not expect it refuses itself."""
    value = record.get(key)
    if isinstance(value, float):
        return value
    if isinstance(value, list):
        return tuple(_integer({key: item}, key, 0, _MAX_UNITS) for item in value)
    return _integer(record, key, 0, _MAX_UNITS)


def _children_of(record: Mapping[str, Any], nodes: Sequence[Node]) -> list[Node]:
    positions = record["children"]
    if not isinstance(positions, list) or not positions:
        raise CheckpointError(f"children: expected a list of earlier nodes, got {short(positions)}")
    return [_earlier("children", position, nodes) for position in positions]


def _owner_of(record: Mapping[str, Any], nodes: Sequence[Node], kind: type[AnyNode]) -> AnyNode | None:
    if "tied_to" not in record:
        return None
    owner = _earlier("tied_to", record["tied_to"], nodes)
    if not isinstance(owner, kind):
        raise CheckpointError(f"tied_to: expected a node of the same kind, got {owner}")
    return owner


def _earlier(key: str, position: Any, nodes: Sequence[Node]) -> Node:
    if not _is_integer(position) or not 0 <= position < len(nodes):
        raise CheckpointError(f"{key}: expected an earlier node, 0 to {len(nodes) - 1}, got {short(position)}")
    return nodes[position]


def _name_of(record: Mapping[str, Any]) -> str | None:
    name = record.get("name")
    if name is not None and not isinstance(name, str):
        raise CheckpointError(f"name: expected a text, got {short(name)}")
    return name


def _check_outer_units(children: Sequence[Node]) -> None:
    num_units = 1
    for child in children:
        num_units *= child.num_units
        if num_units > _MAX_UNITS:
            raise CheckpointError(f"children: expected an outer product of at most {_MAX_UNITS} units, got more")


def _integer(record: Mapping[str, Any], key: str, least: int, greatest: int) -> int:
    value: Any = record.get(key)
    if not _is_integer(value) or not least <= value <= greatest:
        raise CheckpointError(f"{key}: expected an integer from {least} to {greatest}, got {short(value)}")
    return int(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
