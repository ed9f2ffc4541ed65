"""Calculator annotations, ``<<48/2=24>>``: worked answers say what they compute, and can be checked without a judge.

An annotation is well-formed when it is an expression of decimal numbers, ``+ - * /`` and parentheses, then ``=`` and
a number; it is right when the two sides are equal as rational numbers. GSM8K's answers have them (Cobbe et al. 2021,
arXiv 2110.14168).
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from circuits.progress import progress_bar
from diffusion.decoding.config import DecodeMode, Strategy
from diffusion.denoisers.base import Denoiser
from diffusion.errors import ArgumentError
from diffusion.evaluation.blocks import blocks_after
from diffusion.evaluation.intervals import Estimate, interval_of, resamples
from diffusion.evaluation.result_tables import ResultTable
from diffusion.head import CoupledHead

STRATEGY: Strategy = "entropy"
"""Which positions a step commits; it does not look at what was drawn, so that the law of decoding is kept."""
_MARK = re.compile("<<|>>")
_TOKEN = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+|[-+*/()]")
_SIGNS = "+-*/()"
_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv
}  # fmt: skip
_LONGEST = 200  # characters; a number of many digits would take the time of its square


@dataclass(frozen=True)
class AnnotationCheck:
    """How many annotations a text completes, how many of those are well-formed, and how many right."""

    num_annotations: int
    num_well_formed: int
    num_right: int


def check_annotations(context: str, text: str) -> AnnotationCheck:
    """Judge the annotations that ``text`` completes, as a continuation of ``context``.

    One that ``context`` began counts, one that ``text`` leaves open does not, for it may yet become anything. A ``>>``
    that closes nothing and a ``<<`` inside another are annotations that are not well-formed.
    """
    whole, opened = context + text, None
    closed: list[str | None] = []
    for mark in _MARK.finditer(whole):
        is_new = mark.end() > len(context)
        if mark[0] == "<<":
            if opened is not None and is_new:
                closed.append(None)
            opened = mark.end()
        else:
            if is_new:
                closed.append(None if opened is None else whole[opened : mark.start()])
            opened = None
    sides = [_sides(inside) for inside in closed if inside is not None]
    formed = [pair for pair in sides if pair is not None]
    return AnnotationCheck(len(closed), len(formed), sum(left == right for left, right in formed))


def _sides(annotation: str) -> tuple[Fraction | None, Fraction] | None:
    """Return both sides of ``48/2=24``, None on the left for a division by 0; None if it is not well-formed."""
    left, equals, right = annotation.partition("=")
    number = re.fullmatch(r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)", right)
    if len(annotation) > _LONGEST or not equals or number is None:
        return None
    try:
        return _value(left), Fraction(_padded(right))
    except ValueError:
        return None
    except ZeroDivisionError:
        return None, Fraction(_padded(right))


def _value(expression: str) -> Fraction:
    """Return what an expression of numbers is worth, exactly; ValueError where it is none."""
    parts = _TOKEN.findall(expression)
    numbers = {f"n{place}": Fraction(_padded(part)) for place, part in enumerate(parts) if part not in _SIGNS}
    named = "".join(part if part in _SIGNS else f"n{place}" for place, part in enumerate(parts))

    def worth(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            left, right = worth(node.left), worth(node.right)
            result: Fraction = _BINARY[type(node.op)](left, right)
            return result
        if isinstance(node, ast.UnaryOp):
            return worth(node.operand) if isinstance(node.op, ast.UAdd) else -worth(node.operand)
        assert isinstance(node, ast.Name)
        return numbers[node.id]

    try:
        if "".join(parts) != expression:
            raise ValueError(expression)
        return worth(ast.parse(named, mode="eval").body)
    except (SyntaxError, AssertionError, KeyError) as error:
        raise ValueError(expression) from error


def _padded(number: str) -> str:
    """Write ``.5`` and ``5.`` as every version of Python reads them."""
    sign, digits = ("-", number[1:]) if number.startswith("-") else ("", number)
    whole, _, decimals = digits.partition(".")
    return f"{sign}{whole or 0}.{decimals or 0}"


FEW = 0.25
"""Shares of right annotations whose intervals lie below it are those of a denoiser that does not calculate."""
CANNOT_CALCULATE = (
    "few are right in any number of calls: this denoiser knows the form of an annotation and does not calculate, which "
    "no way of decoding makes up for"
)


@dataclass(frozen=True)
class AnnotationShare:
    """Annotations of some texts: how many there are, and the share that is right, with a 95 % bootstrap interval."""

    num_annotations: int
    num_well_formed: int
    num_right: int
    share: Estimate | None

    @classmethod
    def of(cls, checks: Sequence[AnnotationCheck], seed: int = 0) -> AnnotationShare:
        """Add up the checks of texts; the interval is over texts, for the annotations of one are not independent."""
        counts = np.array([(one.num_annotations, one.num_well_formed, one.num_right) for one in checks]).reshape(-1, 3)
        total, formed, right = (int(count) for count in counts.sum(0))
        share = _share_of(counts[:, 0], counts[:, 2], seed) if total else None
        return cls(total, formed, right, share)

    def __str__(self) -> str:
        return f"{self.share or 'none'} ({self.num_right} of {self.num_annotations})"


def _share_of(total: NDArray[np.int64], right: NDArray[np.int64], seed: int) -> Estimate:
    rows = resamples(len(total), seed)
    totals, rights = total[rows].sum(1), right[rows].sum(1)
    return interval_of(right.sum() / total.sum(), rights[totals > 0] / totals[totals > 0])


@dataclass(frozen=True)
class AnnotationRow:
    """Annotations at one number of denoiser calls per block."""

    num_steps: int
    without: AnnotationShare
    coupled: AnnotationShare


@dataclass(frozen=True)
class AnnotationTable(ResultTable):
    """Share of right calculator annotations against denoiser calls per block.

    Attributes:
        rows: one per number of calls.
        true_text: of what really follows the prompts.
        num_texts: how many texts each share was measured on.
        decode: how the circuit was used.
        strategy: which positions a step committed.
        temperature: of the tokens.
        seed: of the draws and the bootstrap.
    """

    rows: tuple[AnnotationRow, ...]
    true_text: AnnotationShare
    num_texts: int
    decode: str
    strategy: str
    temperature: float
    seed: int

    def cells(self) -> list[tuple[str, ...]]:
        """Return the table in words, a title row first."""
        rows = [(str(row.num_steps), str(row.without), str(row.coupled)) for row in self.rows]
        titles = ("calls per block", "without circuit", f"with circuit ({self.decode})")
        return [titles, *rows, ("true text", str(self.true_text), "")]

    @property
    def notes(self) -> tuple[str, ...]:
        """What has to be said of the numbers."""
        shares = [one.share for row in self.rows for one in (row.without, row.coupled) if one.share is not None]
        return (CANNOT_CALCULATE,) if shares and max(share.high for share in shares) < FEW else ()


def annotation_quality(
    denoiser: Denoiser,
    head: CoupledHead,
    data: Tensor,  # shape: (N, P + L)
    decoded: Callable[[Tensor], str],
    *,
    steps: Sequence[int] = (1, 2, 4, 8, 16, 32),
    decode: DecodeMode = "joint",
    temperature: float = 1.0,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = False,
) -> AnnotationTable:
    """Generate one block after each prompt, without and with the circuit, and check its calculator annotations.

    Args:
        denoiser: the masked-token predictor.
        head: the circuit over one block of L positions.
        data: held-out windows of prompt and block, int64, on the denoiser's device.
        decoded: the text of token ids, int64 (any number,).
        steps: denoiser calls per block, each from 1 to L.
        decode: how the circuit is used.
        temperature: of the tokens, with and without the circuit.
        batch_size: texts at a time.
        seed: of the draws and the bootstrap.
        progress: draw a progress bar.

    Raises:
        ArgumentError: the data does not fit, or an argument that ``generate`` refuses.
    """
    length = head.block_length
    if data.dim() != 2 or not len(data) or data.shape[1] < length:
        raise ArgumentError(f"data: expected int64 (N >= 1, at least {length}), got {tuple(data.shape)}")
    prompts = data[:, :-length]
    contexts = [decoded(prompt) for prompt in prompts]

    def checked(texts: Tensor) -> AnnotationShare:
        pairs = zip(contexts, texts, strict=True)
        return AnnotationShare.of([check_annotations(context, decoded(text)) for context, text in pairs], seed)

    def written(used: CoupledHead | None, num_steps: int) -> Tensor:
        options = {"num_steps": num_steps, "strategy": STRATEGY, "decode": decode, "temperature": temperature}
        parts = []
        for out in blocks_after(denoiser, prompts, length, batch_size=batch_size, seed=seed, head=used, **options):
            parts.append(out.generated)
            advance()
        return torch.cat(parts)

    num_batches = -(-len(prompts) // batch_size)
    with progress_bar("checking annotations", 2 * len(steps) * num_batches, enabled=progress) as advance:
        rows = [
            AnnotationRow(count, *(checked(written(used, count)) for used in (None, head))) for count in sorted(steps)
        ]
    return AnnotationTable(tuple(rows), checked(data[:, -length:]), len(prompts), decode, STRATEGY, temperature, seed)
