"""A circuit's value in any semiring, also one of the user's own."""

from __future__ import annotations

import torch
from torch import Tensor

from circuits.algebra.semirings import Semiring
from circuits.arguments import shape_of
from circuits.engine.compile import CompiledCircuit
from circuits.engine.question import Question
from circuits.engine.weights import CircuitWeights
from circuits.errors import ArgumentError
from circuits.evidence import Evidence
from circuits.queries.common import query


@query
def evaluate(
    pc: CompiledCircuit, semiring: Semiring, evidence: Evidence | None = None, *, weights: CircuitWeights | None = None
) -> Tensor:
    """Return a circuit's value in any semiring: the sum over explanations of the products of what they use.

    An explanation is one choice of a child per reached sum unit and one value per reached input unit. In
    ``ct.semirings.LogSemiring()`` the value is log Z, in ``ct.semirings.MaxSemiring()`` the log-score of the best
    explanation; a semiring of your own is one subclass of ``ct.semirings.Semiring`` (Goodman 1999, "Semiring Parsing").

    Args:
        pc: the circuit.
        semiring: what plus and times mean.
        evidence: for B queries; None: no evidence, B = 1.
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.

    Returns:
        (B, *E), with the trailing dimensions E of the semiring's values.

    Raises:
        ArgumentError: ``semiring`` is none, or the evidence does not fit the circuit.
        PropertyError: the circuit has a distribution per class, and the evidence does not say which.
    """
    if not isinstance(semiring, Semiring):
        raise ArgumentError(f"semiring: expected a ct.semirings.Semiring, got {type(semiring).__name__}")
    return Question(pc, evidence, weights).root(_Checked(semiring))


class _Checked(Semiring):
    """Another semiring, whose values are checked: one of a wrong shape might be broadcast to a wrong number."""

    def __init__(self, semiring: Semiring) -> None:
        self.semiring = semiring
        self.adds_up, self.is_linear = semiring.adds_up, semiring.is_linear  # type: ignore[misc]

    def lift(self, log_values: Tensor) -> Tensor:
        """Lift, to any trailing dimensions."""
        return self._checked("lift", self.semiring.lift(log_values), *log_values.shape)

    def times(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply; trailing dimensions need not be those of the factors."""
        shape = torch.broadcast_shapes(left.shape[:3], right.shape[:3])
        return self._checked("times", self.semiring.times(left, right), *shape)

    def product(self, factors: Tensor) -> Tensor:
        """Multiply many values."""
        return self._checked("product", self.semiring.product(factors), len(factors), *factors.shape[2:4])

    def contract(self, log_weights: Tensor, x: Tensor, *, weights: Tensor | None = None) -> Tensor:
        """Add up."""
        shape = max(len(log_weights), len(x)), log_weights.shape[1], x.shape[2]
        return self._checked("contract", self.semiring.contract(log_weights, x, weights=weights), *shape)

    def mix(self, log_table: Tensor, values: Tensor, log_factors: Tensor, *, table: Tensor | None = None) -> Tensor:
        """Add up over listed rows."""
        mixed = self.semiring.mix(log_table, values, log_factors, table=table)
        return self._checked("mix", mixed, len(values), log_table.shape[1])

    def _checked(self, method: str, value: Tensor, *shape: int) -> Tensor:
        if not isinstance(value, Tensor) or value.shape[: len(shape)] != shape:
            raise ArgumentError(
                f"semiring: expected {type(self.semiring).__name__}.{method} to return values of shape "
                f"({', '.join(map(str, shape))}, *E), got {shape_of(value)}; "
                "ct.testing.SemiringTestCase tests a semiring"
            )
        return value
