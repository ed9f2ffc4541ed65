"""What batteries are given: arguments of another kind are named, whatever they are."""

import pytest
import torch

import circuits as ct

DATA = torch.zeros(3, 2, dtype=torch.int64)
SCORES = torch.zeros(3, 2)
WRONG = {
    "no number of categories": (lambda: ct.batteries.learn_spn(DATA, num_categories=2.5), "num_categories: .* got 2.5"),
    "a seed that is none": (lambda: ct.batteries.learn_spn(DATA, seed="a"), "seed: expected an integer"),
    "no points": (lambda: ct.batteries.normal_points(0, 2, seed=0), "num_points: expected an integer >= 1, got 0"),
    "no dimensions": (lambda: ct.batteries.normal_points(2, 0, seed=0), "dim: expected an integer >= 1, got 0"),
    "too many dimensions": (lambda: ct.batteries.normal_points(2, 10**5, seed=0), "dim: expected at most 21201"),
    "a seed of points": (lambda: ct.batteries.normal_points(2, 2, seed=1.5), "seed: expected an integer"),
    "no steps": (lambda: ct.batteries.convex_weights(SCORES, max_steps=0), "max_steps: expected an integer >= 1"),
    "no tolerance": (
        lambda: ct.batteries.convex_weights(SCORES, tolerance=float("nan")),
        "tolerance: .* >= 0, got nan",
    ),
}


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_arguments_of_another_kind_are_named(case):
    call, said = WRONG[case]
    with pytest.raises(ct.ArgumentError, match=said):
        call()
