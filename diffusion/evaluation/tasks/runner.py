"""A task put to a denoiser, without the circuit and with it, in several ways of decoding."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from circuits.arguments import checked_count
from circuits.digests import digest, named_digest
from circuits.progress import progress_bar
from diffusion.decoding.config import DecodeMode, DecodingConfig, Strategy
from diffusion.decoding.controls import Control, StopStrings, before_stop
from diffusion.decoding.generation import Generation, generate
from diffusion.decoding.joint import JointHead
from diffusion.decoding.plans import DynamicWindows
from diffusion.denoisers.base import Denoiser
from diffusion.errors import ArgumentError
from diffusion.evaluation.tasks.samples import Sample, SampleFile
from diffusion.evaluation.tasks.table import Setting, TaskPoint, TaskTable
from diffusion.evaluation.tasks.task import Example, Task, encoded


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Ways of decoding that are compared, each without the circuit and with it.

    Attributes:
        num_steps: denoiser calls in all, by each of the strategies.
        tokens_per_step: beside them, the same in tokens a call. With all counts, thresholds and bounds empty: 1, 2, 4.
        strategies: which positions a step commits, where the number of steps is given; () is the default one.
        thresholds: of the strategy ``threshold``, which decides itself how many calls it takes.
        entropy_bounds: of ``entropy_bound``, in nats, which does so too.
        joint_entropy_bounds: of ``joint_entropy``, in nats: with the circuit only.
        decode: how the circuit is used.
        temperature: tau; None: the head's if that is tuned, else 0.
        activation_threshold: the share of masks below which the circuit is used; None: the head's.
        reverse_activation: whether it is used above it.
        gen_length: tokens to generate at most; None: the task's.
        block_length: positions of a block; None: the circuit's, or all.
        dynamic_windows: whether the whole text is decoded at once, in windows of ``block_length`` at most.
    """

    num_steps: tuple[int, ...] = ()
    tokens_per_step: tuple[int, ...] = ()
    strategies: tuple[Strategy, ...] = ()
    thresholds: tuple[float, ...] = ()
    entropy_bounds: tuple[float, ...] = ()
    joint_entropy_bounds: tuple[float, ...] = ()
    decode: DecodeMode = "joint"
    temperature: float | None = None
    activation_threshold: float | None = None
    reverse_activation: bool = False
    gen_length: int | None = None
    block_length: int | None = None
    dynamic_windows: bool = False

    def settings(self, task: Task, head: JointHead | None) -> tuple[Setting, ...]:
        """Return the ways of decoding a task, those without the circuit first; raises ArgumentError for wrong ones."""
        gen_length = checked_count("gen_length", self.gen_length or task.gen_length)
        block_length = self.block_length or (gen_length if head is None else min(gen_length, head.block_length))
        checked_count("block_length", block_length)
        tuned = float(getattr(head, "temperature", 1.0))
        temperature = (0.0 if tuned == 1 else tuned) if self.temperature is None else self.temperature
        made = []
        for used in (False, True) if head is not None else (False,):
            base = DecodingConfig(decode=self.decode if used else "independent", temperature=temperature)
            if used:
                base = base.changed(
                    activation_threshold=self.activation_threshold, reverse_activation=self.reverse_activation
                )
            for steps, changes in self._ways(used, gen_length, block_length):
                config = base.changed(**changes)
                made.append(
                    Setting(
                        config=replace(config, strategy=config.chosen_strategy),
                        gen_length=gen_length,
                        block_length=block_length,
                        num_steps=steps,
                        with_circuit=used,
                        dynamic_windows=self.dynamic_windows,
                    )
                )
        return tuple(made)

    def _ways(self, used: bool, gen_length: int, block_length: int) -> list[tuple[int | None, dict[str, Any]]]:
        shares = self.tokens_per_step
        if not (self.num_steps or shares or self.thresholds or self.entropy_bounds or self.joint_entropy_bounds):
            shares = (1, 2, 4)
        least = -(-gen_length // block_length)
        counts = [checked_count("num_steps", count) for count in self.num_steps]
        counts += [max(least, -(-gen_length // checked_count("tokens_per_step", share))) for share in shares]
        ways: list[tuple[int | None, dict[str, Any]]] = [
            (count, {} if strategy is None else {"strategy": strategy})
            for strategy in self.strategies or (None,)
            for count in dict.fromkeys(counts)
        ]
        ways += [(None, {"strategy": "threshold", "threshold": value}) for value in self.thresholds]
        ways += [(None, {"strategy": "entropy_bound", "entropy_bound": value}) for value in self.entropy_bounds]
        bounds = self.joint_entropy_bounds if used else ()
        return ways + [(None, {"strategy": "joint_entropy", "entropy_bound": value}) for value in bounds]


def evaluate_task(
    denoiser: Denoiser,
    tokenizer: Any,
    task: Task,
    grid: Grid | None = None,
    *,
    head: JointHead | None = None,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    options: Options | None = None,
) -> TaskTable:
    """Answer all questions of a task in every way of a grid, and judge the answers.

    Args:
        denoiser: the masked-token predictor.
        tokenizer: with ``encode`` and ``decode``; of the denoiser.
        task: the questions.
        grid: the ways of decoding; None: :class:`Grid` with its defaults.
        head: the circuit; None: only without it.
        folder: where answers are kept, see :func:`answer_task`; None: nowhere.
        seed: of all draws.
        options: what else there is to say; None: the defaults.

    Raises:
        ArgumentError: an argument does not fit, or a question is too long for the denoiser.
        CheckpointError: answers in the folder are damaged, or written by another process just now.
    """
    answers = answer_task(denoiser, tokenizer, task, grid, head=head, folder=folder, seed=seed, options=options)
    points = tuple(TaskPoint.of(setting, samples) for setting, samples in answers.items())
    return TaskTable(task.name, points, len(task.shots), seed)


def answer_task(
    denoiser: Denoiser,
    tokenizer: Any,
    task: Task,
    grid: Grid | None = None,
    *,
    head: JointHead | None = None,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    options: Options | None = None,
) -> dict[Setting, list[Sample]]:
    """Return the answers to all questions of a task, in their order, by the way of decoding.

    A text depends on its question, its setting and the seed, neither on the batch nor on the other questions. Where a
    folder is named, every answer is kept in it, and a second call with the same model, task and settings answers only
    what is not there yet: see :class:`~diffusion.evaluation.tasks.samples.SampleFile`. Arguments are those of
    :func:`evaluate_task`.
    """
    options = options or Options()
    checked_count("batch_size", options.batch_size)
    if not task.examples:
        raise ArgumentError("task: expected at least one question, got none")
    settings = (grid or Grid()).settings(task, head)
    prompts = _prompts(denoiser, tokenizer, task, max(setting.gen_length for setting in settings), options.chat)
    stop = () if options.chat else task.stop
    controls = (*options.controls, *([StopStrings(stop, tokenizer)] if stop else []))
    run = _Run(denoiser, tokenizer, task, prompts, head, controls, stop, options.batch_size, seed)
    described = None
    if folder is not None:
        described = {
            "model": options.identity or model_digest("denoiser", denoiser),
            "head": None if head is None else model_digest("head", head),
            "task": {"name": task.name, "version": task.version, "stop": list(stop), "chat": options.chat},
            "controls": [repr(control) for control in controls],
            "seed": seed,
        }
    answers: dict[Setting, list[Sample]] = {}
    way_on = None if folder is None else f"the same call goes on from the answers in {folder}"
    with progress_bar(task.name, len(settings) * len(prompts), enabled=options.progress, way_on=way_on) as advance:
        for setting in settings:
            made_with = None
            if described is not None:
                used = described["head"] if setting.with_circuit else None
                made_with = {**described, "head": used, "setting": asdict(setting)}
            answers[setting] = run.samples(setting, folder, made_with, advance)
    return answers


@dataclass(frozen=True, kw_only=True)
class Options:
    """What else there is to say about an evaluation.

    Attributes:
        batch_size: questions at a time; it changes no result.
        chat: whether questions are put as conversations, in the tokenizer's form.
        controls: what steers decoding beside the model, see :mod:`diffusion.decoding.controls`.
        identity: a text that tells the denoiser from others; None: a hash of its weights.
        progress: draw a progress bar.
    """

    batch_size: int = 8
    chat: bool = False
    controls: tuple[Control, ...] = ()
    identity: str | None = None
    progress: bool = False


def model_digest(name: str, model: Any) -> str:
    """Return a hash of a model's weights and settings, to tell it from others.

    Args:
        name: the argument's, for the message.
        model: a ``torch.nn.Module``, or an object that holds some.

    Raises:
        ArgumentError: it holds none.
    """
    held = {"": model} if isinstance(model, nn.Module) else vars(model) if hasattr(model, "__dict__") else {}
    parts = {key: one for key, one in held.items() if isinstance(one, nn.Module)}
    if not parts:
        raise ArgumentError(
            f"identity: expected a text that tells the {name} from others, got None, and {type(model).__name__} holds "
            "no weights to take a hash of; name one, or keep no answers"
        )
    tensors = {f"{key}.{of}": tensor for key, part in parts.items() for of, tensor in part.state_dict().items()}
    names = ("spec", "activation_threshold", "temperature", "normalization", "top_k")
    settings = {key: repr(getattr(model, key)) for key in names if hasattr(model, key)}
    return digest(type(model).__name__, named_digest(tensors), named_digest(settings))


@dataclass(frozen=True)
class _Run:
    denoiser: Denoiser
    tokenizer: Any
    task: Task
    prompts: list[list[int]]
    head: JointHead | None
    controls: tuple[Control, ...]
    stop: tuple[str, ...]
    batch_size: int
    seed: int

    def samples(
        self, setting: Setting, folder: Any, made_with: dict[str, Any] | None, advance: Callable[..., None]
    ) -> list[Sample]:
        """Return a sample of every question, those that are kept as they are."""
        if made_with is None:
            return self._missing(setting, {}, advance, lambda samples: None)
        with SampleFile.opened(folder, made_with) as file:
            return self._missing(setting, file.read(), advance, file.append)

    def _missing(
        self,
        setting: Setting,
        found: dict[int, Sample],
        advance: Callable[..., None],
        keep: Callable[[Sequence[Sample]], None],
    ) -> list[Sample]:
        hashes = [_example_digest(example, ids) for example, ids in zip(self.task.examples, self.prompts, strict=True)]
        kept = {index: one for index, one in found.items() if index < len(hashes) and one.example == hashes[index]}
        missing = [index for index in range(len(hashes)) if index not in kept]
        for _ in kept:
            advance()
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            samples = self._answered(setting, batch, [hashes[index] for index in batch])
            keep(samples)
            kept |= {sample.index: sample for sample in samples}
            for _ in samples:
                advance()
        return [kept[index] for index in range(len(hashes))]

    def _answered(self, setting: Setting, batch: list[int], hashes: list[str]) -> list[Sample]:
        device = getattr(self.denoiser, "device", torch.device("cpu"))
        begin = time.perf_counter()
        out = generate(
            self.denoiser,
            [torch.tensor(self.prompts[index], dtype=torch.int64, device=device) for index in batch],
            gen_length=setting.gen_length,
            **_order(setting),
            head=self.head if setting.with_circuit else None,
            config=setting.config,
            controls=self.controls,
            seeds=[_seed(self.seed, index) for index in batch],
        )
        seconds = (time.perf_counter() - begin) / len(batch)
        rows = zip(batch, hashes, _rows(out), strict=True)
        return [self._judged(index, example, row, seconds) for index, example, row in rows]

    def _judged(self, index: int, example: str, row: tuple[list[int], int, int, int], seconds: float) -> Sample:
        ids, num_calls, num_windows, num_coupled = row
        text = before_stop(self.tokenizer.decode(ids), self.stop)
        answer, is_right = self.task.judged(text, self.task.examples[index])
        return Sample(index, example, text, answer, is_right, len(ids), num_calls, num_windows, num_coupled, seconds)


def _order(setting: Setting) -> dict[str, Any]:
    """Return the order in which a text is decoded, as arguments of ``generate``."""
    if setting.dynamic_windows:
        return {"plan": DynamicWindows(setting.num_steps, setting.block_length)}
    return {"block_length": setting.block_length, "num_steps": setting.num_steps}


def _rows(out: Generation) -> list[tuple[list[int], int, int, int]]:
    """Return the tokens that were committed in each row, and its calls, windows and windows with the circuit."""
    valid = out.valid[:, out.prompt_length :]
    tokens = [row[keep].tolist() for row, keep in zip(out.generated, valid, strict=True)]
    counts = (part.tolist() for part in (out.row_calls, out.num_windows, out.num_coupled))
    return list(zip(tokens, *counts, strict=True))


def _prompts(denoiser: Denoiser, tokenizer: Any, task: Task, gen_length: int, chat: bool) -> list[list[int]]:
    prompts = [encoded(task, example, tokenizer, chat=chat) for example in task.examples]
    longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
    room = denoiser.spec.max_length - gen_length
    if len(prompts[longest]) > room:
        raise ArgumentError(
            f"gen_length: question {longest} has {len(prompts[longest])} tokens, and with {gen_length} new ones that "
            f"is more than the denoiser's {denoiser.spec.max_length} positions; ask for shorter answers, or with "
            "fewer shots"
        )
    return prompts


def _example_digest(example: Example, ids: list[int]) -> str:
    return digest(*example.answers, *example.tests, example.setup, torch.tensor(ids, dtype=torch.int64))[:16]


def _seed(seed: int, index: int) -> int:
    return int(torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(seed * 1_000_003 + index)))
