"""A circuit computes in its own dtype, whatever ``torch.autocast`` its caller runs under.

Log-values of half precision would be off by whole nats, and gradients would come in another dtype than their weights.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_DEVICES = ("cpu", "cuda")


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return own_precision(torch.matmul)(left, right)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        return own_matmul(grad, right.transpose(-1, -2)), own_matmul(left.transpose(-1, -2), grad)


def own_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices of equal batch shapes; the gradients too are computed with autocast switched off."""
    if torch.compiler.is_compiling():
        return left @ right
    product: Tensor = _Matmul.apply(left, right)
    return product


class _SumOfRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, shares: Tensor) -> Tensor:
        ctx.save_for_backward(table, index, shares)
        ctx.first = _recorded(ctx, table, index, shares)
        total: Tensor = ctx.first[1].detach()
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, index, shares = ctx.saved_tensors
        again = torch.is_grad_enabled()
        if again:
            leaves, total = [table, shares], (table[index] * shares.unsqueeze(2)).sum(1)
        else:
            leaves, total = ctx.first or _recorded(ctx, table, index, shares)
        ctx.first = None  # a loss that is kept does not hold it
        needed = [one for one in leaves if one.requires_grad]
        found = iter(torch.autograd.grad(total, needed, grad, create_graph=again))
        of_table, of_shares = (next(found) if one.requires_grad else None for one in leaves)
        return of_table, None, of_shares


def _recorded(ctx: Any, table: Tensor, index: Tensor, shares: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return leaves in place of table and shares, and the sum of rows of these, which torch can differentiate once."""
    needs = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    with torch.enable_grad():
        leaves = [one.detach().requires_grad_(need) for one, need in zip((table, shares), needs, strict=True)]
        return leaves, _sum_of_rows(leaves[0], index, leaves[1])


def _sum_of_rows(table: Tensor, index: Tensor, shares: Tensor) -> Tensor:
    return torch.nn.functional.embedding_bag(index, table, mode="sum", per_sample_weights=shares)


def own_sum_of_rows(table: Tensor, index: Tensor, shares: Tensor) -> Tensor:
    """Return ``sum_j shares[n, j] table[index[n, j]]``; torch's own function for it has no second gradient.

    Args:
        table: (V, K).
        index: int64 (n, k), rows of it.
        shares: (n, k).
    """
    if torch.compiler.is_compiling() or not (table.requires_grad or shares.requires_grad):
        return _sum_of_rows(table, index, shares)
    total: Tensor = _SumOfRows.apply(table, index, shares)
    return total


def own_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that it runs with autocast switched off."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        active = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
        if not active:
            return function(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            for device in active:
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return run


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that what it makes may be differentiated later: many answers are gradients themselves."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run
