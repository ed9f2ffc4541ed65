"""Prompts: checked, and padded at the left to one length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion.denoisers.base import DenoiserSpec
from diffusion.errors import ArgumentError

Prompt = Tensor | Sequence[Sequence[int]] | Sequence[Tensor]


def padded_prompts(prompt: Prompt, spec: DenoiserSpec) -> tuple[Tensor, Tensor]:
    """Return the prompts as one tensor, and which of it is not padding.

    Padding tokens at the left of a row are padding, as tokenizers write it, where ``spec.pad_id`` is no token that can
    be generated.

    Args:
        prompt: integers (B, P), or B sequences of token ids of different lengths, perhaps empty.
        spec: of the denoiser.

    Returns:
        int64 (B, P) and bool (B, P), with P the length of the longest row.

    Raises:
        ArgumentError: no rows, rows of anything but token ids, with mask tokens, or with padding among the tokens.
    """
    rows = _rows(prompt)
    length = max(len(row) for row in rows)
    tokens = torch.full((len(rows), length), spec.pad_id, device=rows[0].device)
    valid = torch.zeros(len(rows), length, dtype=torch.bool, device=rows[0].device)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        valid[i, length - len(row) :] = True
    outside = (tokens < 0) | (tokens >= spec.vocab_size)
    if bool(outside.any()):
        raise ArgumentError(
            f"prompt: expected token ids from 0 to {spec.vocab_size - 1}, got {int(tokens[outside][0])}"
        )
    _refuse(valid & (tokens == spec.mask_id), f"no mask tokens ({spec.mask_id})", "a prompt is what is known")
    if spec.pad_id in spec.forbidden_ids and spec.pad_id != spec.mask_id:
        is_pad = tokens == spec.pad_id
        valid &= ~is_pad.long().cumprod(1).bool()
        _refuse(valid & is_pad, f"padding ({spec.pad_id}) at the left only", "give each row its tokens alone")
    return tokens, valid


def _rows(prompt: Prompt) -> list[Tensor]:
    """Return the rows as int64 tensors (P,) of different lengths."""
    expected = "prompt: expected int64 (B, P) or a sequence of B >= 1 sequences of token ids"
    if isinstance(prompt, str) or (isinstance(prompt, Sequence) and any(isinstance(row, str) for row in prompt)):
        raise ArgumentError(f"{expected}, got text; encode it with the denoiser's tokenizer")
    try:
        rows = [torch.as_tensor(row) for row in prompt]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{expected}, got {type(prompt).__name__}: {error}") from error
    if not rows or any(row.dim() != 1 for row in rows):
        raise ArgumentError(f"{expected}, got {type(prompt).__name__} with {len(rows)} rows; one prompt is a row too")
    for row in rows:
        if row.numel() and (row.is_floating_point() or row.is_complex() or row.dtype == torch.bool):
            raise ArgumentError(f"{expected}, got {row.dtype}; token ids are whole numbers")
    return [row.long() for row in rows]


def _refuse(wrong: Tensor, expected: str, way_out: str) -> None:
    if bool(wrong.any()):
        row, position = wrong.nonzero()[0].tolist()
        raise ArgumentError(f"prompt: expected {expected}, got one at position {position} of row {row}; {way_out}")
