"""Weights that do not exist as tables, but as a linear map that queries share the costly part of."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from circuits.algebra.logspace import log_sum, smallest_differentiable_sum, smallest_safe_sum
from circuits.algebra.semirings import Semiring
from circuits.precision import own_precision
from circuits.weights.forms import JoinedWeights

_NUMBERS_AT_ONCE = 1 << 22
"""How many numbers of tables that are written out exist at a time."""

W = TypeVar("W", bound="ImplicitWeights")


class ImplicitWeights(JoinedWeights):
    """Weights W_nb >= 0, (K, I), of n nodes for B queries, as a map: a form of one's own fills in these five.

    Where weights add up the map is applied, elsewhere the tables of a few queries at a time are written out.
    """

    num_units: int
    """K."""
    numbers_per_row: int
    """How many numbers exist while a row of a table is written out."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Return ``W_nb x_nb``: (n, I, B, E) to (n, K, B, E)."""

    @abstractmethod
    def support(self: W) -> W:
        """Return weights that are positive exactly where the logarithms of these are above -inf."""

    @abstractmethod
    def rows_at(self, slot: Tensor, query: Tensor, unit: Tensor) -> Tensor:
        """Return all rows at once, see :meth:`rows`; of a dimension of length 1 the only entry is read."""

    def rows(self, slot: Tensor, query: Tensor, unit: Tensor) -> Tensor:
        """Write the rows out, a few at a time."""
        step = max(1, _NUMBERS_AT_ONCE // self.numbers_per_row)
        parts = zip(*(index.split(step) for index in (slot, query, unit)), strict=True)
        return torch.cat([self.rows_at(*part) for part in parts])

    def contract(self, semiring: Semiring, x: Tensor) -> Tensor:
        """Apply the map where weights add up, else write out tables."""
        if not semiring.is_linear:
            return self.scaled(semiring, self._by_tables(semiring, x))
        columns = x.reshape(*x.shape[:3], math.prod(x.shape[3:]))
        tensors = (columns, *self.tensors)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors) and not torch.compiler.is_compiling():
            out: Tensor = _LogApply.apply(self, *tensors)
        else:
            out = _applied(self, columns, smallest_safe_sum)
        return self.scaled(semiring, out.reshape(*out.shape[:3], *x.shape[3:]))

    def _by_tables(self, semiring: Semiring, x: Tensor) -> Tensor:
        """Write out the tables of a few nodes and queries at a time; with gradients, once more on the way back."""
        num_nodes, num_children, batch_size = x.shape[:3]
        is_shared = self.batch_size == 1
        pairs = x if is_shared else x.movedim(2, 1).flatten(0, 1).unsqueeze(2)  # (n or n * B, I, B or 1, *E)

        def contracted(start: int, part: Tensor) -> Tensor:
            pair = torch.arange(start, start + len(part), device=x.device).repeat_interleave(self.num_units)
            slot, query = (pair, pair * 0) if is_shared else (pair // batch_size, pair % batch_size)
            unit = torch.arange(self.num_units, device=x.device).repeat(len(part))
            return semiring.contract(self.rows(slot, query, unit).unflatten(0, (len(part), self.num_units)), part)

        out, per_part = [], max(1, _NUMBERS_AT_ONCE // (self.num_units * num_children))
        for i, part in enumerate(pairs.split(per_part)):
            if torch.is_grad_enabled():
                again = checkpoint(contracted, i * per_part, part, use_reentrant=False, preserve_rng_state=False)
                out.append(again)
            else:
                out.append(contracted(i * per_part, part))
        joined = torch.cat(out)
        return joined if is_shared else joined.squeeze(2).unflatten(0, (num_nodes, batch_size)).movedim(1, 2)


class _LogApply(torch.autograd.Function):
    """First gradients come from sums that are safe to divide by, second ones from sums whose cube is."""

    @staticmethod
    def forward(ctx: Any, weights: ImplicitWeights, *tensors: Tensor) -> Tensor:
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_(is_needed) for t, is_needed in zip(tensors, needed, strict=True)]
            out = _applied(weights.with_tensors(inputs[1:]), inputs[0], smallest_safe_sum)
        ctx.weights, ctx.recorded = weights, (inputs, out)
        ctx.save_for_backward(*tensors)
        return out.detach()

    @staticmethod
    @own_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        is_differentiable, needed = torch.is_grad_enabled(), ctx.needs_input_grad[1:]
        inputs, out = ctx.recorded
        if is_differentiable:
            inputs = [t.view_as(t) for t in ctx.saved_tensors]  # some are made of each other: gradients stop here
            out = _applied(ctx.weights.with_tensors(inputs[1:]), inputs[0], smallest_differentiable_sum)
        wanted = [t for t, is_needed in zip(inputs, needed, strict=True) if is_needed]
        options = {"retain_graph": True, "create_graph": is_differentiable, "allow_unused": True}
        grads = iter(torch.autograd.grad(out, wanted, grad, **options))
        return None, *(next(grads) if is_needed else None for is_needed in needed)


def _applied(weights: ImplicitWeights, x: Tensor, smallest: Callable[[torch.dtype, int], float]) -> Tensor:
    """Return ``log W exp(x)``, (n, I, B, E) to (n, K, B, E): -inf exactly where no term is possible, never NaN.

    As in :mod:`~circuits.algebra.logspace` sums are taken in linear space, below the columns' maxima, and those that
    are too small to trust once more in log space.
    """
    peak = x.detach().amax(1, keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    total = weights.apply((x - peak).exp())
    low = total < smallest(x.dtype, x.shape[1])
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and not bool(low.any()):
        return total.log() + peak
    out = torch.where(low, -torch.inf, torch.where(low, 1.0, total).log() + peak)
    if is_compiling:
        return out
    possible = weights.support().apply((x > -torch.inf).to(x.dtype)) > 0
    node, unit, query, entry = (low & possible).nonzero(as_tuple=True)
    if not len(node):
        return out
    terms = weights.rows(node, query, unit) + x[node, :, query, entry]
    return out.index_put((node, unit, query, entry), log_sum(terms))


def at(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """Return an index along a dimension that has length 1 where its entry is shared."""
    return index if tensor.shape[dim] > 1 else torch.zeros_like(index)
