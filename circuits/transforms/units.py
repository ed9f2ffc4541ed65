"""Drop units that are never reached, and merge units that are equal: the distribution stays, the circuit shrinks.

Both give every node a *grouping* of its units: old unit k becomes unit ``group[k]``, or nothing where that is -1. Units
of an elementwise product and of its children disappear or merge only together, and so do those of tied nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from circuits.engine.compile import CompiledCircuit
from circuits.families import Finite
from circuits.precision import own_precision
from circuits.symbolic import Circuit, Input, Node, ParametricNode, Product, Sum, parameter_owner, product
from circuits.transforms.rebuild import Rebuild, add_columns

Groups = dict[Node, Tensor]
"""int64 (K,) per node: the new unit of every old one, -1 where it disappears."""


@own_precision
def trim(pc: CompiledCircuit) -> CompiledCircuit:
    """Remove the units that no sample can reach, because every way from the root to them has a zero weight.

    The distribution stays the same. A unit stays where its removal would break an elementwise product or a tie.
    """
    rebuild = Rebuild(pc)
    reached: dict[Node, Tensor] = {node: torch.zeros(node.num_units, dtype=torch.bool) for node in pc.circuit.nodes}
    reached[pc.circuit.root][:] = True
    for node in reversed(pc.circuit.nodes):
        units = reached[node]
        if isinstance(node, Sum):
            used = (rebuild.log_weights(node).cpu()[units] > -torch.inf).any(0)
            for child, part in zip(node.children, used.split([c.num_units for c in node.children]), strict=True):
                reached[child] |= part
        elif isinstance(node, Product):
            for child, choice in zip(node.children, unit_choices(node), strict=True):
                reached[child][choice[units]] = True
    _keep_whole_ties(pc.circuit, reached)
    _align(pc.circuit, reached, torch.logical_or, lambda count: torch.ones(count, dtype=torch.bool))
    groups = {node: (kept.cumsum(0) - 1).masked_fill(~kept, -1) for node, kept in reached.items()}
    return _regroup(rebuild, groups)


@own_precision
def merge_equal_units(pc: CompiledCircuit) -> CompiledCircuit:
    """Merge the units of a node that are the same distribution because their weights are equal.

    The distribution stays the same; the weights that lead to merged units add up. Units stay apart where merging them
    would break an elementwise product or a tie, and units of the root, if they are classes.
    """
    rebuild = Rebuild(pc)
    classes: Groups = {node: torch.arange(node.num_units) for node in pc.circuit.nodes}
    for node in pc.circuit.nodes:
        if isinstance(node, Input):
            is_finite = isinstance(node.distribution, Finite)
            parameters = rebuild.log_weights(node) if is_finite else rebuild.raw(node)
            classes[node] = _equal_rows(parameters.cpu().flatten(0, -2).t())
        elif isinstance(node, Product):
            chosen = [classes[child][units] for child, units in zip(node.children, unit_choices(node), strict=True)]
            classes[node] = _equal_rows(torch.stack(chosen, 1))
        elif isinstance(node, Sum):
            columns, num_columns = _child_units(node, classes)
            classes[node] = _equal_rows(add_columns(rebuild.log_weights(node).cpu(), columns, num_columns).exp())
    _align(pc.circuit, classes, _refinement, torch.arange)
    return _regroup(rebuild, classes)


def unit_choices(node: Product) -> list[Tensor]:
    """Return which unit of each child every unit of the product multiplies: one int64 (K,) per child."""
    units = torch.arange(node.num_units)
    if node.mode == "elementwise":
        return [units] * len(node.children)
    return list(torch.unravel_index(units, [child.num_units for child in node.children]))


def _regroup(rebuild: Rebuild, groups: Groups) -> CompiledCircuit:
    built: dict[Node, Node] = {}
    for node in rebuild.pc.circuit.nodes:
        first = _first_of_groups(groups[node])
        children = [built[child] for child in node.children if child in built]
        if not len(first):
            continue
        if isinstance(node, Input):
            built[node] = rebuild.input(node, first)
        elif isinstance(node, Product):
            built[node] = product(*children, mode=node.mode, name=node.name)
        elif isinstance(node, Sum):
            columns, num_columns = _child_units(node, groups)
            log_weights = rebuild.log_weights(node)[first.to(rebuild.pc.device)]
            log_weights = add_columns(log_weights, columns, num_columns)
            is_unreached = (log_weights == -torch.inf).all(1, keepdim=True)
            built[node] = rebuild.sum(node, children, log_weights.masked_fill(is_unreached, 0.0))
    return rebuild.compile(built[rebuild.pc.circuit.root])


def _child_units(node: Sum, groups: Groups) -> tuple[Tensor, int]:
    """Return the new column of every old one, and how many new ones there are."""
    columns, num_columns = [], 0
    for child in node.children:
        columns.append(torch.where(groups[child] >= 0, groups[child] + num_columns, -1))
        num_columns += int(groups[child].max()) + 1
    return torch.cat(columns), num_columns


def _first_of_groups(groups: Tensor) -> Tensor:
    """Return the first old unit of every group, in the order of the groups."""
    units = torch.arange(len(groups)).masked_fill(groups < 0, len(groups))
    first = torch.full((int(groups.max()) + 1,), len(groups))
    if not len(first):
        return first
    return first.scatter_reduce(0, groups.clamp_min(0), units, "amin")


def _equal_rows(rows: Tensor) -> Tensor:
    """Return the class of every row: equal rows have the same class, numbered by first occurrence."""
    return _numbered(torch.unique(rows, dim=0, return_inverse=True)[1])


def _numbered(labels: Tensor) -> Tensor:
    """Rename labels to 0, 1, ... in the order of their first occurrence."""
    _, labels = labels.unique(return_inverse=True)
    first = torch.full((int(labels.max()) + 1,), len(labels))
    first = first.scatter_reduce(0, labels, torch.arange(len(labels)), "amin")
    return first.argsort().argsort()[labels]


def _refinement(one: Tensor, other: Tensor) -> Tensor:
    """Return the coarsest classes within which both labels are constant."""
    return _numbered(one * len(other) + other)


def _align(
    circuit: Circuit,
    labels: dict[Node, Tensor],
    join: Callable[[Tensor, Tensor], Tensor],
    finest: Callable[[int], Tensor],
) -> None:
    """Change the labels, which only get finer, until nodes whose units go together have the same ones.

    Units of an outer product are combinations of its children's; where another node needs something else of it, its
    children get the finest labels there are. The root's units stay apart: each is the distribution of a class.
    """
    changed = True

    def set_label(node: Node, label: Tensor) -> None:
        nonlocal changed
        if not torch.equal(labels[node], label):
            labels[node] = label
            changed = True

    def pin(node: Node) -> None:
        set_label(node, finest(node.num_units))
        if isinstance(node, Product) and node.mode == "outer":
            for child in node.children:
                pin(child)

    kept = [node for node in circuit.nodes if bool((labels[node] != 0).any()) or labels[node].dtype != torch.bool]
    together, apart = _together(kept)
    for node in (circuit.root, *apart):
        if node in kept:
            pin(node)
    while changed:
        changed = False
        for node in kept:
            if isinstance(node, Product) and node.mode == "outer":
                set_label(node, _outer_label(node, labels, join))
        for nodes in together:
            if any(isinstance(node, Product) and node.mode == "outer" for node in nodes):
                for node in nodes:
                    pin(node)
                continue
            joined = labels[nodes[0]]
            for node in nodes[1:]:
                joined = join(joined, labels[node])
            for node in nodes:
                set_label(node, joined)


def _outer_label(node: Product, labels: dict[Node, Tensor], join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    chosen = [labels[child][units] for child, units in zip(node.children, unit_choices(node), strict=True)]
    if chosen[0].dtype == torch.bool:
        return torch.stack(chosen).all(0)
    combined = chosen[0]
    for other in chosen[1:]:
        combined = join(combined, other)
    return combined


def _keep_whole_ties(circuit: Circuit, reached: dict[Node, Tensor]) -> None:
    """Where one of several tied sums has a child that is reached, keep all that is below this child of the others."""
    changed = True
    while changed:
        changed = False
        together, apart = _together([node for node in circuit.nodes if bool(reached[node].any())])
        for nodes in (*together, apart):
            if any(bool(reached[node].any()) for node in nodes):
                for node in nodes:
                    if not bool(reached[node].any()):
                        _keep_all_below(node, reached)
                        changed = True


def _keep_all_below(root: Node, reached: dict[Node, Tensor]) -> None:
    stack = [root]
    while stack:
        node = stack.pop()
        if not bool(reached[node].all()):
            reached[node] = torch.ones_like(reached[node])
            stack.extend(node.children)


def _together(kept: Sequence[Node]) -> tuple[list[list[Node]], list[Node]]:
    """List what must be grouped alike, products with their children and tied nodes, and what must not be grouped.

    The latter are children of tied sums that split the columns of their weights differently.
    """
    together: list[list[Node]] = []
    apart: list[Node] = []
    tied: dict[ParametricNode, list[ParametricNode]] = {}
    for node in kept:
        if isinstance(node, Product) and node.mode == "elementwise":
            together.append([node, *node.children])
        elif isinstance(node, ParametricNode):
            tied.setdefault(parameter_owner(node), []).append(node)
    for nodes in tied.values():
        if len(nodes) == 1:
            continue
        together.append(list(nodes))
        counts = {tuple(child.num_units for child in node.children) for node in nodes}
        if len(counts) == 1:
            together.extend(list(position) for position in zip(*(node.children for node in nodes), strict=True))
        else:
            apart.extend(child for node in nodes for child in node.children)
    return together, apart
