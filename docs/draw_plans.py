"""Draw which positions each plan looks at and commits, and the windows that it lays over a canvas."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

import circuits as ct
import diffusion as df

VOCAB, MASK, LENGTH, WINDOW, STEPS = 6, 5, 24, 8, 4
GIVEN, OPEN, BEFORE, NOW, BOX = "#c9c9c9", "#ffffff", "#bcd5ec", "#1f6fb4", "#c0504d"


@dataclass
class Sure:
    """A denoiser that is surer of some positions than of others."""

    spec = df.DenoiserSpec(
        vocab_size=VOCAB, mask_id=MASK, eos_ids=(), pad_id=MASK, forbidden_ids=(MASK,), max_length=LENGTH
    )

    def logits(
        self,
        tokens: Tensor,
        *,
        valid: Tensor | None = None,
        t: Tensor | None = None,
        window: tuple[int, int] | None = None,
        cache: object = None,
    ) -> Tensor:
        """Return logits that depend on row and position alone."""
        generator = torch.Generator().manual_seed(5)
        sureness = torch.rand(2, 6, 1, generator=generator).repeat_interleave(4, 1) * 3
        sureness += torch.rand(2, LENGTH, 1, generator=generator)
        direction = torch.nn.functional.one_hot(torch.randint(VOCAB - 1, (2, LENGTH), generator=generator), VOCAB)
        return (sureness * direction)[:, slice(*(window or (0, LENGTH)))]


def watched(kind: type) -> tuple[type, list]:
    """Return a plan that remembers the windows of every call, and the list of them."""
    seen: list = []

    class Watched(kind):
        def cover(self, *arguments):
            seen.append(super().cover(*arguments))
            return seen[-1]

    return Watched, seen


def draw(axes: Axes, title: str, kind: type, head: df.CoupledHead | None, *arguments: int) -> None:
    """Draw one plan: calls from top to bottom, two rows of the canvas each."""
    canvas = torch.full((2, LENGTH), MASK)
    canvas[0, :5] = canvas[1, 9:13] = canvas[1, 0] = 0
    plan, seen = watched(kind)
    out = df.infill(Sure(), canvas, head=head, plan=plan(*arguments), strategy="entropy", record=True)
    for step, windows in enumerate(seen):
        before, after = out.trajectory[step] != MASK, out.trajectory[step + 1] != MASK
        for row in range(2):
            y = step * 2.6 + row
            for x in range(LENGTH):
                colour = (
                    GIVEN if canvas[row, x] != MASK else BEFORE if before[row, x] else NOW if after[row, x] else OPEN
                )
                axes.add_patch(Rectangle((x, y), 1, 0.8, facecolor=colour, edgecolor="#999999", linewidth=0.4))
        for row, start, length in zip(windows.rows, windows.starts, windows.lengths, strict=True):
            box = (float(start), float(step * 2.6 + row - 0.05))
            axes.add_patch(Rectangle(box, float(length), 0.9, fill=False, edgecolor=BOX, linewidth=1.8))
    axes.set(xlim=(-0.3, LENGTH + 0.3), ylim=(STEPS * 2.6 - 0.5, -0.3), xticks=[])
    axes.set_yticks([step * 2.6 + 0.9 for step in range(STEPS)], [f"call {step + 1}" for step in range(STEPS)])
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[:].set_visible(False)


def main() -> None:
    """Write the picture."""
    head = df.CoupledHead(ct.compile(ct.structures.hmm(WINDOW, 3, VOCAB), seed=0))
    figure = Figure(figsize=(11, 3.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    draw(panels[0], f"Blocks({WINDOW}, {STEPS})", df.Blocks, head, WINDOW, STEPS)
    draw(panels[1], f"Anywhere({STEPS}), no circuit", df.Anywhere, None, STEPS)
    draw(panels[2], f"DynamicWindows({STEPS}), circuit of {WINDOW}", df.DynamicWindows, head, STEPS)
    figure.savefig(Path(__file__).parent / "pictures" / "plans.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
