"""The oracle: queries by brute-force enumeration of all assignments, in float64, node by node.

It shares no code with the compiled circuit but the weights: every node becomes a table over its own variables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from circuits.engine.compile import CompiledCircuit
from circuits.errors import ArgumentError
from circuits.evidence import Evidence
from circuits.families import Direct
from circuits.symbolic import Input, Node, Product, Sum

_MAX_ASSIGNMENTS = 1 << 22


@torch.no_grad()
def enumerate_joint(pc: CompiledCircuit) -> Tensor:
    """Return the log-probability of every assignment of a small circuit.

    Args:
        pc: a circuit with at most 2**22 assignments.

    Returns:
        float64, shape ``pc.circuit.num_categories``, (C,) * D when all variables have C categories; with R classes
        (R, ...), a table per class.

    Raises:
        ArgumentError: the circuit is too large, or a variable has infinitely many values.
    """
    return _enumerate(pc, lambda terms: torch.logsumexp(terms, 1))


@torch.no_grad()
def enumerate_explanations(pc: CompiledCircuit) -> Tensor:
    """Return ``max_z log p(x, z)`` of every assignment: float64, in the shape of :func:`enumerate_joint`."""
    return _enumerate(pc, lambda terms: terms.amax(1))


@torch.no_grad()
def enumerated_log_partition(joint: Tensor, evidence: Evidence) -> Tensor:
    """Return ``log sum_x joint(x) prod_i e_i(x_i)`` from a table of log-probabilities: float64 (B,)."""
    return torch.logsumexp(_with_evidence(joint, evidence).flatten(1), 1)


@torch.no_grad()
def enumerated_marginals(joint: Tensor, evidence: Evidence) -> Tensor:
    """Return ``p(x_i = v | e)`` from a table of log-probabilities: float64 (B, D, C), 0 beyond a variable's values."""
    weighted = _with_evidence(joint, evidence)
    posterior = torch.softmax(weighted.flatten(1), 1).reshape(weighted.shape)
    marginals = posterior.new_zeros(len(posterior), joint.dim(), max(joint.shape))
    for var, count in enumerate(joint.shape):
        others = [1 + other for other in range(joint.dim()) if other != var]
        marginals[:, var, :count] = posterior.sum(others) if others else posterior
    return marginals


@torch.no_grad()
def evaluate_slowly(pc: CompiledCircuit, x: Tensor) -> Tensor:
    """Return log p(x), node by node in float64, for circuits of any families; NaN in ``x`` is summed out.

    Args:
        pc: a circuit.
        x: floating point (B, D).

    Returns:
        (B,), or (B, R) with R classes.
    """
    values: dict[Node, Tensor] = {}  # (K, B)
    x = x.double().cpu()
    for node in pc.circuit.nodes:
        if isinstance(node, Input):
            value = x[:, node.var]
            values[node] = torch.where(value.isnan(), 0.0, _log_probability(pc, node, value.nan_to_num(0.0)))
        elif isinstance(node, Product):
            values[node] = _multiplied(node, values)
        else:
            assert isinstance(node, Sum)
            children = node.mixed([values[child] for child in node.children])
            weights = pc.log_weights(node).double().cpu()
            values[node] = torch.logsumexp(weights.unsqueeze(-1) + children, 1)
    root = values[pc.circuit.root]
    return root[0] if pc.circuit.num_classes is None else root.t()


def _log_probability(pc: CompiledCircuit, node: Input, x: Tensor) -> Tensor:
    """Return log p(x) of the units of an input node, (K, B), for ``x`` (B,)."""
    if isinstance(node.distribution, Direct):
        parameters = node.distribution.read(pc.bank_row(node).double().cpu()).unsqueeze(-1).unbind(0)
        return node.distribution.log_density(parameters, x)
    return pc.log_weights(node).double().cpu().t()[:, x.long()]


def _with_evidence(joint: Tensor, evidence: Evidence) -> Tensor:
    if evidence.reference is not None:
        raise ArgumentError("evidence: a table of assignments has no input units to divide; leave relative_to out")
    factors = evidence.dense(max(joint.shape), torch.float64)
    total = joint.unsqueeze(0)
    for var, count in enumerate(joint.shape):
        total = total + factors[:, var, :count].reshape(-1, *_broadcast_shape(joint.dim(), var, count))
    return total


def _enumerate(pc: CompiledCircuit, plus: Callable[[Tensor], Tensor]) -> Tensor:
    """Tabulate every node over its variables, (K, C_0 or 1, ..., C_D-1 or 1), children first; ``plus`` adds dim 1."""
    circuit = pc.circuit
    if not all(circuit.num_categories):
        raise ArgumentError(f"pc: {circuit} has variables with infinitely many values; use testing.evaluate_slowly")
    num_assignments = math.prod(circuit.num_categories)
    if num_assignments > _MAX_ASSIGNMENTS:
        raise ArgumentError(
            f"pc: {circuit} has {num_assignments} assignments; enumeration is for at most {_MAX_ASSIGNMENTS}"
        )
    tables: dict[Node, Tensor] = {}
    for node in circuit.nodes:
        if isinstance(node, Input):
            weights = pc.log_weights(node).double().cpu().t()
            shape = _broadcast_shape(circuit.num_vars, node.var, weights.shape[1])
            tables[node] = weights.reshape(-1, *shape)
        elif isinstance(node, Product):
            tables[node] = _multiplied(node, tables)
        else:
            assert isinstance(node, Sum)
            weights = pc.log_weights(node).double().cpu()
            children = node.mixed([tables[child] for child in node.children])
            tables[node] = plus(weights.reshape(*weights.shape, *[1] * circuit.num_vars) + children.unsqueeze(0))
    root = tables[circuit.root]
    return root[0] if circuit.num_classes is None else root


def _multiplied(node: Product, values: Mapping[Node, Tensor]) -> Tensor:
    total = values[node.children[0]]
    for child in node.children[1:]:
        other = values[child]
        total = (total.unsqueeze(1) + other).flatten(0, 1) if node.mode == "outer" else total + other
    return total


def _broadcast_shape(num_vars: int, var: int, count: int) -> list[int]:
    return [count if other == var else 1 for other in range(num_vars)]
