"""Draw and print the exact distance from the truth of every way of decoding, against the number of calls."""

from __future__ import annotations

from pathlib import Path

import torch
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
_HOLLOW = {"markerfacecolor": "none", "markersize": 9}  # seen also where another line lies on top
SHOWN = {
    "independent, low_confidence": {"color": "#c0504d", "linestyle": "--", "marker": "s", **_HOLLOW},
    "independent, random": {"color": "#c0504d", "marker": "o"},
    "circuit x prediction, global, random": {"color": "#e0a030", "marker": "^"},
    "circuit x prediction, local, random": {"color": "#4f9d69", "marker": "D", **_HOLLOW, "markersize": 11},
    "circuit alone, low_confidence": {"color": "#1f6fb4", "linestyle": "--", "marker": "s", **_HOLLOW},
    "circuit alone, random": {"color": "#1f6fb4", "marker": "o"},
}


def law_of(world: World, way: str, num_steps: int) -> DecoderLaw:
    """Return the law of one way of decoding; "prediction" is the Bayes-optimal one, "circuit" the true one."""
    who, *normalization, strategy = way.split(", ")
    rule = Rule(strategy=strategy, num_steps=num_steps)
    if who == "independent":
        return decoder_law(reference.independent(world.denoiser(), rule), world.blank)
    denoiser = world.uniform_denoiser() if who == "circuit alone" else world.denoiser()
    options = {"normalization": normalization[0]} if normalization else {}
    step_law = reference.coupled(denoiser, world.circuit(dtype=torch.float64), rule, **options)
    return decoder_law(step_law, world.blank)


def main() -> None:
    """Print a table per world, and write the picture."""
    figure = Figure(figsize=(9, 6.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, world) in zip(figure.subplots(2, 2).flat, WORLDS.items(), strict=True):
        steps = range(1, world.length + 1)
        print(f"\n{name}: total variation / KL(truth || decoder) in nats, at 1 to {world.length} calls")
        for way, style in SHOWN.items():
            laws = [law_of(world, way, num_steps) for num_steps in steps]
            distances = [world.total_variation(law) for law in laws]
            cells = [f"{d:.3f}/{world.kl(law):.3f}" for d, law in zip(distances, laws, strict=True)]
            print(f"  {way:38}" + "  ".join(cells))
            axes.plot(steps, distances, label=way, **{"markersize": 5, **style})
        axes.set_title(name, fontsize=10, loc="left")
        axes.set(xlabel="calls of the denoiser", ylabel="total variation", ylim=(-0.05, 0.9), xticks=list(steps))
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(Path(__file__).parent / "pictures" / "worlds.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
