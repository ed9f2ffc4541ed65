"""Enumeration of all latent configurations: the oracle of expected flows and of upward passes in any semiring.

A configuration chooses one child unit at every sum unit that is reached from the root. A circuit's polynomial is the
sum over configurations of the product of the chosen weights and of the reached input units (Darwiche 2003).
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

from hypothesis import assume

from circuits.symbolic import Circuit, Input, Node, Product, Sum

_MAX_CONFIGURATIONS = 500


class Configuration(NamedTuple):
    """The sum edges that were chosen and the input units that are reached, with repetitions."""

    edges: tuple[tuple[Sum, int, int], ...]
    """(node, unit, index of the chosen child unit among all units of all children)."""
    leaves: tuple[tuple[Input, int], ...]
    """(node, unit)."""


def configurations(circuit: Circuit) -> list[Configuration]:
    """Return all configurations; tells Hypothesis to try another case where there are more than a few hundred."""
    assume(_count(circuit) <= _MAX_CONFIGURATIONS)
    below: dict[Node, list[list[Configuration]]] = {}
    for node in circuit.nodes:
        below[node] = [_of_unit(node, unit, below) for unit in range(node.num_units)]
    return below[circuit.root][0]


def _of_unit(node: Node, unit: int, below: dict[Node, list[list[Configuration]]]) -> list[Configuration]:
    if isinstance(node, Input):
        return [Configuration((), ((node, unit),))]
    if isinstance(node, Product):
        parts = [below[child][chosen] for child, chosen in zip(node.children, _factors(node, unit), strict=True)]
        return [_joined(combination) for combination in itertools.product(*parts)]
    assert isinstance(node, Sum)
    units = [unit_below for child in node.children for unit_below in below[child][_mixed(node)]]
    return [
        Configuration(((node, unit, index), *configuration.edges), configuration.leaves)
        for index, unit_below in enumerate(units)
        for configuration in unit_below
    ]


def _mixed(node: Sum) -> slice:
    """Return which units of every child a sum mixes."""
    return slice(None) if node.unit is None else slice(node.unit, node.unit + 1)


def _joined(parts: tuple[Configuration, ...]) -> Configuration:
    edges = tuple(edge for part in parts for edge in part.edges)
    return Configuration(edges, tuple(leaf for part in parts for leaf in part.leaves))


def _factors(node: Product, unit: int) -> list[int]:
    """Return the unit of every child that a product unit multiplies; in outer products the last varies fastest."""
    if node.mode == "elementwise":
        return [unit] * len(node.children)
    chosen = []
    for child in reversed(node.children):
        unit, factor = divmod(unit, child.num_units)
        chosen.append(factor)
    return chosen[::-1]


def _count(circuit: Circuit) -> int:
    """Return the number of configurations of the largest unit of any node, without building them."""
    counts: dict[Node, list[int]] = {}
    for node in circuit.nodes:
        if isinstance(node, Input):
            counts[node] = [1] * node.num_units
        elif isinstance(node, Product):
            counts[node] = [
                math.prod(counts[child][chosen] for child, chosen in zip(node.children, factors, strict=True))
                for factors in (_factors(node, unit) for unit in range(node.num_units))
            ]
        else:
            assert isinstance(node, Sum)
            counts[node] = [sum(sum(counts[child][_mixed(node)]) for child in node.children)] * node.num_units
    return max(max(units) for units in counts.values())
