r"""Answers in LaTeX: MATH. What is in ``\boxed{}``, and which spellings of it mean the same."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from diffusion.evaluation.tasks.data import text_of
from diffusion.evaluation.tasks.task import Example

_BOXES = ("\\boxed", "\\fbox")
_SAID = re.compile(r"final answer is:?\s*(.+?)(?:\.?\s*I hope|\.?\s*\n|\.?\s*$)", re.IGNORECASE | re.DOTALL)

_DROPPED = re.compile(
    r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;: ]|\\(?:quad|qquad|displaystyle|big|Big|bigg|Bigg)(?![a-zA-Z])"
    r"|\^\s*\{?\s*\\circ\s*\}?|\\degree|\\?\$|\\?%|~|\s+"
)
_WORDS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=[\d})])\\(?:text|textrm|mathrm|mbox)\s*\{[^{}]*\}(?:\^\{?\d\}?)?$")
_NAMED = re.compile(r"^[a-zA-Z]\s*(?:=|\\in)(?=.)")
_SHORT_FRACTION = re.compile(r"\\frac\s*(\d|[a-zA-Z])\s*(\d|[a-zA-Z])")
_HALF_FRACTION = re.compile(r"\\frac\s*(?:(\d|[a-zA-Z])\s*\{|(\{[^{}]*\})\s*(\d|[a-zA-Z]))")
_SHORT_ROOT = re.compile(r"\\sqrt\s*(\d|[a-zA-Z])")
_SLASHED = re.compile(r"^(-?)\(?(\d+)\)?/\(?(\d+)\)?$")
_THOUSANDS = re.compile(r"^-?\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?$")
_FRACTION = re.compile(r"^(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}$")
_DECIMAL = re.compile(r"^-?(?:\d+(?:\.\d*)?|\.\d+)$")


def math_example(record: dict[str, Any]) -> Example:
    r"""Return the example of a record with ``problem``, ``solution``, and ``answer``, or else one in ``\boxed{}``."""
    solution = text_of(record["solution"]) if "solution" in record else ""
    answer = text_of(record["answer"]) if "answer" in record else last_boxed(solution)
    if answer is None:
        raise KeyError("answer")
    return Example(text_of(record["problem"]), (answer,), solution or f"\\boxed{{{answer}}}")


def extract_boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{}`` of a text, else what follows "final answer is"; None: neither."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    said = _SAID.findall(text)
    return said[-1].strip() if said else None


def last_boxed(text: str) -> str | None:
    r"""Return what stands in the last ``\boxed{}`` or ``\fbox{}``, braces within it included; None if nothing does.

    One that is not closed does not count; ``\boxed 5`` has the 5.
    """
    starts = sorted((found.end(), name) for name in _BOXES for found in re.finditer(re.escape(name), text))
    for start, _ in reversed(starts):
        rest = text[start:].lstrip()
        if not rest.startswith("{"):
            token = re.match(r"[^\s$.,]+", rest)
            if token is not None:
                return token.group()
            continue
        content = _braced(rest)
        if content is not None:
            return content.strip()
    return None


def is_same_expression(answer: str, example: Example) -> bool:
    """Whether an answer is written like one that is right, or is the same number, after both are normalised."""
    found = normalized_latex(answer)
    rights = [normalized_latex(right) for right in example.answers]
    return any(found == right or (_value(found) is not None and _value(found) == _value(right)) for right in rights)


def normalized_latex(text: str) -> str:
    r"""Return an expression in one of the ways in which it can be written.

    Spaces, ``\left``, ``\right``, currency, per cent, degrees, a unit in ``\text{}`` at the end, an ``x =`` in front
    and a full stop at the end are dropped; ``\dfrac``, ``\tfrac``, ``\frac12`` and ``1/2`` become ``\frac{1}{2}``,
    ``\sqrt3`` becomes ``\sqrt{3}``, ``.5`` becomes ``0.5``, ``1,000`` becomes ``1000``.
    """
    text = text.strip().strip("$").rstrip(".").strip()
    text = _DROPPED.sub("", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    if len(text) > len(unit := _UNIT.sub("", text)) > 0:
        text = unit
    text = _NAMED.sub("", _WORDS.sub(r"\1", text))
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = _HALF_FRACTION.sub(_whole_fraction, text)
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    text = _SLASHED.sub(r"\1\\frac{\2}{\3}", text)
    if _THOUSANDS.match(text):
        text = text.replace("{,}", "").replace(",", "")
    text = re.sub(r"(?<![\d}])\.(?=\d)", "0.", text)
    return re.sub(r"^(-?\d+)\.0*$", r"\1", text)


def _whole_fraction(found: re.Match[str]) -> str:
    numerator, braced, denominator = found.groups()
    return f"\\frac{{{numerator}}}{{" if numerator else f"\\frac{braced}{{{denominator}}}"


def _value(text: str) -> Fraction | None:
    """Return the number that a normalised expression is; None if it is none that is easily seen."""
    fraction = _FRACTION.match(text)
    if fraction is not None:
        sign, numerator, denominator = fraction.groups()
        return None if int(denominator) == 0 else Fraction(int(sign + "1") * int(numerator), int(denominator))
    return Fraction(text) if _DECIMAL.match(text) and len(text) < 100 else None


def _braced(text: str) -> str | None:
    """Return what stands between a text's first brace and the one that closes it; None if none does."""
    depth = 0
    for place, character in enumerate(text):
        if character in "{}" and (place == 0 or text[place - 1] != "\\"):
            depth += 1 if character == "{" else -1
            if depth == 0:
                return text[1:place]
    return None
