"""A denoiser, with a circuit or without, as a model of lm-evaluation-harness (the package ``lm_eval``, extra [eval]).

    lm_eval.simple_evaluate(model=DiffusionLM(denoiser, tokenizer, head=head), tasks=["gsm8k"])

The module is imported by name, and not by ``diffusion``: it needs the package.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from circuits.arguments import checked_count
from circuits.digests import digest
from circuits.progress import progress_bar
from diffusion.decoding.config import DecodingConfig
from diffusion.decoding.controls import Control, RepetitionPenalty, StopStrings, TopK, TopP, before_stop
from diffusion.decoding.generation import Step, generate
from diffusion.decoding.joint import JointHead
from diffusion.denoisers.base import Denoiser
from diffusion.errors import ArgumentError
from diffusion.evaluation.likelihood import Method, log_likelihood
from diffusion.evaluation.tasks.task import chat_text

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
else:
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ArgumentError("lm_eval: expected the package to be installed; pip install 'unfactor[eval]'") from error

DEFAULT_LENGTH = 256
"""Tokens to generate where neither a task nor the options say."""

_LOG = logging.getLogger(__name__)
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_OF_LAW = "entropy"


@dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    """How a model answers the harness.

    Attributes:
        config: options of decoding that differ from the defaults, by name, see
            :class:`~diffusion.decoding.config.DecodingConfig`; they go before what a task asks for.
        gen_length: tokens to generate at most; None: what a task asks for, else 256.
        block_length: positions of a block; None: the circuit's, or all.
        num_steps: denoiser calls for an answer of ``gen_length``; None: one per token. Of a continuation that is only
            scored, calls in proportion.
        likelihood: what ``loglikelihood`` is, see :func:`~diffusion.evaluation.likelihood.log_likelihood`: ``elbo``,
            ``decoder`` or ``sequential``.
        num_samples: noise levels of ``elbo`` per block.
        is_greedy: whether to find out too if greedy decoding would write a continuation, which some tasks count; it
            takes more calls. If not, the harness is told that it would not.
        batch_size: texts at a time; it changes no result.
        seed: of all draws.
        progress: draw progress bars.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    gen_length: int | None = None
    block_length: int | None = None
    num_steps: int | None = None
    likelihood: Method = "elbo"
    num_samples: int = 32
    is_greedy: bool = True
    batch_size: int = 1
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        DecodingConfig().changed(**self.config)
        for name in ("gen_length", "block_length", "num_steps", "num_samples", "batch_size"):
            if getattr(self, name) is not None:
                checked_count(name, getattr(self, name))
        if self.likelihood not in ("decoder", "elbo", "sequential"):
            raise ArgumentError(f"likelihood: expected decoder, elbo or sequential, got {self.likelihood!r}")


@dataclass(frozen=True)
class _Ask:
    """One thing that the harness asks: where it stands in its list, tokens, and a seed that is its own."""

    index: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    seed: int


class DiffusionLM(LM):
    """A model of the harness.

    Args:
        denoiser: the masked-token predictor.
        tokenizer: of it, with ``encode`` and ``decode``; for conversations with ``apply_chat_template``.
        head: the circuit; None: the denoiser alone.
        options: how to answer; None: the defaults.
        name: of the model, in the harness's results.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        tokenizer: Any,
        *,
        head: JointHead | None = None,
        options: HarnessOptions | None = None,
        name: str = "unfactor",
    ) -> None:
        super().__init__()
        self.denoiser, self.tokenizer, self.head = denoiser, tokenizer, head
        self.options = options or HarnessOptions()
        self.name = name
        self._has_special = False  # in the texts that the harness hands over

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness keeps what it made with the tokenizer's form for conversations."""
        return self.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return a name for the tokenizer's form for conversations, for the harness's records; None: it is not used."""
        if not chat_template:
            return None
        self._has_special = True
        return f"{self.tokenizer_name}: chat template"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text, in the tokenizer's form; from then on names of special tokens are these.

        Raises ArgumentError if the tokenizer has no such form, or an answer is to be continued that is begun already.
        """
        if not add_generation_prompt:
            raise ArgumentError(
                "apply_chat_template: expected tasks that leave the whole answer to the model, got one that begins it; "
                "leave the option out"
            )
        self._has_special = True
        return chat_text(self.tokenizer, chat_history)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what is written after each context, up to the strings at which it is to stop."""
        contexts = [cast("tuple[str, dict[str, Any]]", request.args) for request in requests]
        asked = [_Asked.of(kwargs, self.options) for _, kwargs in contexts]
        keys = [(context, repr(one)) for (context, _), one in zip(contexts, asked, strict=True)]
        seeds = _seeds(self.options.seed, keys, repeated=True)
        asks = [
            _Ask(index, self._prompt(context, asked[index].gen_length), (), seeds[index])
            for index, (context, _) in enumerate(contexts)
        ]
        texts = [""] * len(requests)
        for batch in self._batches("generate_until", asks, lambda ask: asked[ask.index], disable_tqdm):
            how = asked[batch[0].index]
            stop = [StopStrings(how.until, self.tokenizer)] if how.until else []
            out = generate(
                self.denoiser,
                self._rows(batch, "prompt"),
                gen_length=how.gen_length,
                block_length=self._block_length(how.gen_length),
                num_steps=self.options.num_steps,
                head=self.head,
                config=how.config,
                controls=[*how.controls, *stop],
                seeds=[ask.seed for ask in batch],
            )
            valid = out.valid[:, out.prompt_length :]
            for ask, row, kept in zip(batch, out.generated, valid, strict=True):
                text = before_stop(self.tokenizer.decode(row[kept].tolist()), how.until)
                texts[ask.index] = text
                self.cache_hook.add_partial("generate_until", requests[ask.index].args, text)
        return texts

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation after its context, and whether greedy decoding writes it."""
        pairs = [cast("tuple[str, str]", request.args) for request in requests]
        seeds = _seeds(self.options.seed, pairs)
        asks = [
            _Ask(index, *self._parted(*pair), seed) for index, (pair, seed) in enumerate(zip(pairs, seeds, strict=True))
        ]
        found = dict.fromkeys(range(len(requests)), (0.0, True))
        for batch in self._batches("loglikelihood", asks, lambda ask: len(ask.answer), disable_tqdm):
            if not batch[0].answer:
                continue
            log_probs = self._log_probs(batch)
            greedy = self._are_greedy(batch) if self.options.is_greedy else [False] * len(batch)
            for ask, log_prob, is_greedy in zip(batch, log_probs, greedy, strict=True):
                found[ask.index] = (log_prob, is_greedy)
                self.cache_hook.add_partial("loglikelihood", requests[ask.index].args, found[ask.index])
        return [found[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, with nothing before it.

        Of a text that is longer than the denoiser, as many tokens as it has positions come first, and then half as many
        at a time, each with as many tokens before them.
        """
        texts = [str(request.args[0]) for request in requests]
        seeds = _seeds(self.options.seed, texts)
        asks = [
            _Ask(index, prompt, answer, seeds[index] ^ number)
            for index, text in enumerate(texts)
            for number, (prompt, answer) in enumerate(_windows(self._encode(text), self.denoiser.spec.max_length))
        ]
        totals = [0.0] * len(requests)
        for batch in self._batches("loglikelihood_rolling", asks, lambda ask: len(ask.answer), disable_tqdm):
            for ask, log_prob in zip(batch, self._log_probs(batch), strict=True):
                totals[ask.index] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _log_probs(self, batch: Sequence[_Ask]) -> list[float]:
        """Return log-probabilities of answers of one length."""
        given, method = self.options, self.options.likelihood
        length, options = len(batch[0].answer), dict[str, Any]()
        if method == "elbo":
            options = {"num_samples": given.num_samples}
        elif method == "decoder":
            config = {"strategy": _OF_LAW, **given.config, "temperature": given.config.get("temperature", 1.0)}
            options = {"config": DecodingConfig().changed(**config), "num_steps": self._steps_for(length)}
        found = log_likelihood(
            self.denoiser,
            self._rows(batch, "prompt"),
            self._rows(batch, "answer"),
            head=self.head,
            method=method,
            block_length=self._block_length(length),
            seeds=[ask.seed for ask in batch],
            **options,
        )
        return [float(value) for value in found]

    def _are_greedy(self, batch: Sequence[_Ask]) -> list[bool]:
        """Return which answers of one length greedy decoding writes; it ends once it has written another everywhere."""
        answers = torch.tensor([ask.answer for ask in batch])
        config = DecodingConfig().changed(**{**self.options.config, "temperature": 0.0})
        differs = torch.zeros(len(batch), dtype=torch.bool)

        def compare(step: Step) -> None:
            written = step.tokens[:, -answers.shape[1] :].cpu(), ~step.masked[:, -answers.shape[1] :].cpu()
            differs.copy_(((written[0] != answers) & written[1]).any(1))
            if bool(differs.all()) and not config.remask:
                raise _Settled

        try:
            out = generate(
                self.denoiser,
                self._rows(batch, "prompt"),
                gen_length=answers.shape[1],
                block_length=self._block_length(answers.shape[1]),
                num_steps=self._steps_for(answers.shape[1]),
                head=self.head,
                config=config,
                stop_at_eos=False,
                seeds=[ask.seed for ask in batch],
                on_step=compare,
            )
        except _Settled:
            return [False] * len(batch)
        return [bool(same) for same in (out.generated.cpu() == answers).all(1)]

    def _steps_for(self, length: int) -> int | None:
        """Return the calls for an answer that is shorter than what is generated: in proportion."""
        if self.options.num_steps is None:
            return None
        whole = self.options.gen_length or DEFAULT_LENGTH
        blocks = -(-length // self._block_length(length))
        return max(blocks, -(-length * self.options.num_steps // whole))

    def _block_length(self, length: int) -> int:
        if self.options.block_length is not None:
            return self.options.block_length
        return length if self.head is None else min(length, self.head.block_length)

    def _prompt(self, context: str, gen_length: int) -> tuple[int, ...]:
        return self._cut(self._encode(context), self.denoiser.spec.max_length - gen_length)

    def _parted(self, context: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the tokens of both, as those of the whole text: spaces between them belong to the continuation."""
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        before, whole = self._encode(kept), self._encode(kept + continuation)
        if whole[: len(before)] != before:  # a token reaches over the border
            whole = before + self._encode(continuation)
        answer = whole[len(before) :]
        return self._cut(before, self.denoiser.spec.max_length - len(answer)), tuple(answer)

    def _cut(self, tokens: list[int], room: int) -> tuple[int, ...]:
        """Return the end of a context that is too long; raises ArgumentError if there is no room at all."""
        if room < 0:
            raise ArgumentError(
                f"gen_length: expected at most the denoiser's {self.denoiser.spec.max_length} positions, got "
                f"{self.denoiser.spec.max_length - room}; ask for a shorter answer"
            )
        if len(tokens) > room:
            _LOG.warning("a context of %d tokens has lost all but its last %d", len(tokens), room)
        return tuple(tokens[max(0, len(tokens) - room) :])

    def _encode(self, text: str) -> list[int]:
        if not text:
            return []
        return list(self.tokenizer.encode(text, special=True) if self._has_special else self.tokenizer.encode(text))

    def _rows(self, batch: Sequence[_Ask], name: str) -> list[Tensor]:
        device = getattr(self.denoiser, "device", torch.device("cpu"))
        return [torch.tensor(getattr(ask, name), dtype=torch.int64, device=device) for ask in batch]

    def _batches(
        self, title: str, asks: Sequence[_Ask], kind: Callable[[_Ask], Hashable], is_quiet: bool
    ) -> Iterator[list[_Ask]]:
        """Yield what is asked in batches of one kind each, long prompts first, so that too little memory shows soon."""
        kinds: dict[Hashable, list[_Ask]] = defaultdict(list)
        for ask in sorted(asks, key=lambda ask: -len(ask.prompt)):
            kinds[kind(ask)].append(ask)
        size = self.options.batch_size
        with progress_bar(title, len(asks), enabled=self.options.progress and not is_quiet) as advance:
            for group in kinds.values():
                for start in range(0, len(group), size):
                    yield group[start : start + size]
                    advance(len(group[start : start + size]))


class _Settled(Exception):
    """No row can become the answer any more."""


@dataclass(frozen=True)
class _Asked:
    """How a text is to be written: what the options leave open, as the task asks for it."""

    gen_length: int
    until: tuple[str, ...]
    config: DecodingConfig
    controls: tuple[Control, ...]

    @classmethod
    def of(cls, kwargs: Mapping[str, Any], options: HarnessOptions) -> _Asked:
        left = dict(kwargs)
        until = left.pop("until", None) or ()
        lengths = [left.pop(name) for name in _LENGTHS if left.get(name) is not None]
        do_sample, temperature = left.pop("do_sample", None), left.pop("temperature", None)
        if do_sample is False:
            temperature = 0.0
        makers: dict[str, Callable[[Any], Control]] = {
            "top_k": TopK, "top_p": TopP, "repetition_penalty": RepetitionPenalty
        }  # fmt: skip
        controls = tuple(make(left.pop(name)) for name, make in makers.items() if left.get(name) is not None)
        unknown = sorted(name for name, value in left.items() if value is not None)
        if unknown:
            raise ArgumentError(
                f"gen_kwargs: expected until, {_LENGTHS[0]}, do_sample, temperature, {', '.join(makers)}, got "
                f"{unknown[0]!r}; options of decoding belong to --model_args"
            )
        config = DecodingConfig().changed(**({} if temperature is None else {"temperature": float(temperature)}))
        return cls(
            gen_length=options.gen_length or checked_count(_LENGTHS[0], lengths[0] if lengths else DEFAULT_LENGTH),
            until=tuple(one for one in ([until] if isinstance(until, str) else until) if one),
            config=config.changed(**options.config),
            controls=controls,
        )


def _windows(tokens: list[int], longest: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (before, tokens) so that every token comes once, and at most ``longest`` together."""
    if tokens:
        yield (), tuple(tokens[:longest])
    half = max(1, longest // 2)
    for start in range(longest, len(tokens), half):
        answer = tokens[start : start + half]
        yield tuple(tokens[max(0, start + len(answer) - longest) : start]), tuple(answer)


def _seeds(seed: int, asked: Sequence[Any], *, repeated: bool = False) -> list[int]:
    """Return a seed for everything that is asked, by what it is: the order and the mates make no difference.

    With ``repeated``, what is asked again has another seed than the first time.
    """
    seen: Counter[str] = Counter()
    seeds = []
    for one in asked:
        key = digest(str(seed), *((one,) if isinstance(one, str) else one))
        seeds.append(int(digest(key, str(seen[key]))[:15], 16))
        seen[key] += repeated
    return seeds


__all__ = ["DEFAULT_LENGTH", "DiffusionLM", "HarnessOptions"]
