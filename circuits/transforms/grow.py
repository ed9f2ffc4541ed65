"""Grow a circuit by noisy duplication of its units (Liu et al. 2023, "Scaling Up Probabilistic Circuits")."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from circuits.arguments import checked_count, checked_number
from circuits.engine.compile import CompiledCircuit
from circuits.errors import ArgumentError
from circuits.precision import own_precision
from circuits.symbolic import Input, Node, ParametricNode, Product, Sum, parameter_owner, product
from circuits.transforms.rebuild import TABLES, Rebuild, normalise
from circuits.transforms.units import unit_choices


class _Copies(NamedTuple):
    """Copies of an old node's K units: the copy c of unit k is the unit ``units[c K + k]`` of ``node``."""

    node: Node
    units: Tensor


@own_precision
def grow(
    pc: CompiledCircuit,
    *,
    num_copies: int = 2,
    noise: float = 0.1,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> CompiledCircuit:
    """Replace every sum and input unit by noisy copies of itself, so that learning can go on in a larger circuit.

    A copy mixes the copies of the old unit's children, each with an equal part of the old weight, times noise, and is
    normalised. Without noise the distribution is exactly the old one. Copies of an outer product are all combinations
    of its factors' copies. Tied parameters stay tied, and classes stay as many as they were.

    Args:
        pc: the circuit.
        num_copies: how many units take the place of one, >= 1.
        noise: the standard deviation of the Gaussian noise on log-weights, of sums and of categorical and Bernoulli
            inputs; >= 0. Inputs of other families are copied as they are. Without noise all copies are equal, and EM
            keeps them so.
        seed: for the noise; fresh entropy when neither it nor ``generator`` is given.
        generator: a CPU generator, instead of ``seed``.

    Raises:
        ArgumentError: an argument is out of range.
    """
    rebuild = Rebuild(pc)
    checked_count("num_copies", num_copies)
    checked_number("noise", noise, "a standard deviation")
    if seed is not None and generator is not None:
        raise ArgumentError("seed: give either seed or generator, not both")
    if generator is None:
        generator = torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(seed)

    drawn: dict[tuple[object, ...], Tensor] = {}

    def noisy(node: ParametricNode, log_weights: Tensor, axis: int, layout: tuple[object, ...]) -> Tensor:
        """Add noise, the same for tied nodes whose children were copied alike, and normalise."""
        key = (parameter_owner(node), *layout)
        if key not in drawn:
            drawn[key] = noise * torch.randn(log_weights.shape, generator=generator, dtype=torch.float64)
        return normalise(log_weights + drawn[key].to(log_weights.device), axis)[0]

    copies: dict[Node, _Copies] = {}
    for node in pc.circuit.nodes:
        children = [copies[child] for child in node.children]
        count = 1 if node is pc.circuit.root else num_copies
        if isinstance(node, Input):
            if isinstance(node.distribution, TABLES):
                log_table = noisy(node, rebuild.log_weights(node).repeat(1, count), 0, (count,))
                new_input = rebuild.table(node, log_table)
            else:
                new_input = rebuild.input(node, torch.arange(node.num_units).repeat(count))
            copies[node] = _Copies(new_input, torch.arange(count * node.num_units))
        elif isinstance(node, Product):
            copies[node] = _product(rebuild, node, children)
        elif isinstance(node, Sum):
            old, layout = _old_columns(node, children)
            log_weights = rebuild.log_weights(node).repeat(count, 1)
            spread = log_weights[:, old.columns] - old.num_copies.to(log_weights.device, torch.float64).log()
            spread = spread.masked_fill((old.num_copies == 0).to(spread.device), -torch.inf)
            weights = noisy(node, spread, 1, (count, layout))
            new = rebuild.sum(node, [child.node for child in children], weights)
            copies[node] = _Copies(new, torch.arange(count * node.num_units))
    root = copies[pc.circuit.root]
    num_roots = pc.circuit.root.num_units
    if len(root.units) == num_roots:
        return rebuild.compile(rebuild.select(root.node, root.units))
    weights = torch.full((num_roots, root.node.num_units), -torch.inf, dtype=torch.float64)
    weights[torch.arange(len(root.units)) % num_roots, root.units] = math.log(num_roots / len(root.units))
    return rebuild.compile(rebuild.extra_sum([root.node], weights))


class _Columns(NamedTuple):
    columns: Tensor
    """The old column of every new one, int64 (I',)."""
    num_copies: Tensor
    """How many copies that old column has, (I',); 0 where the new unit is no copy and is not used."""


def _old_columns(node: Sum, children: list[_Copies]) -> tuple[_Columns, tuple[object, ...]]:
    columns, num_copies, layout, start = [], [], [], 0
    for child, part in zip(node.children, children, strict=True):
        old = torch.zeros(part.node.num_units, dtype=torch.int64)
        old[part.units] = torch.arange(len(part.units)) % child.num_units
        is_copy = torch.zeros(part.node.num_units, dtype=torch.int64)
        is_copy[part.units] = len(part.units) // child.num_units
        columns.append(old + start)
        num_copies.append(is_copy)
        layout.append(tuple(part.units.tolist()))
        start += child.num_units
    return _Columns(torch.cat(columns), torch.cat(num_copies)), tuple(layout)


def _product(rebuild: Rebuild, node: Product, children: list[_Copies]) -> _Copies:
    counts = [len(part.units) // child.num_units for child, part in zip(node.children, children, strict=True)]
    if node.mode == "elementwise":
        least = min(counts) * node.num_units
        parts = [rebuild.select(part.node, part.units[:least]) for part in children]
        return _Copies(product(*parts, name=node.name), torch.arange(least))
    units = torch.zeros(*counts, node.num_units, dtype=torch.int64)
    for position, (child, part, choice) in enumerate(zip(node.children, children, unit_choices(node), strict=True)):
        chosen = part.units.reshape(counts[position], child.num_units)[:, choice]  # (copies, K)
        shape = [1] * len(counts)
        shape[position] = counts[position]
        units = units * part.node.num_units + chosen.reshape(*shape, node.num_units)
    return _Copies(product(*(part.node for part in children), mode="outer", name=node.name), units.flatten())
