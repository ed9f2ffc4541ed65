"""Pearson's test of samples against a table of probabilities."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_RARE = 1e-4
_LEAST_EXPECTED = 5.0


def assert_distributed(draw: Callable[[int], Tensor], log_probs: Tensor, num_samples: int) -> None:
    """Assert that S samples, (S, B, D), follow normalised tables, (B, C_0, ..., C_D-1).

    Among thousands of right samplers some draw samples that look wrong. So what looks wrong is drawn again, in ten
    times the number, and only then counts: one wrong verdict in 1e8 remains, and a wrong sampler stays wrong.
    """
    suspects = [b for b, p in enumerate(_p_values(draw(num_samples), log_probs)) if p < _RARE]
    if suspects:
        p_values = _p_values(draw(11 * num_samples)[num_samples:], log_probs)
        worst = min(p_values[b] for b in suspects)
        assert worst >= _RARE, f"the samples do not follow the distribution: chi-square test with p = {worst:.3g}"


def _p_values(samples: Tensor, log_probs: Tensor) -> list[float]:
    return [_p_value(samples[:, b], log_probs[b].contiguous()) for b in range(len(log_probs))]


def _p_value(samples: Tensor, log_probs: Tensor) -> float:
    """Return the probability of a fit as bad as this one or worse; cells with small expectations are pooled."""
    in_range = (samples >= 0) & (samples < torch.tensor(log_probs.shape))
    assert bool(in_range.all()), f"a sample has a value that its variable does not have: {samples[~in_range.all(1)][0]}"
    cells = (samples * torch.tensor(log_probs.stride())).sum(1)
    counts = torch.bincount(cells, minlength=log_probs.numel()).double()
    expected = log_probs.flatten().exp() * len(samples)
    if bool((counts[expected == 0] > 0).any()):
        return 0.0
    small = expected < _LEAST_EXPECTED
    pooled = [torch.cat([table[~small], table[small].sum().reshape(1)]) for table in (counts, expected)]
    counts, expected = (table[pooled[1] >= _LEAST_EXPECTED] for table in pooled)
    if len(counts) < 2:
        return 1.0
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, statistic / 2))
