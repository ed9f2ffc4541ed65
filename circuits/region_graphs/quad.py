"""Quad trees and quad graphs over images (Mari, Vessio, Vergari 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from circuits.errors import ArgumentError
from circuits.region_graphs.builder import Builder, bits_of, checked_grid

Merge = Callable[[Builder, list[int]], int]


def quad_tree(shape: Sequence[int], num_splits: int) -> Builder:
    """Merge four neighbours at a time, by rows first or all at once."""
    if num_splits not in (2, 4):
        raise ArgumentError(f"num_splits: expected 2 or 4, got {num_splits!r}")
    return _grown(shape, _by_rows if num_splits == 2 else Builder.merged)


def quad_graph(shape: Sequence[int]) -> Builder:
    """Merge four neighbours at a time, by rows and by columns."""
    return _grown(shape, _both_ways)


def _grown(shape: Sequence[int], merge: Merge) -> Builder:
    """Halve the grid of regions until one is left. Odd rows and columns at the end have one or two neighbours."""
    channels, height, width = checked_grid(shape)
    size = height * width
    builder = Builder()
    grid = [
        [builder.region(bits_of(c * size + i * width + j for c in range(channels))) for j in range(width)]
        for i in range(height)
    ]
    while len(grid) > 1 or len(grid[0]) > 1:
        grid = [
            [_joined(builder, [row[j : j + 2] for row in grid[i : i + 2]], merge) for j in range(0, len(grid[0]), 2)]
            for i in range(0, len(grid), 2)
        ]
    return builder


def _joined(builder: Builder, block: list[list[int]], merge: Merge) -> int:
    cells = [cell for row in block for cell in row]
    if len(cells) == 1:
        return cells[0]
    return builder.merged(cells) if len(cells) == 2 else merge(builder, cells)


def _by_rows(builder: Builder, cells: list[int]) -> int:
    return builder.merged([builder.merged(cells[:2]), builder.merged(cells[2:])])


def _both_ways(builder: Builder, cells: list[int]) -> int:
    region = _by_rows(builder, cells)
    builder.partition(region, [builder.merged(cells[::2]), builder.merged(cells[1::2])])
    return region
