"""Explanations at a temperature: semirings between the log semiring, which draws, and the best explanation."""

from __future__ import annotations

import torch
from torch import Tensor

from circuits.algebra import logspace
from circuits.algebra.semirings import ChoosingSemiring, LogSemiring, MaxSemiring
from circuits.arguments import checked_temperature
from circuits.randomness import Source


class BestSemiring(MaxSemiring):
    """The maximum over what is asked about: a missing variable is summed out, as the constant 1."""

    adds_up = True


class TemperedSemiring(ChoosingSemiring):
    """Explanations at a temperature: plus is ``tau log sum exp(. / tau)``, between the log and the max semiring.

    An explanation, latents and leaves together, is a product of weights, and so its power 1 / tau is one of theirs:
    explanations are drawn exactly from ``p(x, z | e)^(1 / tau)``. What is missing is summed out as it is. At tau = 1 it
    is the log semiring, towards 0 it becomes the max semiring.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def contract(self, log_weights: Tensor, x: Tensor, *, weights: Tensor | None = None) -> Tensor:
        """Tempered log-sum-exp over i, as one batched GEMM."""
        return logspace.log_matmul(log_weights / self.temperature, x / self.temperature) * self.temperature

    def mix(self, log_table: Tensor, values: Tensor, log_factors: Tensor, *, table: Tensor | None = None) -> Tensor:
        """Tempered log-sum-exp over the listed rows."""
        tau = self.temperature
        listed, index = torch.unique(values, return_inverse=True)
        return logspace.log_mix(log_table[listed] / tau, index, log_factors / tau) * tau

    def choose(self, scores: Tensor, generator: Source) -> Tensor:
        """Draw one index per row of ``scores`` (n, I) with probability proportional to exp(score / tau): (n,)."""
        peak = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
        return LogSemiring().choose((scores - peak) / self.temperature, generator)


def choosing_semiring(temperature: float) -> ChoosingSemiring:
    """Return the semiring whose choices are explanations at a temperature tau >= 0; 0: the best."""
    checked_temperature(temperature)
    if temperature == 1:
        return LogSemiring()
    return TemperedSemiring(temperature) if temperature > 0 else BestSemiring()
