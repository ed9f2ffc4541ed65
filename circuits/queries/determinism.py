"""Whether a compiled circuit is deterministic: no assignment has two explanations."""

from __future__ import annotations

import torch
from torch import Tensor

from circuits.engine.compile import CompiledCircuit
from circuits.engine.weights import CircuitWeights
from circuits.errors import PropertyError
from circuits.queries.alignment import Part
from circuits.queries.power_sums import Power, Tables, tables_of_powers
from circuits.symbolic import Circuit, Input, Node, Sum

_MAX_SUPPORT = 1 << 24


def is_deterministic(circuit: Circuit | CompiledCircuit) -> bool:
    """Return whether no assignment has two explanations, as far as can be shown.

    Of a symbolic circuit only the structure is looked at: every sum has a single child unit. Of a compiled one the
    weights too: the child units that a sum unit mixes have disjoint supports, either on one variable or, where the
    children are compatible, jointly. True is a proof; False can mean that neither test could tell.
    """
    if isinstance(circuit, Circuit):
        return circuit.is_deterministic
    return _overlapping_sum(circuit) is None


def require_deterministic(pc: CompiledCircuit, query: str) -> None:
    """Raise PropertyError, naming the sum, unless the compiled circuit is deterministic."""
    node = _overlapping_sum(pc)
    if node is not None:
        raise PropertyError(
            f"{query}: expected a deterministic circuit, got one in which the supports of the units that {node} mixes "
            "overlap, or could not be shown to be disjoint"
        )


@torch.no_grad()
def _overlapping_sum(pc: CompiledCircuit) -> Sum | None:
    """Return a sum whose units mix children with supports that are not shown to be disjoint, or None."""
    weights = pc.weights()
    powers = [Power(pc, weights)] * 2
    num_values = max(1, *pc.circuit.num_categories)
    no_evidence = torch.zeros(1, pc.circuit.num_vars, num_values, dtype=pc.dtype, device=pc.device)
    tables: Tables = {}
    supports: dict[Node, Tensor] | None = None
    for node in pc.circuit.sums:
        used = (pc.log_weights(node, weights) > -torch.inf).to(pc.dtype)
        mixed = (used.t() @ used).fill_diagonal_(0.0) > 0  # (I, I): some unit mixes both
        if not bool(mixed.any()):
            continue
        pairs = {(a, b): (Part(a), Part(b)) for a in node.children for b in node.children}
        try:
            tables_of_powers(pairs.values(), powers, no_evidence, known=tables)
        except PropertyError:
            supports = _variable_supports(pc, weights) if supports is None else supports
            own = node.mixed([supports[child] for child in node.children]) if supports else None
            if own is None or bool((mixed & _share_every_variable(own, node)).any()):
                return node
            continue
        rows = [node.mixed([tables[pairs[a, b]][0][..., 0] for b in node.children], 1) for a in node.children]
        if bool((mixed & (node.mixed(rows) > -torch.inf)).any()):
            return node
    return None


def _share_every_variable(supports: Tensor, node: Node) -> Tensor:
    """Return which two of I units, with supports (I, D, C), have a common value of every variable: bool (I, I)."""
    own = supports[:, sorted(node.scope)]
    return (torch.einsum("idc,jdc->ijd", own, own) > 0).all(2)


def _variable_supports(pc: CompiledCircuit, weights: CircuitWeights) -> dict[Node, Tensor]:
    """Return which values each unit allows each variable, 0 or 1, (K, D, C); nothing if the circuit is too large."""
    num_vars, num_values = pc.circuit.num_vars, max(1, *pc.circuit.num_categories)
    supports: dict[Node, Tensor] = {}
    if pc.circuit.num_units * num_vars * num_values > _MAX_SUPPORT:
        return supports
    for node in pc.circuit.nodes:
        table = torch.zeros(node.num_units, num_vars, num_values, dtype=pc.dtype, device=pc.device)
        if isinstance(node, Input) and not node.distribution.num_values:
            table[:, node.var, 0] = 1.0  # units of such families share every value
        elif isinstance(node, Input):
            table[:, node.var, : node.distribution.num_values] = (
                (pc.log_weights(node, weights) > -torch.inf).t().to(pc.dtype)
            )
        elif isinstance(node, Sum):
            used = (pc.log_weights(node, weights) > -torch.inf).to(pc.dtype)
            children = node.mixed([supports[child] for child in node.children])
            table = (torch.einsum("oi,idc->odc", used, children) > 0).to(pc.dtype)
        else:
            for part, units in Part(node).factors:
                child = supports[part.node]
                table = table + (child if units is None else child[units.to(pc.device)])
        supports[node] = table
    return supports
