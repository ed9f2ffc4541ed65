"""Factors on the children of single sum nodes: evidence on the latents that choose among them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.algebra.semirings import Semiring
from circuits.errors import ArgumentError
from circuits.symbolic import Sum


@dataclass(frozen=True, eq=False)
class LatentFactors:
    """Log-factors on the children of n of the F sum nodes of one layer: evidence on what chooses among them."""

    rows: Tensor
    """Which nodes of the layer, int64 (n,)."""
    log: Tensor
    """Log-factors, (n, I, B)."""

    def applied(self, semiring: Semiring, x: Tensor) -> Tensor:
        """Multiply the layer's children, (F, I, B, *E), by the factors."""
        factors = semiring.lift(self.log)
        if len(self.rows) == len(x):
            order = self.rows.argsort()
            return semiring.times(x, factors.index_select(0, order))
        return x.index_copy(0, self.rows, semiring.times(x.index_select(0, self.rows), factors))

    def added(self, log_weights: Tensor, node: Tensor, query: Tensor) -> Tensor:
        """Add the factors to the log-weights, (m, I), of m reached sum units, in place; node, query: (m,)."""
        matches = node.unsqueeze(1) == self.rows  # (m, n)
        given, slot = matches.nonzero(as_tuple=True)
        log_weights[given] += self.log[slot, :, query[given]]
        return log_weights


def latents_by_layer(
    factors: Iterable[tuple[Sum, tuple[int, int], Tensor]], batch_size: int, like: Tensor
) -> dict[int, LatentFactors]:
    """Return log-factors on the children of sum nodes by layer, in the type and on the device of ``like``.

    Args:
        factors: a node, where it is evaluated (layer, row), and its factors (B, I).
        batch_size: B.
        like: any tensor.

    Raises:
        ArgumentError: factors of a wrong shape, or given twice.
    """
    by_layer: dict[int, dict[int, Tensor]] = defaultdict(dict)
    for node, (layer, row), log in factors:
        shape = batch_size, node.parameter_shape[1]
        if log.shape != shape:
            raise ArgumentError(
                f"latents: expected log-factors {shape} for the child units of {node}, got {tuple(log.shape)}"
            )
        if row in by_layer[layer]:
            raise ArgumentError(f"latents: {node} is given twice, by name and by node; give it once")
        by_layer[layer][row] = log.to(like).t()
    return {
        layer: LatentFactors(torch.tensor(list(rows), device=like.device), torch.stack(list(rows.values())))
        for layer, rows in by_layer.items()
    }
