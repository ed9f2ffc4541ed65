"""Entropy regularisation of the M-step: weights that fit the flows and stay spread out."""

from __future__ import annotations

import torch
from torch import Tensor

_NEWTON_STEPS = 60
_LAMBERT_STEPS = 6


def entropic_maximum(log_shares: Tensor, is_possible: Tensor, strength: float, axis: int) -> Tensor:
    """Return the logarithm of ``argmax_w sum_c p_c log w_c + tau H(w)``, with H(w) = - sum_c w_c log w_c.

    The derivatives are equal where ``p_c / w_c - tau log w_c = mu``. So ``log w_c = W(p_c / tau exp(mu / tau)) - mu /
    tau`` with Lambert's W, and mu is the number for which the weights sum to 1. Their sum is convex in mu and falls, so
    Newton's method finds it from below. This is the M-step of Liu and Van den Broeck 2021 ("Tractable Regularization of
    Probabilistic Circuits") for the entropy of the choices of single sum units.

    Args:
        log_shares: log p, whose exponentials sum to 1 along ``axis``, as those of w do.
        is_possible: where weights may be positive; elsewhere p is 0 and w stays so.
        strength: tau > 0, in nats of likelihood per nat of entropy.
        axis: of p and w.
    """
    dtype = log_shares.dtype
    log_p = log_shares.double().masked_fill(~is_possible, -torch.inf)
    nothing = log_p == -torch.inf
    scaled = log_p - torch.tensor(strength, dtype=torch.float64).log()  # log (p / tau)
    mu = 1 - strength * log_p.amax(axis, keepdim=True)
    log_w = log_p
    for _ in range(_NEWTON_STEPS):
        argument = (scaled + mu / strength).masked_fill(nothing, 0.0)
        lambert = _lambert_of_exp(argument).masked_fill(nothing, 0.0)
        log_w = (lambert - mu / strength).masked_fill(~is_possible, -torch.inf)
        w = log_w.exp()
        excess = w.sum(axis, keepdim=True) - 1
        slope = (w / (1 + lambert)).sum(axis, keepdim=True) / strength
        mu = mu + excess / slope
        if float(excess.abs().max()) < 1e-13:
            break
    return torch.log_softmax(log_w, axis).to(dtype)


def _lambert_of_exp(a: Tensor) -> Tensor:
    """Return ``W(e^a)``, the t > 0 with ``t + log t = a``, by Newton's method on ``log t``."""
    log_t = torch.where(a < 1, a - torch.nn.functional.softplus(a - 1) * 0.5, a.clamp_min(1).log())
    for _ in range(_LAMBERT_STEPS):
        t = log_t.exp()
        log_t = log_t - (t + log_t - a) / (1 + t)
    return log_t.exp()
