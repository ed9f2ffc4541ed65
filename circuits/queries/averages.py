"""Averages under the posterior over children: the expectation and entropy semirings.

A value carries the logarithm of its mass and an average of a quantity over that mass, rather than mass times quantity
as in Eisner 2002: averages neither underflow nor need a sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

from circuits.algebra import logspace
from circuits.algebra.semirings import Semiring


def log_matmul_average(
    log_weights: Tensor,  # shape: (F, O, I)
    x: Tensor,  # shape: (F, I, B)
    average: Tensor,  # shape: (F, I, B)
    *,
    weights: Tensor | None = None,  # shape: (F, O, I)
    edge: Tensor | None = None,  # shape: (F, O, I)
) -> tuple[Tensor, Tensor]:
    """Return the log-space product, (F, O, B), and the average over its terms of ``average_i + edge_oi``, (F, O, B).

    Both are differentiable; the average is 0 where no term is possible. Averages are ignored where ``x`` is -inf, a
    quantity per edge where the weight is 0. ``weights`` are exp(log_weights), where the caller has them (then without a
    gradient).
    """
    out = logspace.log_matmul(log_weights, x, weights=weights)
    if weights is None or log_weights.requires_grad:
        weights = log_weights.exp()
    possible = x > -torch.inf
    peak = logspace.column_peak(x.detach().clone())
    scaled = torch.where(possible, (torch.where(possible, x, 0.0) - peak).exp(), 0.0)
    average = torch.where(possible, average, 0.0)
    total = torch.matmul(weights, scaled)
    numerator = torch.matmul(weights, scaled * average)
    if edge is not None:
        edge = torch.where(log_weights > -torch.inf, edge, 0.0)
        numerator = numerator + torch.matmul(weights * edge, scaled)
    low = total < logspace.smallest_differentiable_sum(x.dtype, x.shape[1])
    result = torch.where(low, 0.0, numerator) / torch.where(low, 1.0, total)
    f, o, b = (low & (out > -torch.inf)).nonzero(as_tuple=True)
    if len(f):
        terms = log_weights.expand(len(x), -1, -1)[f, o] + x[f, :, b]
        quantity = average[f, :, b]
        if edge is not None:
            quantity = quantity + edge.expand(len(x), -1, -1)[f, o]
        result = result.index_put((f, o, b), (torch.softmax(terms, 1) * quantity).sum(1))
    return out, result


class EntropySemiring(Semiring):
    """Log-mass and entropy of the posterior over the choices below a unit (Hernando, Crespi, Cybenko 2005).

    The trailing dimension holds (log-mass, entropy in nats). Choices below a product unit are independent, so entropies
    add up; at a sum unit the entropy is that of the choice plus the average entropy of what was chosen.
    """

    def lift(self, log_values: Tensor) -> Tensor:
        """Read log-values as masses of single outcomes, of entropy 0."""
        return torch.stack([log_values, torch.zeros_like(log_values)], -1)

    def times(self, left: Tensor, right: Tensor) -> Tensor:
        """Add log-masses and entropies."""
        return left + right

    def product(self, factors: Tensor) -> Tensor:
        """Add log-masses and entropies along dimension 1."""
        return factors.sum(1)

    def contract(self, log_weights: Tensor, x: Tensor, *, weights: Tensor | None = None) -> Tensor:
        """Return the log-mass of the mixture and ``log-mass + average of (entropy_i - log-mass_i - log w_oi)``."""
        log_mass, entropy = x[..., 0], x[..., 1]
        peak = logspace.column_peak(log_mass.detach().clone())  # keeps the cancelling log-masses small
        surprise = entropy - torch.where(log_mass > -torch.inf, log_mass - peak, 0.0)
        edge = -torch.where(log_weights > -torch.inf, log_weights, 0.0)
        out, average = log_matmul_average(log_weights, log_mass, surprise, weights=weights, edge=edge)
        possible = out > -torch.inf
        return torch.stack([out, torch.where(possible, torch.where(possible, out, 0.0) - peak + average, 0.0)], -1)
