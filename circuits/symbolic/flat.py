"""Walking what is below a node, and pickling nodes as flat records: both without recursion, for chains can be long."""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from circuits.symbolic.nodes import Node

T = TypeVar("T")
_graph_of: WeakValueDictionary[Node, Graph] = WeakValueDictionary()
"""The graph by which a node is being written, for as long as somebody writes it."""
_lock = threading.Lock()


def below_first(root: T, below: Callable[[T], Sequence[T]]) -> Iterator[T]:
    """Yield every node that ``below`` leads to from ``root`` once, each after those below it, and ``root`` last."""
    done: set[T] = set()
    stack: list[tuple[T, bool]] = [(root, False)]
    while stack:
        node, below_is_done = stack.pop()
        if node in done:
            continue
        if below_is_done:
            done.add(node)
            yield node
            continue
        stack.append((node, True))
        stack.extend((other, False) for other in reversed(below(node)) if other not in done)


class Graph:
    """Nodes, each after all that it depends on; a pickle holds it once, and the nodes are positions in it."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes
        self.positions = {node: position for position, node in enumerate(nodes)}

    def record(self, node: Node) -> tuple[type[Node], dict[str, Any], list[int], int | None]:
        """Return class, own attributes, and the positions of the children and of the owner of the parameters."""
        own = {name: value for name, value in vars(node).items() if name not in ("children", "tied_to", "scope_bits")}
        tied_to = _tied_to(node)
        children = [self.positions[child] for child in node.children]
        return type(node), own, children, None if tied_to is None else self.positions[tied_to]

    def __reduce__(self) -> tuple[Any, ...]:
        return _graph_from, ([self.record(node) if _graph_of.get(node) is self else node for node in self.nodes],)


def reduced(node: Node) -> tuple[Any, ...]:
    """Return how to pickle a node: as a position in a graph that the nodes around it share."""
    with _lock:
        graph = _graph_of.get(node)
        if graph is None:
            graph = Graph(list(below_first(node, lambda other: () if other in _graph_of else _needs(other))))
            for member in graph.nodes:
                _graph_of.setdefault(member, graph)
    return _node_at, (graph, graph.positions[node])


def copied(root: Node, rename: Callable[[str], str]) -> Node:
    """Return a copy of all that a node depends on, with other names."""
    graph = Graph(list(below_first(root, _needs)))
    records = [graph.record(node) for node in graph.nodes]
    for _, own, _, _ in records:
        own["name"] = own["name"] and rename(own["name"])
    return _graph_from(records).nodes[-1]


def _tied_to(node: Node) -> Node | None:
    return getattr(node, "tied_to", None)


def _needs(node: Node) -> tuple[Node, ...]:
    """Return what a node cannot be built without."""
    tied_to = _tied_to(node)
    return node.children if tied_to is None else (*node.children, tied_to)


def _node_at(graph: Graph, position: int) -> Node:
    return graph.nodes[position]


def _graph_from(records: Sequence[Any]) -> Graph:
    nodes: list[Node] = []
    for record in records:
        if not isinstance(record, tuple):  # a node of another graph
            nodes.append(record)
            continue
        kind, own, positions, tied_to = record
        children = tuple(nodes[position] for position in positions)
        scope_bits = functools.reduce(operator.or_, (c.scope_bits for c in children), 0) or 1 << own["var"]
        node = object.__new__(kind)
        vars(node).update(own, children=children, scope_bits=scope_bits)
        if "parameter_shape" in own:
            vars(node)["tied_to"] = None if tied_to is None else nodes[tied_to]
        nodes.append(node)
    return Graph(nodes)
