"""Where the vertices of a layered diagram go: rows by height, and within a row so that few edges cross.

Lengths are in units of ``INCHES`` until the places are returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_SWEEPS = 8
_GAP = 0.45
_LETTER = 0.19
_HEIGHT = 0.6
INCHES = 0.62


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
    is_chain: bool = False
    """Whether to go from left to right."""


def placed(diagram: Diagram) -> tuple[list[tuple[float, float]], float, float]:
    """Return the vertices' centres, and the width and height of the whole, in inches.

    A vertex stands one row below the lowest vertex above it; rows are ordered by the mean place of the neighbours,
    downward and upward in turn (Sugiyama, Tagawa, Toda 1981). Chains go from left to right: the rows are columns, and
    inputs hang below what multiplies them.
    """
    above: list[list[int]] = [[] for _ in diagram.vertices]
    below: list[list[int]] = [[] for _ in diagram.vertices]
    for upper, lower in diagram.edges:
        above[lower].append(upper)
        below[upper].append(lower)
    hanging = _hanging(above, below) if diagram.is_chain else {}
    hung = set(hanging.values())
    rows = [[vertex for vertex in row if vertex not in hung] for row in _rows(above, below)]
    rows = [row for row in rows if row]
    sizes = [_HEIGHT if diagram.is_chain and vertex.shape != "dot" else vertex.width for vertex in diagram.vertices]
    drops = {vertex: (sizes[vertex] + sizes[leaf]) / 2 + _GAP for vertex, leaf in hanging.items()}
    room = [drops.get(vertex, 0.0) for vertex in range(len(sizes))]
    weights = [1.0] * len(sizes)
    if diagram.is_chain:  # the more is below a vertex, the straighter is the line to it
        heights = _heights(above, below)
        weights = [100.0 ** min(heights[vertex], 150) for vertex in range(len(sizes))]
    x = _across(rows, above, below, sizes, room, weights)
    for vertex, leaf in hanging.items():
        x[leaf] = x[vertex] - drops[vertex]
    least = min(place - size / 2 for place, size in zip(x, sizes, strict=True))
    breadth = max(place + size / 2 for place, size in zip(x, sizes, strict=True)) - least
    if not diagram.is_chain:
        row_height = min(max(0.8, 0.05 * breadth), 1.2)
        y = {vertex: (height + 0.5) * row_height for height, row in enumerate(rows) for vertex in row}
        centres = [((x[vertex] - least) * INCHES, y[vertex]) for vertex in range(len(x))]
        return centres, breadth * INCHES, len(rows) * row_height
    along, length = _columns(rows[::-1], diagram)
    along |= {leaf: along[vertex] for vertex, leaf in hanging.items()}
    centres = [(along[vertex] * INCHES, (x[vertex] - least + _GAP / 2) * INCHES) for vertex in range(len(x))]
    return centres, length * INCHES, (breadth + _GAP) * INCHES


def _hanging(above: Sequence[Sequence[int]], below: Sequence[Sequence[int]]) -> dict[int, int]:
    """Return, by vertex, the leaf that hangs from it: the first that it alone has, if there are others below it."""
    found: dict[int, int] = {}
    for vertex, lower in enumerate(below):
        leaves = [leaf for leaf in lower if not below[leaf] and len(above[leaf]) == 1]
        if leaves and len(lower) > 1:
            found[vertex] = leaves[0]
    return found


def _columns(columns: Sequence[Sequence[int]], diagram: Diagram) -> tuple[dict[int, float], float]:
    """Return where along a chain each vertex stands, and how long the chain is."""
    along: dict[int, float] = {}
    end = 0.0
    for column in columns:
        width = max(diagram.vertices[vertex].width for vertex in column)
        along |= dict.fromkeys(column, end + width / 2)
        end += width + _GAP
    return along, end - _GAP


def _across(
    rows: Sequence[list[int]],
    above: Sequence[Sequence[int]],
    below: Sequence[Sequence[int]],
    sizes: Sequence[float],
    room: Sequence[float],
    weights: Sequence[float],
) -> list[float]:
    """Order every row, and return where in its row each vertex stands."""
    x = [0.0] * len(sizes)
    for row in rows:
        _spread(row, [float(i) for i in range(len(row))], sizes, room, weights, x)
    for sweep in range(2 * _SWEEPS + 1):  # the last one centres vertices above what is below them
        is_downward = sweep % 2 == 1
        for row in reversed(rows) if is_downward else rows:
            neighbours = above if is_downward else below
            wanted = [_mean(neighbours[vertex], x, weights, x[vertex]) for vertex in row]
            order = sorted(range(len(row)), key=wanted.__getitem__)
            row[:] = [row[i] for i in order]
            _spread(row, [wanted[i] for i in order], sizes, room, weights, x)
    return x


def _heights(above: Sequence[Sequence[int]], below: Sequence[Sequence[int]]) -> dict[int, int]:
    """Return how many edges the longest way down from each vertex has, lower vertices first."""
    height: dict[int, int] = {}
    waiting = [len(lower) for lower in below]
    ready = [vertex for vertex, count in enumerate(waiting) if count == 0]
    for vertex in ready:
        height[vertex] = 1 + max((height[lower] for lower in below[vertex]), default=-1)
        for upper in above[vertex]:
            waiting[upper] -= 1
            if waiting[upper] == 0:
                ready.append(upper)
    return height


def _rows(above: Sequence[Sequence[int]], below: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the vertices by height: every vertex just below the lowest of those above it."""
    height = _heights(above, below)
    for vertex in reversed(height):
        if above[vertex]:
            height[vertex] = min(height[upper] for upper in above[vertex]) - 1
    lowest = min(height.values())
    rows: list[list[int]] = [[] for _ in range(max(height.values()) - lowest + 1)]
    for vertex in sorted(height):
        rows[height[vertex] - lowest].append(vertex)
    return rows


def _spread(
    row: Sequence[int],
    wanted: Sequence[float],
    sizes: Sequence[float],
    room: Sequence[float],
    weights: Sequence[float],
    x: list[float],
) -> None:
    """Place the vertices of a row in order, as near to where they are wanted as their sizes allow.

    Neighbours that would overlap become one block around the mean of what they want (pool adjacent violators).
    ``room`` is what a vertex needs before it.
    """
    blocks: list[tuple[float, float, int]] = []  # weighted sum of (wanted - offset), weight, and how many
    offsets = []
    offset = 0.0
    for i, vertex in enumerate(row):
        if i > 0:
            offset += (sizes[row[i - 1]] + sizes[vertex]) / 2 + _GAP + room[vertex]
        offsets.append(offset)
        blocks.append((weights[vertex] * (wanted[i] - offset), weights[vertex], 1))
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, weight, count = blocks.pop()
            blocks[-1] = (blocks[-1][0] + total, blocks[-1][1] + weight, blocks[-1][2] + count)
    position = 0
    for total, weight, count in blocks:
        for _ in range(count):
            x[row[position]] = total / weight + offsets[position]
            position += 1


def _mean(neighbours: Sequence[int], x: Sequence[float], weights: Sequence[float], default: float) -> float:
    total = sum(weights[other] for other in neighbours)
    return sum(weights[other] * x[other] for other in neighbours) / total if neighbours else default
