"""The options of `unfactor evaluate` that are about tasks with right answers, and about texts judged from outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import typer

from diffusion.app.option_groups import GREATEST_SEED, OptionGroup, count, flag, optional
from diffusion.app.options import DecodingOptions
from diffusion.decoding.names import flags
from diffusion.errors import ArgumentError

_T = TypeVar("_T")
_SHARED = ("activation_threshold", "reverse_activation", "dynamic_windows")
RESULTS = Path("unfactor-results")
"""Where results of a model by name go, unless told otherwise."""


class TaskOptions(OptionGroup):
    """A task, and the ways of decoding that it compares; and a judge of texts."""

    OPTIONS: ClassVar[Mapping[str, Any]] = {
        "task": optional(
            str, "'gsm8k', 'math500', 'mbpp', or a .jsonl file (also .gz) with keys prompt and answer.", "--task"
        ),
        "data": optional(
            Path, "A .jsonl file (also .gz) with the questions of a named task; without it they are downloaded."
        ),
        "limit": count("Only so many questions, from the first on."),
        "shots": Annotated[
            int, typer.Option("--shots", *flags("shots"), min=0, help="Worked examples before every question.")
        ],
        "shots_data": optional(Path, "A file like --data that the worked examples come from."),
        "template": optional(str, "The text around a question, with {question} in it.", shown="the task's"),
        "answer_pattern": optional(str, "Of a task of your own: a regular expression whose last match is the answer."),
        "chat": flag("Ask in the form for conversations that the tokenizer has.", "--chat"),
        "allow_code_execution": flag(
            "Run the programs that the model writes, which mbpp needs.", "--allow-code-execution"
        ),
        "length": count(
            "Tokens of an answer at most.", "--length", "--gen-length", *flags("gen_length"), shown="the task's"
        ),
        "block": count(
            "Tokens of a block, or at most of a window.",
            *("--block", "--block-length", *flags("block_length")),
            shown="the head's",
        ),
        "steps": optional(str, "Denoiser calls, several by commas.", "--num-steps", *flags("num_steps")),
        "tokens_per_step": optional(
            str, "In place of calls: tokens a call, several by commas.", "--tokens-per-step", shown="1,2,4"
        ),
        "threshold": optional(str, "Bounds of the strategy threshold, by commas.", "--threshold"),
        "entropy_bound": optional(str, "Bounds of the strategy entropy_bound, by commas, in nats.", "--entropy-bound"),
        "joint_entropy_bound": optional(
            str,
            "Bounds of the strategy joint_entropy, by commas, in nats; only with the circuit.",
            "--joint-entropy-bound",
        ),
        **{name: DecodingOptions.OPTIONS[name] for name in _SHARED},
        "circuit": flag("With and without the circuit, or only without.", "--circuit/--no-circuit"),
        "batch_size": Annotated[int, typer.Option(min=1, help="Questions at a time; it changes no result.")],
        "seed": Annotated[int, typer.Option(min=0, max=GREATEST_SEED, help="Of all draws.")],
        "results": optional(
            Path,
            "Folder of answers, tables and pictures.",
            *("--results", *flags("results")),
            shown=f"OUT/results, or {RESULTS}",
        ),
        "scorer": optional(
            str,
            "A causal model that judges the texts: a name on the hub, a folder, or a .gguf file. With a task the "
            "answers, else texts after parts of held-out text.",
            "--scorer",
        ),
    }
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "reverse_activation": False, "dynamic_windows": False, "shots": 0, "chat": False, "allow_code_execution": False,
        "circuit": True, "batch_size": 8, "seed": 0,
    }  # fmt: skip

    def check_unused(self) -> None:
        """Raise ArgumentError if there is neither a task nor a judge, and an option that only these have."""
        changed = [name for name, value in self.given.items() if value != self.DEFAULTS.get(name)]
        if changed:
            name = changed[0].replace("_", "-")
            raise ArgumentError(f"task: expected one with --{name}, got none; name it with --task, or a --scorer")

    def list_of(self, name: str, kind: Callable[[str], _T]) -> tuple[_T, ...]:
        """Return the values of an option that has several, separated by commas; () where it is not named."""
        return parsed_list(name, self.given[name], kind)


def parsed_list(name: str, value: str | None, kind: Callable[[str], _T]) -> tuple[_T, ...]:
    """Return values that are separated by commas; () for None. Raises ArgumentError if one is not of its kind."""
    if value is None:
        return ()
    try:
        return tuple(kind(part.strip()) for part in value.split(","))
    except ValueError as error:
        what = {int: "whole numbers", float: "numbers"}.get(kind, "values")  # type: ignore[call-overload]
        raise ArgumentError(f"{name}: expected {what} separated by commas, got {value!r}") from error
