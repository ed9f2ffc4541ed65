"""Evidence of every kind as one table of log-factors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from circuits.evidence import Evidence


def dense_factors(evidence: Evidence, num_categories: int, dtype: torch.dtype) -> Tensor:  # shape: (B, D, C)
    """Return the log-factors of the values 0 .. num_categories - 1."""
    values = evidence.values
    if values is None:
        factors = evidence.factors(num_categories)[..., :num_categories].to(dtype)
    else:
        given = evidence.log_factors
        listed = torch.zeros_like(values, dtype=dtype) if given is None else given.to(dtype)
        factors = listed.new_full((*values.shape[:2], num_categories), -torch.inf)
        exists = (values >= 0) & (values < num_categories)  # other families have other values
        values, listed = values.long().masked_fill(~exists, 0), listed.masked_fill(~exists, -torch.inf)
        factors = factors.scatter_reduce(2, values, listed, "amax")
    if evidence.missing is None:
        return factors
    if evidence.otherwise is None:
        return factors.masked_fill(evidence.missing.unsqueeze(-1), 0.0)
    return torch.where(evidence.missing.unsqueeze(-1), evidence.otherwise.dense(num_categories, dtype), factors)


def unlisted_factors(evidence: Evidence, num_categories: int) -> Tensor:  # shape: (B, D, C)
    """Return the factors of evidence without listed values; missing variables are not looked at."""
    if evidence.log_factors is not None:
        return evidence.log_factors
    pairs = evidence.normal if evidence.bounds is None else evidence.bounds
    assert pairs is not None
    v = torch.arange(num_categories, dtype=pairs.dtype, device=pairs.device)
    first, second = pairs.split(1, -1)
    if evidence.bounds is not None:
        return torch.where((first < v) & (v <= second), 0.0, -torch.inf).to(pairs.dtype)
    return -0.5 * ((v - first) / second).square() - second.log() - 0.5 * math.log(2 * math.pi)
