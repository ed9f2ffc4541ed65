"""The inner layers of a compiled circuit: products and sums.

A layer evaluates F nodes of equal shape at once. Its output has shape (F, K, B, *E): F folded nodes, K units each, a
batch of B, and the semiring's own trailing dimensions E. The batch comes last so that every sum layer is a GEMM of its
weights with a contiguous (I, B) block, and reductions over units run across contiguous memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from circuits.engine import logspace
from circuits.engine.addressing import Address, Gradients, ParameterRows, Rows
from circuits.engine.conditioning import LatentFactors, conditions_of
from circuits.engine.external import GivenSums
from circuits.engine.semirings import LogSemiring, Semiring
from circuits.symbolic import ProductMode

_MAX_SLOTS = 4
_LOG = LogSemiring()


class Weights:
    """Normalised weights of one parameter bank: sums (P, O, I), finite input families (P, C, K).

    The banks of other input families hold what the family reads: ``log`` is their numbers (P, S, K), ``linear`` the
    logarithm of a factor on every unit, (P, 1, K).
    """

    def __init__(self, log: Tensor, linear: Tensor | None = None) -> None:
        self.log = log
        self._linear = linear

    @property
    def linear(self) -> Tensor:
        """exp(log), detached: for GEMMs; gradients flow through ``log``. Computed when first asked for."""
        if self._linear is None:
            with torch.inference_mode(False), torch.no_grad():
                self._linear = self.log.detach().exp()
        return self._linear

    @property
    def num_writes(self) -> int:
        """How often somebody has written into the tensors in place."""
        return self.log._version + (0 if self._linear is None else self._linear._version)

    def with_log(self, log: Tensor) -> Weights:
        """Return the same weights with another leaf of automatic differentiation, or another view, as ``log``."""
        return Weights(log, self._linear)


class _InnerLayer(nn.Module):
    """F nodes with equally many children, whose units are ``child_units``."""

    addresses: Tensor
    """(layer, row) of every child of every node, int64 (F, children, 2)."""
    slots: list[Rows]
    """What gathers the children, by their position among a node's children."""

    def __init__(self, children: Sequence[Sequence[Address]], child_units: Sequence[int]) -> None:
        super().__init__()
        self.child_units = list(child_units)
        self.register_buffer("addresses", torch.tensor(children), persistent=False)
        layers = [{addresses[slot][0] for addresses in children} for slot in range(len(child_units))]
        self.child_layers = [found.pop() if len(found) == 1 else None for found in layers]
        """Per child, the layer that all nodes have it in; None: in several."""

    def all_of(self, outputs: Sequence[Tensor | None]) -> Tensor:
        """Return of which nodes all children are True, (F, 1, B), from bool (F', 1, B) of the layers below."""
        gathered = [slot(outputs) for slot in self.slots]
        children = functools.reduce(torch.logical_and, gathered)
        num_nodes = len(self.addresses)
        if len(children) > num_nodes:  # all children of a node in one slot
            return children.unflatten(0, (num_nodes, -1)).all(1)
        return children.repeat_interleave(num_nodes // len(children), 0)  # siblings share theirs

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for slot in self.slots:
            slot.move(fn)
        return super()._apply(fn, recurse)


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
        self.slots = [Rows(slot) for slot in slots]

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
    """Dense sum units of F nodes whose children have equally many units.

    *Siblings* are nodes with the same children, S of them in a row of the layer. Their children are gathered and
    exponentiated once, and their weights are multiplied as one matrix of S * K rows: the layer works on F / S *stacks*.
    """

    def __init__(
        self,
        children: Sequence[Sequence[Address]],
        child_units: Sequence[int],
        parameters: ParameterRows,
        *,
        position: int,
        num_siblings: int,
    ) -> None:
        super().__init__(children, child_units)
        self.parameter_rows = parameters
        self.position = position
        self.num_nodes = len(children)
        self.num_siblings = num_siblings
        slots = ([addresses[slot] for addresses in children[::num_siblings]] for slot in range(len(child_units)))
        self.slots = [Rows(slot) for slot in slots]

    def gather(self, outputs: Sequence[Tensor | None], semiring: Semiring = _LOG) -> Tensor:
        """Return the children's units side by side, times the factors of latent evidence, shape (F, I, B, *E)."""
        x = self._gather_stacks(outputs)
        if self.num_siblings > 1:
            x = x.repeat_interleave(self.num_siblings, 0)
        latents = self._latents_of(outputs)
        return x if latents is None else latents.applied(semiring, x)

    def forward(
        self,
        semiring: Semiring,
        outputs: Sequence[Tensor | None],
        weights: Weights,
        external: GivenSums | None = None,
    ) -> Tensor:
        """Return the mixtures, shape (F, K, B, *E); ``external`` weights replace those of some nodes."""
        is_stacked = external is None and self._latents_of(outputs) is None
        x = self._gather_stacks(outputs) if is_stacked else self.gather(outputs, semiring)
        if external is not None and external.is_everywhere:
            return external.contract(semiring, x, None)
        log_weights, linear = self._select(weights.log, len(x)), self._select(weights.linear, len(x))
        own = self._unstack(semiring.contract(log_weights, x, weights=linear))
        return own if external is None else external.contract(semiring, x, own)

    def forward_recorded(
        self, outputs: Sequence[Tensor | None], weights: Weights
    ) -> tuple[Tensor, logspace.Contraction | None]:
        """Return the mixtures in the log semiring and what :meth:`adjoint` needs."""
        x = self._gather_stacks(outputs) if self._latents_of(outputs) is None else self.gather(outputs)
        log_weights, linear = self._select(weights.log, len(x)), self._select(weights.linear, len(x))
        out, saved = logspace.contract(log_weights, linear, x, record=True)
        return self._unstack(out), saved

    def adjoint(
        self, grad: Tensor, saved: logspace.Contraction, weights: Weights, gradients: Gradients, flows: Flows | None
    ) -> Tensor:
        """Send the gradient of the output, (F, K, B), to the children and, unless None, to the weights' ``flows``.

        Returns:
            The gradient of what was gathered: (F, I, B) under latent evidence, else (F / S, I, B).
        """
        num_stacks = len(saved.scaled)
        grad = grad.reshape(num_stacks, grad.shape[0] * grad.shape[1] // num_stacks, grad.shape[-1])  # B may be 0
        grad_x, scale = logspace.contract_adjoint(grad, self._select(weights.linear, num_stacks), saved)
        if flows is not None:
            self.parameter_rows.add_outer(flows.linear, scale, saved.scaled)
            if saved.repaired:
                extra = torch.zeros(*scale.shape[:2], saved.scaled.shape[1], dtype=scale.dtype, device=scale.device)
                logspace.repaired_weight_flows(grad, saved, extra)
                self.parameter_rows.add(flows.extra(), self._unstack(extra))
        per_stack = grad_x
        if num_stacks * self.num_siblings != self.num_nodes:  # siblings were not stacked
            per_stack = grad_x.unflatten(0, (-1, self.num_siblings)).sum(1)
        parts = [per_stack] if len(self.slots) == 1 else per_stack.split(self.child_units, 1)
        for slot, part in zip(self.slots, parts, strict=True):
            slot.adjoint(part, gradients)
        return grad_x

    def _latents_of(self, outputs: Sequence[Tensor | None]) -> LatentFactors | None:
        return conditions_of(outputs).latents.get(self.position)

    def _gather_stacks(self, outputs: Sequence[Tensor | None]) -> Tensor:
        """Return the children's units side by side, once for all siblings, shape (F / S, I, B, *E)."""
        parts = [slot(outputs) for slot in self.slots]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _select(self, bank: Tensor, num_stacks: int) -> Tensor:
        """Return the rows of a bank that the nodes use, those of siblings below each other, (F / S, S * O, I)."""
        rows = self.parameter_rows.select(bank)
        return rows if num_stacks == self.num_nodes else rows.reshape(num_stacks, -1, rows.shape[-1])

    def _unstack(self, stacks: Tensor) -> Tensor:
        """Return (F, O, ...) of (F / S, S * O, ...)."""
        is_stacked = len(stacks) != self.num_nodes
        per_node = stacks.shape[0] * stacks.shape[1] // self.num_nodes  # not -1: B may be 0
        return stacks.reshape(self.num_nodes, per_node, *stacks.shape[2:]) if is_stacked else stacks


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
