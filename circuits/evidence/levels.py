"""On which variables evidence says nothing: those whose values all have one factor."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from circuits.evidence import Evidence


@torch.no_grad()
def even_factors(
    evidence: Evidence,
    num_categories: Tensor,  # shape: (D,)
) -> Tensor:  # shape: (B, D)
    """Return the finite log-factor that all values of a variable have, NaN where they differ; 0 of missing ones.

    Evidence that is relative to other evidence is even only where it and that say nothing at all.
    """
    num_values = num_categories.to(evidence.device)
    if evidence.reference is not None:
        sides = (even_factors(side, num_values) for side in (replace(evidence, reference=None), evidence.reference))
        are_silent = torch.stack([side == 0 for side in sides]).all(0)
        return torch.where(are_silent, 0.0, torch.nan)
    if evidence.bounds is not None:
        even = _of_bounds(evidence.bounds, num_values)
    elif evidence.log_factors is not None and evidence.log_factors.shape[-1]:
        even = _of_factors(evidence.log_factors, evidence.values, num_values)
    else:
        even = torch.full((evidence.batch_size, evidence.num_vars), torch.nan, device=evidence.device)
    if evidence.missing is None:
        return even
    rest = torch.zeros_like(even) if evidence.otherwise is None else even_factors(evidence.otherwise, num_values)
    return torch.where(evidence.missing, rest, even)


def _of_bounds(bounds: Tensor, num_values: Tensor) -> Tensor:
    """Return 0 where all values lie within the bounds, (B, D, 2)."""
    lower, upper = bounds.unbind(-1)
    is_free = (lower == -torch.inf) & (upper == torch.inf)
    holds_all = (num_values > 0) & (lower < 0) & (upper >= num_values - 1)
    return torch.where(is_free | holds_all, 0.0, torch.nan)


def _of_factors(log_factors: Tensor, values: Tensor | None, num_values: Tensor) -> Tensor:
    """Return the one factor of dense or listed values; values that a variable does not have do not count."""
    count, limit = log_factors.shape[-1], num_values.unsqueeze(-1)
    least = greatest = log_factors
    if values is not None:  # what is listed above -inf is distinct, so that counting says whether it is everything
        counts = (log_factors > -torch.inf) & (values >= 0) & (values < limit)
        is_whole = counts.sum(-1) == num_values
    else:
        counts = torch.arange(count, device=log_factors.device) < limit
        is_whole = (num_values <= count).expand(log_factors.shape[:2])
    if values is not None or not bool((num_values == count).all()):
        least, greatest = log_factors.masked_fill(~counts, torch.inf), log_factors.masked_fill(~counts, -torch.inf)
    low, high = least.amin(-1), greatest.amax(-1)
    is_even = is_whole & (num_values > 0) & (low == high) & low.isfinite()
    return torch.where(is_even, low, torch.nan)
