"""Latents of a circuit under an automaton: one configuration per column, and the path that the automaton takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.queries.latents import LatentChoice


@dataclass(frozen=True, eq=False)
class ConstrainedLatentChoice(LatentChoice):
    """Latents together with a path of the automaton, n columns; given both the variables are independent.

    Attributes:
        labels: which set of values the path reads every variable with, int64 (n, D).
        classes: int64 (V,), the class of every value.
        log_label: (M, K), the log-weight with which a set reads a class of values; the set M reads everything.
    """

    labels: Tensor
    classes: Tensor
    log_label: Tensor

    def log_weights(self, values: Tensor | None = None) -> Tensor:
        """Return ``log p(x_i = v | z)`` where the path allows v, else -inf, of all values or of some.

        Args:
            values: int64 (n, D, k); None: all.

        Returns:
            (n, D, C) or (n, D, k).
        """
        log_weights = super().log_weights(values)
        return log_weights + self.log_path(values, slice(None), log_weights.shape[-1])

    def log_path(self, values: Tensor | None, columns: Tensor | slice, num_values: int) -> Tensor:
        """Return the log-weights with which some columns' paths read values (n, D, k), or all: (n, D, num_values)."""
        if values is None:
            values = torch.arange(num_values, device=self.classes.device)
        read = torch.cat([self.log_label, torch.zeros_like(self.log_label[:1])])
        classes = self.classes[values.clamp_max(len(self.classes) - 1)]
        return read[self.labels[columns].unsqueeze(-1), classes]
