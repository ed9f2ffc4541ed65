"""Pictures of the evaluations. Matplotlib is imported only when one is drawn."""

from __future__ import annotations

import itertools
import math
import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from circuits.files import replace_file
from diffusion.evaluation.annotations import AnnotationTable
from diffusion.evaluation.few_step_curve import TRUE_TEXT, WITHOUT, FewStepCurve
from diffusion.evaluation.few_steps import FewStepTable
from diffusion.evaluation.gap import GapTable
from diffusion.evaluation.intervals import Estimate, rounded

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
    """Draw perplexities against the mask ratio, and the share of the gap that is closed, as a PNG.

    All values and their intervals are inside the axes; a row that is not meaningful has no bar, and says so. A value
    that is not finite is named in words. Below the picture stands what has to be said about its shares.

    Args:
        table: what to draw.
        path: the file, replaced in one piece.
        title: of the perplexities' half.
    """
    write_png(gap_figure(table, title=title), path)


def draw_few_steps(table: FewStepTable, path: str | os.PathLike[str]) -> None:
    """Draw the share of good texts against steps per block, with its intervals, as a PNG."""
    write_png(few_steps_figure(table), path)


def draw_few_step_curve(table: FewStepCurve, path: str | os.PathLike[str], *, title: str = "") -> None:
    """Draw loss and trigram divergence against denoiser calls, with their intervals and true text's, as a PNG."""
    write_png(few_step_curve_figure(table, title=title), path)


def draw_annotations(table: AnnotationTable, path: str | os.PathLike[str]) -> None:
    """Draw the share of right calculator annotations against denoiser calls, with intervals, as a PNG."""
    write_png(annotations_figure(table), path)


def gap_figure(table: GapTable, *, title: str = "") -> Figure:
    """Return what :func:`draw_gap` writes."""
    notes = "\n".join(textwrap.fill(note[0].upper() + note[1:] + ".", 160) for note in table.notes)
    figure = _figure(10.0, 4.2 + 0.2 * (notes.count("\n") + bool(notes)))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    ratios = [row.mask_ratio for row in table.rows]
    for name, label in _LABELS.items():
        _line(left, ratios, [getattr(row, name) for row in table.rows], label, _COLOURS[name])
    left.set_yscale("log")
    left.set_yticks(ticks := _log_ticks(*left.get_ylim()), [f"{tick:g}" for tick in ticks])
    left.minorticks_off()
    left.set(xlabel="share of the block that is masked", ylabel="perplexity of masked tokens", xticks=ratios)
    left.set_title(title or "What the factorized output loses, and the circuit returns", fontsize=11, loc="left")
    left.legend(frameon=False, fontsize=9)
    _shares(right, table)
    right.set_title(f"{table.num_windows} held-out blocks, 95 % intervals", fontsize=9, loc="right", color="#555555")
    if notes:
        figure.supxlabel(notes, fontsize=8, color="#555555", x=0.01, ha="left")
    tidy(left, right)
    return figure


def few_steps_figure(table: FewStepTable) -> Figure:
    """Return what :func:`draw_few_steps` writes."""
    figure, axes = _against_calls(table, lambda estimate: estimate, f"share of texts: {table.criterion}")
    axes.legend(frameon=False, fontsize=9)
    return figure


def annotations_figure(table: AnnotationTable) -> Figure:
    """Return what :func:`draw_annotations` writes; a number of calls at which there are none has no point."""
    figure, axes = _against_calls(table, lambda counted: counted.share, "share of annotations that are right")
    if table.true_text.share is not None:
        axes.axhline(
            table.true_text.share.value, color=_COLOURS["sequential"], linewidth=1, linestyle="--", label=TRUE_TEXT
        )
    axes.legend(frameon=False, fontsize=9)
    return figure


def _against_calls(
    table: FewStepTable | AnnotationTable, estimate_of: Callable[[Any], Estimate | None], ylabel: str
) -> tuple[Figure, Axes]:
    """Draw shares without and with the circuit against denoiser calls."""
    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    for name, label, colour in (
        ("without", "factorized", _COLOURS["one_step"]),
        ("coupled", f"with the circuit ({table.decode})", _COLOURS["coupled"]),
    ):
        found = {row.num_steps: estimate_of(getattr(row, name)) for row in table.rows}
        drawn = {count: estimate for count, estimate in found.items() if estimate is not None}
        _line(axes, list(drawn), list(drawn.values()), label, colour)
    steps = [row.num_steps for row in table.rows]
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, map(str, steps))
    axes.set(xlabel="denoiser calls per block", ylabel=ylabel, ylim=(-0.02, 1.02))
    axes.set_title(f"{table.num_texts} texts, 95 % intervals", fontsize=9, loc="right", color="#555555")
    tidy(axes)
    return figure, axes


def few_step_curve_figure(table: FewStepCurve, *, title: str = "") -> Figure:
    """Return what :func:`draw_few_step_curve` writes."""
    figure = _figure(10.0, 4.4)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for axes, name in ((left, "loss"), (right, "divergence")):
        for (curve, points), style in zip(table.curves.items(), _styles(table), strict=True):
            estimates = [getattr(point.quality, name) for point in points]
            _line(axes, [point.num_calls for point in points], estimates, curve, **style)
        truth = getattr(table.true_text, name)
        axes.axhline(truth.value, color=_COLOURS["sequential"], linewidth=1, linestyle="--", label=TRUE_TEXT)
        axes.axhspan(truth.low, truth.high, color=_COLOURS["sequential"], alpha=0.08, linewidth=0)
        calls = [point.num_calls for point in table.points if point.num_steps is not None]
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks := sorted(set(calls)), [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(f"denoiser calls for {table.block_length} tokens")
    left.set_ylabel("negative log-likelihood per token (nats)")
    right.set_ylabel("trigram divergence to held-out text (nats)")
    judged = "one token at a time" if table.judge_samples is None else f"at {table.judge_samples} noise levels"
    left.set_title(title or f"Text in few steps, judged {judged}", fontsize=11, loc="left")
    right.set_title(f"{table.num_texts} texts, 95 % intervals", fontsize=9, loc="right", color="#555555")
    left.legend(frameon=False, fontsize=9)
    tidy(left, right)
    return figure


def _styles(table: FewStepCurve) -> list[dict[str, str]]:
    """Return a colour and a marker per curve; single points have colours and markers of their own."""
    others = itertools.cycle([("#d9932f", "s"), ("#7f5aa2", "D")])
    known = {WITHOUT: (_COLOURS["one_step"], "o")}
    chosen = [
        known.get(curve) or (next(others) if curve.startswith(WITHOUT) else (_COLOURS["coupled"], "o"))
        for curve in table.curves
    ]
    return [{"colour": colour, "marker": marker} for colour, marker in chosen]


def _shares(axes: Axes, table: GapTable) -> None:
    """Draw a bar with its interval per meaningful row, and words for every other."""
    for position, row in enumerate(table.rows):
        share, is_finite = row.share_closed, all(map(math.isfinite, asdict(row.share_closed).values()))
        if row.is_meaningful and is_finite:
            axes.bar(position, share.value, color=_COLOURS["coupled"], width=0.6)
            _intervals(axes, [position], [share], "black")
            words, place, turn = rounded(share.value), (position, max(share.high, 0.0)), 0
        else:
            words = f"not finite: {share}" if row.is_meaningful else "not meaningful"
            place, turn = (position, 0.0), 90
        axes.annotate(
            words, place, (0, 4), textcoords="offset points", ha="center", va="bottom", rotation=turn, fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )  # fmt: skip
    axes.axhline(1.0, color=_COLOURS["sequential"], linewidth=1, linestyle="--", label="one token at a time")
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set(xlabel="share of the block that is masked", ylabel="share of the gap closed (nats)")
    axes.set_xticks(range(len(table.rows)), [rounded(row.mask_ratio) for row in table.rows])
    axes.set_xlim(-0.5, len(table.rows) - 0.5)
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(0.0, bottom), max(1.0, top) + 0.08 * (max(1.0, top) - min(0.0, bottom)))  # room for the numbers
    axes.legend(frameon=False, fontsize=9)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    return Figure(figsize=(width, height), layout="constrained")


def _line(
    axes: Axes, x: Sequence[float], estimates: Sequence[Estimate], label: str, colour: str, marker: str = "o"
) -> None:
    """Draw the finite estimates and their intervals; the legend names where the others are."""
    pairs = list(zip(x, estimates, strict=True))
    finite = [pair for pair in pairs if all(map(math.isfinite, asdict(pair[1]).values()))]
    others = ", ".join(f"{position:g}" for position, estimate in pairs if (position, estimate) not in finite)
    label += f" (not finite at {others})" if others else ""
    positions, shown = [pair[0] for pair in finite], [pair[1] for pair in finite]
    axes.plot(positions, [estimate.value for estimate in shown], marker=marker, markersize=4, color=colour, label=label)
    low, high = ([getattr(estimate, end) for estimate in shown] for end in ("low", "high"))
    # two bars on each other are hard to read
    axes.fill_between(positions, low, high, color=colour, alpha=0.12, linewidth=0)
    _intervals(axes, positions, shown, colour)


def _intervals(axes: Axes, x: Sequence[float], estimates: Sequence[Estimate], colour: str) -> None:
    """Draw each interval as an error bar."""
    low, high = ([getattr(estimate, end) for estimate in estimates] for end in ("low", "high"))
    middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
    half = [(b - a) / 2 for a, b in zip(low, high, strict=True)]
    axes.errorbar(x, middle, half, fmt="none", ecolor=colour, elinewidth=1, capsize=3)


def _log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers within the limits of a logarithmic axis, few enough to read."""
    round_numbers = [1, 1.5, *(digit * 10**power for power in range(7) for digit in (2, 3, 4, 5, 7, 10, 15))]
    inside = [number for number in round_numbers if low <= number <= high]
    if len(inside) < 2:
        return [float(f"{low * (high / low) ** part:.3g}") for part in (0.0, 0.25, 0.5, 0.75, 1.0)]
    return inside[:: 1 + len(inside) // 10]


def tidy(*all_axes: Axes) -> None:
    """Leave out two sides of the frame, and draw a faint grid."""
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)


def write_png(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a picture, replaced in one piece."""
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
