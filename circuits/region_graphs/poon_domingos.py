"""The region graph of Poon and Domingos (2011): all rectangles that guillotine cuts make."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import prod

from circuits.arguments import checked_count
from circuits.errors import ArgumentError
from circuits.region_graphs.builder import Builder

Box = tuple[tuple[int, int], ...]
"""Start and end along every axis."""


def poon_domingos(shape: Sequence[int], delta: int | Sequence[int], max_depth: int | None) -> Builder:
    """Cut boxes, breadth first, until no cut is left; equal boxes are one region."""
    lengths = tuple(shape) if isinstance(shape, Sequence) else ()
    if not 1 <= len(lengths) <= 3:
        raise ArgumentError(f"shape: expected (length,), (height, width) or (channels, height, width), got {shape!r}")
    for length in lengths:
        checked_count("shape", length)
    deltas = [delta] if isinstance(delta, int) else list(delta)
    for step in deltas:
        checked_count("delta", step)
    if max_depth is not None:
        checked_count("max_depth", max_depth, least=0)
    cut_axes = range(1, 3) if len(lengths) == 3 else range(len(lengths))
    builder = Builder(merge=True)
    whole: Box = tuple((0, length) for length in lengths)
    depths = {whole: 0}
    builder.region(_bits_of_box(whole, lengths))
    queue = deque([whole])
    while queue:
        box = queue.popleft()
        if max_depth is not None and depths[box] >= max_depth:
            continue
        region = builder.region(_bits_of_box(box, lengths))
        for halves in _cuts(box, cut_axes, deltas):
            builder.partition(region, [builder.region(_bits_of_box(half, lengths)) for half in halves])
            for half in halves:
                if half not in depths:
                    depths[half] = depths[box] + 1
                    queue.append(half)
    return builder


def _cuts(box: Box, axes: Sequence[int], deltas: Sequence[int]) -> list[tuple[Box, Box]]:
    for delta in deltas:
        found = []
        for axis in axes:
            start, end = box[axis]
            for cut in range((start // delta + 1) * delta, end, delta):
                found.append((_with(box, axis, (start, cut)), _with(box, axis, (cut, end))))
        if found:
            return found
    return []


def _with(box: Box, axis: int, interval: tuple[int, int]) -> Box:
    return (*box[:axis], interval, *box[axis + 1 :])


def _bits_of_box(box: Box, lengths: Sequence[int]) -> int:
    """Return the scope of a box: a run of ones along the last axis, repeated along the others."""
    start, end = box[-1]
    bits = ((1 << (end - start)) - 1) << start
    for axis in reversed(range(len(box) - 1)):
        stride = prod(lengths[axis + 1 :])
        row, bits = bits, 0
        for position in range(*box[axis]):
            bits |= row << (position * stride)
    return bits
