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
        with torch.enable_grad():
            needs = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
            ctx.leaves = [one.detach().requires_grad_(need) for one, need in zip((table, shares), needs, strict=True)]
            ctx.total = _sum_of_rows(ctx.leaves[0], index, ctx.leaves[1])
        return ctx.total.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, index, shares = ctx.saved_tensors
        again = torch.is_grad_enabled()
        leaves = [table, shares] if again else ctx.leaves
        total = (table[index] * shares.unsqueeze(2)).sum(1) if again else ctx.total
        needed = [one for one in leaves if one.requires_grad]
        found = iter(torch.autograd.grad(total, needed, grad, create_graph=again, retain_graph=True))
        of_table, of_shares = (next(found) if one.requires_grad else None for one in leaves)
        return of_table, None, of_shares


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
