"""Losses of masked tokens, window by window, under several masks, of a denoiser, a circuit and a head.

The masks of one window are nested: it has one order of its places, and under every mask the last of them are masked, as
many as the mask counts. So one pass from the most masked to the last place has the losses one token at a time of all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import circuits as ct
import diffusion as df

Losses = dict[str, Tensor]
"""By mask: nats per masked token, float64 (B,)."""


@dataclass(frozen=True)
class Masks:
    """Nested masks of some windows.

    Attributes:
        order: of the places of each window, int64 (B, L).
        counts: by the name of a mask: how many of the last places of each order are masked, int64 (B,), at least 1.
    """

    order: Tensor
    counts: dict[str, Tensor]

    @classmethod
    def at_random(cls, num_windows: int, length: int, ratios: tuple[float, ...], *, seed: int) -> Masks:
        """Draw the order of each window; its masks are named by their ratios."""
        order = torch.rand(num_windows, length, generator=torch.Generator().manual_seed(seed)).argsort(1)
        return cls(
            order,
            {str(ratio): torch.full((num_windows,), df.masking.count_masked(length, ratio)) for ratio in ratios},
        )

    @classmethod
    def of(cls, masked: Tensor, name: str, *, seed: int) -> Masks:
        """Return one mask, bool (N, L), with its places in random order."""
        keys = torch.rand(masked.shape, generator=torch.Generator().manual_seed(seed))
        return cls((keys + masked).argsort(1), {name: masked.sum(1)})

    def rows(self, rows: slice) -> Masks:
        """Return those of some windows."""
        return Masks(self.order[rows], {name: count[rows] for name, count in self.counts.items()})

    def masked(self, count: Tensor) -> Tensor:
        """Return where the last places of each order are, as many as a count (B,) says, bool (B, L)."""
        length = self.order.shape[1]
        is_last = torch.arange(length) >= length - count.unsqueeze(1)
        return torch.zeros_like(is_last).scatter(1, self.order, is_last)

    def losses(self, nats: Callable[[Tensor], Tensor]) -> Losses:
        """Return nats (B,) of a mask, bool (B, L), by its name and divided by the number of its places."""
        return {name: nats(self.masked(count)).double() / count for name, count in self.counts.items()}


def one_step_losses(denoiser: df.Denoiser, windows: Tensor, masks: Masks, forbidden: tuple[int, ...]) -> Losses:
    """Return the losses of the denoiser alone, all masked tokens independently."""

    def nats(masked: Tensor) -> Tensor:
        said = asked(denoiser, windows, masked, forbidden).log_prob_of(windows[:, -masked.shape[1] :])
        return -said.double().masked_fill(~masked, 0.0).sum(1)

    return masks.losses(nats)


def circuit_losses(pc: ct.CompiledCircuit, categories: Tensor, masks: Masks) -> Losses:
    """Return the losses of the circuit's own conditional."""
    return masks.losses(lambda masked: -ct.queries.log_conditional(pc, categories, ~masked))


def head_losses(
    log_likelihood: Callable[[df.Prediction, Tensor, Tensor], Tensor],
    denoiser: df.Denoiser,
    windows: Tensor,
    masks: Masks,
    forbidden: tuple[int, ...],
) -> Losses:
    """Return the losses of what a head, given prediction, block and mask, says in one step."""

    def nats(masked: Tensor) -> Tensor:
        said = asked(denoiser, windows, masked, forbidden, features=True)
        return -log_likelihood(said, windows[:, -masked.shape[1] :], masked)

    return masks.losses(nats)


def sequential_losses(denoiser: df.Denoiser, windows: Tensor, masks: Masks, forbidden: tuple[int, ...]) -> Losses:
    """Return the losses of the denoiser asked one token at a time, the true tokens before it revealed."""
    order, block = masks.order, windows[:, -masks.order.shape[1] :]
    most = max(int(count.max()) for count in masks.counts.values())
    steps = []
    for left in range(most, 0, -1):
        masked = masks.masked(torch.full((len(order),), left))
        said = asked(denoiser, windows, masked, forbidden).log_prob_of(block).double()
        steps.append(-said.gather(1, order[:, -left, None]).squeeze(1))
    total = torch.stack(steps).flip(0).cumsum(0)  # of the last 1, 2, ... places
    return {name: total.gather(0, count[None] - 1)[0] / count for name, count in masks.counts.items()}


def asked(
    denoiser: df.Denoiser, windows: Tensor, masked: Tensor, forbidden: tuple[int, ...], *, features: bool = False
) -> df.Prediction:
    """Ask a denoiser about the last block with ``masked`` (B, L) masked."""
    start = windows.shape[1] - masked.shape[1]
    canvas = torch.cat([windows[:, :start], windows[:, start:].masked_fill(masked, denoiser.spec.mask_id)], 1)
    window = (start, canvas.shape[1])
    return df.Prediction.ask(denoiser, canvas, window=window, features=features, forbidden_ids=forbidden)
