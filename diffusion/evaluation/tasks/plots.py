"""The picture of a task: accuracy against tokens per call."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from diffusion.evaluation.plots import tidy, write_png
from diffusion.evaluation.tasks.table import WITH, TaskTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WITHOUT_COLOURS = ("#c0504d", "#d9932f", "#7f5aa2", "#9a9a9a")
_WITH_COLOURS = ("#1f6fb4", "#2f9e77", "#143d66", "#5ab4d9")
_MARKERS = ("o", "s", "D", "^")


def draw_task(table: TaskTable, path: str | os.PathLike[str], *, title: str = "") -> None:
    """Draw accuracy against tokens per denoiser call, a line a curve with 95 % intervals and its AUP, as a PNG.

    Args:
        table: what to draw.
        path: the file, replaced in one piece.
        title: in place of the table's own.
    """
    write_png(task_figure(table, title=title), path)


def task_figure(table: TaskTable, *, title: str = "") -> Figure:
    """Return what :func:`draw_task` writes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    axes = figure.subplots()
    aup, drawn = table.aup, {True: 0, False: 0}
    for name, points in table.curves.items():
        is_coupled = name.startswith(WITH)
        number = drawn[is_coupled]
        drawn[is_coupled] += 1
        colour = (_WITH_COLOURS if is_coupled else _WITHOUT_COLOURS)[number % len(_MARKERS)]
        x = [point.tokens_per_call for point in points]
        y = [100 * point.accuracy.value for point in points]
        low = [100 * (point.accuracy.value - point.accuracy.low) for point in points]
        high = [100 * (point.accuracy.high - point.accuracy.value) for point in points]
        axes.errorbar(
            x,
            y,
            (low, high),
            color=colour,
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=5,
            linewidth=1.5,
            linestyle="-" if is_coupled else "--",
            elinewidth=1,
            capsize=3,
            label=f"{name} (AUP {aup[name]:.1f})" if name in aup else name,
        )
    axes.set(xlabel="tokens per denoiser call", ylabel="accuracy (%)")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.set_title(title or table.title, fontsize=11, loc="left")
    tidy(axes)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.14), ncols=2)
    return figure
