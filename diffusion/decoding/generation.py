"""Block decoding: fill one block after the other, each in a few denoising steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.arguments import checked_count
from diffusion.decoding.remasking import Strategy
from diffusion.decoding.step import DecodeMode, DecodeOptions, decode_step
from diffusion.denoisers.base import Denoiser, DenoiserSpec
from diffusion.errors import ArgumentError
from diffusion.head import CoupledHead
from diffusion.prediction import Prediction


@dataclass(frozen=True, eq=False)
class Generation:
    """Generated text.

    Attributes:
        tokens: int64 (B, P + gen_length): prompts, padded at the left to P, and what was generated after them.
        valid: bool (B, P + gen_length), False at padding: left of a prompt, and after a text that has ended.
        prompt_length: P.
        num_calls: how often the denoiser was called.
        trajectory: int64 (num_calls + 1, B, P + gen_length), the tokens before the first step and after every step,
            with masks; None unless it was asked for.
    """

    tokens: Tensor
    valid: Tensor
    prompt_length: int
    num_calls: int
    trajectory: Tensor | None

    @property
    def generated(self) -> Tensor:
        """The tokens after the prompts, int64 (B, gen_length)."""
        return self.tokens[:, self.prompt_length :]


@torch.no_grad()
def generate(
    denoiser: Denoiser,
    prompt: Tensor | Sequence[Sequence[int]] | Sequence[Tensor],
    *,
    gen_length: int,
    block_length: int,
    num_steps: int,
    strategy: Strategy = "low_confidence",
    head: CoupledHead | None = None,
    decode: DecodeMode = "latent",
    temperature: float | None = None,
    threshold: float = 0.9,
    stop_at_eos: bool = True,
    record: bool = False,
    generator: torch.Generator | None = None,
) -> Generation:
    """Generate text block by block (semi-autoregressive masked diffusion; Nie et al. 2025, Li et al. 2026).

    Every step calls the denoiser once on the whole canvas, decodes some masked positions of the current block, and
    leaves the others masked. ``head=None`` is the factorized baseline; it runs the same code.

    Args:
        denoiser: the masked-token predictor.
        prompt: int64 (B, P), or B sequences of token ids of different lengths, which are padded at the left.
        gen_length: how many tokens to generate, a multiple of ``block_length``.
        block_length: L; with a head, the number of variables of its circuit.
        num_steps: denoiser calls in all, a multiple of the number of blocks and at most ``gen_length``. The strategy
            "threshold" may need fewer.
        strategy: which positions a step commits, see :mod:`diffusion.decoding.remasking`.
        head: the circuit and its activation threshold; None: tokens are predicted independently.
        decode: how the circuit is used, see :class:`~diffusion.decoding.step.DecodeOptions`; ignored without a head.
        temperature: tau; by default the head's, or 1 without one; 0 is greedy.
        threshold: for the strategy "threshold".
        stop_at_eos: end a text at its first end-of-text token: the rest of it is padding.
        record: keep the tokens of every step.
        generator: for all draws, on the denoiser's device; the same seed gives the same text on one machine.

    Raises:
        ArgumentError: an argument has a wrong type, shape or value, or prompt and text exceed the denoiser's length.
    """
    spec = denoiser.spec
    num_blocks = _checked_blocks(gen_length, block_length, num_steps)
    if head is not None:
        _check_head(head, spec, block_length)
    if temperature is None:
        temperature = 1.0 if head is None else head.temperature
    options = DecodeOptions(decode=decode, strategy=strategy, temperature=temperature, threshold=threshold)
    prompts, prompt_valid = _pad_left(prompt, spec)
    batch_size, prompt_length = prompts.shape
    if prompt_length + gen_length > spec.max_length:
        raise ArgumentError(
            f"prompt: {prompt_length} tokens and gen_length={gen_length} exceed the denoiser's {spec.max_length} "
            "positions; "
            "shorten the prompt or generate less"
        )
    canvas = torch.cat([prompts, torch.full((batch_size, gen_length), spec.mask_id, device=prompts.device)], 1)
    valid = torch.cat([prompt_valid, torch.ones_like(canvas[:, prompt_length:], dtype=torch.bool)], 1)
    uses_list_only = head is not None and decode != "independent" and head.activation_threshold >= 1
    top_k = head.top_k if head is not None and uses_list_only else None
    ended = torch.zeros(batch_size, dtype=torch.bool, device=canvas.device)
    history = [canvas.clone()] if record else []
    num_calls = 0
    for block in range(num_blocks):
        start = prompt_length + block * block_length
        window = slice(start, start + block_length)
        open_rows = (~ended).unsqueeze(-1)
        masked = (canvas[:, window] == spec.mask_id) & open_rows
        for steps_left in range(num_steps // num_blocks, 0, -1):
            if not bool(masked.any()):
                break
            prediction = Prediction.ask(
                denoiser,
                canvas,
                valid=valid,
                window=(window.start, window.stop),
                top_k=top_k,
                features=head is not None and head.needs_features,
            )
            num_calls += 1
            counts = -(-masked.sum(-1) // steps_left)
            step = decode_step(
                prediction, canvas[:, window], masked, counts, head=head, options=options, generator=generator
            )
            canvas[:, window] = step.tokens
            masked = masked & ~step.committed
            if record:
                history.append(canvas.clone())
        if stop_at_eos and spec.eos_ids:
            ended = _end_at_eos(canvas, valid, prompt_length, start + block_length, spec)
            if bool(ended.all()):
                break
    canvas[:, prompt_length:].masked_fill_(canvas[:, prompt_length:] == spec.mask_id, spec.pad_id)
    return Generation(canvas, valid, prompt_length, num_calls, torch.stack(history) if record else None)


def _end_at_eos(canvas: Tensor, valid: Tensor, prompt_length: int, stop: int, spec: DenoiserSpec) -> Tensor:
    """Pad, in place, everything after the first end-of-text token between prompt and ``stop``; return who ended."""
    is_eos = torch.isin(canvas[:, prompt_length:stop], torch.tensor(spec.eos_ids, device=canvas.device))
    after = is_eos.cumsum(-1) - is_eos.long() > 0
    ended = is_eos.any(-1)
    rest = torch.cat([after, ended.unsqueeze(-1).expand(-1, canvas.shape[1] - stop)], 1)
    canvas[:, prompt_length:].masked_fill_(rest, spec.pad_id)
    valid[:, prompt_length:] &= ~rest
    return ended


def _checked_blocks(gen_length: int, block_length: int, num_steps: int) -> int:
    for name, value in (("gen_length", gen_length), ("block_length", block_length), ("num_steps", num_steps)):
        checked_count(name, value)
    if gen_length % block_length:
        raise ArgumentError(f"gen_length: expected a multiple of block_length={block_length}, got {gen_length}")
    num_blocks = gen_length // block_length
    if num_steps % num_blocks or num_steps > gen_length:
        raise ArgumentError(
            f"num_steps: expected a multiple of the {num_blocks} blocks, at most gen_length={gen_length}, got "
            f"{num_steps}"
        )
    return num_blocks


def _check_head(head: CoupledHead, spec: DenoiserSpec, block_length: int) -> None:
    if head.block_length != block_length:
        raise ArgumentError(
            f"block_length: the head's circuit is over {head.block_length} positions, got {block_length}; they must "
            "be equal"
        )
    categories = set(head.pc.circuit.num_categories)
    if categories != {spec.vocab_size}:
        raise ArgumentError(
            f"head: its circuit has {sorted(categories)} categories and the denoiser {spec.vocab_size} tokens; fit a "
            "circuit "
            "on this denoiser's tokens"
        )


def _pad_left(prompt: Tensor | Sequence[Sequence[int]] | Sequence[Tensor], spec: DenoiserSpec) -> tuple[Tensor, Tensor]:
    """Return the prompts as int64 (B, P) and which of it is not padding, bool (B, P)."""
    rows = [torch.as_tensor(row, dtype=torch.int64) for row in prompt]
    if not rows or any(row.dim() != 1 for row in rows):
        raise ArgumentError(
            "prompt: expected int64 (B, P) or a sequence of B >= 1 sequences of token ids, got "
            f"{type(prompt).__name__} with "
            f"{len(rows)} rows"
        )
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
    return tokens, valid
