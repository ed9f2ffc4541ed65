"""Draw and print the distance from the truth of every mode, strategy and baseline, against the number of calls.

Laws are enumerated, temperature 1. Energy sampling has no law in closed form and is sampled, with an error bar.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import circuits as ct
import diffusion as df
from diffusion.decoding.baselines import (
    AdaptiveHead,
    CausalHead,
    CircuitModel,
    CopulaHead,
    EnergyHead,
    MixtureHead,
    fit_conditional,
)
from diffusion.decoding.config import STRATEGIES
from diffusion.testing import Table, decoder_law, reference, worlds
from diffusion.testing.heads import with_adaptive_head, with_head
from diffusion.testing.reference import DRAWS, Rule
from diffusion.testing.worlds import World

WORLDS = {
    "cities, San Francisco : New York = 7 : 3": worlds.cities(probs=[0.7, 0.3]),
    "parity, 0 1 1": worlds.parity(3),
    "hidden Markov, a b c": worlds.hidden_markov(3, seed=1),
    "endings, a <eos> <eos>": worlds.endings(3, num_words=2),
}
NUM_SAMPLES = 8000
CHUNKS = 8
SHOWN = {
    "independent, low_confidence": {"color": "#c0504d", "linestyle": "--", "marker": "s", "markerfacecolor": "none"},
    "independent, random": {"color": "#c0504d", "marker": "s"},
    "joint local, random": {"color": "#1f6fb4", "marker": "o", "markersize": 10, "markerfacecolor": "none"},
    "joint, random": {"color": "#e0a030", "marker": "^"},
    "copula, random": {"color": "#4f9d69", "marker": "D"},
    "energy 16, random": {"color": "#7d5ba6", "marker": "v"},
    "causal, random": {"color": "#555555", "marker": "x"},
    "mixture, random": {"color": "#222222", "marker": "+", "markersize": 9},
    "adaptive": {"color": "#d16ba5", "marker": "*", "markersize": 11, "linestyle": "none"},
    "adaptive, corrected": {"color": "#1c8c8c", "marker": "P", "markersize": 8, "linestyle": "none"},
}


class Point(NamedTuple):
    """How far from the truth a decoder is; ``error`` is a standard deviation, 0 where nothing was sampled."""

    calls: float
    distance: float
    kl: float
    error: float = 0.0


def modes(world: World) -> dict[str, list[Point]]:
    """Return the points of every mode and strategy: the Bayes-optimal denoiser, without and with the true circuit."""
    circuit, denoiser = world.circuit(dtype=torch.float64), world.denoiser()
    steps = range(1, world.length + 1)
    ways = {}
    for strategy in STRATEGIES:
        decides = strategy in ("threshold", "entropy_bound", "joint_entropy")  # how many calls, by what was drawn
        rules = [Rule.of(strategy)] if decides else [Rule.of(strategy, num_steps=number) for number in steps]
        ways[f"independent, {strategy}"] = [reference.independent(denoiser, rule) for rule in rules]
        for mode in DRAWS:
            for normalization in ("global", "local"):
                name = f"{mode} local, {strategy}" if normalization == "local" else f"{mode}, {strategy}"
                options = {"decode": mode, "normalization": normalization}
                ways[name] = [reference.coupled(denoiser, circuit, rule, **options) for rule in rules]
    return {name: [enumerated(world, law) for law in laws] for name, laws in ways.items()}


def baselines(world: World) -> dict[str, list[Point]]:
    """Return the points of the baselines: small models are the true circuit, or trained on 4,000 texts."""
    model, denoiser = CircuitModel(world.circuit()), world.denoiser()
    blocks = world.sample(4000, generator=torch.Generator().manual_seed(0))
    sizes = {"vocab_size": world.spec.vocab_size, "block_length": world.length}
    causal, mixture = CausalHead(**sizes), MixtureHead(**sizes, num_components=len(world.support))
    for head in (causal, mixture):
        fit_conditional(head, denoiser, blocks, steps=400)
    steps = range(1, world.length + 1)
    points = {}
    for name, head in (("copula", CopulaHead(world.circuit())), ("causal", causal), ("mixture", mixture)):
        laws = [with_head(denoiser, head, Rule(num_steps=number)) for number in steps]
        points[f"{name}, random"] = [enumerated(world, law) for law in laws]
    for count in (4, 16, 64):
        head = EnergyHead(model, num_candidates=count)
        points[f"energy {count}, random"] = [sampled(world, head, number) for number in steps]
    for name, corrects, weight in (("adaptive", False, 0.5), ("adaptive, corrected", True, 0.0)):
        head = AdaptiveHead(model, mixture_weight=weight, corrects=corrects)
        points[name] = [enumerated(world, with_adaptive_head(denoiser, head))]
    return points


def enumerated(world: World, step_law: df.testing.law.StepLaw) -> Point:
    """Return the distance of a decoder whose law can be enumerated; NaN if it may write what the circuit rules out."""
    try:
        law = decoder_law(step_law, world.blank)
    except ct.ImpossibleEvidenceError:
        return Point(math.nan, math.nan, math.nan)
    return Point(law.expected_steps, world.total_variation(law), world.kl(law))


def sampled(world: World, head: df.JointHead, num_steps: int) -> Point:
    """Return the distance of the decoder's texts; the error is that of the mean over parts of them."""
    texts = df.generate(
        world.denoiser(),
        torch.zeros(NUM_SAMPLES, 0, dtype=torch.int64),
        gen_length=world.length,
        block_length=world.length,
        num_steps=num_steps,
        head=head,
        strategy="random",
        temperature=1.0,
        seeds=range(NUM_SAMPLES),
    ).generated
    table = Table(texts)
    parts = torch.tensor([world.total_variation(Table(part)) for part in texts.chunk(CHUNKS)])
    return Point(num_steps, world.total_variation(table), world.kl(table), float(parts.std() / CHUNKS**0.5))


def main() -> None:
    """Print a table per world, and write the picture."""
    figure = Figure(figsize=(9, 7.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, world) in zip(figure.subplots(2, 2).flat, WORLDS.items(), strict=True):
        steps = list(range(1, world.length + 1))
        points = modes(world) | baselines(world)
        print(f"\n{name}: total variation / KL(truth || decoder) in nats, at 1 to {world.length} calls")
        for way, line in points.items():
            cells = [f"{p.distance:.3f}" + (f"±{p.error:.3f}" if p.error else "") + f"/{p.kl:.3f}" for p in line]
            at = f" ({line[0].calls:.2f} calls)" if len(line) == 1 else ""
            print(f"  {way:32}" + "  ".join(cells) + at, flush=True)
        for way, style in SHOWN.items():
            line = points[way]
            calls, distances = [p.calls for p in line], [p.distance for p in line]
            axes.errorbar(calls, distances, [2 * p.error for p in line], label=way, **{"markersize": 6, **style})
        axes.set_title(name, fontsize=10, loc="left")
        axes.set(xlabel="calls of the denoiser", ylabel="total variation", ylim=(-0.03, None), xticks=steps)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(Path(__file__).parent / "pictures" / "baselines.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
