"""Prompts and answers of different lengths as windows of one: the context at the left, a block of the answer last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from circuits.arguments import checked_count
from diffusion.denoisers.base import DenoiserSpec
from diffusion.errors import ArgumentError


def answer_windows(
    pairs: Iterable[tuple[Sequence[int], Sequence[int]]],
    spec: DenoiserSpec,
    *,
    context_length: int,
    block_length: int,
) -> tuple[Tensor, Tensor]:
    """Cut every answer into blocks, each after what stands before it in the prompt and the answer.

    An answer's end is filled up with the token that ends a text, as block decoding writes it; for a denoiser that has
    none, what does not fill a block is left out. Contexts that are shorter are padded at their left.

    Args:
        pairs: tokens of prompt and answer; a text without a prompt has an empty one. They are taken one by one.
        spec: of the denoiser: its padding and its end of text.
        context_length: tokens of a window before the block.
        block_length: L.

    Returns:
        Windows, int64 (N, context_length + L), and bool of the same shape, False at padding: ``windows`` and ``valid``
        of :func:`~diffusion.training.logit_cache.cache_logits`.

    Raises:
        ArgumentError: no answer fills a block.
    """
    checked_count("context_length", context_length, 0)
    checked_count("block_length", block_length)
    rows, valid = [], []
    for prompt, answer in pairs:
        tokens = [*prompt, *answer]
        if spec.eos_ids:
            tokens += [spec.eos_ids[0]] * (-len(answer) % block_length)
        for start in range(len(prompt), len(tokens) - block_length + 1, block_length):
            context = tokens[max(0, start - context_length) : start]
            padding = context_length - len(context)
            rows.append(np.array([spec.pad_id] * padding + context + tokens[start : start + block_length], np.int64))
            valid.append(np.arange(context_length + block_length) >= padding)
    if not rows:
        raise ArgumentError(f"pairs: expected an answer of at least a block of {block_length} tokens, got none")
    return torch.from_numpy(np.stack(rows)), torch.from_numpy(np.stack(valid))
