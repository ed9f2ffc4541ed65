"""What a denoiser may be asked, and what it may answer."""

from __future__ import annotations

import torch
from torch import Tensor

from circuits.arguments import check_stored, kind_of
from diffusion.denoisers.base import Denoiser, DenoiserSpec
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


def raw_logits(
    denoiser: Denoiser,
    tokens: Tensor,  # shape: (B, length)
    *,
    valid: Tensor | None,  # shape: (B, length)
    t: Tensor | None,  # shape: (B,)
    window: tuple[int, int],
) -> Tensor:
    """Return a denoiser's own logits of a window, (B, L, V), for controls that combine several of them.

    Raises ArgumentError if they have a wrong shape or dtype.
    """
    logits = denoiser.logits(tokens, valid=valid, t=t, window=window)
    check_logits(denoiser, logits, tokens, window)
    return logits


def check_logits(denoiser: Denoiser, logits: Tensor, tokens: Tensor, window: tuple[int, int]) -> None:
    """Raise ArgumentError unless a denoiser's answer is floating point (B, L, V) for a window (start, stop)."""
    who, vocab_size = type(denoiser).__name__, denoiser.spec.vocab_size
    if not isinstance(logits, Tensor) or logits.dim() != 3 or not logits.is_floating_point():
        raise ArgumentError(f"denoiser: expected floating-point logits (B, L, V) of {who}, got {kind_of(logits)}")
    expected = (len(tokens), window[1] - window[0], vocab_size)
    if tuple(logits.shape) == expected:
        return
    problem = "see Denoiser.logits"
    if logits.shape[2] != vocab_size:
        problem = (
            f"spec.vocab_size is {vocab_size}: set it to the width of the logits and forbid the ids without a token"
        )
    elif logits.shape[1] == tokens.shape[1]:
        problem = f"it ignores window={window}: return logits[:, start:stop]"
    raise ArgumentError(f"denoiser: expected logits {expected} of {who}, got {tuple(logits.shape)}; {problem}")
