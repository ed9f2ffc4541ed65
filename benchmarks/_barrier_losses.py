"""Losses of masked tokens, window by window, at several mask ratios, under a denoiser, a circuit and a head.

The masks of one window are nested: it has one random order of its places, and at every ratio the last of them are
masked. So one pass from the most masked to the last place has the losses one token at a time at all ratios.
"""

from __future__ import annotations

import torch
from torch import Tensor

import circuits as ct
import diffusion as df

Losses = dict[float, Tensor]
"""By mask ratio: nats per masked token, float64 (B,)."""


def orders(num_windows: int, length: int, *, seed: int) -> Tensor:
    """Draw the order of the places of each window, int64 (N, L)."""
    return torch.rand(num_windows, length, generator=torch.Generator().manual_seed(seed)).argsort(1)


def masks(order: Tensor, ratio: float) -> Tensor:
    """Return where the last places of each order are, as many as a ratio stands for, bool (B, L)."""
    count = df.masking.count_masked(order.shape[1], ratio)
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, order.shape[1] - count :], True)


def one_step_losses(
    denoiser: df.Denoiser, windows: Tensor, order: Tensor, ratios: tuple[float, ...], forbidden: tuple[int, ...]
) -> Losses:
    """Return the losses of the denoiser alone, all masked tokens independently."""
    losses = {}
    for ratio in ratios:
        masked = masks(order, ratio)
        said = asked(denoiser, windows, masked, forbidden).log_prob_of(windows[:, -order.shape[1] :])
        losses[ratio] = _per_token(-said.double().masked_fill(~masked, 0.0).sum(1), masked)
    return losses


def circuit_losses(pc: ct.CompiledCircuit, categories: Tensor, order: Tensor, ratios: tuple[float, ...]) -> Losses:
    """Return the losses of the circuit's own conditional."""
    found = {ratio: masks(order, ratio) for ratio in ratios}
    return {
        ratio: _per_token(-ct.queries.log_conditional(pc, categories, ~masked), masked)
        for ratio, masked in found.items()
    }


def head_losses(
    head: df.CoupledHead, denoiser: df.Denoiser, windows: Tensor, order: Tensor, ratios: tuple[float, ...]
) -> Losses:
    """Return the losses of the product of a head's circuit and the denoiser's prediction in one step."""
    forbidden, losses = head.spec_for(denoiser.spec).forbidden_ids, {}
    for ratio in ratios:
        masked = masks(order, ratio)
        said = asked(denoiser, windows, masked, forbidden, features=head.needs_features)
        block = windows[:, -order.shape[1] :]
        losses[ratio] = _per_token(-head.conditional_log_likelihood(said, block, masked), masked)
    return losses


def sequential_losses(
    denoiser: df.Denoiser, windows: Tensor, order: Tensor, ratios: tuple[float, ...], forbidden: tuple[int, ...]
) -> Losses:
    """Return the losses of the denoiser asked one token at a time, the true tokens before it revealed."""
    length, block = order.shape[1], windows[:, -order.shape[1] :]
    counts = {ratio: df.masking.count_masked(length, ratio) for ratio in ratios}
    steps: list[Tensor] = []
    for step in range(length - max(counts.values()), length):
        masked = torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, step:], True)
        said = asked(denoiser, windows, masked, forbidden).log_prob_of(block).double()
        steps.append(-said.gather(1, order[:, step : step + 1]).squeeze(1))
    return {ratio: torch.stack(steps[-count:]).mean(0) for ratio, count in counts.items()}


def asked(
    denoiser: df.Denoiser, windows: Tensor, masked: Tensor, forbidden: tuple[int, ...], *, features: bool = False
) -> df.Prediction:
    """Ask a denoiser about the last block with ``masked`` (B, L) masked."""
    start = windows.shape[1] - masked.shape[1]
    canvas = torch.cat([windows[:, :start], windows[:, start:].masked_fill(masked, denoiser.spec.mask_id)], 1)
    window = (start, canvas.shape[1])
    return df.Prediction.ask(denoiser, canvas, window=window, features=features, forbidden_ids=forbidden)


def _per_token(loss: Tensor, masked: Tensor) -> Tensor:
    return loss.double() / masked.sum(1)
