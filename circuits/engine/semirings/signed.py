"""Sums of products of signed numbers in log space."""

from __future__ import annotations

import torch
from torch import Tensor

from circuits.engine import logspace
from circuits.engine.semirings.base import Semiring


class SignedSemiring(Semiring):
    """Real numbers as (log of the positive terms, log of the negative terms), in two trailing entries.

    The two totals stay apart until the end, so an expectation is as accurate as the expectation of its magnitude.
    """

    is_linear = True

    def lift(self, log_values: Tensor) -> Tensor:
        """Read log-values as positive numbers."""
        return torch.stack([log_values, torch.full_like(log_values, -torch.inf)], -1)

    def times(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply: equal signs make positive terms, different ones negative terms."""
        positive = _log_add(left[..., 0] + right[..., 0], left[..., 1] + right[..., 1])
        negative = _log_add(left[..., 0] + right[..., 1], left[..., 1] + right[..., 0])
        return torch.stack([positive, negative], -1)

    def contract(self, log_weights: Tensor, x: Tensor, *, weights: Tensor | None = None) -> Tensor:
        """Log-sum-exp over i of both, as one batched GEMM."""
        return logspace.log_matmul(log_weights, x.flatten(2), weights=weights).unflatten(2, x.shape[2:])


def _log_add(left: Tensor, right: Tensor) -> Tensor:
    """Return log(exp(left) + exp(right)) with gradient 0, not NaN, where both are -inf."""
    possible = torch.maximum(left, right) > -torch.inf
    return torch.where(
        possible,
        torch.logaddexp(torch.where(possible, left, 0.0), torch.where(possible, right, 0.0)),
        -torch.inf,
    )
