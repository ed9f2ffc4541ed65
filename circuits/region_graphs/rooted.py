"""Trees given by their edges, and the choice of a root."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from circuits.errors import ArgumentError, StructureError

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class RootedTree(Generic[Name]):
    """A tree whose edges point away from its root."""

    order: list[Name]
    """All nodes, each before its children; the root first."""
    children: dict[Name, list[Name]]


def rooted_tree(edges: Iterable[tuple[Name, Name]], root: Name | None = None) -> RootedTree[Name]:
    """Root a tree of edges in any order and direction; at its centre, so that the depth is least, if no root is named.

    Raises ArgumentError if the root is not a node, StructureError if the edges are not one tree.
    """
    neighbours: dict[Name, list[Name]] = {}
    num_edges = 0
    for one, other in edges:
        neighbours.setdefault(one, []).append(other)
        neighbours.setdefault(other, []).append(one)
        num_edges += 1
    if not neighbours:
        if root is None:
            raise StructureError("edges: expected at least one, or the root of a tree of one node")
        return RootedTree([root], {root: []})
    if root is not None and root not in neighbours:
        raise ArgumentError(f"root: expected a node of the tree, got {root!r}")
    start = next(iter(neighbours))
    order, parents = _walk(neighbours, start)
    if len(order) != len(neighbours) or num_edges != len(neighbours) - 1:
        raise StructureError(
            f"edges: expected a tree, got {num_edges} edges and {len(neighbours)} nodes, of which {len(order)} are "
            f"connected to {start!r}"
        )
    if root is None:
        root = _centre(neighbours, order[-1])
    order, parents = _walk(neighbours, root)
    children: dict[Name, list[Name]] = {node: [] for node in order}
    for node in order[1:]:
        children[parents[node]].append(node)
    return RootedTree(order, children)


def _walk(neighbours: dict[Name, list[Name]], start: Name) -> tuple[list[Name], dict[Name, Name]]:
    """Return the nodes, breadth first, and the parents of all but the first."""
    order, parents, seen = [start], {}, {start}
    for node in order:
        for other in neighbours[node]:
            if other not in seen:
                seen.add(other)
                parents[other] = node
                order.append(other)
    return order, parents


def _centre(neighbours: dict[Name, list[Name]], far: Name) -> Name:
    """Return the middle of a longest path; a node that is farthest from some other is an end of one."""
    order, parents = _walk(neighbours, far)
    path = [order[-1]]
    while path[-1] in parents:
        path.append(parents[path[-1]])
    return path[len(path) // 2]
