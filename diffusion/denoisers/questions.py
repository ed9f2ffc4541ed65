"""What a denoiser may be asked."""

from __future__ import annotations

import torch
from torch import Tensor

from circuits.arguments import check_stored
from diffusion.denoisers.base import DenoiserSpec
from diffusion.errors import ArgumentError


def check_question(
    spec: DenoiserSpec,
    tokens: Tensor,  # shape: (B, L)
    valid: Tensor | None,  # shape: (B, L)
    window: tuple[int, int] | None,
) -> tuple[int, int]:
    """Check the arguments of ``logits``; return the window ``(start, stop)``, the whole text where there is none."""
    if tokens.ndim != 2 or tokens.dtype != torch.int64:
        raise ArgumentError(f"tokens: expected int64 (B, L), got {tokens.dtype} of shape {tuple(tokens.shape)}")
    check_stored("tokens", tokens)
    length = tokens.shape[1]
    if length > spec.max_length:
        raise ArgumentError(
            f"tokens: expected at most max_length = {spec.max_length} positions, got {length}; shorten the prompt, or "
            "build the model with a larger max_length"
        )
    if tokens.numel():
        smallest, largest = (int(value) for value in torch.aminmax(tokens))
        if smallest < 0 or largest >= spec.vocab_size:
            raise ArgumentError(
                f"tokens: expected ids from 0 to {spec.vocab_size - 1}, got {smallest} to {largest}; encode the text "
                "with the tokenizer that the model was trained with"
            )
    if valid is not None and (valid.dtype != torch.bool or valid.shape != tokens.shape):
        raise ArgumentError(
            f"valid: expected bool {tuple(tokens.shape)}, got {valid.dtype} of shape {tuple(valid.shape)}"
        )
    start, stop = window or (0, length)
    if not 0 <= start <= stop <= length:
        raise ArgumentError(f"window: expected 0 <= start <= stop <= {length}, got {window}")
    return start, stop
