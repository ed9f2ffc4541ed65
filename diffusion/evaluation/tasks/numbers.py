"""Answers that are numbers: GSM8K."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from diffusion.evaluation.tasks.data import text_of
from diffusion.evaluation.tasks.latex import last_boxed
from diffusion.evaluation.tasks.task import Example

MARK = "####"
"""What GSM8K's solutions have before their answer."""
_NUMBER = re.compile(r"(?:(?<![\w)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
_SAID = re.compile(r"answer\s*(?:is|:|=)", re.IGNORECASE)


def gsm8k_example(record: dict[str, Any]) -> Example:
    """Return the example of a record with keys ``question`` and ``answer``, a solution with its ``#### number``."""
    solution = text_of(record["answer"])
    _, mark, answer = solution.rpartition(MARK)
    if not mark:
        raise ValueError(f"expected {MARK} before the number in 'answer', got {solution!r:.60}")
    return Example(text_of(record["question"]), (answer.strip(),), solution)


def extract_number(text: str) -> str | None:
    r"""Return the number that a solution ends in, normalised; None if there is none.

    The first number after the first ``####``, else in the last ``\boxed{}``, else after the last "answer is", else the
    last number of all.
    """
    _, mark, after = text.partition(MARK)
    if mark:
        return _first(after)
    boxed = last_boxed(text)
    said = list(_SAID.finditer(text))
    for part in (boxed, text[said[-1].end() :] if said else None):
        if part is not None and (found := _first(part)) is not None:
            return found
    numbers = _NUMBER.findall(_plain(text))
    return normalized_number(numbers[-1]) if numbers else None


def is_same_number(answer: str, example: Example) -> bool:
    """Whether an answer equals one that is right: 1,000 = $1000 = 1000.0."""
    return normalized_number(answer) in {normalized_number(right) for right in example.answers}


def normalized_number(text: str) -> str:
    """Return a number without commas, currency, a sign of plus, or zeros at its end; other text without spaces."""
    plain = _plain(text).strip().rstrip(".").removesuffix("%").strip()
    if not _NUMBER.fullmatch(plain):
        return "".join(plain.split())
    written = f"{Decimal(plain.replace(',', '')):f}"
    written = written.rstrip("0").rstrip(".") if "." in written else written
    return "0" if written in ("-0", "") else written


def _first(text: str) -> str | None:
    found = _NUMBER.search(_plain(text))
    return None if found is None else normalized_number(found.group())


def _plain(text: str) -> str:
    return re.sub(r"\\?\$", "", text).replace("{,}", ",")
