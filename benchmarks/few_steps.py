"""What few denoiser calls write, with a head and without it, by any strategy at any temperature.

    unfactor demo --from-scratch --out gsm8k    # trains the models, or take a folder that has some
    python benchmarks/few_steps.py --out gsm8k --head HEAD --calls 1 2 4 8 16
    python benchmarks/few_steps.py --out gsm8k --head HEAD --calls 4 8 --strategy low_confidence --temperature 0.5
    python benchmarks/few_steps.py --out gsm8k --calls 32 --strategy threshold --temperature 0 --texts 128

*nats*: per token under the denoiser asked one token at a time, in one random order of each text's positions, as in
``df.evaluation.few_step_curve``; *distinct*: shares of a text's tokens, pairs and triples that are different. A text
that repeats itself is probable too, so read the two together.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import diffusion as df
from diffusion.app.models import open_models
from diffusion.app.workspace import Workspace
from diffusion.evaluation.blocks import blocks_after
from diffusion.evaluation.few_step_curve import distinct_share
from diffusion.evaluation.intervals import interval_of, resamples
from diffusion.text.corpus import windows_and_rest


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("unfactor-demo"), help="folder of the models")
    parser.add_argument("--head", type=Path, help="a saved head in place of the folder's")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--calls", type=int, nargs="+", default=(1, 2, 4, 8))
    parser.add_argument("--strategy", default="entropy")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models, folder = open_models(options.out, head=options.head), Workspace(options.out, progress=False)
    assert models.head is not None
    length, span = models.head.block_length, models.denoiser.config.span
    data, _ = windows_and_rest(folder.held_out_stream(folder.recipe()), length=span, max_windows=128)
    prompts = data[: options.texts, :-length]
    print(f"{len(prompts)} texts of {length} tokens, {options.strategy}, temperature {options.temperature:g}\n")
    print("| calls | head | nats | distinct |\n|---|---|---|---|")
    for head in (None, models.head):
        for calls in options.calls:
            config = df.DecodingConfig(
                decode="joint", strategy=options.strategy, temperature=options.temperature, threshold=0.9
            )
            asked = {"num_steps": calls, "head": head, "config": config, "batch_size": 128, "seed": 0}
            outs = list(blocks_after(models.denoiser, prompts, length, **asked))
            taken = float(torch.cat([out.row_calls.double() for out in outs]).mean())
            texts = torch.cat([out.generated for out in outs])
            shares = (f"{distinct_share(texts.numpy(), n).mean():.2f}" for n in (1, 2, 3))
            name = "" if head is None else "with"
            print(
                f"| {taken:.3g} | {name} | {nats(models.denoiser, prompts, texts)} | {', '.join(shares)} |", flush=True
            )


def nats(denoiser: df.Denoiser, prompts: Tensor, texts: Tensor) -> str:
    """Return nats per token of texts after prompts, the denoiser asked one token at a time, with an interval."""
    order = torch.rand(texts.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    log_prob = df.log_likelihood(denoiser, prompts, texts, method="sequential", order=order)
    loss = -log_prob.numpy() / texts.shape[1]
    return str(interval_of(float(np.mean(loss)), loss[resamples(len(loss), 0)].mean(1)))


if __name__ == "__main__":
    main()
