"""The log-probability of a text: under a decoder itself, one token at a time, or as a bound over noise levels.

All three replay :func:`~diffusion.decoding.generation.fill` with the given tokens in place of drawn ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from circuits import RowGenerators
from circuits.arguments import checked_count, kind_of
from diffusion.decoding.canvas import Canvas, Teacher
from diffusion.decoding.config import KEEPS_LAW, MODES, DecodingConfig
from diffusion.decoding.generation import fill
from diffusion.decoding.joint import JointHead
from diffusion.decoding.plans import Blocks, Look, Plan
from diffusion.decoding.prompts import Rows, check_length, checked_seeds, padded_rows, token_rows
from diffusion.denoisers.base import Denoiser, DenoiserSpec
from diffusion.errors import ArgumentError

Method = Literal["decoder", "elbo", "sequential"]
_OPTIONS: dict[Method, frozenset[str]] = {
    "decoder": frozenset({"num_steps", "config", "plan", *DecodingConfig.__dataclass_fields__}),
    "elbo": frozenset({"num_samples"}),
    "sequential": frozenset({"order"}),
}


def log_likelihood(
    denoiser: Denoiser,
    prompt: Rows,
    answer: Rows,
    *,
    head: JointHead | None = None,
    method: Method = "decoder",
    block_length: int | None = None,
    valid: Tensor | None = None,
    seeds: Any = None,
    **options: Any,
) -> Tensor:
    """Return the log-probability of answers to prompts, (B,) in nats.

    ``decoder``: the exact log-probability that ``df.generate`` with the same options, at temperature 1 and with
    ``stop_at_eos=False``, writes these tokens (DUEL, arXiv 2603.01367): its steps are replayed with the given tokens,
    and the joint log-probabilities of what each commits are added up. It exists where the positions that are committed
    do not depend on what is drawn. With ``strategy="random"`` it is the one given the order that the seeds draw, the
    mean of which over seeds is a lower bound, by Jensen.

    ``sequential``: one token and one denoiser call at a time, from left to right or in a given order, block by block.

    ``elbo``: an unbiased estimate of the evidence lower bound of the masked diffusion process, block by block. Of n
    tokens a number l, uniform on 1..n, is masked: ``E[n / l * sum_{i masked} log q_i(x_i | visible)]`` (Nie et al.
    2025, arXiv 2502.09992), which equals the integral over times of :mod:`diffusion.training.masking`, and the mean of
    ``sequential`` over all orders. With a head, q is its marginal.

    Args:
        denoiser: the masked-token predictor.
        prompt: int64 (B, P), or B sequences of token ids of different lengths.
        answer: int64 (B, A), or B sequences of different lengths; padding at the right is left out.
        head: the circuit; None: tokens are predicted independently.
        method: what is measured.
        block_length: positions of a block; None: the circuit's length, or all.
        valid: bool (B, P), False at padding of the prompts.
        seeds: an integer per row, of what is random; of ``decoder`` those of ``df.generate``. None: fresh ones.
        options: of ``decoder``: ``num_steps``, ``config``, ``plan`` and those of
            :class:`~diffusion.decoding.config.DecodingConfig`, as of ``df.generate``. Of ``elbo``: ``num_samples``, how
            many noise levels each block is looked at, evenly spread, 32 by default. Of ``sequential``: ``order``, int64
            (A,) or (B, A), the answer's positions, from 0, in the order in which those of a block are asked for.

    Returns:
        float64 (B,); -inf for a text that cannot come out.

    Raises:
        ArgumentError: an argument has a wrong type, shape or value, a text has masks in it, or the decoder has no
            likelihood: a temperature other than 1, mode ``latent``, ``remask``, or a strategy that looks at the draw.
        ImpossibleEvidenceError: of ``elbo`` with a head: the circuit rules out tokens that a sample leaves visible.
    """
    if method not in get_args(Method):
        raise ArgumentError(f"method: expected one of {', '.join(get_args(Method))}, got {method!r}")
    unknown = sorted(set(options) - _OPTIONS[method])
    if unknown:
        known = ", ".join(sorted(_OPTIONS[method]))
        raise ArgumentError(f"{unknown[0]}: method={method!r} has no such option; expected one of {known}")
    text = _Text.of(denoiser, prompt, answer, valid, seeds)
    if block_length is None:
        block_length = text.length if head is None else min(text.length, head.block_length)
    checked_count("block_length", block_length)
    if method == "decoder":
        return _of_decoder(denoiser, text, head, block_length, **options)
    if method == "elbo":
        return _elbo(denoiser, text, head, block_length, **options)
    return _sequential(denoiser, text, head, block_length, **options)


def _of_decoder(
    denoiser: Denoiser,
    text: _Text,
    head: JointHead | None,
    block_length: int,
    *,
    num_steps: int | None = None,
    config: DecodingConfig | None = None,
    plan: Plan | None = None,
    **changes: Any,
) -> Tensor:
    config = (DecodingConfig(temperature=1.0) if config is None else config).changed(**changes)
    _check_config(config)
    return _replayed(denoiser, text.canvas(text.is_answer), plan or Blocks(block_length, num_steps), head, config)


def _sequential(
    denoiser: Denoiser, text: _Text, head: JointHead | None, block_length: int, *, order: Tensor | None = None
) -> Tensor:
    plan = _OneByOne(block_length, text.ranks(order))
    return _replayed(denoiser, text.canvas(text.is_answer), plan, head, DecodingConfig(temperature=1.0))


def _elbo(
    denoiser: Denoiser, text: _Text, head: JointHead | None, block_length: int, *, num_samples: int = 32
) -> Tensor:
    checked_count("num_samples", num_samples)
    config = DecodingConfig(decode="marginal", temperature=1.0)
    total = torch.zeros(len(text.tokens), dtype=torch.float64, device=text.tokens.device)
    for number, start in enumerate(range(text.first, text.tokens.shape[1], block_length)):
        span = start, min(start + block_length, text.tokens.shape[1])
        inside = text.answer_in(span)
        count = inside.sum(1)
        source = RowGenerators(text.seeds).at(number)
        shift = source.uniform()[:, 0]
        for sample in range(num_samples):
            level = (shift + sample / num_samples) % 1  # an even grid, as masking.sample_times has it
            num_masked = torch.minimum((level * count).long() + 1, count)
            noise = torch.full(inside.shape, 2.0, dtype=torch.float64, device=inside.device)
            noise[:, slice(*span)] = source.at(sample).uniform(span[1] - span[0])
            rank = noise.masked_fill(~inside, 2.0).argsort(1).argsort(1)
            masked = (rank < num_masked.unsqueeze(1)) & inside
            look = Look(span, masked, num_masked, torch.ones_like(count, dtype=torch.bool))
            later = text.answer_in((span[1], text.tokens.shape[1]))
            log_prob = _replayed(denoiser, text.canvas(masked | later), _Once(look), head, config)
            total += log_prob * count / num_masked.clamp_min(1) / num_samples
    return total


def _replayed(denoiser: Denoiser, canvas: Canvas, plan: Plan, head: JointHead | None, config: DecodingConfig) -> Tensor:
    assert canvas.teacher is not None
    fill(denoiser, canvas, plan, head=head, config=config)
    return canvas.teacher.log_prob


def _check_config(config: DecodingConfig) -> None:
    """Raise ArgumentError where positions depend on what is drawn, or the law of a draw is not at hand."""
    if config.temperature != 1:
        raise ArgumentError(
            f"temperature: expected 1, got {config.temperature!r}; only draws that are not tempered have a likelihood"
        )
    if MODES[config.decode].draws_latents:
        known = ", ".join(name for name, mode in MODES.items() if not mode.draws_latents)
        raise ArgumentError(
            f"decode: expected one of {known}, got {config.decode!r}; its draws of latents are not summed over, joint "
            "has the same law where positions do not depend on them"
        )
    if config.remask:
        raise ArgumentError(f"remask: expected 0, got {config.remask!r}; texts that are rewritten have many histories")
    if not config.keeps_law:
        raise ArgumentError(
            f"strategy: expected one of {', '.join(sorted(KEEPS_LAW))}, got {config.chosen_strategy!r}; its positions "
            "depend on the drawn tokens"
        )


@dataclass(frozen=True, eq=False)
class _Text:
    """Prompts, padded at the left to length ``first``, and answers, padded at the right: tokens int64 (B, T)."""

    tokens: Tensor
    valid: Tensor
    first: int
    seeds: Tensor
    spec: DenoiserSpec

    @classmethod
    def of(cls, denoiser: Denoiser, prompt: Rows, answer: Rows, valid: Tensor | None, seeds: Any) -> _Text:
        spec = denoiser.spec
        parts = {"prompt": token_rows("prompt", prompt, spec), "answer": token_rows("answer", answer, spec)}
        device = getattr(denoiser, "device", parts["prompt"][0].device)
        parts = {name: [row.to(device) for row in rows] for name, rows in parts.items()}
        if len(parts["prompt"]) != len(parts["answer"]):
            raise ArgumentError(
                f"answer: expected as many rows as prompt, {len(parts['prompt'])}, got {len(parts['answer'])}"
            )
        for name, rows in parts.items():
            if any(bool((row == spec.mask_id).any()) for row in rows):
                raise ArgumentError(f"{name}: expected texts without mask tokens ({spec.mask_id}), got one with a hole")
        before, valid_before = padded_rows("prompt", parts["prompt"], valid, spec, at_left=True)
        after, valid_after = padded_rows("answer", parts["answer"], None, spec, at_left=False)
        if bool((valid_after & (valid_after.long().cumprod(1) == 0)).any()):
            raise ArgumentError("answer: expected padding at the right only, got some at the left")
        tokens = torch.cat([before, after], 1)
        check_length("answer", tokens.shape[1], spec)
        valid_all = torch.cat([valid_before, valid_after], 1)
        return cls(tokens, valid_all, before.shape[1], checked_seeds(seeds, None, parts["prompt"]), spec)

    @property
    def length(self) -> int:
        """A, at least 1."""
        return max(1, self.tokens.shape[1] - self.first)

    @property
    def is_answer(self) -> Tensor:
        """Where the answers' tokens are, bool (B, T)."""
        return self.answer_in((self.first, self.tokens.shape[1]))

    def answer_in(self, span: tuple[int, int]) -> Tensor:
        """Return where the answers' tokens within a span are, bool (B, T)."""
        inside = torch.zeros_like(self.valid)
        inside[:, slice(*span)] = self.valid[:, slice(*span)]
        return inside

    def canvas(self, masked: Tensor) -> Canvas:
        """Return the texts with masks, and with themselves as teacher."""
        noised = self.tokens.masked_fill(masked, self.spec.mask_id)
        teacher = Teacher(self.tokens)
        return Canvas(noised, self.valid.clone(), masked, self.first, self.seeds, self.spec, teacher=teacher)

    def ranks(self, order: Tensor | None) -> Tensor:
        """Return when each position's turn comes, int64 (B, T)."""
        num_rows, length = len(self.tokens), self.tokens.shape[1] - self.first
        places = torch.arange(length, device=self.tokens.device)
        if order is None:
            order = places
        is_order = isinstance(order, Tensor) and order.dtype == torch.int64 and order.dim() in (1, 2)
        if not is_order or order.expand(num_rows, -1).shape != (num_rows, length):
            raise ArgumentError(f"order: expected int64 ({length},) or ({num_rows}, {length}), got {kind_of(order)}")
        order = order.to(places.device).expand(num_rows, length)
        if not torch.equal(order.sort(1).values, places.expand(num_rows, length)):
            raise ArgumentError(
                f"order: expected every position from 0 to {length - 1} once, got {order.tolist()!r:.80}"
            )
        return torch.nn.functional.pad(order.argsort(1), (self.first, 0))


@dataclass(frozen=True, eq=False)
class _OneByOne(Plan):
    """One position of a block after the other, by ranks, int64 (B, T)."""

    length: int
    ranks: Tensor

    def looks(self, canvas: Canvas) -> Iterator[Look]:
        for start in range(canvas.first, canvas.length, self.length):
            span = start, min(start + self.length, canvas.length)
            inside = torch.zeros_like(canvas.masked)
            inside[:, slice(*span)] = True
            for _ in range(*span):
                left = canvas.masked & inside & ~canvas.ended.unsqueeze(1)
                counts = left.any(1).long()
                if not bool(counts.any()):
                    break
                turn = self.ranks.masked_fill(~left, canvas.length).argmin(1, keepdim=True)
                one = torch.zeros_like(left).scatter(1, turn, True) & left
                yield Look(span, one, counts, left.sum(1) <= 1)


@dataclass(frozen=True, eq=False)
class _Once(Plan):
    """One look, and no more."""

    look: Look

    def looks(self, canvas: Canvas) -> Iterator[Look]:
        yield self.look
