"""Pictures of the evaluations. Matplotlib is imported only when one is drawn."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from circuits.files import replace_file
from diffusion.evaluation.few_steps import FewStepTable
from diffusion.evaluation.gap import Estimate, GapTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"one_step": "#c0504d", "circuit_alone": "#9a9a9a", "coupled": "#1f6fb4", "sequential": "#3a3a3a"}
_LABELS = {
    "one_step": "one step, factorized",
    "circuit_alone": "circuit alone",
    "coupled": "one step, with the circuit",
    "sequential": "one token at a time",
}


def draw_gap(table: GapTable, path: str | os.PathLike[str], *, title: str = "") -> None:
    """Draw perplexities against the mask ratio, and the share of the gap that is closed, as a PNG."""
    figure = _figure(10.0, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    ratios = [row.mask_ratio for row in table.rows]
    for name, label in _LABELS.items():
        _line(left, ratios, [getattr(row, name) for row in table.rows], label, _COLOURS[name])
    left.set_yscale("log")
    left.set_yticks(
        ticks := _log_ticks([getattr(row, name).value for row in table.rows for name in _LABELS]), map(str, ticks)
    )
    left.minorticks_off()
    left.set(xlabel="share of the block that is masked", ylabel="perplexity of masked tokens", xticks=ratios)
    left.set_title(title or "What the factorized output loses, and the circuit returns", fontsize=11, loc="left")
    left.legend(frameon=False, fontsize=9)
    positions = range(len(table.rows))
    for position, row in zip(positions, table.rows, strict=True):
        value, low, high = (min(max(end, -0.5), 1.2) for end in asdict(row.share_closed).values())
        right.bar(position, value, color=_COLOURS["coupled"], width=0.6, alpha=1.0 if row.is_meaningful else 0.4)
        right.vlines(position, low, high, color="black", linewidth=1)
        note = f"{row.share_closed.value:.2f}" + ("" if row.is_meaningful else "*")
        right.text(position, max(high, value, 0) + 0.02, note, ha="center", fontsize=9)
    right.set(xlabel="share of the block that is masked", ylabel="share of the gap closed (nats)")
    right.set_xticks(positions, [f"{ratio:g}" for ratio in ratios])
    right.set_ylim(bottom=min(0.0, right.get_ylim()[0]), top=max(1.0, right.get_ylim()[1]))
    right.set_title(f"{table.num_windows} held-out blocks, 95 % intervals", fontsize=9, loc="right", color="#555555")
    _finish(figure, (left, right), path)


def draw_few_steps(table: FewStepTable, path: str | os.PathLike[str]) -> None:
    """Draw the share of good texts against steps per block as a PNG."""
    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    steps = [row.num_steps for row in table.rows]
    _line(axes, steps, [row.without for row in table.rows], "factorized", _COLOURS["one_step"])
    _line(axes, steps, [row.coupled for row in table.rows], f"with the circuit ({table.decode})", _COLOURS["coupled"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, map(str, steps))
    axes.set(xlabel="denoiser calls per block", ylabel=f"share of texts: {table.criterion}", ylim=(0, 1.02))
    axes.set_title(f"{table.num_texts} texts, 95 % intervals", fontsize=9, loc="right", color="#555555")
    axes.legend(frameon=False, fontsize=9)
    _finish(figure, (axes,), path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    return Figure(figsize=(width, height), layout="constrained")


def _line(axes: Axes, x: Sequence[float], estimates: Sequence[Estimate], label: str, colour: str) -> None:
    axes.plot(x, [estimate.value for estimate in estimates], marker="o", markersize=4, color=colour, label=label)
    axes.fill_between(
        x, [estimate.low for estimate in estimates], [estimate.high for estimate in estimates], color=colour, alpha=0.15
    )


def _log_ticks(values: Sequence[float]) -> list[int]:
    finite = [value for value in values if value < float("inf")]
    ticks = [
        tick for tick in (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70, 100, 200, 500, 1000) if tick >= min(finite) * 0.8
    ]
    return [tick for tick in ticks if tick <= max(finite) * 1.2] or ticks[:1]


def _finish(figure: Figure, all_axes: Sequence[Axes], path: str | os.PathLike[str]) -> None:
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
