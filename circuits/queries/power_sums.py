"""Sums over all assignments of products of powers of circuits, and expectations of a circuit's logarithm under them.

One joint recursion over the nodes that meet (see :mod:`circuits.queries.alignment`): n nodes with K_1, ..., K_n units
make a table (K_1, ..., K_n, B). Vergari et al. 2021 build the product of circuits; here only its integral is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.algebra import logspace
from circuits.engine.compile import CompiledCircuit
from circuits.engine.weights import CircuitWeights
from circuits.errors import PropertyError
from circuits.queries.alignment import LeafStep, Meeting, Part, ProductStep, SumStep, align
from circuits.queries.averages import log_matmul_average
from circuits.symbolic import Input, ParametricNode, Sum

Tables = dict[Meeting, tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, eq=False)
class Power:
    """One factor, ``p(x) ** exponent`` on the support of p. An exponent other than 1 is for deterministic circuits."""

    pc: CompiledCircuit
    weights: CircuitWeights
    exponent: float = 1.0

    def log_weights(self, node: ParametricNode) -> tuple[Tensor, Tensor]:
        """Return the log-weights of a node, outputs first, and their power: sums (K, I), inputs (K, C)."""
        if isinstance(node, Input) and not node.distribution.num_values:
            raise PropertyError(
                f"sum over a product of circuits: expected variables with finitely many values, got {node}, a "
                f"{node.distribution}"
            )
        log = self.pc.log_weights(node, self.weights)
        log = log.t() if isinstance(node, Input) else log
        if self.exponent == 1.0:
            return log, log
        possible = log > -torch.inf
        return log, torch.where(possible, self.exponent * torch.where(possible, log, 0.0), -torch.inf)


def log_sum_of_powers(
    powers: Sequence[Power], log_factors: Tensor, *, averaged: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return ``log sum_x prod_i e_i(x_i) prod_j p_j(x) ** a_j``, (B,), and an average of one circuit's logarithm.

    What is ``averaged`` over the terms of the sum is ``log p_j(x) + sum_i log e_i(x_i)`` of a deterministic circuit j.
    Raises PropertyError if the circuits are not compatible.
    """
    root = tuple(Part(power.pc.circuit.root) for power in powers)
    log_value, average = tables_of_powers([root], powers, log_factors, averaged=averaged)[root]
    return log_value.flatten(), None if average is None else average.flatten()


def tables_of_powers(
    roots: Iterable[Meeting],
    powers: Sequence[Power],
    log_factors: Tensor,
    *,
    averaged: int | None = None,
    known: Tables | None = None,
) -> Tables:
    """Return (log-value, average), each (K_1, ..., K_n, B), of the given meetings and of all below them.

    Tables that are ``known`` from an earlier call with the same circuits and factors are used and added to.
    """
    tables: Tables = {} if known is None else known
    for meeting, step in align(roots, tables).items():
        if isinstance(step, LeafStep):
            tables[meeting] = _leaf(meeting, powers, log_factors, averaged)
        elif isinstance(step, ProductStep):
            tables[meeting] = _product(step, tables)
        else:
            tables[meeting] = _sum(meeting, step, tables, powers, averaged)
    return tables


def _leaf(
    meeting: Meeting, powers: Sequence[Power], log_factors: Tensor, averaged: int | None
) -> tuple[Tensor, Tensor | None]:
    axis = averaged or 0
    nodes = [part.node for part in meeting]
    assert all(isinstance(node, Input) for node in nodes)
    weighted = [power.log_weights(node) for power, node in zip(powers, nodes, strict=True) if isinstance(node, Input)]
    log, log_weights = weighted[axis]
    factors = log_factors[:, nodes[axis].scope_bits.bit_length() - 1, : log.shape[1]].t()  # (C, B)
    others = [power for position, (_, power) in enumerate(weighted) if position != axis]
    terms = factors
    for table in reversed(others):
        terms = table.t().reshape(log.shape[1], -1, *[1] * (terms.dim() - 1)) + terms.unsqueeze(1)
    average = None
    if averaged is not None:
        average = torch.where(factors > -torch.inf, factors, 0.0)
        average = average.reshape(log.shape[1], *[1] * len(others), -1).expand_as(terms)
    return _contract(log_weights, terms, average, log if averaged is not None else None, axis)


def _product(step: ProductStep, tables: Tables) -> tuple[Tensor, Tensor | None]:
    total: tuple[Tensor, Tensor | None] | None = None
    for child, maps in zip(step.children, step.maps, strict=True):
        log_value, average = tables[child]
        for axis, units in enumerate(maps):
            if units is not None:
                units = units.to(log_value.device)
                log_value = log_value.index_select(axis, units)
                average = None if average is None else average.index_select(axis, units)
        if total is None:
            total = log_value, average
        else:
            total = total[0] + log_value, None if average is None or total[1] is None else total[1] + average
    assert total is not None
    return total


def _sum(
    meeting: Meeting, step: SumStep, tables: Tables, powers: Sequence[Power], averaged: int | None
) -> tuple[Tensor, Tensor | None]:
    node = meeting[step.axis].node
    assert isinstance(node, Sum)
    log, log_weights = powers[step.axis].log_weights(node)
    children = [tables[child] for child in step.children]
    log_value = node.mixed([value for value, _ in children], step.axis).movedim(step.axis, 0)
    averages = [average for _, average in children if average is not None]
    average = node.mixed(averages, step.axis).movedim(step.axis, 0) if averages else None
    return _contract(log_weights, log_value, average, log if averaged == step.axis else None, step.axis)


def _contract(
    log_weights: Tensor,  # shape: (K, I)
    x: Tensor,  # shape: (I, ...)
    average: Tensor | None,  # shape: (I, ...)
    edge: Tensor | None,  # shape: (K, I)
    axis: int,
) -> tuple[Tensor, Tensor | None]:
    """Contract along dimension 0 and put the result's units on ``axis``."""
    peak = log_weights.detach().amax(1, keepdim=True)
    peak = torch.where(peak > -torch.inf, peak, 0.0)
    scaled = (log_weights - peak).unsqueeze(0)  # powers may exceed 1: the largest weight of a row becomes 1
    flat = x.reshape(1, len(x), -1)
    if average is None:
        out = logspace.log_matmul(scaled, flat)
    else:
        out, average = log_matmul_average(
            scaled, flat, average.reshape(flat.shape), edge=None if edge is None else edge.unsqueeze(0)
        )
        average = average.reshape(-1, *x.shape[1:]).movedim(0, axis)
    return (out[0] + peak).reshape(-1, *x.shape[1:]).movedim(0, axis), average
