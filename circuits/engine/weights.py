"""The weights that a pass over a circuit uses, and factors on its classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuits.errors import ArgumentError
from circuits.evidence import Evidence
from circuits.symbolic import Circuit

if TYPE_CHECKING:
    pass


class Weights:
    """Normalised weights of one parameter bank: sums (P, O, I), finite input families (P, C, K).

    The banks of other input families hold what the family reads: ``log`` is their numbers (P, S, K), ``linear`` the
    logarithm of a factor on every unit, (P, 1, K).
    """

    linear: Tensor
    """exp(log), detached: for GEMMs; gradients flow through ``log``. Computed when first asked for."""

    def __init__(self, log: Tensor, linear: Tensor | None = None) -> None:
        self.log = log
        if linear is not None:
            self.linear = linear

    def __getattr__(self, name: str) -> Tensor:
        """Compute ``linear``, and keep it; nothing else is missing."""
        if name != "linear":
            raise AttributeError(name)
        with torch.inference_mode(False), torch.no_grad():
            self.linear = self.log.detach().exp()
        return self.linear

    def with_log(self, log: Tensor) -> Weights:
        """Return the same weights with another leaf of automatic differentiation, or another view, as ``log``."""
        return Weights(log, vars(self).get("linear"))


@dataclass(frozen=True, eq=False)
class CircuitWeights:
    """The weights that queries use: every query takes them as ``weights=``. ``pc.weights(...)`` returns them."""

    own: Mapping[str, Weights]
    """Those of the circuit's parameters, by name of ``pc.bank``."""
    given: Mapping[int, Any] = field(default_factory=dict)
    """Those that nodes are given at run time, by layer: ``GivenSums`` and ``GivenInputs``."""

    @property
    def batch_size(self) -> int:
        """B of the weights given at run time; 1 when all queries share them."""
        return max({given.batch_size for given in self.given.values()} - {1}, default=1)

    def tensors(self) -> list[Tensor]:
        """Return all log-weights."""
        return [*(own.log for own in self.own.values()), *(t for given in self.given.values() for t in given.tensors)]

    def of_queries(self, index: Tensor) -> CircuitWeights:
        """Return the weights of some queries, int64 (m,); they may come more than once."""
        return replace(self, given={layer: given.of_queries(index) for layer, given in self.given.items()})

    def detached(self, *, requires_grad: bool = False) -> CircuitWeights:
        """Return the same weights without their history, the own ones as new leaves of automatic differentiation."""
        own = {
            name: weights.with_log(weights.log.detach().requires_grad_(requires_grad))
            for name, weights in self.own.items()
        }
        return CircuitWeights(own, {layer: given.detached() for layer, given in self.given.items()})

    def with_own(self, own: Mapping[str, Weights]) -> CircuitWeights:
        """Return the same weights with those of some banks replaced."""
        return replace(self, own={**self.own, **own})


def check_compiled(pc: object, argument: str = "pc") -> None:
    """Raise ArgumentError unless an argument is a compiled circuit."""
    if not hasattr(pc, "own_weights"):
        way_out = "; ct.compile(circuit) makes one" if isinstance(pc, Circuit) else ""
        raise ArgumentError(f"{argument}: expected a compiled circuit, got {type(pc).__name__}{way_out}")


def check_kinds(evidence: object, weights: object) -> None:
    """Raise ArgumentError unless evidence and weights are such, or None."""
    if not isinstance(evidence, Evidence | None):
        way_out = "ct.Evidence.observe(x) is that of assignments x (B, D)"
        raise ArgumentError(f"evidence: expected a ct.Evidence, got {type(evidence).__name__}; {way_out}")
    if not isinstance(weights, CircuitWeights | None):
        raise ArgumentError(f"weights: expected what pc.weights(...) returns, got {type(weights).__name__}")
