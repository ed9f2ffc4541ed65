"""Numbers with their confidence intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{rounded(self.value)} [{rounded(self.low)}, {rounded(self.high)}]"

    def is_below(self, other: Estimate) -> bool:
        """Whether this interval lies below the other one without touching it."""
        return self.high < other.low


def rounded(value: float, decimals: int = 2) -> str:
    """Write a number with so many decimals, or up to four where fewer would make a 0 or a 1 of what is neither."""
    if abs(value) >= 1e6:
        return f"{value:.3g}"
    while decimals < 4 and value not in (0.0, 1.0) and float(f"{value:.{decimals}f}") in (0.0, 1.0):
        decimals += 1
    return f"{value:.{decimals}f}"


def wilson(num_good: int, num_all: int) -> Estimate:
    """Return a share with its 95 % Wilson score interval (Wilson 1927), which holds it whatever rounding does.

    Args:
        num_good: successes.
        num_all: trials, at least 1.
    """
    z = 1.959964
    share = num_good / num_all
    centre = (share + z * z / (2 * num_all)) / (1 + z * z / num_all)
    spread = z / (1 + z * z / num_all) * (share * (1 - share) / num_all + z * z / (4 * num_all**2)) ** 0.5
    return Estimate(share, max(0.0, min(share, centre - spread)), min(1.0, max(share, centre + spread)))


def resamples(count: int, seed: int, num_resamples: int = 1000) -> NDArray[np.int64]:
    """Draw which of some samples are in each resample of the bootstrap (Efron 1979), (num_resamples, count)."""
    return np.random.default_rng(seed).integers(count, size=(num_resamples, count))


def interval_of(value: float, drawn: NDArray[Any]) -> Estimate:
    """Return a number with the middle 95 % of what it was in resamples."""
    low, high = np.quantile(drawn, [0.025, 0.975], method="inverted_cdf")  # which never subtracts infinities
    return Estimate(float(value), float(low), float(high))
