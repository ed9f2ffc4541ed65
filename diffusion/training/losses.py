"""The coupled loss of a head: of a batch's blocks, of a whole cache, and apart by the share that is masked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from circuits.arguments import checked_count
from circuits.learning.distributed import Processes
from diffusion.errors import ArgumentError
from diffusion.head import CoupledHead
from diffusion.training.cached import CachedBatch
from diffusion.training.logit_cache import LogitCache

Weighting = Literal["masked_mean", "uniform"]
ALONE = Processes()


@torch.no_grad()
def coupled_loss(
    head: CoupledHead,
    cache: LogitCache,
    *,
    weighting: Weighting = "masked_mean",
    batch_size: int = 256,
    processes: Processes = ALONE,
) -> float:
    """Return the coupled loss over a whole cache: the mean over its blocks, whatever ``batch_size`` is.

    Args:
        head: whose circuit and calibration are measured.
        cache: predictions for noised blocks.
        weighting: ``masked_mean``: nats per masked token, over the blocks that have a mask (NaN if none has);
            ``uniform``: nats per block, over all of them.
        batch_size: blocks at a time.
        processes: those that call this together; each measures its share.
    """
    check_weighting(weighting)
    own = range(processes.rank * batch_size, len(cache), processes.size * batch_size)
    batches = (_batch(head, cache, at, batch_size) for at in own)
    return mean_loss(head, batches, weighting, processes)


@torch.no_grad()
def mean_loss(
    head: CoupledHead, batches: Iterable[CachedBatch], weighting: Weighting, processes: Processes = ALONE
) -> float:
    """Return the mean coupled loss of all blocks that have one, in the batches of all processes; NaN if none has."""
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        losses = _block_losses(head, batch, weighting)
        sums += torch.tensor([float(losses.double().sum()), len(losses)], dtype=torch.float64)
    total, num_blocks = processes.summed(sums).tolist()
    return total / num_blocks if num_blocks else math.nan


@torch.no_grad()
def losses_by_ratio(
    head: CoupledHead, cache: LogitCache, *, num_bins: int = 4, batch_size: int = 256
) -> tuple[float, ...]:
    """Return the coupled loss per masked token apart by the share of a block that is masked: one number hides a head
    that is good where much is masked and bad where little is.

    Args:
        head: whose circuit and conditioners are measured.
        cache: predictions for noised blocks.
        num_bins: bins of equal width, (0, 1/n], (1/n, 2/n], ...
        batch_size: blocks at a time.

    Returns:
        Nats per masked token, each the mean over the blocks of a bin; NaN for a bin without blocks.
    """
    checked_count("num_bins", num_bins)
    ratios = torch.from_numpy(np.array(cache.masked)).double().mean(1)
    losses = [
        _block_losses(head, _batch(head, cache, start, batch_size), "masked_mean")
        for start in range(0, len(cache), batch_size)
    ]
    loss, ratios = torch.cat(losses).double().cpu(), ratios[ratios > 0]
    bins = (ratios * num_bins).ceil().long() - 1
    return tuple(float(loss[bins == number].mean()) for number in range(num_bins))


def per_block(nats: Tensor, masked: Tensor, weighting: Weighting) -> Tensor:
    """Return what each block counts of its nats, (B,), in the objective; those without a mask may count nothing."""
    if weighting == "uniform":
        return nats
    num_masked = masked.sum(-1)
    has_mask = num_masked > 0
    return nats[has_mask] / num_masked[has_mask]


def check_weighting(weighting: str) -> None:
    """Raise ArgumentError unless it is one of :data:`Weighting`."""
    if weighting not in get_args(Weighting):
        raise ArgumentError(f"weighting: expected one of {', '.join(get_args(Weighting))}, got {weighting!r}")


def _batch(head: CoupledHead, cache: LogitCache, start: int, batch_size: int) -> CachedBatch:
    rows = slice(start, start + batch_size)
    return cache.batch(rows, head.pc.device, masked_only=not head.needs_observed)


def _block_losses(head: CoupledHead, batch: CachedBatch, weighting: Weighting) -> Tensor:
    """Return the loss of every block that has one: (B,), or fewer, for a block without a mask has none per token."""
    return per_block(-batch.distribution(head).log_prob(batch.tokens), batch.masked, weighting)
