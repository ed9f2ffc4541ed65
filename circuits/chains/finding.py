"""Which nodes of a circuit are a chain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeGuard

from circuits.symbolic import Node, Product, Sum, parameter_owner

_SHORTEST = 4


def chains_of(layers: Sequence[Sequence[Node]]) -> list[list[Sum]]:
    """Return the sums of every chain of a circuit's layers that is long enough to be worth a recurrence, first to last.

    Of a chain each layer has one node, and nobody else looks at what is inside.
    """
    num_parents = Counter(child for nodes in layers for node in nodes for child in node.children)
    alone = {nodes[0] for nodes in layers if len(nodes) == 1}
    follower: dict[Node, Sum] = {}
    for node in alone:
        found = _next_sum(node)
        links = () if found is None else (found, node.children[0])
        if found is not None and all(link in alone and num_parents[link] == 1 for link in links):
            follower[node] = found
    num_factors = {node: len(node.children[0].children) for node in follower}  # equally many in all steps of a chain
    follower = {a: b for a, b in follower.items() if num_factors[a] == num_factors.get(b, num_factors[a])}
    chains = []
    for start in follower.keys() - set(follower.values()):
        sums: list[Any] = [start]
        while sums[-1] in follower:
            sums.append(follower[sums[-1]])
        if len(sums) >= _SHORTEST:
            chains.append(sums)
    return chains


def _next_sum(node: Node) -> Sum | None:
    """Return the one sum that a sum mixes the product of, with leaves; where there are several, that of its weights."""
    if not _is_step(node) or not isinstance(product := node.children[0], Product):
        return None
    if product.mode != "elementwise" or len(product.children) == 1:
        return None
    sums = [child for child in product.children if _is_step(child)]
    tied = [child for child in sums if parameter_owner(child) is parameter_owner(node)]
    found = tied or sums
    return found[0] if len(found) == 1 else None


def _is_step(node: Node) -> TypeGuard[Sum]:
    """Whether it mixes all units of one child, and has as many itself."""
    if not isinstance(node, Sum) or len(node.children) > 1:
        return False
    return node.parameter_shape == (node.children[0].num_units, node.children[0].num_units)
