"""Draw and print the exact distance from the truth of every way of decoding, against the number of calls.

In the upper row so many calls are asked for. In the lower one the strategy says how many positions go together, and how
many calls that takes depends on what was drawn: there a point stands at the expected number of calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from diffusion.testing import DecoderLaw, decoder_law, reference, worlds
from diffusion.testing.reference import Rule
from diffusion.testing.worlds import World

WORLDS = {
    "hidden Markov, a b c a a": worlds.hidden_markov(5, seed=1),
    "sums, 1 + 3 = 4": worlds.sums(4),
    "parity, 0 1 1 0 0": worlds.parity(5),
    "endings, a b <eos> <eos> <eos>": worlds.endings(5),
}
THRESHOLDS = (0.3, 0.5, 0.7, 0.9)
BOUNDS = (3.0, 1.0, 0.3, 0.1)
_HOLLOW = {"markerfacecolor": "none", "markersize": 9}  # seen also where another line lies on top
COUNTED = {
    "independent, low_confidence": {"color": "#c0504d", "linestyle": "--", "marker": "s", **_HOLLOW},
    "independent, random": {"color": "#c0504d", "marker": "o"},
    "circuit x prediction, global, random": {"color": "#e0a030", "marker": "^"},
    "circuit x prediction, local, random": {"color": "#4f9d69", "marker": "D", **_HOLLOW, "markersize": 11},
    "circuit alone, low_confidence": {"color": "#1f6fb4", "linestyle": "--", "marker": "s", **_HOLLOW},
    "circuit alone, random": {"color": "#1f6fb4", "marker": "o"},
}
ADAPTIVE = {
    "independent, threshold": {"color": "#c0504d", "linestyle": "--", "marker": "s", **_HOLLOW},
    "independent, entropy_bound": {"color": "#c0504d", "marker": "o"},
    "circuit x prediction, local, entropy_bound": {"color": "#4f9d69", "marker": "D", **_HOLLOW, "markersize": 11},
    "circuit x prediction, local, joint_entropy": {"color": "#4f9d69", "linestyle": "--", "marker": "x"},
    "circuit alone, threshold": {"color": "#1f6fb4", "linestyle": "--", "marker": "s", **_HOLLOW},
    "circuit alone, entropy_bound": {"color": "#1f6fb4", "marker": "o"},
    "circuit alone, joint_entropy": {"color": "#1f6fb4", "linestyle": ":", "marker": "x"},
}


def rules(strategy: str, world: World) -> Iterator[tuple[str, Rule]]:
    """Yield the rules of one line, from few calls to many, and what each is called."""
    if strategy == "threshold":
        yield from ((f"{value:g}", Rule.of("threshold", threshold=value)) for value in THRESHOLDS)
    elif strategy in ("entropy_bound", "joint_entropy"):
        yield from ((f"{value:g}", Rule.of(strategy, entropy_bound=value)) for value in BOUNDS)
    else:
        counts = range(1, world.length + 1)
        yield from ((str(count), Rule.of(strategy, num_steps=count)) for count in counts)


def law_of(world: World, way: str, rule: Rule) -> DecoderLaw:
    """Return the law of one way of decoding; "prediction" is the Bayes-optimal one, "circuit" the true one."""
    who, *normalization = way.split(", ")[:-1]
    if who == "independent":
        return decoder_law(reference.independent(world.denoiser(), rule), world.blank)
    denoiser = world.uniform_denoiser() if who == "circuit alone" else world.denoiser()
    options = {"normalization": normalization[0]} if normalization else {}
    step_law = reference.coupled(denoiser, world.circuit(dtype=torch.float64), rule, **options)
    return decoder_law(step_law, world.blank)


def draw(axes: Axes, world: World, shown: dict[str, dict]) -> None:
    """Print and draw the lines of one world."""
    for way, style in shown.items():
        laws = {name: law_of(world, way, rule) for name, rule in rules(way.split(", ")[-1], world)}
        calls = [law.expected_steps for law in laws.values()]
        distances = [world.total_variation(law) for law in laws.values()]
        cells = [f"{name}: {law.expected_steps:.2f} calls " * (shown is ADAPTIVE) for name, law in laws.items()]
        cells = [
            f"{cell}{distance:.3f}/{world.kl(law):.3f}"
            for cell, distance, law in zip(cells, distances, laws.values(), strict=True)
        ]
        print(f"  {way:44}" + "  ".join(cells), flush=True)
        axes.plot(calls, distances, label=way, **{"markersize": 5, **style})
    steps = list(range(1, world.length + 1))
    axes.set(xlabel="calls of the denoiser", ylim=(-0.05, 0.9), xticks=steps, xlim=(0.8, world.length + 0.2))
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Print a table per world, and write the picture."""
    figure = Figure(figsize=(15, 8.4), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subfigures(2, 1)
    for row, shown in zip(rows, (COUNTED, ADAPTIVE), strict=True):
        for axes, (name, world) in zip(row.subplots(1, 4, sharey=True), WORLDS.items(), strict=True):
            asked = f"1 to {world.length} calls" if shown is COUNTED else "thresholds, and bounds in nats"
            print(f"\n{name}: total variation / KL(truth || decoder) in nats, at {asked}")
            draw(axes, world, shown)
            axes.set_title(name, fontsize=10, loc="left")
        row.axes[0].set_ylabel("total variation")
        handles, labels = axes.get_legend_handles_labels()
        row.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(Path(__file__).parent / "pictures" / "worlds.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
