"""Structural properties of circuits: what each is, whether a circuit has it, and which node breaks it.

Definitions as in Choi, Vergari, Van den Broeck 2020 ("Probabilistic Circuits") and Vergari et al. 2021. Every circuit
that could be built is smooth and decomposable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from circuits.errors import PropertyError
from circuits.queries.alignment import Part, align, can_align
from circuits.symbolic import Circuit, Node, Product


def is_smooth(circuit: Circuit) -> bool:
    """Return whether the children of every sum have its scope."""
    return circuit.is_smooth


def is_decomposable(circuit: Circuit) -> bool:
    """Return whether the children of every product have disjoint scopes."""
    return circuit.is_decomposable


def is_structured_decomposable(circuit: Circuit) -> bool:
    """Return whether the circuit is compatible with itself: products over the same scope decompose it alike."""
    return circuit.is_structured_decomposable


def compatible(p: Circuit, q: Circuit) -> bool:
    """Return whether two circuits decompose the same scopes alike, so that ``sum_x p(x) q(x)`` is tractable.

    A product of one circuit may be finer than that of the other: several of its children then meet one. So a fully
    factorized circuit is compatible with every circuit over the same variables.
    """
    if p.num_categories != q.num_categories:
        return False
    return can_align(p.root, q.root)


def is_chain(circuit: Circuit) -> bool:
    """Return whether the variables have a linear order in which every product pairs single variables with the rest."""
    return chain_order(circuit) is not None


def chain_order(circuit: Circuit) -> tuple[int, ...] | None:
    """Return a linear order in which every product splits off variables from the front, or None if there is none.

    An HMM has the order 0, 1, ..., D - 1: each product pairs the next leaf with all that follows.
    """
    remaining, order = circuit.root.scope_bits, list[int]()
    scopes = {node.scope_bits for node in circuit.nodes if node.scope_bits.bit_count() > 1}
    for bits in [*sorted(scopes, key=int.bit_count, reverse=True), 0]:
        split_off = remaining & ~bits
        order += [variable for variable in range(split_off.bit_length()) if split_off >> variable & 1]
        remaining &= bits
    return None if chain_breaker(circuit, order) else tuple(order)


def chain_breaker(circuit: Circuit, order: Sequence[int]) -> Product | None:
    """Return a product that does not split off single variables from the front of ``order``; None if all do."""
    rank = rank_of_scopes(order)
    later = [0]  # by rank, from the last: the variables that come after
    for variable in reversed(order[1:]):
        later.append(later[-1] | 1 << variable)
    later.reverse()
    for node in circuit.nodes:
        if isinstance(node, Product) and len(node.children) > 1:
            *front, last = front_to_back(node, rank)
            if any(child.scope_bits not in rank for child in front):
                return node
            if last.scope_bits & ~later[max(rank[child.scope_bits] for child in front)]:
                return node
    return None


def rank_of_scopes(order: Sequence[int]) -> dict[int, int]:
    """Return the position in ``order`` of every scope that is a single variable (a bit set)."""
    return {1 << variable: position for position, variable in enumerate(order)}


def front_to_back(node: Product, rank: Mapping[int, int]) -> list[Node]:
    """Return the children of a product of a chain in the chain's order: single variables, then the rest."""
    return sorted(node.children, key=lambda child: rank.get(child.scope_bits, len(rank)))


def require_compatible(p: Circuit, q: Circuit, query: str) -> None:
    """Raise PropertyError, naming the nodes, unless two circuits are compatible."""
    if p.num_categories != q.num_categories:
        raise PropertyError(
            f"{query}: expected compatible circuits, got {p} with categories {p.num_categories[:8]} and {q} with "
            f"{q.num_categories[:8]} (roots {p.root} and {q.root})"
        )
    try:
        align([(Part(p.root), Part(q.root))])
    except PropertyError as error:
        raise PropertyError(f"{query}: expected compatible circuits, got some that are {error}") from None
