"""The texts that measures of few-step decoding look at: one block after each prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diffusion.decoding.generation import Generation, generate
from diffusion.denoisers.base import Denoiser


def blocks_after(
    denoiser: Denoiser,
    prompts: Tensor,  # shape: (N, P)
    length: int,
    *,
    batch_size: int,
    seed: int,
    **options: Any,
) -> Iterator[Generation]:
    """Generate one block of ``length`` tokens after each prompt, and yield what came out batch by batch.

    The seed draws one of its own for every row. Options are further ones of ``generation.generate``.
    """
    seeds = torch.randint(2**62, (len(prompts),), generator=torch.Generator().manual_seed(seed))
    for prompt, own in zip(prompts.split(batch_size), seeds.split(batch_size), strict=True):
        yield generate(
            denoiser, prompt, gen_length=length, block_length=length, stop_at_eos=False, seeds=own, **options
        )
