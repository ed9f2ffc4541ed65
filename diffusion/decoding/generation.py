"""Filling in text: :func:`infill` fills the masks of any canvas, :func:`generate` continues prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from circuits.arguments import checked_count
from diffusion.decoding.canvas import Canvas
from diffusion.decoding.config import DecodeMode, DecodingConfig, Strategy
from diffusion.decoding.controls import Control, View, all_controls, steered
from diffusion.decoding.head_mixture import HeadMixture
from diffusion.decoding.joint import JointHead, check_constrained, check_head, spec_with
from diffusion.decoding.plans import Anywhere, Blocks, DynamicWindows, Look, Plan
from diffusion.decoding.prompts import Rows, checked_seeds, holed_canvas, prompted_canvas, token_rows
from diffusion.decoding.step import decode_step
from diffusion.denoisers.base import CachingDenoiser, Denoiser, DenoiserSpec
from diffusion.denoisers.questions import raw_logits
from diffusion.errors import ArgumentError
from diffusion.head import CoupledHead
from diffusion.prediction import Prediction

_OTHER_OPTIONS = {"seeds", "generator", "on_step", "record", "constraint", "controls", "logits_hook", "cache"}


@dataclass(frozen=True, eq=False)
class Step:
    """What ``on_step`` gets after every denoiser call.

    Attributes:
        number: of the call, from 1.
        tokens: int64 (B, T), with mask tokens where nothing is written yet; a copy.
        masked: bool (B, T), where that is.
        span: ``(start, stop)``, the positions that the denoiser was asked about.
    """

    number: int
    tokens: Tensor
    masked: Tensor
    span: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Generation:
    """Generated text.

    Attributes:
        tokens: int64 (B, T): of ``generate`` the prompts, padded at the left to P, and what was generated after them.
        valid: bool (B, T), False at padding: beside a prompt, and after a text that has ended.
        prompt_length: P; 0 of ``infill``.
        num_calls: how often the denoiser was called: once a step, and more where a control asks again.
        row_calls: in how many of the calls each row took part, int64 (B,).
        num_windows: how many windows of each row were decoded, int64 (B,).
        num_coupled: in how many of them the circuit was used, int64 (B,).
        tokens_per_call: tokens written per denoiser call of their row, padding after the end not counted; a mean
            over rows.
        trajectory: int64 (number of steps + 1, B, T), the tokens before the first step and after every step, with
            masks; None unless it was asked for.
    """

    tokens: Tensor
    valid: Tensor
    prompt_length: int
    num_calls: int
    row_calls: Tensor
    num_windows: Tensor
    num_coupled: Tensor
    tokens_per_call: float
    trajectory: Tensor | None

    @property
    def sequences(self) -> Tensor:
        """The tokens; the name that other libraries use."""
        return self.tokens

    @property
    def generated(self) -> Tensor:
        """The tokens after the prompts, int64 (B, gen_length)."""
        return self.tokens[:, self.prompt_length :]


def generate(
    denoiser: Denoiser,
    prompt: Rows,
    *,
    gen_length: int,
    block_length: int | None = None,
    num_steps: int | None = None,
    head: JointHead | None = None,
    decode: DecodeMode | None = None,
    strategy: Strategy | None = None,
    temperature: float | None = None,
    config: DecodingConfig | None = None,
    stop_at_eos: bool = True,
    **options: Any,
) -> Generation:
    """Continue prompts, block by block (Nie et al. 2025, Li et al. 2026): :func:`infill` of prompts and masks.

    Every step calls the denoiser once, decodes some masked positions of the current block, and leaves the others
    masked. ``head=None`` is the factorized baseline; it runs the same code.

    Args:
        denoiser: the masked-token predictor.
        prompt: int64 (B, P), or B sequences of token ids of different lengths, which are padded at the left. Mask
            tokens in it are holes, and filled first.
        gen_length: how many tokens to generate at most; fewer where a text ends.
        block_length: positions of a block; the last one may be shorter. None: the circuit's length, or all.
        num_steps: denoiser calls in all, at least one per block. None: one per position.
        head: the circuit; None: tokens are predicted independently.
        decode: how the circuit is used, see :data:`~diffusion.decoding.config.MODES`; ``joint`` by default.
        strategy: which positions a step commits, see :data:`~diffusion.decoding.config.STRATEGIES`.
        temperature: tau >= 0; by default the head's if that is not 1, else 0, which is greedy.
        config: all options of a step at once; those above replace its own.
        stop_at_eos: end a text at its first end-of-text token: the rest of it is padding.
        options: ``valid``, ``plan`` (which has ``block_length`` and ``num_steps`` of its own), ``constraint``,
            ``controls``, ``logits_hook``, ``seeds``, ``generator``, ``on_step``, ``record``, ``cache`` and those of
            :class:`~diffusion.decoding.config.DecodingConfig`, as for :func:`infill`.

    Raises:
        ArgumentError: an argument has a wrong type, shape or value, prompt and text exceed the denoiser's length, or
            the denoiser's logits are broken.
    """
    valid, plan = options.pop("valid", None), options.pop("plan", None)
    _check(denoiser, head, config, plan, block_length=block_length, num_steps=num_steps)
    checked_count("gen_length", gen_length)
    if block_length is None:
        block_length = gen_length if head is None else min(gen_length, head.block_length)
    checked_count("block_length", block_length)
    if num_steps is not None:
        checked_count("num_steps", num_steps)
    chosen = _config(
        config, head, decode=decode, strategy=strategy, temperature=temperature, **_config_options(options)
    )
    rows = _rows("prompt", prompt, denoiser)
    seeds = checked_seeds(options.pop("seeds", None), options.pop("generator", None), rows)
    constraint = options.pop("constraint", None)
    options["controls"] = all_controls(options.pop("controls", ()), options.pop("logits_hook", None))
    spec = spec_with(head, denoiser.spec, chosen)
    canvas = prompted_canvas(rows, valid, gen_length, spec, seeds, constraint, ends=stop_at_eos)
    plan = plan or Blocks(block_length, num_steps)
    return fill(denoiser, canvas, plan, head=head, config=chosen, stop_at_eos=stop_at_eos, **options)


def infill(
    denoiser: Denoiser,
    tokens: Rows,
    masked: Tensor | None = None,
    *,
    num_steps: int | None = None,
    window_length: int | None = None,
    head: JointHead | None = None,
    decode: DecodeMode | None = None,
    strategy: Strategy | None = None,
    temperature: float | None = None,
    config: DecodingConfig | None = None,
    stop_at_eos: bool = False,
    **options: Any,
) -> Generation:
    """Fill every masked position of a canvas, wherever it is.

    Args:
        denoiser: the masked-token predictor.
        tokens: int64 (B, T), or B sequences of different lengths, which are padded at the right.
        masked: bool (B, T), which positions to fill, other ones in every row if need be. None: where the mask token is.
        num_steps: denoiser calls in all. None: one per masked position.
        window_length: the greatest length of a window in which tokens are decoded jointly; None: the circuit's.
        head: the circuit; None: tokens are predicted independently.
        decode: how the circuit is used; ``joint`` by default.
        strategy: which positions a step commits.
        temperature: tau >= 0; by default the head's if that is not 1, else 0, which is greedy.
        config: all options of a step at once; those above replace its own.
        stop_at_eos: make padding of what follows an end-of-text token that was written.
        options: ``valid``: bool (B, T), False at padding, which is never filled (an attention mask). ``plan``: the
            order, :class:`~diffusion.decoding.plans.Blocks`, ``Anywhere`` or ``DynamicWindows``, which is the default
            with a head; it takes ``num_steps`` and the windows' length itself. Blocks are counted from the canvas's
            first position, padding included. ``constraint``: what the text satisfies in the end, see
            :mod:`diffusion.decoding.constraints`; of ``generate`` the new text, else the whole canvas.
            ``controls``: what steers decoding beside the model, see :mod:`diffusion.decoding.controls`, in this order.
            ``logits_hook``: a control of your own, ``hook(logits, view) -> logits``, the last of them. ``seeds``: an
            integer per row: with it a row's text depends on its tokens and its seed, not on the batch, its mates or
            padding. ``generator``: draws the seeds where none are given. ``on_step``: called with a :class:`Step` after
            every denoiser call. ``record``: keep the tokens of every step. ``cache``: whether the denoiser keeps what
            it computed about the text before a block, see :class:`~diffusion.denoisers.base.CachingDenoiser`: the same
            text where its attention makes that exact, else an approximation. And the options of
            :class:`~diffusion.decoding.config.DecodingConfig`.

    Raises:
        ArgumentError: an argument has a wrong type, shape or value, or the denoiser's logits are broken.
    """
    valid, plan = options.pop("valid", None), options.pop("plan", None)
    _check(denoiser, head, config, plan, num_steps=num_steps, window_length=window_length)
    for name, count in (("num_steps", num_steps), ("window_length", window_length)):
        if count is not None:
            checked_count(name, count)
    chosen = _config(
        config, head, decode=decode, strategy=strategy, temperature=temperature, **_config_options(options)
    )
    rows = _rows("tokens", tokens, denoiser)
    seeds = checked_seeds(options.pop("seeds", None), options.pop("generator", None), rows)
    constraint = options.pop("constraint", None)
    options["controls"] = all_controls(options.pop("controls", ()), options.pop("logits_hook", None))
    spec = spec_with(head, denoiser.spec, chosen)
    canvas = holed_canvas(rows, masked, valid, spec, seeds, constraint, ends=stop_at_eos)
    if plan is None:
        uses_windows = head is not None and chosen.decode != "independent"
        plan = DynamicWindows(num_steps, window_length) if uses_windows or window_length else Anywhere(num_steps)
    return fill(denoiser, canvas, plan, head=head, config=chosen, stop_at_eos=stop_at_eos, **options)


@torch.no_grad()
def fill(
    denoiser: Denoiser,
    canvas: Canvas,
    plan: Plan,
    *,
    head: JointHead | None = None,
    config: DecodingConfig | None = None,
    stop_at_eos: bool = False,
    controls: Sequence[Control] = (),
    on_step: Callable[[Step], None] | None = None,
    record: bool = False,
    cache: bool = False,
) -> Generation:
    """Fill a canvas in place by a plan: what :func:`generate` and :func:`infill` do once they know what was asked.

    Arguments are theirs, but for:

    Args:
        canvas: is filled in place.
        plan: the order.
        config: how to decode.
    """
    _check(denoiser, head, config, plan)
    config = config or DecodingConfig()
    if head is not None and canvas.constraint is not None:
        check_constrained(head, config)
    if on_step is not None and not callable(on_step):
        raise ArgumentError(f"on_step: expected a function of a step, or None, got {type(on_step).__name__}")
    _check_controls(controls, canvas, config)
    canvas.controls = tuple(controls)
    canvas.spec = spec_with(head, denoiser.spec, config)
    history = [canvas.tokens.clone()] if record else []
    kept = _new_cache(denoiser) if cache else None
    # read once: at every step, comparing large ones with what was kept takes as long as the step itself
    weights = head.pc.weights() if isinstance(head, CoupledHead) and config.decode != "independent" else None
    num_steps, asked = 0, list[Look]()
    for look in plan.looks(canvas):
        num_steps += 1
        prediction = Prediction.ask(
            denoiser,
            canvas.tokens,
            valid=canvas.valid,
            t=canvas.mask_ratio,
            window=look.span,
            cache=kept,
            logits_hook=steered(controls, _view(denoiser, canvas, look, num_steps, asked)) if controls else None,
            top_k=None if head is None or canvas.constraint is not None else head.top_k,
            features=head is not None and head.needs_features,
            forbidden_ids=canvas.spec.forbidden_ids,
        )
        decode_step(canvas, look, prediction, plan, head, config, weights=weights)
        if stop_at_eos:
            canvas.end_texts(look.span[1])
        for control in controls:
            control.after_step(canvas)
        if record:
            history.append(canvas.tokens.clone())
        if on_step is not None:
            on_step(Step(num_steps, canvas.tokens.clone(), canvas.masked.clone(), look.span))
    canvas.close()
    num_written, row_calls = (canvas.writable & canvas.valid).sum(1), canvas.num_calls + canvas.num_extra_calls
    return Generation(
        tokens=canvas.tokens,
        valid=canvas.valid,
        prompt_length=canvas.first,
        num_calls=num_steps + len(asked),
        row_calls=row_calls,
        num_windows=canvas.num_windows,
        num_coupled=canvas.num_coupled,
        tokens_per_call=float((num_written / row_calls.clamp_min(1)).mean()),
        trajectory=torch.stack(history) if record else None,
    )


def _view(denoiser: Denoiser, canvas: Canvas, look: Look, step: int, asked: list[Look]) -> View:
    """Return what controls see of a step; calls that they make are noted in ``asked``."""
    valid, t = canvas.valid.clone(), canvas.mask_ratio

    def ask(tokens: Tensor) -> Tensor:
        asked.append(look)
        canvas.num_extra_calls += (look.counts > 0).long()
        return raw_logits(denoiser, tokens, valid=valid, t=t, window=look.span)

    return View(
        tokens=canvas.tokens.clone(),
        valid=valid,
        masked=canvas.masked.clone(),
        given=canvas.given,
        first=canvas.first,
        span=look.span,
        step=step,
        spec=denoiser.spec,
        ask=ask,
    )


def _new_cache(denoiser: Denoiser) -> Any:
    if not isinstance(denoiser, CachingDenoiser):
        raise ArgumentError(
            f"cache: expected a denoiser with a method new_cache, got {type(denoiser).__name__}; decode without a cache"
        )
    return denoiser.new_cache()


def _check_controls(controls: Sequence[Control], canvas: Canvas, config: DecodingConfig) -> None:
    if canvas.constraint is not None and any(control.cuts_text for control in controls):
        raise ArgumentError(
            "controls: expected none that cuts the text beside a constraint, which would no longer hold, got stop "
            "strings; say in the constraint where the text ends"
        )
    if config.chosen_strategy == "joint_entropy" and any(type(one).scores is not Control.scores for one in controls):
        raise ArgumentError(
            "controls: expected none that changes scores with strategy='joint_entropy', which has none; use another "
            "strategy, or df.controls.EndPenalty"
        )


def _config(config: DecodingConfig | None, head: JointHead | None, **changes: Any) -> DecodingConfig:
    own = getattr(head, "decoding", {})
    base = config or DecodingConfig().changed(**own)
    if config is None and changes.get("temperature") is None and head is not None and head.temperature != 1 and not own:
        changes["temperature"] = head.temperature
    return base.changed(**changes)


def _config_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of a decoding configuration out of others."""
    names = [name for name in options if name in DecodingConfig.__dataclass_fields__]
    taken = {name: options.pop(name) for name in names}
    unknown = sorted(set(options) - _OTHER_OPTIONS)
    if unknown:
        raise ArgumentError(f"{unknown[0]}: no such option; see df.infill and df.DecodingConfig for those there are")
    return taken


def _rows(name: str, rows: Rows, denoiser: Denoiser) -> list[Tensor]:
    """Return rows of token ids, int64 (P,) each, where the denoiser is, if it says where."""
    parts = token_rows(name, rows, denoiser.spec)
    device = getattr(denoiser, "device", parts[0].device)
    return [part.to(device) for part in parts]


def _check(
    denoiser: Denoiser, head: JointHead | None, config: DecodingConfig | None, plan: Plan | None, **counts: int | None
) -> None:
    if not isinstance(getattr(denoiser, "spec", None), DenoiserSpec) or not hasattr(denoiser, "logits"):
        raise ArgumentError(f"denoiser: expected one with spec and logits, df.Denoiser, got {type(denoiser).__name__}")
    if config is not None and not isinstance(config, DecodingConfig):
        raise ArgumentError(f"config: expected df.DecodingConfig(...) or None, got {type(config).__name__}")
    if plan is not None and not isinstance(plan, Plan):
        got = plan.__name__ if isinstance(plan, type) else type(plan).__name__
        raise ArgumentError(f"plan: expected df.Blocks(...), df.Anywhere() or df.DynamicWindows(), got {got}")
    given = [name for name, count in counts.items() if count is not None]
    if plan is not None and given:
        raise ArgumentError(f"{given[0]}: a plan has its own, got both; say it in the plan, {plan!r}")
    if head is not None:
        check_head(head, denoiser.spec, config or DecodingConfig())
        if isinstance(head, CoupledHead | HeadMixture):
            head.check_tokenizer(getattr(denoiser, "tokenizer_fingerprint", None))
