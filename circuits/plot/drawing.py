"""Pictures of circuits and region graphs: Graphviz where its program ``dot`` is installed, else matplotlib."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from circuits.engine.compile import CompiledCircuit
from circuits.engine.weights import check_compiled
from circuits.errors import ArgumentError, UnfactorError
from circuits.files import replace_file
from circuits.learning.samples import Samples, checked_samples
from circuits.plot.charts import checked_path, learning_curves, samples, save
from circuits.plot.edge_flows import edge_flows
from circuits.plot.layout import Diagram, Vertex, placed
from circuits.region_graphs import RegionGraph
from circuits.symbolic import Circuit, Input, Node, Product

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from torch import Tensor

Engine = Literal["graphviz", "matplotlib"]

_MAX_VERTICES = 400
_SUM, _PRODUCT, _INPUT, _REGION = "#cfe2f3", "#fde2c4", "#dcefd8", "#e8e8e8"
_FLOW, _WIDEST, _THINNEST = "#c0504d", 7.0, 0.3
_MAX_LISTED = 6
_MARGIN, _GRID = 0.15, 0.45


def structure(circuit: Circuit, path: str | os.PathLike[str], *, engine: Engine | None = None) -> None:
    """Draw a circuit: one vertex per node, sums (+) above what they mix, products (x), inputs by their variable.

    The number of units of a node stands below its sign.

    Args:
        circuit: of at most 400 nodes.
        path: a .png, .svg or .pdf file.
        engine: what draws; None: Graphviz where its program ``dot`` is installed, else matplotlib.

    Raises:
        ArgumentError: too many nodes, another kind of file, or Graphviz asked for where it is not installed.
        UnfactorError: Graphviz failed.
    """
    if not isinstance(circuit, Circuit):
        raise ArgumentError(f"circuit: expected ct.Circuit(root), got {type(circuit).__name__}")
    position = {node: i for i, node in enumerate(circuit.nodes)}
    vertices = [_vertex_of(node) for node in circuit.nodes]
    edges = [(position[node], position[child]) for node in circuit.nodes for child in node.children]
    _draw("circuit", Diagram(vertices, edges, is_chain=_is_chain(circuit)), path, engine)


def region_graph(graph: RegionGraph, path: str | os.PathLike[str], *, engine: Engine | None = None) -> None:
    """Draw a region graph: regions as boxes of their variables, partitions as dots; the root is at the top.

    Regions of an image (a graph with a ``shape`` of two or three axes) are drawn as their cells in the image.

    Args:
        graph: of at most 400 regions and partitions.
        path: a .png, .svg or .pdf file.
        engine: what draws; None: Graphviz where its program ``dot`` is installed, else matplotlib. Regions of an image
            are always drawn by matplotlib.

    Raises:
        ArgumentError: too many regions, another kind of file, or Graphviz asked for where it is not installed.
        UnfactorError: Graphviz failed.
    """
    if not isinstance(graph, RegionGraph):
        raise ArgumentError(f"graph: expected a ct.RegionGraph, got {type(graph).__name__}")
    vertices = [_region_vertex(graph, region) for region in range(graph.num_regions)]
    edges = []
    for partition in graph.partitions:
        edges.append((partition.region, len(vertices)))
        edges += [(len(vertices), part) for part in partition.parts]
        vertices.append(Vertex("", "dot", "black"))
    regions = {graph.scope_bits[partition.region] for partition in graph.partitions}
    _draw("graph", Diagram(vertices, edges, is_chain=_are_nested(regions, graph.num_vars)), path, engine)


def flows(
    pc: CompiledCircuit,
    data: Tensor | np.ndarray,  # shape: (N, D)
    path: str | os.PathLike[str],
    *,
    observed: Tensor | np.ndarray | None = None,  # shape: (N, D)
    labels: Tensor | np.ndarray | None = None,  # shape: (N,)
    engine: Engine | None = None,
) -> None:
    """Draw a circuit with lines as wide as the flow of data through them: which parts explain it.

    The flow of an edge is the probability that the latent choices of a sample, drawn from their posterior, use it
    (Darwiche 2003), averaged over the samples. The widest line is the flow 1.

    Args:
        pc: a compiled circuit of at most 400 nodes.
        data: (N, D), integers, or floating point with NaN for missing values; all are evaluated at once.
        path: a .png, .svg or .pdf file.
        observed: bool (N, D), False where a value is missing.
        labels: the class of each sample, int64 (N,), for a circuit with ``num_classes``: its flow starts at this class.
        engine: what draws; None: Graphviz where its program ``dot`` is installed, else matplotlib.

    Raises:
        ArgumentError: too many nodes, data that do not fit, another kind of file, or Graphviz asked for where it is not
            installed.
        UnfactorError: Graphviz failed.
    """
    check_compiled(pc)
    checked_path(path)
    _check_size("pc", len(pc.circuit.nodes))
    samples_given = checked_samples(pc, "data", Samples(data, observed, labels=labels))
    (batch,) = samples_given.batches(len(samples_given))
    position = {node: i for i, node in enumerate(pc.circuit.nodes)}
    edges, widths = [], []
    for node, shares in zip(pc.circuit.nodes, edge_flows(pc, batch.evidence), strict=True):
        for child, share in zip(node.children, shares, strict=True):
            edges.append((position[node], position[child]))
            widths.append(_THINNEST + (_WIDEST - _THINNEST) * min(share, 1.0))
    vertices = [_vertex_of(node) for node in pc.circuit.nodes]
    _draw("pc", Diagram(vertices, edges, widths, _is_chain(pc.circuit)), path, engine)


def _is_chain(circuit: Circuit) -> bool:
    return _are_nested({node.scope_bits for node in circuit.nodes if isinstance(node, Product)}, circuit.num_vars)


def _are_nested(scopes: set[int], num_vars: int) -> bool:
    """Whether of the scopes that are split, each is what is left of the one before, and there are many of them."""
    by_size = sorted(scopes, key=int.bit_count, reverse=True)
    is_nested = all(inner & outer == inner for outer, inner in itertools.pairwise(by_size))
    return is_nested and (len(scopes) > 2 or 2 * len(scopes) > num_vars)


def _vertex_of(node: Node) -> Vertex:
    if isinstance(node, Input):
        return Vertex(f"X{node.var}\n{node.num_units}", "circle", _INPUT)
    if isinstance(node, Product):
        sign = "\N{MULTIPLICATION SIGN}" if node.mode == "elementwise" else "\N{CIRCLED TIMES}"
        return Vertex(f"{sign}\n{node.num_units}", "circle", _PRODUCT)
    return Vertex(f"+\n{node.num_units}", "circle", _SUM)


def _region_vertex(graph: RegionGraph, region: int) -> Vertex:
    scope = sorted(graph.scope(region))
    if graph.shape is not None and len(graph.shape) in (2, 3):
        height, width = graph.shape[-2:]
        cells = {var % (height * width) for var in scope}
        return Vertex(
            "", "grid", _SUM, tuple(tuple(i * width + j in cells for j in range(width)) for i in range(height))
        )
    return Vertex(_ranges_text(scope), "box", _INPUT if not graph.partitions_of[region] else _REGION)


def _ranges_text(scope: Sequence[int]) -> str:
    """Write variables shortly: runs of three and more as ``0-5``."""
    runs: list[list[int]] = []
    for var in scope:
        if runs and var == runs[-1][-1] + 1:
            runs[-1].append(var)
        else:
            runs.append([var])
    words = []
    for run in runs:
        words += [f"{run[0]}\N{EN DASH}{run[-1]}"] if len(run) > 2 else [str(var) for var in run]
    if len(words) > _MAX_LISTED:
        return f"{len(scope)} vars"
    return " ".join(words)


def _draw(argument: str, diagram: Diagram, path: str | os.PathLike[str], engine: Engine | None) -> None:
    target = checked_path(path)
    _check_size(argument, len(diagram.vertices))
    if engine not in (None, *get_args(Engine)):
        raise ArgumentError(f"engine: expected 'graphviz', 'matplotlib' or None, got {engine!r}")
    if engine == "graphviz" and shutil.which("dot") is None:
        raise ArgumentError("engine: Graphviz's program `dot` is not installed; install it, or use 'matplotlib'")
    has_grids = any(vertex.shape == "grid" for vertex in diagram.vertices)
    program = None if has_grids or engine == "matplotlib" else shutil.which("dot")
    if program is None:
        _draw_with_matplotlib(diagram, target)
    else:
        with replace_file(target) as temporary:
            _draw_with_graphviz(program, diagram, temporary, target.suffix.lower())


def _check_size(argument: str, num_vertices: int) -> None:
    if num_vertices > _MAX_VERTICES:
        raise ArgumentError(
            f"{argument}: {num_vertices} vertices are too many for a picture; draw a smaller one of the same kind, of "
            f"at most {_MAX_VERTICES}"
        )


def _draw_with_graphviz(program: str, diagram: Diagram, path: Path, suffix: str) -> None:
    done = subprocess.run(
        [program, f"-T{suffix[1:]}", "-o", str(path)],
        input=dot_text(diagram),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode != 0:
        raise UnfactorError(f"Graphviz: it failed with code {done.returncode}: {done.stderr.strip()[:200]}")


def dot_text(diagram: Diagram) -> str:
    """Return the diagram in Graphviz's language."""
    lines = [
        "digraph {",
        f"  rankdir={'LR' if diagram.is_chain else 'TB'};",
        "  graph [dpi=72, bgcolor=white, nodesep=0.12, ranksep=0.25, margin=0.05];",
        '  node [style=filled, fontname="Helvetica", fontsize=9, margin="0.04,0.02", width=0.35, height=0.2];',
        "  edge [arrowhead=none];",
    ]
    for position, vertex in enumerate(diagram.vertices):
        label = vertex.label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        shape = "point, width=0.08, height=0.08" if vertex.shape == "dot" else vertex.shape
        lines.append(f'  v{position} [label="{label}", shape={shape}, fillcolor="{vertex.color}"];')
    for edge, (above, below) in enumerate(diagram.edges):
        width = "" if diagram.widths is None else f' [penwidth={diagram.widths[edge]:.2f}, color="{_FLOW}"]'
        lines.append(f"  v{above} -> v{below}{width};")
    return "\n".join([*lines, "}"]) + "\n"


def _draw_with_matplotlib(diagram: Diagram, path: Path) -> None:
    from matplotlib.figure import Figure

    places, width, height = placed(diagram)
    figure = Figure(figsize=(width + 2 * _MARGIN, height), dpi=72)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(-_MARGIN, width + _MARGIN)
    axes.set_ylim(0, height)
    for edge, (above, below) in enumerate(diagram.edges):
        (x0, y0), (x1, y1) = places[above], places[below]
        style: dict[str, Any] = {"color": "#888888", "linewidth": 0.8}
        if diagram.widths is not None:
            style = {"color": _FLOW, "linewidth": diagram.widths[edge]}
        axes.plot([x0, x1], [y0, y1], zorder=1, **style)
    for vertex, (x, y) in zip(diagram.vertices, places, strict=True):
        _draw_vertex(axes, vertex, x, y)
    save(figure, path)


def _draw_vertex(axes: Axes, vertex: Vertex, x: float, y: float) -> None:
    from matplotlib.patches import Rectangle

    if vertex.shape == "dot":
        axes.plot([x], [y], marker="o", color="black", markersize=4, zorder=3)
        return
    if vertex.shape == "grid":
        rows, columns = len(vertex.cells), len(vertex.cells[0])
        cell = _GRID / max(rows, columns)
        left, top = x - cell * columns / 2, y + cell * rows / 2
        for i, row in enumerate(vertex.cells):
            for j, is_inside in enumerate(row):
                color = "#3c78b4" if is_inside else "#f4f4f4"
                corner = left + j * cell, top - (i + 1) * cell
                patch = Rectangle(corner, cell, cell, facecolor=color, edgecolor="#999999", lw=0.5, zorder=2)
                axes.add_patch(patch)
        return
    style: dict[str, Any] = {"facecolor": vertex.color, "edgecolor": "#444444", "linewidth": 0.8}
    style["boxstyle"] = "circle,pad=0.25" if vertex.shape == "circle" else "round,pad=0.3"
    axes.text(x, y, vertex.label, ha="center", va="center", fontsize=8, linespacing=0.95, bbox=style, zorder=3)


__all__ = ["flows", "learning_curves", "region_graph", "samples", "structure"]
