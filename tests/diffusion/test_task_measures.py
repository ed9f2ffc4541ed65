"""Accuracy under parallelism is the one that was published, for the points that were published."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.errors import ArgumentError
from diffusion.evaluation.intervals import wilson
from diffusion.evaluation.tasks import accuracy_at, accuracy_under_parallelism

# hao-ai-lab's leaderboard of diffusion language models (arXiv 2601.07568): tokens per call, accuracy, AUP. The best
# accuracy of a task is that of all methods of its table.
PUBLISHED = {
    ("GSM8K-CoT", 74.98): [
        ([(1.0, 74.1)], 74.1000),
        ([(1.0, 74.79), (2.77, 74.68)], 205.7811),
        ([(1.0, 74.98), (2.88, 74.39)], 213.7564),
        ([(1.0, 74.0), (5.14, 72.63)], 358.1422),
        ([(1.0, 74.02), (9.08, 73.10)], 635.7170),
    ],
    ("MATH", 41.15): [
        ([(1.0, 32.1), (1.97, 30.82)], 47.1873),
        ([(1.0, 29.1), (2.66, 28.94)], 48.9958),
        ([(1.0, 32.0), (3.17, 30.18)], 64.5356),
        ([(1.0, 32.76), (5.87, 30.92)], 111.7453),
    ],
    ("MBPP", 63.6): [
        ([(1.0, 41.58), (2.13, 38.6)], 56.6011),
        ([(1.0, 41.62), (2.35, 40.0)], 60.4513),
        ([(1.0, 42.0), (4.72, 41.6)], 97.6125),
    ],
}
CASES = [(task, best, points, aup) for (task, best), rows in PUBLISHED.items() for points, aup in rows]


@pytest.mark.parametrize(("task", "best", "points", "aup"), CASES)
def test_aup_equals_the_published_value(task, best, points, aup):
    assert accuracy_under_parallelism(points, best=best) == pytest.approx(aup, abs=6e-5)
    assert accuracy_under_parallelism(points[::-1], best=best) == pytest.approx(aup, abs=6e-5)


def test_points_more_than_five_below_the_first_count_for_nothing():
    points = [(1.0, 70.0), (2.0, 65.0), (3.0, 64.9)]
    assert accuracy_under_parallelism(points) == accuracy_under_parallelism(points[:2])
    assert accuracy_under_parallelism([*points[:2], (3.0, 65.0)]) > accuracy_under_parallelism(points[:2])
    between = [(1.0, 70.0), (2.0, 10.0), (3.0, 70.0)]  # the line goes from the first to the third
    assert accuracy_under_parallelism(between) == pytest.approx(70.0 + 2 * 70.0)


@given(st.lists(st.floats(0.1, 50), min_size=1, max_size=6, unique=True), st.floats(1, 100))
def test_without_a_loss_of_accuracy_it_is_the_area_under_the_curve(parallelism, accuracy):
    points = [(rho, accuracy) for rho in parallelism]
    assert accuracy_under_parallelism(points) == pytest.approx(max(parallelism) * accuracy)


def test_the_weight_of_an_accuracy():
    found = accuracy_under_parallelism([(1.0, 80.0), (2.0, 76.0)], best=80.0)
    assert found == pytest.approx(80 + (80 + 76 * math.exp(-3 * (1 - 76 / 80))) / 2)
    assert accuracy_under_parallelism([(1.0, 0.0), (3.0, 0.0)]) == 0.0


@pytest.mark.parametrize(
    "points", [[], [(0.0, 50.0)], [(1.0, 101.0)], [(1.0, float("nan"))], [(math.inf, 1.0)], [(1,)]]
)
def test_points_outside_their_range_are_refused(points):
    with pytest.raises(ArgumentError, match="points: expected"):
        accuracy_under_parallelism(points)


def test_the_accuracy_at_equal_parallelism_is_linear_between_points():
    points = [(4.0, 40.0), (1.0, 70.0), (2.0, 60.0)]
    for at in (1.0, 1.25, 2.0, 3.5, 4.0):
        assert accuracy_at(points, at) == pytest.approx(np.interp(at, [1, 2, 4], [70, 60, 40]))
    assert accuracy_at(points, 0.9) is None
    assert accuracy_at(points, 4.1) is None
    assert accuracy_at([(2.0, 50.0)], 2.0) == 50.0


@pytest.mark.parametrize("num_all", [1, 2, 3, 10, 999])
def test_an_interval_holds_its_share(num_all):
    for num_good in range(0, num_all + 1, max(1, num_all // 7)):
        estimate = wilson(num_good, num_all)
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert wilson(0, 10).high == pytest.approx(0.2775, abs=1e-4)  # scipy.stats.binomtest(0, 10).proportion_ci("wilson")
