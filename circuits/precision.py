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
