"""The tasks by name, and those of a file of yours."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from circuits.arguments import checked_count
from diffusion.errors import ArgumentError
from diffusion.evaluation.tasks import code, latex, numbers
from diffusion.evaluation.tasks.data import Reader, download_examples, read_examples, text_of
from diffusion.evaluation.tasks.task import QUESTION, Example, Task


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What makes a task of the data of its name."""

    reader: Reader
    template: str
    extract: Callable[[str], str | None]
    is_right: Callable[[str, Example], bool]
    stop: tuple[str, ...]
    gen_length: int
    dataset: tuple[str, str | None]  # of the hub
    splits: tuple[str, str | None]  # of the questions and of worked examples


def _not_allowed(answer: str, example: Example) -> bool:
    raise ArgumentError("allow_code_execution: expected True, for answers are judged by running them; got False")


KNOWN: dict[str, _Known] = {
    "gsm8k": _Known(
        reader=numbers.gsm8k_example,
        template=f"Question: {QUESTION}\nAnswer:",
        extract=numbers.extract_number,
        is_right=numbers.is_same_number,
        stop=("Question:",),
        gen_length=256,
        dataset=("openai/gsm8k", "main"),
        splits=("test", "train"),
    ),
    "math500": _Known(
        reader=latex.math_example,
        template=f"Problem: {QUESTION}\nWrite the final answer as \\boxed{{answer}}.\nSolution:",
        extract=latex.extract_boxed,
        is_right=latex.is_same_expression,
        stop=("Problem:",),
        gen_length=512,
        dataset=("HuggingFaceH4/MATH-500", None),
        splits=("test", None),
    ),
    "mbpp": _Known(
        reader=code.mbpp_example,
        template=f"Write a Python function.\n{QUESTION}\n{code.FENCE}python\n",
        extract=code.extract_code,
        is_right=_not_allowed,
        stop=(code.FENCE,),
        gen_length=256,
        dataset=("google-research-datasets/mbpp", "full"),
        splits=("test", "prompt"),
    ),
}
"""The tasks that have a name."""


def load_task(
    name: str,
    *,
    data: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    shots: int = 0,
    shots_data: str | os.PathLike[str] | None = None,
    template: str | None = None,
    answer_pattern: str | None = None,
    allow_code_execution: bool = False,
) -> Task:
    r"""Return a task: one with a name, or that of a file with a question and its answer on every line.

    Args:
        name: ``gsm8k``, ``math500``, ``mbpp``, or the path of a ``.jsonl`` or ``.jsonl.gz`` file of objects with the
            keys ``prompt`` and ``answer``; the answer is a text, a number, or a list of them, any of which is right.
        data: a file of the task's own records, for a task with a name; None: it is downloaded.
        limit: only so many questions, from the first on.
        shots: how many worked examples stand before every question.
        shots_data: a file that the worked examples come from, of the same form, its first lines; None: they are
            downloaded.
        template: the text around a question, with ``{question}`` in it; None: the task's own.
        answer_pattern: of a file: a regular expression whose last match (its first group, if it has one) is the answer
            in a text; None: the whole text is.
        allow_code_execution: whether programs that a model wrote may be run, which ``mbpp`` needs.

    Raises:
        ArgumentError: the name is not known, data are missing or not as they have to be, or running programs is not
            allowed.
    """
    for argument, count, least in (("limit", limit, 1), ("shots", shots, 0)):
        if count is not None:
            checked_count(argument, count, least)
    if name in KNOWN:
        if answer_pattern is not None:
            raise ArgumentError(f"answer_pattern: expected none, for {name} finds answers its own way; leave it out")
        task = _known(name, KNOWN[name], data, limit, allow_code_execution)
        reader, source = KNOWN[name].reader, (KNOWN[name].dataset, KNOWN[name].splits[1])
    else:
        task = _of_file(name, data, limit, answer_pattern)
        reader, source = _file_example, None
    if template is not None:
        task = replace(task, template=template)
    return replace(task, shots=_shots(reader, shots, shots_data, source)) if shots else task


def _known(
    name: str, known: _Known, data: str | os.PathLike[str] | None, limit: int | None, allow_code_execution: bool
) -> Task:
    is_right = known.is_right
    if is_right is _not_allowed:
        if not allow_code_execution:
            raise ArgumentError(
                f"allow_code_execution: expected True for {name}, whose answers are programs that are run, got False; "
                "run them with --allow-code-execution, best in a container"
            )
        is_right = code.judge_by_tests()
    if data is None:
        examples = download_examples(*known.dataset, known.splits[0], known.reader, limit=limit)
    else:
        examples = read_examples(data, known.reader, limit=limit)
    return Task(
        name=name,
        examples=examples,
        template=known.template,
        extract=known.extract,
        is_right=is_right,
        stop=known.stop,
        gen_length=known.gen_length,
    )


def _of_file(name: str, data: object, limit: int | None, answer_pattern: str | None) -> Task:
    if not re.search(r"\.jsonl(\.gz)?$", str(name)):
        raise ArgumentError(f"task: expected one of {', '.join(KNOWN)}, or a .jsonl or .jsonl.gz file, got {name!r}")
    if data is not None:
        raise ArgumentError(f"data: expected none, for the task is itself the file {name}; leave it out")
    return Task(
        name=re.sub(r"\.jsonl(\.gz)?$", "", Path(name).name) or "task",
        examples=read_examples(name, _file_example, name="task", limit=limit),
        template=QUESTION,
        extract=_extraction(answer_pattern),
        is_right=_is_same_text,
    )


def _file_example(record: dict[str, Any]) -> Example:
    answers = record["answer"] if isinstance(record["answer"], list) else [record["answer"]]
    if not answers:
        raise ValueError("expected an answer, got an empty list")
    texts = tuple(map(text_of, answers))
    return Example(text_of(record["prompt"]), texts, text_of(record.get("solution", texts[0])))


def _extraction(pattern: str | None) -> Callable[[str], str | None]:
    if pattern is None:
        return lambda text: text.strip() or None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ArgumentError(f"answer_pattern: expected a regular expression, got {pattern!r}: {error}") from error

    def extract(text: str) -> str | None:
        found = list(compiled.finditer(text))
        return (found[-1].group(1 if compiled.groups else 0) or "").strip() or None if found else None

    return extract


def _is_same_text(answer: str, example: Example) -> bool:
    return any(answer.split() == right.split() for right in example.answers)


def _shots(
    reader: Reader,
    count: int,
    path: str | os.PathLike[str] | None,
    source: tuple[tuple[str, str | None], str | None] | None,
) -> tuple[Example, ...]:
    if path is not None:
        found = read_examples(path, reader, name="shots_data", limit=count)
    elif source is None or source[1] is None:
        raise ArgumentError("shots_data: expected a file of worked examples, got none; name one, or ask without shots")
    else:
        found = download_examples(*source[0], source[1], reader, limit=count)
    if len(found) < count:
        raise ArgumentError(f"shots: expected at most {len(found)}, as many as there are examples, got {count}")
    return found
