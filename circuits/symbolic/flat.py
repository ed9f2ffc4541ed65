"""Walking what is below a node, and pickling nodes as flat records: both without recursion, for chains can be long."""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from circuits.symbolic.nodes import Node

_graph_of: WeakValueDictionary[Node, Graph] = WeakValueDictionary()
"""The graph by which a node is being written, for as long as somebody writes it."""
_lock = threading.Lock()


def below_first(root: Node, below: Callable[[Node], Sequence[Node]]) -> Iterator[Node]:
    """Yield every node that ``below`` leads to from ``root`` once, each after those below it, and ``root`` last."""
    done: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(root, False)]
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
    """Nodes with all that they depend on; a pickle holds it once, and the nodes are positions in it.

    Args:
        nodes: each after its children and the node that it is tied to.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes
        self.positions = {node: position for position, node in enumerate(nodes)}

    def __reduce__(self) -> tuple[Any, ...]:
        records = [node if _graph_of.get(node) is not self else self._record_of(node) for node in self.nodes]
        return _graph_from, (records,)

    def _record_of(self, node: Node) -> tuple[type[Node], dict[str, Any], list[int], int | None]:
        """Return class, own attributes, and the positions of the children and of the owner of the parameters."""
        own = {name: value for name, value in vars(node).items() if name not in ("children", "tied_to", "scope_bits")}
        tied_to = getattr(node, "tied_to", None)
        return (
            type(node),
            own,
            [self.positions[child] for child in node.children],
            None if tied_to is None else self.positions[tied_to],
        )


def reduced(node: Node) -> tuple[Any, ...]:
    """Return how to pickle a node: as a position in a graph that the nodes around it share."""
    with _lock:
        graph = _graph_of.get(node)
        if graph is None:
            graph = Graph(list(below_first(node, _needs)))
            for member in graph.nodes:
                _graph_of.setdefault(member, graph)
    return _node_at, (graph, graph.positions[node])


def _needs(node: Node) -> tuple[Node, ...]:
    """Return what a node cannot be built without; nothing where another graph has it."""
    if node in _graph_of:
        return ()
    tied_to: Node | None = getattr(node, "tied_to", None)
    return node.children if tied_to is None else (*node.children, tied_to)


def _node_at(graph: Graph, position: int) -> Node:
    return graph.nodes[position]


def _graph_from(records: Sequence[Any]) -> Graph:
    nodes: list[Node] = []
    for record in records:
        if not isinstance(record, tuple):  # a node of another graph
            nodes.append(record)
            continue
        kind, own, children, tied_to = record
        node = object.__new__(kind)
        vars(node).update(own, children=tuple(nodes[child] for child in children))
        if "parameter_shape" in own:
            vars(node)["tied_to"] = None if tied_to is None else nodes[tied_to]
        scopes = (child.scope_bits for child in node.children)
        vars(node)["scope_bits"] = functools.reduce(operator.or_, scopes) if children else 1 << own["var"]
        nodes.append(node)
    return Graph(nodes)
