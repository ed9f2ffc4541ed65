"""Controls: what steers decoding beside the model, as objects that are put together in a list.

``df.generate(..., controls=[Guidance(1.0), MinLength(20), TopP(0.9)])`` applies them in this order to the denoiser's
logits of every step, before the circuit sees them: so whatever a control rules out is ruled out of the joint
distribution too, and the temperature comes after them. A function ``hook(logits, view) -> logits`` is a control too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from circuits.arguments import checked_count, is_number
from diffusion.denoisers.base import DenoiserSpec
from diffusion.errors import ArgumentError
from diffusion.prediction import LogitsHook

if TYPE_CHECKING:
    from diffusion.decoding.canvas import Canvas


@dataclass(frozen=True, eq=False)
class View:
    """What a control sees of a step; its tensors are copies.

    Attributes:
        tokens: int64 (B, T), the canvas, with mask tokens where nothing is written yet.
        valid: bool (B, T), False at padding.
        masked: bool (B, T), what is still to be filled.
        given: bool (B, T), what stood there before anything was written: the prompt, or what is around the holes.
        first: where the part after the prompts begins, for all rows; 0 of ``infill``.
        span: ``(start, stop)``, the n positions that the logits are about.
        step: the number of the step, from 1.
        spec: of the denoiser.
        ask: calls the denoiser again, about the same positions of another canvas: int64 (B, T) to logits (B, n, V). It
            counts as a call.
    """

    tokens: Tensor
    valid: Tensor
    masked: Tensor
    given: Tensor
    first: int
    span: tuple[int, int]
    step: int
    spec: DenoiserSpec
    ask: Callable[[Tensor], Tensor]

    @property
    def prompt_lengths(self) -> Tensor:
        """How many tokens the prompt of each row has, padding not counted, int64 (B,)."""
        return self.valid[:, : self.first].sum(1)

    @property
    def starts(self) -> Tensor:
        """Where the text after the prompt of each row begins on the canvas, int64 (B,)."""
        return self.valid.long().argmax(1).clamp_min(self.first)

    @property
    def places(self) -> Tensor:
        """How many positions after that each of the n positions is, int64 (B, n); negative: before it."""
        return torch.arange(*self.span, device=self.tokens.device) - self.starts.unsqueeze(1)


class Control:
    """Something that steers decoding; a subclass overrides what it needs."""

    cuts_text: ClassVar[bool] = False
    """Whether it makes padding of tokens that were written."""

    def logits(self, logits: Tensor, view: View) -> Tensor:
        """Return changed logits of a step.

        Args:
            logits: (B, n, V), -inf at the tokens that can never be generated.
            view: of the canvas.
        """
        return logits

    def scores(self, scores: Tensor, tokens: Tensor, spec: DenoiserSpec) -> Tensor:
        """Return changed scores of proposed tokens, by which the positions that are committed are chosen.

        Args:
            scores: (W, n), the higher the sooner.
            tokens: int64 (W, n).
            spec: of the denoiser.
        """
        return scores

    def after_step(self, canvas: Canvas) -> None:
        """Look at, or change, the canvas after the tokens of a step are written."""


@dataclass(frozen=True)
class Hook(Control):
    """A function ``hook(logits, view) -> logits`` as a control.

    Attributes:
        function: what it calls.
    """

    function: Callable[[Tensor, View], Tensor]

    def logits(self, logits: Tensor, view: View) -> Tensor:
        """Return what the function does."""
        return self.function(logits, view)


@dataclass(frozen=True)
class EndPenalty(Control):
    """Makes the end of the text less probable: what is subtracted from the logits of end-of-text tokens.

    The default forbids them; LLaDA's ``logits_eos_inf``.

    Attributes:
        penalty: in nats, >= 0.
    """

    penalty: float = math.inf

    def __post_init__(self) -> None:
        if not (isinstance(self.penalty, (int, float)) and self.penalty >= 0):
            raise ArgumentError(f"penalty: expected a number of nats >= 0, got {self.penalty!r}")

    def logits(self, logits: Tensor, view: View) -> Tensor:
        """Return the logits with the penalty on end-of-text tokens."""
        penalties = torch.zeros(view.spec.vocab_size, dtype=logits.dtype, device=logits.device)
        penalties[list(view.spec.eos_ids)] = self.penalty
        return logits - penalties


@dataclass(frozen=True)
class EndLast(Control):
    """End-of-text tokens are committed last, whatever was believed of them; LLaDA's ``confidence_eos_eot_inf``.

    It looks at what was proposed, so it changes the law at temperatures above 0. It needs a strategy with scores, so
    any but ``joint_entropy``.
    """

    def scores(self, scores: Tensor, tokens: Tensor, spec: DenoiserSpec) -> Tensor:
        """Return scores that are lowest where an end-of-text token is proposed."""
        ends = torch.tensor(spec.eos_ids, dtype=torch.int64, device=tokens.device)
        return scores.masked_fill(torch.isin(tokens, ends), torch.finfo(scores.dtype).min)


@dataclass(frozen=True)
class MinLength(Control):
    """The text has at least so many tokens: no end-of-text token is among the first of them.

    Attributes:
        length: tokens after the prompt, or from a row's beginning where there is none.
    """

    length: int

    def __post_init__(self) -> None:
        checked_count("min_length", self.length)

    def logits(self, logits: Tensor, view: View) -> Tensor:
        """Return the logits without end-of-text tokens at the first positions."""
        ends = torch.zeros(view.spec.vocab_size, dtype=torch.bool, device=logits.device)
        ends[list(view.spec.eos_ids)] = True
        return logits.masked_fill((view.places < self.length).unsqueeze(-1) & ends, -torch.inf)


@dataclass(frozen=True)
class TopK(Control):
    """Only the k most probable tokens of every position are possible.

    Attributes:
        k: at least 1.
    """

    k: int

    def __post_init__(self) -> None:
        checked_count("top_k", self.k)

    def logits(self, logits: Tensor, view: View) -> Tensor:
        """Return the logits of the k best, -inf elsewhere."""
        best, index = logits.topk(min(self.k, logits.shape[-1]), -1)
        return torch.full_like(logits, -torch.inf).scatter(-1, index, best)


@dataclass(frozen=True)
class TopP(Control):
    """Only the fewest tokens that together have probability p are possible (Holtzman et al. 2020, arXiv 1904.09751).

    Attributes:
        p: above 0, at most 1.
    """

    p: float

    def __post_init__(self) -> None:
        if not is_number(self.p) or not 0 < self.p <= 1:
            raise ArgumentError(f"top_p: expected a number above 0 and at most 1, got {self.p!r}")

    def logits(self, logits: Tensor, view: View) -> Tensor:
        """Return the logits of those tokens, -inf elsewhere."""
        ordered, index = torch.softmax(logits, -1).sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, before >= self.p)
        return logits.masked_fill(dropped, -torch.inf)


@dataclass(frozen=True)
class RepetitionPenalty(Control):
    """Tokens that a row holds already are less probable: ``log q`` of them is multiplied by the penalty.

    As by Keskar et al. 2019 (arXiv 1909.05858), but of log-probabilities, so that a constant added to all logits makes
    no difference. What is written in the same step is not seen; end-of-text tokens are spared.

    Attributes:
        penalty: above 0; 1 changes nothing.
    """

    penalty: float

    def __post_init__(self) -> None:
        if not is_number(self.penalty) or not self.penalty > 0:
            raise ArgumentError(f"repetition_penalty: expected a number above 0, got {self.penalty!r}")

    def logits(self, logits: Tensor, view: View) -> Tensor:
        """Return log-probabilities, not normalised."""
        log_q = torch.log_softmax(logits, -1)
        visible = view.valid & ~view.masked
        seen = torch.zeros(len(log_q), view.spec.vocab_size, device=log_q.device)
        seen = seen.scatter_add(1, view.tokens, visible.to(seen.dtype)) > 0
        seen[:, list(view.spec.eos_ids)] = False
        return torch.where(seen.unsqueeze(1), log_q * self.penalty, log_q)


@dataclass(frozen=True)
class Guidance(Control):
    """Classifier-free guidance: what the prompt adds to the logits counts more (Nie et al. 2025, arXiv 2502.09992).

    The denoiser is called a second time, with all that was given masked: ``l = u + (1 + scale) (c - u)`` of its logits
    c with the prompt and u without it.

    Attributes:
        scale: >= 0; 0 changes nothing.
    """

    scale: float

    def __post_init__(self) -> None:
        if not is_number(self.scale) or not self.scale >= 0:
            raise ArgumentError(f"scale: expected a number >= 0, got {self.scale!r}")

    def logits(self, logits: Tensor, view: View) -> Tensor:
        """Return the guided logits."""
        if self.scale == 0:
            return logits
        without = view.ask(view.tokens.masked_fill(view.given, view.spec.mask_id)).to(logits.dtype)
        guided = without + (1 + self.scale) * (logits - without)
        return torch.where(logits == -torch.inf, logits, guided)


@dataclass(frozen=True)
class StopStrings(Control):
    """A text ends before the first of some strings that occurs in it; the rest becomes padding.

    An occurrence counts once nothing before its end is masked any more. It is looked for after the prompt, or after the
    first hole. A token that holds something before the string stays whole.

    Attributes:
        strings: one, or several.
        tokenizer: with a method ``decode``, from ids to text.
    """

    strings: str | Sequence[str]
    tokenizer: Any = field(repr=False)
    cuts_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        strings = (self.strings,) if isinstance(self.strings, str) else tuple(self.strings)
        if not strings or not all(isinstance(string, str) and string for string in strings):
            raise ArgumentError(f"stop: expected strings of at least one character, got {self.strings!r}")
        object.__setattr__(self, "strings", strings)

    def after_step(self, canvas: Canvas) -> None:
        """End the rows in which a stop string is complete."""
        gone = torch.zeros_like(canvas.masked)
        for row in (~canvas.ended).nonzero().flatten().tolist():
            if not bool(canvas.writable[row].any()):
                continue
            start = max(canvas.first, int(canvas.writable[row].long().argmax()))
            is_known = canvas.valid[row, start:] & ~canvas.masked[row, start:]
            ids = canvas.tokens[row, start : start + int(is_known.long().cumprod(0).sum())].tolist()
            kept = self._kept(ids)
            if kept is not None:
                gone[row, start + kept :] = True
        if bool(gone.any()):
            canvas.cut(gone)

    def _kept(self, ids: list[int]) -> int | None:
        """Return how many tokens stand before the first occurrence; None if there is none."""
        text = self.tokenizer.decode(ids)
        found = [text.find(string) for string in self.strings if string in text]
        if not found:
            return None
        before = text[: min(found)]
        counts = (count for count in range(len(ids)) if len(self.tokenizer.decode(ids[:count])) >= len(before))
        return next(counts, len(ids))


def before_stop(text: str, strings: Sequence[str]) -> str:
    """Return a text up to the first occurrence of one of some strings; all of it where none occurs."""
    return text[: min((text.find(string) for string in strings if string in text), default=len(text))]


def all_controls(
    controls: Sequence[Control | Callable[[Tensor, View], Tensor]], logits_hook: Callable[[Tensor, View], Tensor] | None
) -> tuple[Control, ...]:
    """Return controls, functions among them wrapped, with a hook of the user's own at the end.

    Raises ArgumentError for what is neither a control nor a function.
    """
    if isinstance(controls, Control) or not isinstance(controls, Sequence):
        raise ArgumentError(f"controls: expected a list of controls, got {type(controls).__name__}; put it in a list")
    if logits_hook is not None and not callable(logits_hook):
        raise ArgumentError(f"logits_hook: expected hook(logits, view) -> logits, got {type(logits_hook).__name__}")
    given = [*controls, *([] if logits_hook is None else [logits_hook])]
    for control in given:
        if isinstance(control, type) or not (isinstance(control, Control) or callable(control)):
            raise ArgumentError(f"controls: expected df.controls objects or hook(logits, view), got {control!r:.80}")
    return tuple(control if isinstance(control, Control) else Hook(control) for control in given)


def steered(controls: Sequence[Control], view: View) -> LogitsHook | None:
    """Return the change of logits that all controls together make; None: there are none of them."""
    if not controls:
        return None
    forbidden = torch.tensor(view.spec.forbidden_ids, device=view.tokens.device)

    def hook(logits: Tensor) -> Tensor:
        logits = logits.index_fill(-1, forbidden, -torch.inf)
        for control in controls:
            changed = control.logits(logits, view)
            if not isinstance(changed, Tensor) or changed.shape != logits.shape or changed.dtype != logits.dtype:
                got = f"{changed.dtype} {tuple(changed.shape)}" if isinstance(changed, Tensor) else repr(changed)
                raise ArgumentError(
                    f"controls: expected {control!r:.60} to return {logits.dtype} {tuple(logits.shape)}, got {got:.60}"
                )
            logits = changed
        return logits

    return hook
