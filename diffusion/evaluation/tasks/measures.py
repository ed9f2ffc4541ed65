"""Measures of accuracy and parallelism together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from circuits.arguments import is_number
from diffusion.errors import ArgumentError

_PENALTY = 3.0
_LARGEST_LOSS = 5.0  # percentage points of accuracy


def accuracy_under_parallelism(points: Sequence[tuple[float, float]], *, best: float | None = None) -> float:
    """Return the accuracy under parallelism, AUP, of one way of decoding (d3LLM, arXiv 2601.07568).

    Points (rho_i, y_i), ascending in rho, those whose accuracy is more than 5 below that of the first left out:
    ``rho_1 y_1 + sum_i (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2`` with
    ``W(y) = min(exp(-3 (1 - y / best)), 1)``. Without a loss of accuracy it is the area under the curve.

    Args:
        points: tokens per denoiser call, above 0, and accuracy in percent, in any order.
        best: the highest accuracy that anything reaches on the task, in percent; None: the highest of the points.

    Raises:
        ArgumentError: there are no points, or numbers are outside their range.
    """
    if not points:
        raise ArgumentError("points: expected at least one pair of tokens per call and accuracy, got none")
    for point in points:
        if len(point) != 2 or not all(map(is_number, point)) or not 0 < point[0] < math.inf or not 0 <= point[1] <= 100:
            raise ArgumentError(
                f"points: expected tokens per call above 0 and an accuracy from 0 to 100, got {point!r}"
            )
    if best is None:
        best = max(accuracy for _, accuracy in points)
    if not is_number(best) or not 0 <= best <= 100:
        raise ArgumentError(f"best: expected an accuracy from 0 to 100, got {best!r}")
    (first, top), *others = sorted(points, key=lambda point: (point[0], -point[1]))
    if best == 0:
        return 0.0
    kept = [(first, top), *(point for point in others if point[1] >= top - _LARGEST_LOSS)]
    weighted = [y * min(math.exp(-_PENALTY * (1 - y / best)), 1.0) for _, y in kept]
    widths = (end - start for (start, _), (end, _) in pairwise(kept))
    heights = ((low + high) / 2 for low, high in pairwise(weighted))
    return first * top + sum(width * height for width, height in zip(widths, heights, strict=True))


def accuracy_at(points: Sequence[tuple[float, float]], tokens_per_call: float) -> float | None:
    """Return the accuracy of a curve at some number of tokens per call, linear between the points next to it.

    Args:
        points: tokens per call and accuracy, in any order.
        tokens_per_call: where.

    Returns:
        None outside the range of the points.
    """
    ordered = sorted(points)
    for (start, low), (end, high) in pairwise(ordered):
        if start <= tokens_per_call <= end and end > start:
            return low + (high - low) * (tokens_per_call - start) / (end - start)
    same = [accuracy for at, accuracy in ordered if at == tokens_per_call]
    return max(same) if same else None
