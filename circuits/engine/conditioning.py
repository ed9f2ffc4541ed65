"""The part of the evidence that is not on variables: factors on latents, and the class.

Latent factors multiply the children of a sum node, and so are evidence on the latent variable that chooses among them.
They belong to single nodes, not to the parameters that nodes may share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from circuits.engine.semirings import Semiring


@dataclass(frozen=True, eq=False)
class LatentFactors:
    """Log-factors on the children of n of the F sum nodes of one layer."""

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


@dataclass(frozen=True, eq=False)
class Conditions:
    """The part of the evidence that is not on variables."""

    latents: Mapping[int, LatentFactors] = field(default_factory=dict)
    """By layer."""
    class_factors: Tensor | None = None
    """Log-factors on the root's units, (R, B); None: the circuit has no classes, or they are kept apart."""
    silent: Mapping[int, Tensor] = field(default_factory=dict)
    """By sum layer, which nodes are the constant 1, bool (F, 1, B); see :func:`~circuits.engine.passes.silent_sums`."""


class LayerValues(list[Any]):
    """Values of the layers in order, (F, K, B, *E) each, or None; with the conditions that they were computed under."""

    def __init__(self, values: Any, conditions: Conditions) -> None:
        super().__init__(values)
        self.conditions = conditions


def conditions_of(values: Any) -> Conditions:
    """Return the conditions that come with layer values; none with a plain list."""
    return values.conditions if isinstance(values, LayerValues) else Conditions()
