"""Draw and print how far from the truth each mode is with each strategy, exactly."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from diffusion.testing import decoder_law, reference, worlds
from diffusion.testing.reference import Rule

MODES = ("independent", "marginal", "latent", "any_order", "joint")
STRATEGIES = ("random", "entropy", "margin", "top_prob", "low_confidence")
CALLS = (1, 2, 4)


def distances() -> dict[int, list[list[float]]]:
    """Return total variation to the truth, by number of calls, mode and strategy.

    The circuit is the true one beside a denoiser that knows nothing; without circuit, the denoiser is Bayes-optimal.
    """
    world = worlds.hidden_markov(4, seed=1)
    pc = world.circuit(dtype=torch.float64)

    def distance(mode: str, strategy: str, calls: int) -> float:
        rule = Rule(strategy=strategy, num_steps=calls)
        step_law = (
            reference.independent(world.denoiser(), rule)
            if mode == "independent"
            else reference.coupled(world.uniform_denoiser(), pc, rule, decode=mode)
        )
        return float(world.total_variation(decoder_law(step_law, world.blank)))

    return {calls: [[distance(mode, strategy, calls) for strategy in STRATEGIES] for mode in MODES] for calls in CALLS}


def main() -> None:
    """Print a table per number of calls, and write the picture."""
    figure = Figure(figsize=(11, 3.1), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (calls, table) in zip(figure.subplots(1, 3, sharey=True), distances().items(), strict=True):
        print(f"\n{calls} calls: total variation with {', '.join(STRATEGIES)}")
        axes.imshow(table, cmap="OrRd", vmin=0, vmax=0.8, aspect="auto")
        for row, (mode, values) in enumerate(zip(MODES, table, strict=True)):
            print(f"  {mode:12}" + "  ".join(f"{value:.3f}" for value in values))
            for column, value in enumerate(values):
                text = "0" if value < 5e-4 else f"{value:.2f}".removeprefix("0")
                colour = "#2a7a3f" if value < 5e-4 else "black"
                axes.text(column, row, text, ha="center", va="center", fontsize=9, color=colour)
        axes.set_xticks(range(len(STRATEGIES)), STRATEGIES, rotation=30, ha="right", fontsize=8)
        axes.set_yticks(range(len(MODES)), MODES, fontsize=9)
        axes.set_title("1 call for 4 tokens" if calls == 1 else f"{calls} calls", fontsize=10, loc="left")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.savefig(Path(__file__).parent / "pictures" / "laws.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
