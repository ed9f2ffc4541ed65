"""Calculator annotations: right exactly where both sides are the same rational number."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuits as ct
from diffusion import CoupledHead
from diffusion.denoisers.base import DenoiserSpec
from diffusion.errors import ArgumentError
from diffusion.evaluation.annotations import (
    CANNOT_CALCULATE,
    AnnotationCheck,
    AnnotationRow,
    AnnotationShare,
    AnnotationTable,
    annotation_quality,
    check_annotations,
)


def counts(context, text):
    check = check_annotations(context, text)
    return check.num_annotations, check.num_well_formed, check.num_right


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        ("48/2=24", (1, 1, 1)),
        ("48/2=25", (1, 1, 0)),
        ("2+3*4=14", (1, 1, 1)),
        ("(2+3)*4=20", (1, 1, 1)),
        ("8-3-2=3", (1, 1, 1)),
        ("16/4/2=2", (1, 1, 1)),
        (".5*3=1.5", (1, 1, 1)),
        ("5.*2=10.0", (1, 1, 1)),
        ("0.1+0.2=0.3", (1, 1, 1)),  # in floating point it is not
        ("1/3*3=1", (1, 1, 1)),
        ("10/3=3.33", (1, 1, 0)),
        ("3-5=-2", (1, 1, 1)),
        ("-(2-5)=3", (1, 1, 1)),
        ("+10=10", (1, 1, 1)),
        ("1/0=0", (1, 1, 0)),
        ("560//10=56", (1, 0, 0)),
        ("2**3=8", (1, 0, 0)),
        ("(2+3=5", (1, 0, 0)),
        ("2+=2", (1, 0, 0)),
        ("2 3=23", (1, 0, 0)),
        ("2+3", (1, 0, 0)),
        ("2+3=", (1, 0, 0)),
        ("=5", (1, 0, 0)),
        ("5=2+3", (1, 0, 0)),
        ("2+3=5=5", (1, 0, 0)),
        ("two=2", (1, 0, 0)),
        ("__import__('os')=1", (1, 0, 0)),
        ("٣+1=4", (1, 0, 0)),
        ("9" * 300 + "=1", (1, 0, 0)),
        ("(" * 90 + "1" + ")" * 90 + "=1", (1, 1, 1)),
    ],
)
def test_an_annotation_is_right_where_both_sides_are_equal_numbers(inside, expected):
    assert counts("", f"so <<{inside}>>, then") == expected


@given(st.data())
def test_expressions_have_their_value_as_rational_numbers(data):
    def made(depth):
        if depth == 0 or data.draw(st.booleans()):
            cents = data.draw(st.integers(0, 5000))
            return f"{cents // 100}.{cents % 100:02d}", Fraction(cents, 100)
        (left, p), (right, q) = made(depth - 1), made(depth - 1)
        sign = data.draw(st.sampled_from("+-*/" if q else "+-*"))
        value = {"+": p + q, "-": p - q, "*": p * q, "/": p / q if q else None}[sign]
        return f"({left}{sign}{right})", value

    text, value = made(2)
    scale = data.draw(st.integers(0, 3))
    stated = Fraction(int(value * 10**scale), 10**scale)  # cut off, so that it is right only where nothing is lost
    digits = f"{abs(int(value * 10**scale)):0{scale + 1}d}"
    shown = f"{'-' if stated < 0 else ''}{digits[: len(digits) - scale]}.{digits[len(digits) - scale :]}"
    assert counts("", f"<<{text}={shown}>>") == ((1, 1, int(stated == value)) if len(text + shown) < 200 else (1, 0, 0))


def test_what_the_text_completes_is_judged():
    assert counts("<<1+1=3>> and <<2+", "2=4>> is <<1+1=2>>2") == (2, 2, 2)
    assert counts("<<1+1=2>>", " nothing") == (0, 0, 0)
    assert counts("", "<<1+1=2>> <<1+") == (1, 1, 1)  # what is still open may become anything
    assert counts("", "5>> <<1+1=2>>") == (2, 1, 1)  # nothing was open
    assert counts("", "<<1+<<1+1=2>>") == (2, 1, 1)  # one inside another
    assert counts("<", "<1+1=2>>") == (1, 1, 1)  # a mark that is cut in two belongs to what completes it


def test_a_share_counts_annotations_and_its_interval_draws_texts():
    checks = [AnnotationCheck(2, 2, 1), AnnotationCheck(0, 0, 0), AnnotationCheck(1, 1, 1)]
    share = AnnotationShare.of(checks)
    assert (share.num_annotations, share.num_right, share.share.value) == (3, 2, pytest.approx(2 / 3))
    assert (share.share.low, share.share.high) == (0.5, 1.0)  # nothing but the first text, or the third
    assert str(share) == "0.67 [0.50, 1.00] (2 of 3)"
    assert str(AnnotationShare.of([AnnotationCheck(0, 0, 0)])) == "none (0 of 0)"
    same = AnnotationShare.of([AnnotationCheck(4, 4, 1)] * 50)
    assert (same.share.low, same.share.high) == (0.25, 0.25)


# Two signs, each 1 or 2: after "<<1+" the text is "1=2>>" or "2=3>>", and a mixture of both is wrong.
SIGNS = ["<<", ">>", "+", "=", "1", "2", "3", "?"]
TEXTS = [[4, 3, 5, 1], [5, 3, 6, 1]]


class Halves:
    spec = DenoiserSpec(vocab_size=8, mask_id=7, eos_ids=(), pad_id=7, forbidden_ids=(7,), max_length=16)

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        start, stop = window
        probs = torch.zeros(4, 8)
        for text in TEXTS:
            probs[torch.arange(4), text] += 0.5
        return probs[start - 3 : stop - 3].log().expand(len(tokens), -1, -1).clone()


def test_the_table_says_how_often_each_way_of_decoding_is_right():
    pc = ct.compile(ct.structures.hmm(4, 2, 8, homogeneous=False), seed=0)
    ct.learning.fit(pc, torch.tensor(TEXTS).repeat(20, 1), optimizer="em", num_epochs=100, progress=False)
    data = torch.tensor([[0, 4, 2, *TEXTS[i % 2]] for i in range(64)])
    table = annotation_quality(
        Halves(), CoupledHead(pc), data, lambda ids: "".join(SIGNS[id] for id in ids), steps=(4, 1), seed=3
    )
    assert [row.num_steps for row in table.rows] == [1, 4]
    for row in table.rows:
        assert row.coupled.num_right == row.coupled.num_annotations == 64
        assert row.coupled.share.low == 1.0
        expected, error = 0.5, 4 * np.sqrt(0.25 / 64)  # the denoiser knows no dependencies, however often it is asked
        assert abs(row.without.share.value - expected) < error
    assert table.true_text.num_right == 64
    assert str(table).splitlines()[0] == "| calls per block | without circuit | with circuit (joint) |"
    assert str(table).splitlines()[-1] == "| true text | 1.00 [1.00, 1.00] (64 of 64) |  |"
    with pytest.raises(ArgumentError, match="data: expected int64"):
        annotation_quality(Halves(), CoupledHead(pc), data[:, :2], str)


@pytest.mark.parametrize(("num_right", "is_noted"), [(1, True), (19, False)])
def test_a_table_says_when_the_denoiser_does_not_calculate(num_right, is_noted):
    checks = [AnnotationCheck(1, 1, int(text < num_right)) for text in range(20)]
    share = AnnotationShare.of(checks)
    row = AnnotationRow(1, share, share)
    table = AnnotationTable((row,), share, 20, "joint", "entropy", 1.0, 0)
    assert (CANNOT_CALCULATE in str(table)) is is_noted
