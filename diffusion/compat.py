"""Signatures that users know: :func:`generate` of LLaDA's, and :func:`diffusion_generate` of Dream's.

The meaning of the first, with any model that maps ids to logits, is that of LLaDA's published sampler (Nie et al. 2025,
arXiv 2502.09992, appendix B): blocks from left to right, each step commits the positions of the highest confidence, and
at temperature 0 the tokens are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from circuits import RowGenerators
from circuits.arguments import is_number, kind_of, shape_of
from diffusion.decoding.config import DecodingConfig
from diffusion.decoding.controls import Control, TopK, TopP
from diffusion.decoding.generation import Generation
from diffusion.decoding.generation import generate as generate_text
from diffusion.decoding.joint import JointHead
from diffusion.decoding.names import strategy_named
from diffusion.decoding.plans import Anywhere, DynamicWindows
from diffusion.decoding.proposers import drawn
from diffusion.denoisers.base import Denoiser, DenoiserSpec
from diffusion.errors import ArgumentError
from diffusion.prediction import Prediction

__all__ = ["diffusion_generate", "generate"]

Remasking = Literal["low_confidence", "random"]
LLADA_MASK, LLADA_EOS, LLADA_EOT = 126336, 126081, 126348


def generate(
    model: Callable[..., Any] | Denoiser,
    prompt: Tensor,
    attention_mask: Tensor | None = None,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: Remasking = "low_confidence",
    mask_id: int = LLADA_MASK,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    **ids: int,
) -> Tensor:
    """Continue prompts as LLaDA's own ``generate`` does; at temperature 0 the tokens are the same.

    A mask is never written: where the model's best token is the mask itself, the best of the others is taken, and LLaDA
    leaves a mask. Random numbers come from PyTorch's global generator, ``torch.manual_seed``; they are other ones than
    LLaDA's. Probabilities are those of float32, and of equal ones the leftmost goes first. ``gen_length`` and ``steps``
    need not be multiples of anything.

    Args:
        model: ``model(input_ids, attention_mask=...)`` returns an object with ``.logits``, (B, T, V), as Hugging Face's
            models do; or a :class:`~diffusion.denoisers.base.Denoiser`, whose own mask and forbidden ids hold.
        prompt: int64 (B, P).
        attention_mask: (B, P), 0 or False at padding; what stands there is handed to the model as it is.
        steps: model calls in all, at least one per block; with guidance each call has 2 B rows.
        gen_length: new tokens.
        block_length: positions of a block.
        temperature: 0 is greedy. Confidence is that of the logits without temperature.
        cfg_scale: unsupervised classifier-free guidance: ``u + (cfg_scale + 1) (c - u)``, with u the logits where the
            prompt is masked and c the others.
        remasking: ``low_confidence`` or ``random``.
        mask_id: the id of a masked position.
        logits_eos_inf: never write the end-of-text token.
        confidence_eos_eot_inf: commit end-of-text and end-of-turn tokens last. (LLaDA's code does this for both at
            temperature 0, above it for the end of turn only.)
        ids: ``eos_id`` and ``eot_id``, where they are not LLaDA's 126081 and 126348.

    Returns:
        int64 (B, P + gen_length).

    Raises:
        ArgumentError: an argument has a wrong type, shape or value, or the logits are broken.
    """
    if not isinstance(prompt, Tensor) or prompt.dim() != 2 or prompt.dtype != torch.int64:
        raise ArgumentError(f"prompt: expected int64 (B, P), got {kind_of(prompt)}")
    if remasking not in get_args(Remasking):
        raise ArgumentError(f"remasking: expected one of {', '.join(get_args(Remasking))}, got {remasking!r}")
    if not is_number(cfg_scale) or not 0 <= cfg_scale < torch.inf:
        raise ArgumentError(f"cfg_scale: expected a finite number >= 0, got {cfg_scale!r}")
    unknown = sorted(set(ids) - {"eos_id", "eot_id"})
    if unknown:
        raise ArgumentError(f"{unknown[0]}: no such option; expected eos_id or eot_id")
    if isinstance(model, Denoiser):
        mask_id = _mask_of(model.spec, mask_id)
    prompt = prompt.to(getattr(model, "device", prompt.device))
    adapter = _Adapter(model, prompt, attention_mask, mask_id, float(cfg_scale), gen_length)
    if bool((prompt == mask_id).any()):
        raise ArgumentError("prompt: expected no mask tokens, got some; df.infill fills holes")
    ends = {"eos_id": ids.get("eos_id", LLADA_EOS), "eot_id": ids.get("eot_id", LLADA_EOT)}
    if logits_eos_inf:
        adapter.never = (_checked_id("eos_id", ends["eos_id"], adapter.mask),)
    head = None
    if confidence_eos_eot_inf:
        last = tuple(_checked_id(name, id, adapter.mask) for name, id in ends.items())
        head = _EndsLast(adapter.spec.vocab_size, block_length, last)
    out = generate_text(
        adapter,
        prompt,
        gen_length=gen_length,
        block_length=block_length,
        num_steps=steps,
        head=head,
        config=DecodingConfig(temperature=temperature, strategy=remasking),
        valid=None if attention_mask is None else attention_mask.to(prompt.device),
        generator=torch.Generator().manual_seed(int(torch.randint(2**62, ()))),
        stop_at_eos=False,
    )
    return torch.cat([prompt, out.generated], 1)


def diffusion_generate(
    model: Denoiser,
    inputs: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    steps: int = 512,
    temperature: float = 0.0,
    alg: str = "origin",
    head: JointHead | None = None,
    **options: Any,
) -> Generation:
    """Continue prompts as Dream's method of this name does: over the whole text at once (Ye et al. 2025).

    Every step commits its equal share of the tokens; Dream follows a schedule of times, and with ``alg="origin"`` the
    number is random there. Random numbers come from PyTorch's global generator, ``torch.manual_seed``.

    Args:
        model: of :func:`~diffusion.denoisers.pretrained.load_denoiser`.
        inputs: int64 (B, P).
        attention_mask: (B, P), 0 or False at padding.
        max_new_tokens: tokens to generate.
        steps: model calls in all.
        temperature: 0 is greedy.
        alg: ``origin``, ``maskgit_plus``, ``topk_margin``, ``entropy``, or a strategy of this library's.
        head: a circuit, in windows over what is decoded next; Dream has none.
        options: ``top_p``, ``top_k``; ``alg_temp`` of 0 or None alone; ``output_history``, for ``.trajectory``; and
            ``return_dict_in_generate``, which changes nothing: the result has ``.sequences``.

    Raises:
        ArgumentError: an argument has a wrong type, shape or value, or is not known.
    """
    top_p, top_k, alg_temp = (options.pop(name, None) for name in ("top_p", "top_k", "alg_temp"))
    record = bool(options.pop("output_history", False))
    options.pop("return_dict_in_generate", None)
    if options:
        raise ArgumentError(f"{min(options)}: no such option; expected top_p, top_k, alg_temp or output_history")
    if alg_temp:
        raise ArgumentError(f"alg_temp: expected 0 or None, got {alg_temp!r}; alg='origin' chooses positions at random")
    controls: list[Control] = [] if top_k is None else [TopK(top_k)]
    controls += [] if top_p is None else [TopP(top_p)]
    return generate_text(
        model,
        inputs,
        gen_length=max_new_tokens,
        plan=Anywhere(steps) if head is None else DynamicWindows(steps),
        head=head,
        config=DecodingConfig(temperature=temperature, strategy=strategy_named(alg)),  # type: ignore[arg-type]
        valid=None if attention_mask is None else attention_mask.bool(),
        controls=controls,
        record=record,
        generator=torch.Generator().manual_seed(int(torch.randint(2**62, ()))),
    )


class _Adapter:
    """A model as a denoiser over its own ids and one more, which stands for the mask on the canvas.

    So the model's mask keeps its share of the probability, as in LLaDA's confidence, while it is not written.

    Attributes:
        mask: the id of the mask on the canvas: the number of ids that the model has.
        never: ids of the model that are not written.
    """

    def __init__(
        self,
        model: Any,
        prompt: Tensor,  # shape: (B, P)
        attention_mask: Tensor | None,  # shape: (B, P)
        mask_id: int,
        cfg_scale: float,
        gen_length: int,
    ) -> None:
        self._model, self._prompt, self._mask_id, self._cfg_scale = model, prompt, mask_id, cfg_scale
        self._attention = None
        if attention_mask is not None:
            attention = attention_mask.to(prompt.device)
            self._attention = torch.cat([attention, attention.new_ones(len(prompt), gen_length)], 1)
        self.never: tuple[int, ...] = ()
        described = getattr(getattr(model, "config", None), "vocab_size", None)
        if isinstance(described, int):  # before the model looks up an id that it does not have
            _checked_id("mask_id", mask_id, described)
        blank = torch.cat([prompt, prompt.new_full((len(prompt), gen_length), mask_id)], 1)
        self._first: tuple[Tensor, Tensor] | None = (blank, self._answer(blank))  # asked once to learn how many ids
        self.mask = self._first[1].shape[-1]
        _checked_id("mask_id", mask_id, self.mask)

    @property
    def spec(self) -> DenoiserSpec:
        """The facts: nothing ends a text, and nothing is padding but what ``attention_mask`` says."""
        own = self._model.spec.forbidden_ids if isinstance(self._model, Denoiser) else ()
        return DenoiserSpec(
            vocab_size=self.mask + 1,
            mask_id=self.mask,
            eos_ids=(),
            pad_id=self.mask,
            forbidden_ids=(*own, self.mask),
            max_length=1 << 62,
        )

    @property
    def device(self) -> torch.device:
        """Where the prompts are."""
        return self._prompt.device

    def logits(
        self,
        tokens: Tensor,  # shape: (B, T)
        *,
        valid: Tensor | None = None,
        t: Tensor | None = None,
        window: tuple[int, int] | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Return the model's logits, float32 (B, n, V + 1), with guidance; what must not be written is at -inf."""
        tokens = torch.cat([self._prompt, tokens[:, self._prompt.shape[1] :]], 1)
        tokens = tokens.masked_fill(tokens == self.mask, self._mask_id)
        first, self._first = self._first, None
        answer = first[1] if first is not None and torch.equal(first[0], tokens) else self._answer(tokens)
        logits = answer[:, slice(*(window or (0, tokens.shape[1])))].float()
        logits = torch.cat([logits, torch.full_like(logits[..., :1], -torch.inf)], -1)
        logits[..., list(self.never)] = -torch.inf
        of_mask = logits[..., self._mask_id].clone()
        logits[..., self._mask_id] = -torch.inf
        best = logits.amax(-1)  # the mask keeps its share of the probability where it cannot be chosen
        logits[..., self._mask_id] = of_mask.masked_fill(of_mask >= best, -torch.inf)
        return logits

    def _answer(self, tokens: Tensor) -> Tensor:
        if self._cfg_scale == 0:
            return self._ask(tokens, self._attention)
        without = torch.cat([torch.full_like(self._prompt, self._mask_id), tokens[:, self._prompt.shape[1] :]], 1)
        attention = None if self._attention is None else torch.cat([self._attention, self._attention])
        conditional, unconditional = self._ask(torch.cat([tokens, without]), attention).chunk(2)
        return unconditional + (self._cfg_scale + 1) * (conditional - unconditional)

    def _ask(self, tokens: Tensor, attention: Tensor | None) -> Tensor:
        if isinstance(self._model, Denoiser):
            return self._model.logits(tokens, valid=None if attention is None else attention.bool())
        logits = self._model(tokens, attention_mask=attention).logits
        if not isinstance(logits, Tensor) or logits.shape[:2] != tokens.shape or logits.dim() != 3:
            raise ArgumentError(f"model: expected logits {(*tokens.shape, 'V')}, got {shape_of(logits)}")
        return logits


@dataclass(frozen=True, eq=False)
class _EndsLast:
    """An output layer without dependence whose end-of-text tokens count as the least certain ones."""

    vocab_size: int
    block_length: int
    ends: tuple[int, ...]
    activation_threshold: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    needs_features: bool = False
    modes: frozenset[str] = frozenset({"joint"})

    def distribution(
        self, prediction: Prediction, tokens: Tensor, masked: Tensor, *, absent: Tensor | None = None
    ) -> _Judged:
        """Return the prediction itself, and beside it what confidence is read from."""
        ends = torch.tensor(self.ends, device=tokens.device)
        log_q = prediction.log_q.index_fill(-1, ends, -torch.inf)
        return _Judged(prediction, masked, replace(prediction, log_q=log_q).normalised())


@dataclass(frozen=True, eq=False)
class _Judged:
    """Independent tokens that are judged by other beliefs than those that they are drawn from."""

    prediction: Prediction
    masked: Tensor
    beliefs: Prediction

    def draw(self, temperature: float, generator: RowGenerators) -> Tensor:
        return drawn(self.prediction, temperature, generator)

    def posterior(self) -> Prediction:
        return self.beliefs

    def given(self, tokens: Tensor, observed: Tensor) -> _Judged:
        return replace(self, masked=self.masked & ~observed)


def _mask_of(spec: DenoiserSpec, mask_id: int) -> int:
    if mask_id not in (LLADA_MASK, spec.mask_id):
        raise ArgumentError(f"mask_id: expected the denoiser's own, {spec.mask_id}, or none, got {mask_id}")
    return spec.mask_id


def _checked_id(name: str, id: int, num_ids: int) -> int:
    if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < num_ids:
        raise ArgumentError(f"{name}: expected an id from 0 to {num_ids - 1}, got {id!r}; give this model's {name}")
    return id
