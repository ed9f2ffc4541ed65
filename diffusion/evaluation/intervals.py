"""Confidence intervals."""

from __future__ import annotations

from diffusion.evaluation.gap import Estimate


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
