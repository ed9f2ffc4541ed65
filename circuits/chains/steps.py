"""The steps of a recurrence, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuits.chains.calls import SUM_LARGE, Calls


def run(
    calls: Calls, table: Any, parts: Sequence[Any], start: Tensor, *, every: int = 0, backwards: bool = False
) -> None:
    """Evaluate ``x_n = f_n y_n-1`` and ``y_n = W x_n plus o_n`` from ``start``, y before the first step.

    Args:
        calls: what is done.
        table: W, as they take it.
        parts: f_n; where x_n and y_n are put, and, where there are some, the scales of x_n; o_n, if there are any. As
            tensors, (steps, ...), or as views in the order in which they are used.
        start: (..., K, C).
        every: x_n are divided by their maximum every so many steps; 0: never.
        backwards: whether the last step comes first.
    """
    order = slice(None, None, -1 if backwards else 1)
    ordered = [list(calls.view(part))[order] if isinstance(part, Tensor) else part for part in parts]
    scales, offsets = ordered[3] if every else [], ordered[4] if len(ordered) > 4 else None
    times, mix, peak, divide = calls.times, calls.mix, calls.peak, calls.divide
    before = calls.view(start)
    for step, (factor, x, y) in enumerate(zip(*ordered[:3], strict=True)):
        times(factor, before, out=x)
        if every and not step % every:
            scale = scales[step]
            peak(x, axis=-2, keepdims=True, out=scale)
            if offsets is not None:  # where these are all of y, x is 0
                calls.plus(scale, offsets[step], out=scale)
            divide(x, scale, out=x)
        mix(table, x, out=y)
        if offsets is not None:
            calls.plus(y, offsets[step], out=y)
        before = y


def sums_of_logs(
    calls: Calls, table: Any, parts: tuple[Tensor, Tensor, Tensor | None], *, every: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Evaluate ``y_t = W (exp(e_t - m_t) y_t+1) + o_t`` from the last step to the first, and from y = 1.

    A factor is made when it is used, in the processor's cache.

    Args:
        calls: what is done.
        table: W, as they take it; or an iterator, as they do.
        parts: e, (T, K, B), in any order in memory; m, (T, 1, B); o, which is 1 where y is and else 0.
        every: of :func:`run`.
        keep: whether all x and y are kept; else those of all steps are in one place.

    Returns:
        x and y, (T or 1, K, B); the scales, (T, 1, B), and the least of all y before these were taken out.
    """
    leaves, peak, offsets = parts
    library: Any = torch if calls.view is SUM_LARGE.view else np
    num_steps = leaves.shape[0]
    states, results = leaves.new_empty(2, num_steps if keep else 1, *leaves.shape[1:])
    scales, least = torch.ones_like(peak), torch.ones_like(peak)
    logs, peaks, low = map(calls.view, (leaves, peak, least))
    xs, ys = (list(calls.view(part)) * (1 if keep else num_steps) for part in (states, results))
    lowest: Any = torch.amin if library is torch else np.minimum.reduce
    heard = None if offsets is None else calls.view(1 - offsets)

    def factors() -> Iterator[Any]:
        for step in reversed(range(num_steps)):
            if step + 1 < num_steps:
                lowest(ys[step + 1], axis=0, keepdims=True, out=low[step + 1])
            library.exp(library.subtract(logs[step], peaks[step], out=xs[step]), out=xs[step])
            if heard is not None:
                calls.times(xs[step], heard[step], out=xs[step])
            yield xs[step]

    steps = [factors(), xs[::-1], ys[::-1], scales, *([] if offsets is None else [offsets])]
    run(calls, table, steps, torch.ones_like(states[0]), every=every, backwards=True)
    lowest(ys[0], axis=0, keepdims=True, out=low[0])
    return states, results, scales, least.mul_(scales).min()
