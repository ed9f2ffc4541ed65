"""Products in log space with linear maps that are not one table: what forms of weights at run time are evaluated by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from circuits.engine.logspace import log_sum, smallest_differentiable_sum, smallest_safe_sum
from circuits.precision import own_precision


class LinearMap(Protocol):
    """Weights >= 0 of n nodes for B queries, W_nb (K, I), that need not exist as tables."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it is differentiable in."""

    def with_tensors(self, tensors: Sequence[Tensor]) -> LinearMap:
        """Return the same map of other tensors."""

    def support(self) -> LinearMap:
        """Return a map with positive weights exactly where this one's logarithms are above -inf."""

    def apply(self, x: Tensor) -> Tensor:
        """Return ``W_nb x_nb``: (n, I, B, E) to (n, K, B, E)."""

    def rows(self, node: Tensor, query: Tensor, unit: Tensor) -> Tensor:
        """Return ``log W_nb[k]`` of m rows, (m, I), given by node, query and unit, (m,) each."""


def log_apply(
    linear_map: LinearMap,
    x: Tensor,  # shape: (n, I, B, E)
) -> Tensor:  # shape: (n, K, B, E)
    """Return ``log W exp(x)``, twice differentiable in the map and in ``x``.

    As in :mod:`~circuits.engine.logspace` sums are taken in linear space, below the columns' maxima, and those that are
    too small to trust once more in log space.

    Args:
        linear_map: the weights.
        x: log-values; -inf is allowed.

    Returns:
        -inf exactly where no term is possible, never NaN.
    """
    tensors = (x, *linear_map.tensors)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)) or torch.compiler.is_compiling():
        return _applied(linear_map, x, smallest_safe_sum)
    out: Tensor = _LogApply.apply(linear_map, *tensors)
    return out


class _LogApply(torch.autograd.Function):
    """First gradients come from sums that are safe to divide by, second ones from sums whose cube is."""

    @staticmethod
    def forward(ctx: Any, linear_map: LinearMap, *tensors: Tensor) -> Tensor:
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_(is_needed) for t, is_needed in zip(tensors, needed, strict=True)]
            out = _applied(linear_map.with_tensors(inputs[1:]), inputs[0], smallest_safe_sum)
        ctx.linear_map, ctx.recorded = linear_map, (inputs, out)
        ctx.save_for_backward(*tensors)
        return out.detach()

    @staticmethod
    @own_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        is_differentiable = torch.is_grad_enabled()
        inputs, out = ctx.recorded
        if is_differentiable:
            inputs = [t.view_as(t) for t in ctx.saved_tensors]  # some are made of each other: gradients stop here
            out = _applied(ctx.linear_map.with_tensors(inputs[1:]), inputs[0], smallest_differentiable_sum)
        wanted = [t for t, is_needed in zip(inputs, ctx.needs_input_grad[1:], strict=True) if is_needed]
        grads = iter(
            torch.autograd.grad(out, wanted, grad, retain_graph=True, create_graph=is_differentiable, allow_unused=True)
        )
        return None, *(next(grads) if is_needed else None for is_needed in ctx.needs_input_grad[1:])


def _applied(linear_map: LinearMap, x: Tensor, smallest: Callable[[torch.dtype, int], float]) -> Tensor:
    peak = x.detach().amax(1, keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    total = linear_map.apply((x - peak).exp())
    low = total < smallest(x.dtype, x.shape[1])
    if torch.compiler.is_compiling():
        return torch.where(low, -torch.inf, torch.where(low, 1.0, total).log() + peak)
    if not bool(low.any()):
        return total.log() + peak
    out = torch.where(low, -torch.inf, torch.where(low, 1.0, total).log() + peak)
    possible = linear_map.support().apply((x > -torch.inf).to(x.dtype)) > 0
    node, unit, query, entry = (low & possible).nonzero(as_tuple=True)
    if not len(node):
        return out
    terms = linear_map.rows(node, query, unit) + x[node, :, query, entry]
    return out.index_put((node, unit, query, entry), log_sum(terms))
