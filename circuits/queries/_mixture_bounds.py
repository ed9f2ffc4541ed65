"""Bounds of the entropy of every unit of a circuit, from pairwise distances between the units of a node."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from circuits.engine.compile import CompiledCircuit
from circuits.engine.weights import CircuitWeights
from circuits.errors import PropertyError
from circuits.queries.alignment import Part
from circuits.queries.power_sums import Power, Tables, tables_of_powers
from circuits.symbolic import Input, Node, Sum


class UnitBounds(NamedTuple):
    """What is known of the posteriors p_k of K units of one node under B queries."""

    log_mass: Tensor
    """(K, B): log Z."""
    lower: Tensor
    """(K, B): at most H(p_k)."""
    upper: Tensor
    """(K, B): at least H(p_k)."""
    coefficient: Tensor
    """(K, K, B): at least the Bhattacharyya coefficient sum_x sqrt(p_k p_l), at most 1."""
    divergence: Tensor
    """(K, K, B): at least the Kullback-Leibler divergence of p_k from p_l."""


def mixture_bounds(pc: CompiledCircuit, factors: Tensor) -> UnitBounds:
    """Return the bounds of the root, under log-factors (B, D, C)."""
    weights = pc.weights()
    between = _Coefficients(pc, weights, factors)
    bounds: dict[Node, UnitBounds] = {}
    for node in pc.circuit.nodes:
        if isinstance(node, Input):
            log_weights = pc.log_weights(node, weights)  # (C, K)
            terms = log_weights.t().unsqueeze(2) + factors[:, node.var, : len(log_weights)].t()  # (K, C, B)
            bounds[node] = _of_table(terms)
        elif isinstance(node, Sum):
            rows = [
                node.mixed([between(child, bounds[child], other, bounds[other]) for other in node.children], 1)
                for child in node.children
            ]
            children = [bounds[child] for child in node.children]
            if node.unit is not None:
                children = [_of_units(child, torch.tensor([node.unit], device=pc.device)) for child in children]
            bounds[node] = _of_sum(pc.log_weights(node, weights), children, node.mixed(rows))
        else:
            parts = [(bounds[part.node], units) for part, units in Part(node).factors]
            bounds[node] = _of_product(parts, pc.device)
    return bounds[pc.circuit.root]


class _Coefficients:
    """Bounds of the Bhattacharyya coefficients between the units of two nodes.

    Square roots of sums are at most sums of square roots, so the joint recursion for ``sum_x p(x)^(1/2) q(x)^(1/2)`` is
    an upper bound also where it is not exact.
    """

    def __init__(self, pc: CompiledCircuit, weights: CircuitWeights, factors: Tensor) -> None:
        self.powers = [Power(pc, weights, 0.5)] * 2
        self.factors = factors
        self.tables: Tables = {}

    def __call__(self, first: Node, of_first: UnitBounds, second: Node, of_second: UnitBounds) -> Tensor:
        """Return (K, L, B): at most 1, and 1 where the nodes are not compatible."""
        if first is second:
            return of_first.coefficient
        meeting = (Part(first), Part(second))
        try:
            table, _ = tables_of_powers([meeting], self.powers, self.factors, known=self.tables)[meeting]
        except PropertyError:
            return self.factors.new_ones(first.num_units, second.num_units, len(self.factors))
        log_norm = 0.5 * (of_first.log_mass.unsqueeze(1) + of_second.log_mass)
        possible = table > -torch.inf
        log_ratio = torch.where(possible, table, 0.0) - torch.where(possible, log_norm, 0.0)
        return torch.where(possible, log_ratio.clamp_max(0.0).exp(), 0.0)


def xlogx(x: Tensor) -> Tensor:
    """Return x log x with value and gradient 0 at 0."""
    return torch.where(x > 0, x * torch.where(x > 0, x, 1.0).log(), 0.0)


def _of_table(terms: Tensor) -> UnitBounds:
    log_mass, share = _normalised(terms)
    entropy = -xlogx(share).sum(1)
    root = _sqrt(share)
    coefficient = torch.einsum("kcb,lcb->klb", root, root)
    return UnitBounds(log_mass, entropy, entropy, coefficient.clamp_max(1.0), _divergences(share))


def _of_product(parts: list[tuple[UnitBounds, Tensor | None]], device: torch.device) -> UnitBounds:
    total: UnitBounds | None = None
    for bounds, units in parts:
        if units is not None:
            bounds = _of_units(bounds, units.to(device))
        total = (
            bounds
            if total is None
            else UnitBounds(
                total.log_mass + bounds.log_mass,
                total.lower + bounds.lower,
                total.upper + bounds.upper,
                total.coefficient * bounds.coefficient,
                total.divergence + bounds.divergence,
            )
        )
    assert total is not None
    return total


def _of_units(bounds: UnitBounds, units: Tensor) -> UnitBounds:
    pairs = units.unsqueeze(1), units.unsqueeze(0)
    return UnitBounds(*(t[units] for t in bounds[:3]), *(t[pairs] for t in bounds[3:]))


def _of_sum(log_weights: Tensor, children: list[UnitBounds], coefficient: Tensor) -> UnitBounds:
    log_mass, share = _normalised(log_weights.unsqueeze(2) + torch.cat([c.log_mass for c in children]))  # (O, I, B)
    divergence = _block_diagonal([c.divergence for c in children], torch.inf)
    lower = (share * torch.cat([c.lower for c in children])).sum(1)
    upper = (share * torch.cat([c.upper for c in children])).sum(1)
    closest = torch.einsum("ojb,ijb->oib", share, coefficient)
    farthest = torch.einsum("ojb,ijb->oib", share, (-divergence).exp())
    root = _sqrt(share)
    between = torch.einsum("oib,ijb,pjb->opb", root, coefficient, root)
    own = torch.eye(len(share), dtype=torch.bool, device=share.device).unsqueeze(2)
    return UnitBounds(
        log_mass,
        lower - _weighted_log(share, closest),
        upper - _weighted_log(share, farthest),
        torch.where(own, 1.0, between.clamp_max(1.0)),
        _divergences(share),
    )


def _normalised(terms: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logsumexp along dimension 1, and each term's share of it; shares are 0 where nothing is possible."""
    possible = (terms > -torch.inf).any(1, keepdim=True)
    safe = torch.where(possible, terms, 0.0)
    log_total = safe.logsumexp(1, keepdim=True)
    share = torch.where(possible, (safe - log_total).exp(), 0.0)
    return torch.where(possible, log_total, -torch.inf).squeeze(1), share


def _divergences(share: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergences between rows of shares, (K, I, B) to (K, K, B)."""
    log = torch.where(share > 0, torch.where(share > 0, share, 1.0).log(), 0.0)
    cross = torch.einsum("kib,lib->klb", share, log)
    outside = torch.einsum("kib,lib->klb", (share > 0).to(share.dtype), (share == 0).to(share.dtype)) > 0
    return torch.where(outside, torch.inf, (xlogx(share).sum(1).unsqueeze(1) - cross).clamp_min(0.0))


def _weighted_log(share: Tensor, value: Tensor) -> Tensor:
    """Return sum_i share_i log value_i, with 0 log 0 = 0: (O, I, B) to (O, B)."""
    possible = (share > 0) & (value > 0)
    return torch.where(possible, share * torch.where(possible, value, 1.0).log(), 0.0).sum(1)


def _sqrt(share: Tensor) -> Tensor:
    """Return the square root with gradient 0 at 0."""
    return torch.where(share > 0, torch.where(share > 0, share, 1.0).sqrt(), 0.0)


def _block_diagonal(blocks: list[Tensor], fill: float) -> Tensor:
    """Join (K, K, B) blocks along the diagonal of one (I, I, B) table."""
    rows = []
    for position, block in enumerate(blocks):
        before, after = (sum(len(other) for other in part) for part in (blocks[:position], blocks[position + 1 :]))
        rows.append(torch.nn.functional.pad(block, (0, 0, before, after), value=fill))
    return torch.cat(rows)
