"""The inner layers of a compiled circuit: products and sums.

A layer evaluates F nodes of equal shape at once. Its output has shape (F, K, B, *E): F folded nodes, K units each, a
batch of B, and the semiring's own trailing dimensions E. The batch comes last so that every sum layer is a GEMM of its
weights with a contiguous (I, B) block, and reductions over units run across contiguous memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from circuits import logspace
from circuits.graph import ProductMode
from circuits.rows import Address, Gradients, ParameterRows, Rows
from circuits.semiring import Semiring

_MAX_SLOTS = 4


class Weights(NamedTuple):
    """Normalised weights of one parameter bank: sums (P, O, I), finite input families (P, C, K).

    The banks of other input families hold what the family reads: ``log`` is their numbers (P, S, K), ``linear`` the
    logarithm of a factor on every unit, (P, 1, K).
    """

    log: Tensor
    linear: Tensor
    """exp(log), detached: for GEMMs; gradients flow through ``log``."""


class _InnerLayer(nn.Module):
    """F nodes with equally many children, whose units are ``child_units``."""

    child_layer: Tensor
    child_row: Tensor

    def __init__(self, children: Sequence[Sequence[Address]], child_units: Sequence[int]) -> None:
        super().__init__()
        self.child_units = list(child_units)
        addresses = torch.tensor([list(node) for node in children])  # (F, children, 2)
        self.register_buffer("child_layer", addresses[..., 0].clone(), persistent=False)
        self.register_buffer("child_row", addresses[..., 1].clone(), persistent=False)


class ProductLayer(_InnerLayer):
    """Product units of F nodes with equally many children."""

    def __init__(self, children: Sequence[Sequence[Address]], child_units: Sequence[int], mode: ProductMode) -> None:
        super().__init__(children, child_units)
        self.mode = mode
        self.num_children = len(child_units)
        self.is_stacked = mode == "elementwise" and self.num_children > _MAX_SLOTS
        if self.is_stacked:
            slots = [[address for addresses in children for address in addresses]]
        else:
            slots = [[addresses[slot] for addresses in children] for slot in range(self.num_children)]
        self.slots: Sequence[Rows] = cast(Any, nn.ModuleList(Rows(slot) for slot in slots))

    def forward(self, semiring: Semiring, outputs: Sequence[Tensor | None]) -> Tensor:
        """Return the products of the children's units, shape (F, K, B, *E)."""
        if self.is_stacked:
            return semiring.product(self.slots[0](outputs).unflatten(0, (-1, self.num_children)))
        out = self.slots[0](outputs)
        for slot in self.slots[1:]:
            if self.mode == "outer":
                out = semiring.times(out.unsqueeze(2), slot(outputs).unsqueeze(1)).flatten(1, 2)
            else:
                out = semiring.times(out, slot(outputs))
        return out

    def adjoint(self, grad: Tensor, gradients: Gradients) -> None:
        """Send the gradient of the output, (F, K, B), to the children (log semiring)."""
        if self.is_stacked:
            self.slots[0].adjoint(grad.unsqueeze(1).expand(-1, self.num_children, -1, -1).flatten(0, 1), gradients)
            return
        for position, slot in enumerate(self.slots):
            part = grad
            if self.mode == "outer" and self.num_children > 1:
                others = [1 + i for i in range(self.num_children) if i != position]
                part = grad.unflatten(1, self.child_units).sum(others)
            slot.adjoint(part, gradients)

    def child_choices(self, unit: Tensor) -> list[Tensor]:
        """Return which unit of each child a product unit multiplies: (n,) to one (n,) per child."""
        if self.mode == "elementwise":
            return [unit] * self.num_children
        return list(torch.unravel_index(unit, self.child_units))


class SumLayer(_InnerLayer):
    """Dense sum units of F nodes whose children have equally many units."""

    def __init__(
        self, children: Sequence[Sequence[Address]], child_units: Sequence[int], parameters: ParameterRows
    ) -> None:
        super().__init__(children, child_units)
        self.parameter_rows = parameters
        slots = ([addresses[slot] for addresses in children] for slot in range(len(child_units)))
        self.slots: Sequence[Rows] = cast(Any, nn.ModuleList(Rows(slot) for slot in slots))

    def gather(self, outputs: Sequence[Tensor | None]) -> Tensor:
        """Return the children's units side by side, shape (F, I, B, *E)."""
        parts = [slot(outputs) for slot in self.slots]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def forward(self, semiring: Semiring, outputs: Sequence[Tensor | None], weights: Weights) -> Tensor:
        """Return the mixtures, shape (F, K, B, *E)."""
        log_weights, linear = self.parameter_rows.select(weights.log), self.parameter_rows.select(weights.linear)
        return semiring.contract(log_weights, self.gather(outputs), weights=linear)

    def forward_recorded(
        self, outputs: Sequence[Tensor | None], weights: Weights
    ) -> tuple[Tensor, logspace.Contraction | None]:
        """Return the mixtures in the log semiring and what :meth:`adjoint` needs."""
        log_weights, linear = self.parameter_rows.select(weights.log), self.parameter_rows.select(weights.linear)
        return logspace.contract(log_weights, linear, self.gather(outputs), record=True)

    def adjoint(
        self, grad: Tensor, saved: logspace.Contraction, weights: Weights, gradients: Gradients, flows: Flows | None
    ) -> None:
        """Send the gradient of the output, (F, K, B), to the children and, unless None, to the weights' ``flows``."""
        grad_x, scale = logspace.contract_adjoint(grad, self.parameter_rows.select(weights.linear), saved)
        if flows is not None:
            self.parameter_rows.add_outer(flows.linear, scale, saved.scaled)
            if saved.repaired:
                extra = torch.zeros_like(self.parameter_rows.select(weights.log), memory_format=torch.contiguous_format)
                logspace.repaired_weight_flows(grad, saved, extra)
                self.parameter_rows.add(flows.extra(), extra)
        for slot, part in zip(self.slots, grad_x.split(self.child_units, 1), strict=True):
            slot.adjoint(part, gradients)


class Flows:
    """Gradient with respect to the log-weights of one bank, (P, O, I), gathered over the layers that use it."""

    def __init__(self, bank: Tensor) -> None:
        self.linear = torch.zeros_like(bank)
        """Gradient with respect to the linear weights."""
        self._extra: Tensor | None = None

    def extra(self) -> Tensor:
        """Return the tensor of gradients that are already with respect to the log-weights."""
        if self._extra is None:
            self._extra = torch.zeros_like(self.linear)
        return self._extra

    def total(self, linear_weights: Tensor) -> Tensor:
        """Return ``w * d/dw`` plus the rest: the gradient with respect to the log-weights."""
        flows = self.linear.mul_(linear_weights)
        return flows if self._extra is None else flows.add_(self._extra)
