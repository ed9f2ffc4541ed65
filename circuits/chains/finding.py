"""Which nodes of a circuit are a chain of equal steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

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
    chains = []
    for start in follower.keys() - set(follower.values()):
        sums: list[Any] = [start]
        while sums[-1] in follower:
            sums.append(follower[sums[-1]])
        if len(sums) >= _SHORTEST:
            chains.append(sums)
    return chains


def _next_sum(node: Node) -> Sum | None:
    """Return the one sum with the same weights that a sum mixes the product of, with leaves of as many units."""
    if not isinstance(node, Sum) or node.parameter_shape[1] != node.children[0].num_units:
        return None
    if not isinstance(node.children[0], Product):
        return None
    product = node.children[0]
    owner = parameter_owner(node)
    same = [child for child in product.children if isinstance(child, Sum) and parameter_owner(child) is owner]
    is_chain = product.mode == "elementwise" and len(same) == 1 < len(product.children)
    return same[0] if is_chain and node.num_units == product.num_units else None
