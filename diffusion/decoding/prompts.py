"""From what users hand over to a canvas: prompts of any lengths, canvases with holes, seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from circuits.queries import DeterministicAutomaton
from diffusion.decoding.canvas import Canvas
from diffusion.decoding.constraints import Constraint
from diffusion.denoisers.base import DenoiserSpec
from diffusion.errors import ArgumentError

Rows = Tensor | Sequence[Sequence[int]] | Sequence[Tensor]


def prompted_canvas(
    prompt: Sequence[Tensor],
    valid: Tensor | None,
    gen_length: int,
    spec: DenoiserSpec,
    seeds: Tensor,
    constraint: DeterministicAutomaton | None,
    *,
    ends: bool = False,
) -> Canvas:
    """Return a canvas of prompts, padded at the left, and ``gen_length`` masks; masks in a prompt are holes to fill."""
    tokens, is_valid = padded_rows("prompt", prompt, valid, spec, at_left=True)
    check_length("prompt", tokens.shape[1] + gen_length, spec)
    new = torch.full((len(tokens), gen_length), spec.mask_id, device=tokens.device)
    tokens, is_valid = torch.cat([tokens, new], 1), torch.cat([is_valid, torch.ones_like(new, dtype=torch.bool)], 1)
    masked, first = (tokens == spec.mask_id) & is_valid, tokens.shape[1] - gen_length
    return Canvas(tokens, is_valid, masked, first, seeds, spec, _constraint(constraint, spec, tokens.device, ends))


def holed_canvas(
    rows: Sequence[Tensor],
    masked: Tensor | None,
    valid: Tensor | None,
    spec: DenoiserSpec,
    seeds: Tensor,
    constraint: DeterministicAutomaton | None,
    *,
    ends: bool = False,
) -> Canvas:
    """Return a canvas whose positions ``masked``, or those that hold the mask token, are to be filled."""
    tokens, is_valid = padded_rows("tokens", rows, valid, spec, at_left=False)
    check_length("tokens", tokens.shape[1], spec)
    masked = masked.to(tokens.device) if isinstance(masked, Tensor) else masked
    if masked is None:
        masked = tokens == spec.mask_id
    elif not isinstance(masked, Tensor) or masked.shape != tokens.shape or masked.dtype != torch.bool:
        raise ArgumentError(f"masked: expected bool of shape {tuple(tokens.shape)}, got {_kind(masked)}")
    elif bool(((tokens == spec.mask_id) & is_valid & ~masked).any()):
        raise ArgumentError(
            "masked: expected True at every mask token, got False at one; mark it, or put a token there"
        )
    masked = masked & is_valid
    tokens, limits = tokens.masked_fill(masked, spec.mask_id), _constraint(constraint, spec, tokens.device, ends)
    return Canvas(tokens, is_valid, masked, 0, seeds, spec, limits)


def _constraint(
    automaton: DeterministicAutomaton | None, spec: DenoiserSpec, device: torch.device, ends: bool
) -> Constraint | None:
    return None if automaton is None else Constraint.of(automaton, spec, device, ends=ends)


def checked_seeds(seeds: Any, generator: torch.Generator | None, rows: Sequence[Tensor]) -> Tensor:
    """Return one seed per row, int64 (B,): those given, or drawn from the generator, or from fresh entropy."""
    batch_size, device = len(rows), rows[0].device
    if seeds is None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ArgumentError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
        source = torch.Generator() if generator is None else generator
        if generator is None:
            source.seed()
        return torch.randint(2**62, (batch_size,), generator=source, device=source.device).to(device)
    if generator is not None:
        raise ArgumentError("seeds: give either seeds or generator, not both")
    values = seeds.tolist() if isinstance(seeds, Tensor) else seeds
    values = list(values) if isinstance(values, Iterable) else [values]
    is_whole = all(isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 for value in values)
    if not is_whole or len(values) != batch_size:
        raise ArgumentError(f"seeds: expected {batch_size} integers of 64 bits, one per row, got {seeds!r:.80}")
    return torch.tensor(values, dtype=torch.int64, device=device)


def token_rows(name: str, rows: Rows, spec: DenoiserSpec) -> list[Tensor]:
    """Return rows of token ids as int64 tensors (P,) of perhaps different lengths.

    Raises ArgumentError for no rows, or rows of anything but ids of the denoiser's tokens.
    """
    expected = f"{name}: expected int64 (B, P) or a sequence of B >= 1 sequences of token ids"
    if isinstance(rows, str) or (isinstance(rows, Sequence) and any(isinstance(row, str) for row in rows)):
        raise ArgumentError(f"{expected}, got text; encode it with the denoiser's tokenizer")
    try:
        parts = [torch.as_tensor(row) for row in rows]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{expected}, got {type(rows).__name__}: {error}") from error
    if not parts or any(part.dim() != 1 for part in parts):
        raise ArgumentError(f"{expected}, got {type(rows).__name__} with {len(parts)} rows; one prompt is a row too")
    for part in parts:
        if part.numel() and (part.is_floating_point() or part.is_complex() or part.dtype == torch.bool):
            raise ArgumentError(f"{expected}, got {part.dtype}; token ids are whole numbers")
        outside = (part < 0) | (part >= spec.vocab_size)
        if bool(outside.any()):
            raise ArgumentError(
                f"{name}: expected token ids from 0 to {spec.vocab_size - 1}, got {int(part[outside][0])}"
            )
    return [part.long() for part in parts]


def padded_rows(
    name: str, rows: Sequence[Tensor], valid: Tensor | None, spec: DenoiserSpec, *, at_left: bool
) -> tuple[Tensor, Tensor]:
    """Return token rows as int64 (B, P), padded to the longest, and which of it is no padding, bool (B, P).

    Args:
        name: the argument's, for messages.
        rows: int64 tensors of perhaps different lengths.
        valid: bool (B, P), or zeros and ones, for rows of one length. None: padding tokens at the left of a row (or, of
            canvases, at either end) are padding, as tokenizers write it, where ``spec.pad_id`` is no token that can be
            generated.
        spec: of the denoiser.
        at_left: where shorter rows are padded.

    Raises:
        ArgumentError: ``valid`` does not fit, or padding tokens stand among the others.
    """
    length = max(map(len, rows))
    tokens = torch.full((len(rows), length), spec.pad_id, device=rows[0].device)
    is_valid = torch.zeros(len(rows), length, dtype=torch.bool, device=rows[0].device)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if at_left else slice(0, len(row))
        tokens[i, place], is_valid[i, place] = row, True
    if valid is not None:
        return _with_valid(tokens, valid, spec, is_ragged=not bool(is_valid.all()))
    if spec.pad_id in spec.forbidden_ids and spec.pad_id != spec.mask_id:
        is_pad = tokens == spec.pad_id
        outer = is_pad.long().cumprod(1).bool()
        if not at_left:
            outer |= is_pad.flip(1).long().cumprod(1).bool().flip(1)
        if bool((is_pad & ~outer).any()):
            row, position = (is_pad & ~outer).nonzero()[0].tolist()
            where = "at the left only" if at_left else "at the ends only"
            raise ArgumentError(
                f"{name}: expected padding ({spec.pad_id}) {where}, got one at position {position} of row {row}; give "
                "each row its tokens alone, or say what is padding with valid="
            )
        is_valid &= ~outer
    return tokens, is_valid


def _with_valid(tokens: Tensor, valid: Any, spec: DenoiserSpec, *, is_ragged: bool) -> tuple[Tensor, Tensor]:
    is_mask = isinstance(valid, Tensor) and valid.shape == tokens.shape
    if not is_mask or not (valid.dtype == torch.bool or bool(((valid == 0) | (valid == 1)).all())):
        raise ArgumentError(
            f"valid: expected bool, or zeros and ones, of shape {tuple(tokens.shape)}, got {_kind(valid)}"
        )
    if is_ragged:
        raise ArgumentError("valid: rows of different lengths know what is padding; give either them or valid")
    is_valid = valid.bool().to(tokens.device)
    return tokens.masked_fill(~is_valid, spec.pad_id), is_valid


def check_length(name: str, length: int, spec: DenoiserSpec) -> None:
    """Raise ArgumentError if a canvas is longer than what the denoiser takes."""
    if length > spec.max_length:
        raise ArgumentError(
            f"{name}: expected at most the denoiser's {spec.max_length} positions in all, got {length}; shorten the "
            "text, or generate less"
        )


def _kind(value: Any) -> str:
    return (
        f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r:.60}"
    )
