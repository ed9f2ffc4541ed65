"""Draw what a head reads of the context: potentials and gates along a held-out answer, with the demo's models.

The potentials are the shipped head's. It has no gates: four tables are fitted on top of it, for a few minutes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import circuits as ct
import diffusion as df
from diffusion.app.packing import unpack
from diffusion.app.workspace import Workspace
from diffusion.text.corpus import windows

NUM_WINDOWS, STEPS, NUM_TABLES, NUM_STATES = 1000, 120, 4, 16
SHOWN = 6
"""Which of the windows is drawn."""


def with_gates(head: df.CoupledHead, cache: df.LogitCache) -> df.CoupledHead:
    """Return the head with gates over tables of transitions, fitted."""
    gates = df.TransitionGates.for_hmm(head.pc, cache.features.shape[-1], num_tables=NUM_TABLES)
    gated = df.CoupledHead(head.pc, conditioners=[*head.conditioners, gates])
    df.fit_coupled(gated, cache, config=df.CircuitTraining(steps=STEPS, batch_size=32, learning_rate=0.01))
    return gated


def draw(
    axes: Axes, values: Tensor, tokens: list[str], hidden: Tensor, *, title: str, ylabel: str, **style: object
) -> None:
    """Draw a table whose columns are places; names of tokens that are masked are red."""
    image = axes.imshow(values.numpy(), aspect="auto", interpolation="nearest", **style)  # type: ignore[arg-type]
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_ylabel(ylabel, fontsize=9)
    axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=8, family="monospace")
    for label, is_hidden in zip(axes.get_xticklabels(), hidden.tolist(), strict=True):
        label.set_color("#c0504d" if is_hidden else "#333333")
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, pad=0.01)


def main(folder: Path) -> None:
    """Fit, and write the picture."""
    unpack(folder / "demo")
    workspace = Workspace(folder / "demo")
    denoiser, tokenizer, head = workspace.denoiser(), workspace.tokenizer(), workspace.head()
    length, span = head.block_length, denoiser.config.span
    data = windows(workspace.held_out_stream(workspace.recipe()), length=span, max_windows=NUM_WINDOWS + SHOWN + 1)
    cache = df.cache_logits(denoiser, data[SHOWN + 1 :], folder / "logits", block_length=length, features=True)
    head = with_gates(head, cache)

    shown = data[SHOWN : SHOWN + 1]
    masked = torch.rand(1, length, generator=torch.Generator().manual_seed(0)) < 0.5
    canvas = torch.cat([shown[:, :-length], shown[:, -length:].masked_fill(masked, denoiser.spec.mask_id)], 1)
    prediction = df.Prediction.ask(denoiser, canvas, window=(span - length, span), features=True)
    with torch.no_grad():
        said = head.condition(prediction, masked)
    names = ["initial", *(f"transition{step}" for step in range(length - 1))]
    factors = torch.stack([said.latents[name][0] for name in names], 1)  # (N, L)
    factors = factors - factors.mean(0)
    factors = factors - factors.mean(1, keepdim=True)
    moved = factors.std(1).argsort(descending=True)[:NUM_STATES]
    moved = moved[factors[moved].argmax(1).argsort()]
    mixed = [said.weights[name] for name in names[1:]]
    assert all(isinstance(one, ct.weights.Gates) for one in mixed)
    gates = torch.stack([one.gates[0].softmax(0) for one in mixed], 1)  # (T, L - 1)

    figure = Figure(figsize=(11, 6.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, height_ratios=(NUM_STATES, 8))
    tokens = [tokenizer.decode([token]).replace("\n", "\\n").replace(" ", "_") for token in shown[0, -length:].tolist()]
    span_of = float(factors[moved].abs().max())
    draw(
        upper,
        factors[moved],
        tokens,
        masked[0],
        title=f"potentials on the {NUM_STATES} hidden states they move most, less means of place and state (nats)",
        ylabel="state",
        cmap="RdBu",
        vmin=-span_of,
        vmax=span_of,
    )
    draw(
        lower,
        gates,
        tokens[1:],
        masked[0, 1:],
        title="gates: the share of each table in the transition to a place",
        ylabel="table",
        cmap="Blues",
        vmin=0,
        vmax=1,
    )
    lower.set_yticks(range(NUM_TABLES))
    figure.savefig(Path(__file__).parent / "pictures" / "context.png", metadata={"Software": None})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
