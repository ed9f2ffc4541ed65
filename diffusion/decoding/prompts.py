"""From what users hand over to a canvas: prompts of any lengths, canvases with holes, seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion.decoding.canvas import Canvas
from diffusion.denoisers.base import DenoiserSpec
from diffusion.errors import ArgumentError

Rows = Tensor | Sequence[Sequence[int]] | Sequence[Tensor]


def prompted_canvas(prompt: Rows, valid: Tensor | None, gen_length: int, spec: DenoiserSpec, seeds: Tensor) -> Canvas:
    """Return a canvas of prompts, padded at the left, and ``gen_length`` masks; masks in a prompt are holes to fill."""
    tokens, is_valid = padded_rows("prompt", prompt, valid, spec, at_left=True)
    check_length("prompt", tokens.shape[1] + gen_length, spec)
    new = torch.full((len(tokens), gen_length), spec.mask_id, device=tokens.device)
    tokens, is_valid = torch.cat([tokens, new], 1), torch.cat([is_valid, torch.ones_like(new, dtype=torch.bool)], 1)
    return Canvas(tokens, is_valid, (tokens == spec.mask_id) & is_valid, tokens.shape[1] - gen_length, seeds, spec)


def holed_canvas(
    tokens: Rows, masked: Tensor | None, valid: Tensor | None, spec: DenoiserSpec, seeds: Tensor
) -> Canvas:
    """Return a canvas whose positions ``masked``, or those that hold the mask token, are to be filled."""
    tokens, is_valid = padded_rows("tokens", tokens, valid, spec, at_left=False)
    check_length("tokens", tokens.shape[1], spec)
    if masked is None:
        masked = tokens == spec.mask_id
    elif not isinstance(masked, Tensor) or masked.shape != tokens.shape or masked.dtype != torch.bool:
        raise ArgumentError(f"masked: expected bool of shape {tuple(tokens.shape)}, got {_kind(masked)}")
    elif bool(((tokens == spec.mask_id) & is_valid & ~masked).any()):
        raise ArgumentError(
            "masked: expected True at every mask token, got False at one; mark it, or put a token there"
        )
    masked = masked & is_valid
    return Canvas(tokens.masked_fill(masked, spec.mask_id), is_valid, masked, 0, seeds, spec)


def checked_seeds(seeds: Any, generator: torch.Generator | None, batch_size: int, device: torch.device) -> Tensor:
    """Return one seed per row, int64 (B,): those given, or drawn from the generator, or from fresh entropy."""
    if seeds is None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ArgumentError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
        source = torch.Generator() if generator is None else generator
        if generator is None:
            source.seed()
        return torch.randint(2**62, (batch_size,), generator=source, device=source.device).to(device)
    if generator is not None:
        raise ArgumentError("seeds: give either seeds or generator, not both")
    values = seeds.tolist() if isinstance(seeds, Tensor) else [seeds] if isinstance(seeds, int) else list(seeds)
    is_whole = all(isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 for value in values)
    if not is_whole or len(values) != batch_size:
        raise ArgumentError(f"seeds: expected {batch_size} integers of 64 bits, one per row, got {seeds!r:.80}")
    return torch.tensor(values, dtype=torch.int64, device=device)


def num_rows(name: str, rows: Any) -> int:
    """Return how many rows were given; raise ArgumentError if it is none, or no sequence of rows."""
    is_sequence = isinstance(rows, (Tensor, Sequence)) and not isinstance(rows, (str, bytes))
    if not is_sequence or (isinstance(rows, Tensor) and rows.dim() != 2) or not len(rows):
        raise ArgumentError(
            f"{name}: expected int64 (B, P), or B >= 1 sequences of token ids, got {_kind(rows)}; encode text with the "
            "tokenizer first"
        )
    return len(rows)


def padded_rows(
    name: str, given: Rows, valid: Tensor | None, spec: DenoiserSpec, *, at_left: bool
) -> tuple[Tensor, Tensor]:
    """Return token rows as int64 (B, P), padded to the longest, and which of it is no padding, bool (B, P).

    In a tensor without ``valid``, padding tokens in front of a row are padding, where padding is no text.
    """
    num_rows(name, given)
    if isinstance(given, Tensor):
        tokens = _checked_ids(name, given, spec)
        if valid is None:
            is_pad = tokens == spec.pad_id
            if spec.pad_id in spec.forbidden_ids and spec.pad_id != spec.mask_id and bool(is_pad.any()):
                return tokens, ~(is_pad.long().cumprod(1) > 0)
            return tokens, torch.ones_like(tokens, dtype=torch.bool)
        if not isinstance(valid, Tensor) or valid.shape != tokens.shape:
            raise ArgumentError(f"valid: expected bool of shape {tuple(tokens.shape)}, got {_kind(valid)}")
        is_mask = valid.dtype == torch.bool or bool(((valid == 0) | (valid == 1)).all())
        if not is_mask:
            raise ArgumentError(f"valid: expected bool, or zeros and ones, got {_kind(valid)}")
        return tokens.masked_fill(~valid.bool(), spec.pad_id), valid.bool().to(tokens.device)
    if valid is not None:
        raise ArgumentError(f"valid: rows of different lengths know what is padding; give {name} as a tensor with it")
    rows = [_checked_ids(name, torch.as_tensor(row), spec) for row in given]
    if any(row.dim() != 1 for row in rows):
        raise ArgumentError(f"{name}: expected sequences of token ids, got one of shape {tuple(rows[0].shape)}")
    length = max(map(len, rows))
    tokens = torch.full((len(rows), length), spec.pad_id, device=rows[0].device)
    is_valid = torch.zeros(len(rows), length, dtype=torch.bool, device=rows[0].device)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if at_left else slice(0, len(row))
        tokens[i, place], is_valid[i, place] = row, True
    return tokens, is_valid


def check_length(name: str, length: int, spec: DenoiserSpec) -> None:
    """Raise ArgumentError if a canvas is longer than what the denoiser takes."""
    if length > spec.max_length:
        raise ArgumentError(
            f"{name}: expected at most the denoiser's {spec.max_length} positions in all, got {length}; shorten the "
            "text, or generate less"
        )


def _checked_ids(name: str, ids: Tensor, spec: DenoiserSpec) -> Tensor:
    if not ids.numel():
        return ids.long()
    if ids.dtype in (torch.bool,) or ids.is_floating_point() or ids.is_complex():
        raise ArgumentError(f"{name}: expected integers, the ids of tokens, got {_kind(ids)}")
    ids = ids.long().clone()
    outside = (ids < 0) | (ids >= spec.vocab_size)
    if bool(outside.any()):
        raise ArgumentError(f"{name}: expected token ids from 0 to {spec.vocab_size - 1}, got {int(ids[outside][0])}")
    return ids


def _kind(value: Any) -> str:
    return (
        f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r:.60}"
    )
