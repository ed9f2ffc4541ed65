"""The pictures show what the tables hold: every value and interval, inside the axes, and words where there is none."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.container import BarContainer, ErrorbarContainer

from diffusion.evaluation.few_steps import FewStepRow, FewStepTable
from diffusion.evaluation.gap import ABOVE_ONE, MODELS, NOT_MEANINGFUL, Estimate, GapRow, GapTable, rounded
from diffusion.evaluation.plots import draw_gap, few_steps_figure, gap_figure

INF = float("inf")


def around(value, spread=0.2):
    return Estimate(value, value - spread * abs(value), value + 0.5 * spread * abs(value))


def gap_table(*shares, is_meaningful=True):
    rows = [
        GapRow(ratio, int(8 * ratio), *map(around, (20.0 * ratio, 9.0, 7.5, 7.0 * ratio)), share, is_meaningful)
        for ratio, share in zip((0.25, 0.5, 0.75, 1.0), shares, strict=False)
    ]
    return GapTable(tuple(rows), 64, 0)


HIGH = gap_table(Estimate(1.57, 1.35, 1.84), Estimate(1.17, 1.1, 1.24), Estimate(0.98, 0.95, 1.01))
WIDE = gap_table(Estimate(-0.8, -2.5, 0.1), Estimate(0.3, -0.4, 9.0))
CERTAIN = gap_table(Estimate(0.5, 0.5, 0.5))


def intervals_of(axes):
    """Return the ends of every error bar, in order: one list of (x, low, high) per line."""
    bars = [container for container in axes.containers if isinstance(container, ErrorbarContainer)]
    lines = [container[2][0].get_segments() for container in bars]
    return [[(float(a[0]), float(a[1]), float(b[1])) for a, b in segments] for segments in lines]


def heights_of(axes):
    bars = [container for container in axes.containers if isinstance(container, BarContainer)]
    return [bar.get_height() for container in bars for bar in container]


def contains(limits, values):
    return limits[0] <= min(values) and max(values) <= limits[1]


def words_of(figure):
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    return " ".join(" ".join([*texts, figure.get_supxlabel()]).split())


@pytest.mark.parametrize("table", [HIGH, WIDE, CERTAIN], ids=["above one", "wide", "certain"])
def test_the_gap_picture_shows_every_value_and_interval(table):
    left, right = gap_figure(table).axes
    ratios = [row.mask_ratio for row in table.rows]
    curves = {line.get_label(): line for line in left.lines if not line.get_label().startswith("_")}
    assert len(curves) == len(MODELS)
    for name, line, intervals in zip(MODELS, curves.values(), intervals_of(left), strict=True):
        estimates = [getattr(row, name) for row in table.rows]
        np.testing.assert_allclose(line.get_data(), [ratios, [estimate.value for estimate in estimates]])
        ends = [(estimate.low, estimate.high) for estimate in estimates]
        np.testing.assert_allclose(intervals, [(x, *pair) for x, pair in zip(ratios, ends, strict=True)])
        assert contains(left.get_ylim(), np.ravel(ends))
    shares = [row.share_closed for row in table.rows]
    assert heights_of(right) == [share.value for share in shares]
    ends = [(share.low, share.high) for share in shares]
    found = [interval for line in intervals_of(right) for interval in line]
    np.testing.assert_allclose(found, [(x, *pair) for x, pair in enumerate(ends)])
    assert contains(right.get_ylim(), [*np.ravel(ends), 0.0, 1.0])
    assert [text.get_text() for text in right.texts] == [rounded(share.value) for share in shares]
    assert all(contains(axis.get_xlim(), x) for axis, x in ((left, ratios), (right, range(len(shares)))))


def test_a_share_above_one_is_explained_in_picture_and_table():
    for table, is_above in ((HIGH, True), (WIDE, False), (gap_table(Estimate(2, 1, 3), is_meaningful=False), False)):
        assert (ABOVE_ONE[1:] in words_of(gap_figure(table))) == is_above
        assert (ABOVE_ONE in str(table)) == is_above


def test_a_row_that_is_not_meaningful_has_words_and_no_bar():
    table = replace(HIGH, rows=(replace(HIGH.rows[0], is_meaningful=False), HIGH.rows[2]))
    figure = gap_figure(table)
    right = figure.axes[1]
    assert [
        bar.get_height() for container in right.containers if isinstance(container, BarContainer) for bar in container
    ] == [0.98]
    assert [text.get_text() for text in right.texts] == ["not meaningful", "0.98"]
    assert NOT_MEANINGFUL[1:] in words_of(figure)
    assert NOT_MEANINGFUL in str(table)
    assert "1.57" not in str(table)
    assert ABOVE_ONE not in str(table)


def test_what_is_infinite_is_named_and_not_drawn(tmp_path):
    row = replace(HIGH.rows[1], one_step=Estimate(INF, 5.0, INF), share_closed=Estimate(float("nan"), 0.0, INF))
    figure = gap_figure(table := replace(HIGH, rows=(HIGH.rows[0], row)))
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels[0] == "one step, factorized (not finite at 0.5)"
    assert not any("not finite" in label for label in labels[1:])
    assert "not finite: nan [0.00, inf]" in words_of(figure)
    draw_gap(table, tmp_path / "gap.png")
    draw_gap(replace(table, rows=(row,)), tmp_path / "gap.png")  # nothing finite in a line


@pytest.mark.parametrize("low", [1.01, 1.3, 30.0, 1e5, 1e12])
def test_the_logarithmic_axis_has_ticks_that_can_be_read(low):
    row = replace(HIGH.rows[0], **{name: around(low, 0.01) for name in MODELS})
    left = gap_figure(replace(HIGH, rows=(row,))).axes[0]
    limits = left.get_ylim()
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert 2 <= len(labels) <= 12
    for label, tick in zip(labels, left.get_yticks(), strict=True):
        assert float(label) == pytest.approx(tick, rel=1e-5)
    assert sum(limits[0] <= tick <= limits[1] for tick in left.get_yticks()) >= 2


def test_the_few_steps_picture_shows_every_value_and_interval():
    pairs = [(1, Estimate(0.0, 0.0, 0.02), Estimate(0.004, 0.001, 0.03)), (8, around(0.4), around(0.5))]
    pairs.append((32, Estimate(1.0, 0.98, 1.0), Estimate(0.996, 0.97, 0.9995)))
    table = FewStepTable(tuple(FewStepRow(*pair) for pair in pairs), 256, "all right", "latent", 1.0, 0)
    (axes,) = few_steps_figure(table).axes
    curves = [line for line in axes.lines if not line.get_label().startswith("_")]
    for line, intervals, name in zip(curves, intervals_of(axes), ("without", "coupled"), strict=True):
        estimates = [getattr(row, name) for row in table.rows]
        np.testing.assert_allclose(line.get_data(), [[1, 8, 32], [estimate.value for estimate in estimates]])
        ends = [(estimate.low, estimate.high) for estimate in estimates]
        np.testing.assert_allclose(intervals, [(x, *pair) for x, pair in zip((1, 8, 32), ends, strict=True)], atol=1e-9)
        assert contains(axes.get_ylim(), np.ravel(ends))
    assert "| 1 | 0.00 [0.00, 0.02] | 0.004 [0.001, 0.03] |" in str(table)
    assert "| 32 | 1.00 [0.98, 1.00] | 0.996 [0.97, 0.9995] |" in str(table)


def test_only_zero_and_one_are_written_as_zero_and_one():
    numbers = (0.0, 1.0, 0.998, 1.002, 1 / 256, 0.00004, 0.5, -0.003, 12.345, INF, 2.5e7)
    words = ["0.00", "1.00", "0.998", "1.002", "0.004", "0.0000", "0.50", "-0.003", "12.35", "inf", "2.5e+07"]
    assert [rounded(number) for number in numbers] == words
    assert rounded(1.04, 1) == "1.04"
