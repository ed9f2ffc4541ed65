"""Where the vertices of a layered diagram go: rows by height, and within a row so that few edges cross."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_SWEEPS = 8
_GAP = 0.45
_LETTER = 0.19


@dataclass(frozen=True)
class Vertex:
    """What is drawn at one place."""

    label: str
    shape: str
    """ "circle", "box", "grid" or "dot"."""
    color: str
    cells: tuple[tuple[bool, ...], ...] = ()
    """Of a "grid": which cells are inside."""

    @property
    def width(self) -> float:
        """How much room it takes in its row."""
        if self.shape == "dot":
            return 0.2
        if self.shape == "grid":
            return 0.75
        return max(0.6, _LETTER * max(len(line) for line in self.label.split("\n")) + 0.3)


@dataclass(frozen=True)
class Diagram:
    """Vertices and edges (above, below); edges never form a cycle."""

    vertices: Sequence[Vertex]
    edges: Sequence[tuple[int, int]]
    widths: Sequence[float] | None = None
    """Of the edges' lines, in points; None: all thin."""


def placed(diagram: Diagram) -> tuple[list[tuple[float, float]], float, float]:
    """Return the vertices' centres, and the width and height of the whole.

    A vertex stands one row below the lowest vertex above it; rows are ordered by the mean place of the neighbours,
    downward and upward in turn (Sugiyama, Tagawa, Toda 1981).
    """
    above: list[list[int]] = [[] for _ in diagram.vertices]
    below: list[list[int]] = [[] for _ in diagram.vertices]
    for upper, lower in diagram.edges:
        above[lower].append(upper)
        below[upper].append(lower)
    rows = _rows(above, below)
    x = [0.0] * len(diagram.vertices)
    for row in rows:
        _spread(row, [float(i) for i in range(len(row))], diagram, x)
    for sweep in range(2 * _SWEEPS + 1):  # the last one centres vertices above what is below them
        is_downward = sweep % 2 == 1
        for row in reversed(rows) if is_downward else rows:
            neighbours = above if is_downward else below
            wanted = [_mean([x[other] for other in neighbours[vertex]], x[vertex]) for vertex in row]
            order = sorted(range(len(row)), key=wanted.__getitem__)
            row[:] = [row[i] for i in order]
            _spread(row, [wanted[i] for i in order], diagram, x)
    left = min(x[vertex] - diagram.vertices[vertex].width / 2 for row in rows for vertex in row)
    right = max(x[vertex] + diagram.vertices[vertex].width / 2 for row in rows for vertex in row)
    y = {vertex: float(height) for height, row in enumerate(rows) for vertex in row}
    return [(x[vertex] - left, y[vertex]) for vertex in range(len(x))], right - left, float(len(rows))


def _rows(above: Sequence[Sequence[int]], below: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the vertices by height: every vertex just below the lowest of those above it."""
    height: dict[int, int] = {}
    waiting = [len(lower) for lower in below]
    ready = [vertex for vertex, count in enumerate(waiting) if count == 0]
    for vertex in ready:
        height[vertex] = 1 + max((height[lower] for lower in below[vertex]), default=-1)
        for upper in above[vertex]:
            waiting[upper] -= 1
            if waiting[upper] == 0:
                ready.append(upper)
    for vertex in reversed(ready):
        if above[vertex]:
            height[vertex] = min(height[upper] for upper in above[vertex]) - 1
    lowest = min(height.values())
    rows: list[list[int]] = [[] for _ in range(max(height.values()) - lowest + 1)]
    for vertex in sorted(height):
        rows[height[vertex] - lowest].append(vertex)
    return rows


def _spread(row: Sequence[int], wanted: Sequence[float], diagram: Diagram, x: list[float]) -> None:
    """Place the vertices of a row in order, as near to where they are wanted as their widths allow.

    Neighbours that would overlap become one block around the mean of what they want (pool adjacent violators).
    """
    blocks: list[tuple[float, int]] = []  # sum of (wanted - offset), and how many
    offsets = []
    offset = 0.0
    for i, vertex in enumerate(row):
        if i > 0:
            offset += (diagram.vertices[row[i - 1]].width + diagram.vertices[vertex].width) / 2 + _GAP
        offsets.append(offset)
        blocks.append((wanted[i] - offset, 1))
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = (blocks[-1][0] + total, blocks[-1][1] + count)
    position = 0
    for total, count in blocks:
        for _ in range(count):
            x[row[position]] = total / count + offsets[position]
            position += 1


def _mean(numbers: Sequence[float], default: float) -> float:
    return sum(numbers) / len(numbers) if numbers else default
