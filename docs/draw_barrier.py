"""Draw the picture of the first page: two words in one step, without and with a circuit."""

from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import circuits as ct
import diffusion as df

WORDS = ["San", "New", "Diego", "York"]
TEXTS = torch.tensor([[0, 2], [1, 3], [0, 3], [1, 2]])

if __name__ == "__main__":
    hmm = ct.structures.hmm(seq_length=2, num_states=2, num_categories=4, homogeneous=False)
    pc = ct.compile(hmm, dtype=torch.float64, seed=1)
    ct.learning.fit(pc, TEXTS[:2].repeat(50, 1), optimizer="em", num_epochs=200, progress=False)
    logits = torch.full((1, 2, 4), -torch.inf, dtype=torch.float64)
    logits[0, 0, :2] = logits[0, 1, 2:] = 0.0  # San or New, then Diego or York
    masked = torch.ones(1, 2, dtype=torch.bool)
    alone = torch.log_softmax(logits, -1)[0].gather(1, TEXTS.t()).sum(0).exp()
    coupled = df.CoupledHead(pc).distribution(logits, TEXTS[:1], masked).log_prob(TEXTS.unsqueeze(1))[:, 0].exp()

    figure = Figure(figsize=(7.5, 2.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    names = [" ".join(WORDS[word] for word in text) for text in TEXTS.tolist()]
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title, probabilities, colour in (
        (panels[0], "the denoiser alone", alone, "#c0504d"),
        (panels[1], "the same, times a circuit", coupled, "#1f6fb4"),
    ):
        bars = axes.barh(names, probabilities.tolist(), color=colour)
        axes.bar_label(bars, [f"{p:.2f}" for p in probabilities.tolist()], padding=3)
        axes.set_title(title, fontsize=11, loc="left")
        axes.set(xlim=(0, 0.6), xlabel="probability in one step")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.savefig(Path(__file__).parent / "pictures" / "barrier.png", metadata={"Software": None})
