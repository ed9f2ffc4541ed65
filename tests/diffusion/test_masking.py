from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from diffusion.errors import ArgumentError
from diffusion.training.masking import (
    CosineSchedule,
    GeometricSchedule,
    LinearSchedule,
    Schedule,
    count_masked,
    mask_fixed_ratio,
    mask_tokens,
    sample_times,
    schedule,
)

MASK = 9
SCHEDULES = [LinearSchedule(), CosineSchedule(), GeometricSchedule()]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("noise", SCHEDULES, ids=lambda s: type(s).__name__)
class TestEverySchedule:
    def test_masks_nothing_at_the_start_and_everything_at_the_end(self, noise: Schedule) -> None:
        ends = noise.mask_probability(torch.tensor([0.0, 1.0], dtype=torch.float64))
        torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64), atol=2e-5, rtol=0)

    def test_masks_more_as_time_goes_by(self, noise: Schedule) -> None:
        assert bool((noise.mask_probability(torch.linspace(0, 1, 101, dtype=torch.float64)).diff() > 0).all())

    def test_weight_is_the_rate_of_masking_over_the_probability_of_being_masked(self, noise: Schedule) -> None:
        t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
        probability = noise.mask_probability(t)
        (rate,) = torch.autograd.grad(probability.sum(), t)
        torch.testing.assert_close(noise.elbo_weight(t), rate / probability)

    def test_weight_is_finite_and_not_negative_everywhere(self, noise: Schedule) -> None:
        weight = noise.elbo_weight(torch.linspace(0, 1, 101))
        assert bool(weight.isfinite().all())
        assert bool((weight > -1e-6).all())

    def test_bound_does_not_depend_on_the_schedule(self, noise: Schedule) -> None:
        """If a masked token costs m nats when a share m of the text is masked, the bound is the mean of m: 1/2."""
        t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
        masked_share = noise.mask_probability(t)
        bound = (noise.elbo_weight(t) * masked_share * masked_share).mean()
        assert bound.item() == pytest.approx(0.5, abs=1e-4)

    def test_tokens_are_masked_as_often_as_the_schedule_says(self, noise: Schedule) -> None:
        t = torch.tensor([0.1, 0.5, 0.9])
        _, masked = mask_tokens(
            torch.zeros(3, 20_000, dtype=torch.long), t, mask_id=MASK, schedule=noise, generator=seeded()
        )
        torch.testing.assert_close(masked.double().mean(1), noise.mask_probability(t.double()), atol=0.02, rtol=0)


def test_schedules_are_found_by_name() -> None:
    assert [schedule(name) for name in ("linear", "cosine", "geometric")] == SCHEDULES
    with pytest.raises(ArgumentError, match=r"one of linear, cosine, geometric, got 'cubic'"):
        schedule("cubic")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["uniform", "antithetic", "low_discrepancy"])
def test_times_are_uniform_above_the_earliest(method: str) -> None:
    generator = seeded()
    t = torch.cat(
        [sample_times(7, method=method, generator=generator, earliest=0.2) for _ in range(4000)]  # type: ignore[arg-type]
    )
    assert t.min() >= 0.2
    assert t.max() <= 1
    levels = torch.linspace(0.2, 1, 9)[1:-1]
    below = (t[:, None] < levels).double().mean(0)
    torch.testing.assert_close(below, torch.linspace(0, 1, 9, dtype=torch.float64)[1:-1], atol=0.01, rtol=0)


def test_antithetic_times_come_in_mirrored_pairs() -> None:
    t = sample_times(6, method="antithetic", generator=seeded(), earliest=0)
    torch.testing.assert_close(t[0::2] + t[1::2], torch.ones(3))


def test_low_discrepancy_times_put_one_in_each_slot() -> None:
    t = sample_times(10, method="low_discrepancy", generator=seeded(), earliest=0)
    assert sorted((t * 10).floor().long().tolist()) == list(range(10))


def test_masked_says_where_the_mask_is_and_the_rest_is_untouched() -> None:
    tokens = torch.arange(40).view(4, 10) % MASK
    noisy, masked = mask_tokens(tokens, torch.tensor([0.0, 0.3, 0.7, 1.0]), mask_id=MASK, generator=seeded())
    assert bool((noisy[masked] == MASK).all())
    assert torch.equal(noisy[~masked], tokens[~masked])
    assert not masked[0].any()
    assert masked[3].all()


def test_only_maskable_positions_are_masked() -> None:
    maskable = torch.tensor([[True, False, True], [False, False, False]])
    tokens = torch.zeros(2, 3, dtype=torch.long)
    _, masked = mask_tokens(tokens, torch.ones(2), mask_id=MASK, maskable=maskable, generator=seeded())
    assert torch.equal(masked, maskable)


def test_fixed_ratio_masks_exactly_its_share_and_at_least_one() -> None:
    lengths = torch.tensor([0, 1, 3, 8, 20])
    maskable = torch.arange(20) * 7 % 20 < lengths[:, None]
    for ratio in (0.01, 0.25, 0.5, 1.0):
        chosen = mask_fixed_ratio(maskable, ratio, generator=seeded())
        expected = [0 if n == 0 else max(1, round(ratio * n)) for n in lengths.tolist()]
        assert chosen.sum(1).tolist() == expected
        assert not (chosen & ~maskable).any()


@pytest.mark.parametrize("steps", [200, 7])
def test_a_ratio_is_the_same_number_of_masks_everywhere(steps: int) -> None:
    """For all n <= 128 and ratios k/200 the masks, their count, and the nearest whole number are one and the same."""
    maskable = torch.ones(128, 128, dtype=torch.bool).tril()
    for k in range(1, steps + 1):
        counts = [count_masked(n, k / steps) for n in range(1, 129)]
        assert mask_fixed_ratio(maskable, k / steps, generator=seeded()).sum(1).tolist() == counts
        assert all(
            abs(count - Fraction(k, steps) * n) <= Fraction(1, 2) or count == 1 for n, count in enumerate(counts, 1)
        )


def test_fixed_ratio_chooses_every_position_equally_often() -> None:
    chosen = mask_fixed_ratio(torch.ones(20_000, 8, dtype=torch.bool), 0.25, generator=seeded())
    torch.testing.assert_close(chosen.double().mean(0), torch.full((8,), 0.25, dtype=torch.float64), atol=0.02, rtol=0)


def test_same_seed_same_masks() -> None:
    maskable = torch.ones(5, 9, dtype=torch.bool)
    first, again, other = (mask_fixed_ratio(maskable, 0.5, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: mask_fixed_ratio(torch.ones(2, 3, dtype=torch.bool), 0.0),
            r"ratio: expected a share above 0, up to 1, got 0.0",
        ),
        (lambda: mask_fixed_ratio(torch.ones(2, 3, dtype=torch.bool), math.nan), "ratio"),
        (lambda: count_masked(3, 1.5), r"ratio: expected a share above 0, up to 1, got 1.5"),
        (lambda: mask_fixed_ratio(torch.ones(2, 3), 0.5), "maskable: expected bool"),
        (lambda: mask_tokens(torch.zeros(2, 3), torch.zeros(2), mask_id=0), "tokens: expected int64"),
        (lambda: mask_tokens(torch.zeros(2, 3).long(), torch.zeros(3), mask_id=0), r"t: expected shape \(2,\)"),
        (
            lambda: mask_tokens(torch.zeros(1, 3).long(), torch.tensor([1.5]), mask_id=0),
            r"t: expected times from 0 to 1",
        ),
        (lambda: sample_times(3, earliest=1.0), "earliest"),
        (lambda: sample_times(3, method="sobol"), "method: expected one of"),
        (lambda: GeometricSchedule(least=2, most=1), "least"),
    ],
)
def test_bad_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()
