"""Transformations of a circuit's variables: sum some out, or put them in another order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from circuits.engine.compile import CompiledCircuit
from circuits.errors import ArgumentError
from circuits.precision import own_precision
from circuits.symbolic import Input, Node, Product, Sum, product
from circuits.transforms.rebuild import Rebuild, add_columns, widened


@own_precision
def permute(pc: CompiledCircuit, order: Sequence[int]) -> CompiledCircuit:
    """Return the circuit with its variables in another order: variable i of the result is ``order[i]`` of ``pc``.

    So ``permute(pc, order)(x[:, order]) == pc(x)``. Weights and tied parameters are kept as they are.

    Args:
        pc: the circuit, over D variables.
        order: a permutation of 0 .. D - 1.

    Raises:
        ArgumentError: ``order`` is not a permutation.
    """
    rebuild = Rebuild(pc)
    is_list = isinstance(order, Sequence) and all(isinstance(var, int) for var in order)
    if not is_list or sorted(order) != list(range(pc.circuit.num_vars)):
        raise ArgumentError(
            f"order: expected a permutation of 0 to {pc.circuit.num_vars - 1}, a list of integers, got {order!r:.200}"
        )
    renamed = {old: new for new, old in enumerate(order)}
    built: dict[Node, Node] = {}
    for node in pc.circuit.nodes:
        children = [built[child] for child in node.children]
        if isinstance(node, Input):
            built[node] = rebuild.input(node, var=renamed[node.var])
        elif isinstance(node, Product):
            built[node] = product(*children, mode=node.mode, name=node.name)
        elif isinstance(node, Sum):
            built[node] = rebuild.sum(node, children, rebuild.raw(node))
    return rebuild.compile(built[pc.circuit.root])


class Part(NamedTuple):
    """What is left of an old node: old unit k is the unit ``units[k]`` of ``node``."""

    node: Node
    units: Tensor
    """int64 (K,)."""


@own_precision
def marginalize(pc: CompiledCircuit, variables: Iterable[int]) -> CompiledCircuit:
    """Sum variables out: the circuit of the marginal distribution of the others, which are renumbered in their order.

    Sums of the remaining circuit keep their weights; where an outer product loses a factor, the weights of the units
    that become equal are added up. Input units of every family pass through.

    Args:
        pc: the circuit.
        variables: those to sum out; not all of them.

    Raises:
        ArgumentError: an unknown variable, or no variable would be left.
    """
    rebuild = Rebuild(pc)
    if not isinstance(variables, Iterable):
        raise ArgumentError(f"variables: expected integers in a list, got {variables!r}")
    removed = set(variables)
    if not removed <= set(range(pc.circuit.num_vars)):
        raise ArgumentError(
            f"variables: expected integers from 0 to {pc.circuit.num_vars - 1}, got {sorted(removed)!r:.200}"
        )
    kept = [var for var in range(pc.circuit.num_vars) if var not in removed]
    if not kept:
        raise ArgumentError("variables: all variables would be summed out, which leaves the number 1; keep one")
    return compile_without(rebuild, kept, {})


def compile_without(
    rebuild: Rebuild, kept: Sequence[int], changed: dict[Node, Tensor], class_weights: Tensor | None = None
) -> CompiledCircuit:
    """Compile the circuit with only the variables ``kept``, and with the log-weights of ``changed`` nodes replaced.

    With ``class_weights``, (1, R), the new root is one unit that mixes the root's units with these log-weights.
    """
    renamed = {old: new for new, old in enumerate(kept)}
    parts: dict[Node, Part] = {}
    for node in rebuild.pc.circuit.nodes:
        children = [parts[child] for child in node.children if child in parts]
        if isinstance(node, Input):
            if node.var in renamed:
                var = renamed[node.var]
                new = rebuild.table(node, changed[node], var=var) if node in changed else rebuild.input(node, var=var)
                parts[node] = Part(new, torch.arange(node.num_units))
        elif children and isinstance(node, Sum):
            parts[node] = _sum_part(rebuild, node, children, changed.get(node))
        elif children and isinstance(node, Product):
            parts[node] = _product_part(rebuild, node, parts)
    root = parts[rebuild.pc.circuit.root]
    selected = rebuild.select(root.node, root.units)
    if class_weights is None:
        return rebuild.compile(selected)
    return rebuild.compile(rebuild.mixture(selected, class_weights), has_classes=False)


def _sum_part(rebuild: Rebuild, node: Sum, children: Sequence[Part], changed: Tensor | None) -> Part:
    num_columns, columns = 0, []
    for child in children:
        columns.append(child.units + num_columns)
        num_columns += child.node.num_units
    log_weights = rebuild.raw(node) if changed is None else changed
    units = torch.cat(columns)
    if not torch.equal(units, torch.arange(num_columns)):
        wide = rebuild.log_weights(node) if changed is None else widened(node, changed)
        log_weights = add_columns(wide, units, num_columns)
    return Part(rebuild.sum(node, [child.node for child in children], log_weights), torch.arange(node.num_units))


def _product_part(rebuild: Rebuild, node: Product, parts: dict[Node, Part]) -> Part:
    kept = [(position, parts[child]) for position, child in enumerate(node.children) if child in parts]
    if node.mode == "elementwise":
        if len(kept) == 1:
            return kept[0][1]
        selected = [rebuild.select(part.node, part.units) for _, part in kept]
        return Part(product(*selected, name=node.name), torch.arange(node.num_units))
    choices = torch.unravel_index(torch.arange(node.num_units), [child.num_units for child in node.children])
    units = torch.zeros(node.num_units, dtype=torch.int64)
    for position, part in kept:
        units = units * part.node.num_units + part.units[choices[position]]
    if len(kept) == 1:
        return Part(kept[0][1].node, units)
    return Part(product(*(part.node for _, part in kept), mode="outer", name=node.name), units)
