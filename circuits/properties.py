"""Structural properties of circuits: what each is, whether a circuit has it, and which node breaks it.

Definitions as in Choi, Vergari, Van den Broeck 2020 ("Probabilistic Circuits") and Vergari et al. 2021. Every circuit
that could be built is smooth and decomposable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from circuits import passes
from circuits.alignment import Part, align
from circuits.compile import CompiledCircuit
from circuits.errors import PropertyError
from circuits.graph import Circuit, Input, Node, Product, Sum
from circuits.powers import Power, Tables, tables_of_powers

_MAX_SUPPORT = 1 << 24


def is_smooth(circuit: Circuit) -> bool:
    """Return whether the children of every sum have its scope."""
    return circuit.is_smooth


def is_decomposable(circuit: Circuit) -> bool:
    """Return whether the children of every product have disjoint scopes."""
    return circuit.is_decomposable


def is_deterministic(circuit: Circuit | CompiledCircuit) -> bool:
    """Return whether no assignment has two explanations, as far as can be shown.

    Of a symbolic circuit only the structure is looked at: every sum has a single child unit. Of a compiled one the
    weights too: the child units that a sum unit mixes have disjoint supports, either on one variable or, where the
    children are compatible, jointly. True is a proof; False can mean that neither test could tell.
    """
    if isinstance(circuit, Circuit):
        return circuit.is_deterministic
    return _overlapping_sum(circuit) is None


def is_structured_decomposable(circuit: Circuit) -> bool:
    """Return whether the circuit is compatible with itself: products over the same scope decompose it alike."""
    return compatible(circuit, circuit)


def compatible(p: Circuit, q: Circuit) -> bool:
    """Return whether two circuits decompose the same scopes alike, so that ``sum_x p(x) q(x)`` is tractable.

    A product of one circuit may be finer than that of the other: several of its children then meet one. So a fully
    factorized circuit is compatible with every circuit over the same variables.
    """
    if p.num_categories != q.num_categories:
        return False
    try:
        align([(Part(p.root), Part(q.root))])
    except PropertyError:
        return False
    return True


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


def require_deterministic(pc: CompiledCircuit, query: str) -> None:
    """Raise PropertyError, naming the sum, unless the compiled circuit is deterministic."""
    node = _overlapping_sum(pc)
    if node is not None:
        raise PropertyError(
            f"{query} needs a deterministic circuit, but the supports of the units that {node} mixes overlap, or could "
            "not be shown to be disjoint"
        )


def require_compatible(p: Circuit, q: Circuit, query: str) -> None:
    """Raise PropertyError, naming the nodes, unless two circuits are compatible."""
    if p.num_categories != q.num_categories:
        raise PropertyError(
            f"{query} needs compatible circuits, but {p} has categories {p.num_categories[:8]} and {q} has "
            f"{q.num_categories[:8]} (roots {p.root} and {q.root})"
        )
    try:
        align([(Part(p.root), Part(q.root))])
    except PropertyError as error:
        raise PropertyError(f"{query} needs compatible circuits, but they are {error}") from None


@torch.no_grad()
def _overlapping_sum(pc: CompiledCircuit) -> Sum | None:
    """Return a sum whose units mix children with supports that are not shown to be disjoint, or None."""
    banks = pc.weights()
    powers = [Power(pc, banks)] * 2
    num_values = max(1, int(pc.num_categories.max()))
    no_evidence = torch.zeros(1, pc.circuit.num_vars, num_values, dtype=pc.dtype, device=pc.device)
    tables: Tables = {}
    supports: dict[Node, Tensor] | None = None
    for node in pc.circuit.sums:
        used = (pc.log_weights(node, banks) > -torch.inf).to(pc.dtype)
        mixed = (used.t() @ used).fill_diagonal_(0.0) > 0  # (I, I): some unit mixes both
        if not bool(mixed.any()):
            continue
        pairs = {(a, b): (Part(a), Part(b)) for a in node.children for b in node.children}
        try:
            tables_of_powers(pairs.values(), powers, no_evidence, known=tables)
        except PropertyError:
            supports = _variable_supports(pc, banks) if supports is None else supports
            own = torch.cat([supports[child] for child in node.children]) if supports else None
            if own is None or bool((mixed & _share_every_variable(own, node)).any()):
                return node
            continue
        rows = [torch.cat([tables[pairs[a, b]][0][..., 0] for b in node.children], 1) for a in node.children]
        if bool((mixed & (torch.cat(rows) > -torch.inf)).any()):
            return node
    return None


def _share_every_variable(supports: Tensor, node: Node) -> Tensor:
    """Return which two of I units, with supports (I, D, C), have a common value of every variable: bool (I, I)."""
    own = supports[:, sorted(node.scope)]
    return (torch.einsum("idc,jdc->ijd", own, own) > 0).all(2)


def _variable_supports(pc: CompiledCircuit, banks: passes.Banks) -> dict[Node, Tensor]:
    """Return which values each unit allows each variable, 0 or 1, (K, D, C); nothing if the circuit is too large."""
    num_vars, num_values = pc.circuit.num_vars, max(1, int(pc.num_categories.max()))
    supports: dict[Node, Tensor] = {}
    if pc.circuit.num_units * num_vars * num_values > _MAX_SUPPORT:
        return supports
    for node in pc.circuit.nodes:
        table = torch.zeros(node.num_units, num_vars, num_values, dtype=pc.dtype, device=pc.device)
        if isinstance(node, Input) and not node.distribution.num_values:
            table[:, node.var, 0] = 1.0  # units of such families share every value
        elif isinstance(node, Input):
            table[:, node.var, : node.distribution.num_values] = (
                (pc.log_weights(node, banks) > -torch.inf).t().to(pc.dtype)
            )
        elif isinstance(node, Sum):
            used = (pc.log_weights(node, banks) > -torch.inf).to(pc.dtype)
            children = torch.cat([supports[child] for child in node.children])
            table = (torch.einsum("oi,idc->odc", used, children) > 0).to(pc.dtype)
        else:
            for part, units in Part(node).factors:
                child = supports[part.node]
                table = table + (child if units is None else child[units.to(pc.device)])
        supports[node] = table
    return supports
