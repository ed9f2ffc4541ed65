"""What a recurrence is made of: calls of NumPy or PyTorch, for sums and for maxima, that write into given memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from circuits.algebra.semirings import MaxSemiring

Map = Callable[..., Any]
"""Writes what it makes of vectors (K, C), its first argument, into ``out=``."""


class Calls(NamedTuple):
    """What a recurrence is made of: functions that write into ``out=``."""

    view: Callable[[Tensor], Any]
    """A tensor as the functions take it; what is written into it is written into the tensor."""
    times: Callable[..., Any]
    plus: Callable[..., Any]
    total: Callable[..., Any]
    """Plus along an axis."""
    mix: Callable[..., Any]
    """What a matrix makes of vectors (K, C)."""
    peak: Callable[..., Any] = np.maximum.reduce
    """The maximum along an axis."""
    divide: Callable[..., Any] = np.divide
    mix_each: Callable[..., Any] = np.matmul
    """What matrices (n, K, I) make of vectors of their own, (n, I, C)."""
    zero: float = 0.0
    one: float = 1.0

    @property
    def by_step(self) -> Calls:
        """The same of a matrix of its own in every step: in its place stands an iterator of what mixes there."""
        return self._replace(mix=_mix_next)

    @property
    def are_sums(self) -> bool:
        """Whether plus adds; else it takes the maximum of logarithms."""
        return self.one == 1.0


def _mix_next(steps: Any, x: Any, out: Any) -> None:
    next(steps)(x, out=out)


def _best_of_small(columns: Any, x: Any, out: Any) -> None:
    """Maximise over what lies far apart in memory, which is faster than over neighbours: weights are (I, O, 1)."""
    np.maximum.reduce(np.add(columns, x[..., None, :]), axis=-3, out=out)


def _best_of_many(rows: Any, x: Any, out: Any) -> None:
    """The same of many states and few columns, (K, C): weights are (I, 1, O)."""
    out[...] = np.maximum.reduce(np.add(rows, x[:, :, None]), axis=0).T


def _best_of_large(log_weights: Any, x: Tensor, out: Tensor) -> None:
    columns = x.unsqueeze(0) if x.dim() == 2 else x
    out.copy_(MaxSemiring().contract(log_weights.unsqueeze(0), columns).view(out.shape))


def _mix_each_large(matrices: Tensor, x: Tensor, out: Tensor) -> None:
    """Multiply on a CPU as NumPy does, which takes a fifth of the time for thin products."""
    if out.device.type == "cpu":
        np.matmul(as_array(matrices), as_array(x), out=as_array(out))
    else:
        out.copy_(torch.matmul(matrices, x))


def as_array(tensor: Tensor) -> Any:
    """Return the same memory as NumPy sees it."""
    return (tensor.detach() if tensor.requires_grad else tensor).numpy()


SUM_SMALL = Calls(as_array, np.multiply, np.add, np.add.reduce, np.dot)
SUM_LARGE = Calls(torch.detach, torch.mul, torch.add, torch.sum, torch.mm, torch.amax, torch.div, _mix_each_large)
MAX_SMALL = Calls(
    *(as_array, np.add, np.maximum, np.maximum.reduce, _best_of_small),
    divide=np.subtract,
    zero=-math.inf,
    one=0.0,
)
MAX_MANY = MAX_SMALL._replace(mix=_best_of_many)
MAX_LARGE = Calls(
    *(torch.detach, torch.add, torch.maximum, torch.amax, _best_of_large, torch.amax, torch.sub),
    zero=-math.inf,
    one=0.0,
)
