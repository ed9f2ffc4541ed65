"""The weights that a pass over a circuit uses, factors on the latents that they choose, and gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuits.algebra.semirings import Semiring
from circuits.errors import ArgumentError

if TYPE_CHECKING:
    from circuits.engine.compile import CompiledCircuit
    from circuits.evidence import Evidence
    from circuits.symbolic import Sum


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
        return max([1, *(given.batch_size for given in self.given.values())])

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
    pc: CompiledCircuit, evidence: Evidence, further: Mapping[Sum, Tensor] | None = None
) -> dict[int, LatentFactors]:
    """Return the evidence's log-factors on latents, and ``further`` ones times them, (B, I) each, by layer."""
    by_layer: dict[int, dict[int, Tensor]] = defaultdict(dict)
    for key, factors in (evidence.latents or {}).items():
        node = pc.sum_node(key)
        if factors.shape != (evidence.batch_size, node.parameter_shape[1]):
            raise ArgumentError(
                f"latents: expected log-factors ({evidence.batch_size}, {node.parameter_shape[1]}) for the child "
                f"units of {node}, got {tuple(factors.shape)}"
            )
        layer, row = pc.address(node)
        if row in by_layer[layer]:
            raise ArgumentError(f"latents: {node} is given twice, by name and by node; give it once")
        by_layer[layer][row] = factors.to(pc.device, pc.dtype).t()
    for node, factors in (further or {}).items():
        layer, row = pc.address(node)
        given = by_layer[layer].get(row)
        by_layer[layer][row] = factors.t() if given is None else given + factors.t()
    return {
        layer: LatentFactors(torch.tensor(list(rows), device=pc.device), torch.stack(list(rows.values())))
        for layer, rows in by_layer.items()
    }


def class_factors(pc: CompiledCircuit, classes: Tensor) -> Tensor:
    """Return log-factors on the root's units, (R, B), of labels (B,) or log-factors (B, R)."""
    num_classes = pc.circuit.num_classes
    if num_classes is None:
        raise ArgumentError("evidence: it names a class, but the circuit has none; see ct.Circuit(num_classes=...)")
    classes = classes.to(pc.device)
    if classes.dim() == 1:
        if bool(((classes < 0) | (classes >= num_classes)).any()):
            raise ArgumentError(
                f"labels: expected numbers from 0 to {num_classes - 1}, got {int(classes.min())} to "
                f"{int(classes.max())}"
            )
        is_other = torch.arange(num_classes, device=pc.device).unsqueeze(1) != classes
        return torch.zeros(is_other.shape, dtype=pc.dtype, device=pc.device).masked_fill(is_other, -torch.inf)
    if classes.shape[1] != num_classes:
        raise ArgumentError(f"log_prior: expected {num_classes} classes, got shape {tuple(classes.shape)}")
    return classes.to(pc.dtype).t()
