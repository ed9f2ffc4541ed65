"""Training of the small models: one function for those of plain blocks, one for those that are told a prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from circuits.arguments import checked_count
from diffusion.decoding.baselines.causal import CausalHead
from diffusion.decoding.baselines.mixture import MixtureHead
from diffusion.decoding.baselines.models import AutoregressiveModel
from diffusion.denoisers.base import Denoiser
from diffusion.errors import ArgumentError
from diffusion.prediction import Prediction


def fit_autoregressive(
    model: AutoregressiveModel,
    blocks: Tensor,  # shape: (N, L)
    *,
    steps: int = 300,
    batch_size: int = 64,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> list[float]:
    """Fit a model of plain blocks by maximum likelihood (Adam), in place.

    Args:
        model: to be fitted.
        blocks: int64.
        steps: updates.
        batch_size: blocks an update.
        learning_rate: of the first update; it falls to 0 along a line.
        seed: of the choice of blocks.

    Returns:
        The loss of every update, in nats per token.

    Raises:
        ArgumentError: blocks or settings that do not fit.
    """
    _check_blocks(blocks, model.block_length, model.vocab_size)
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        batch = blocks[_rows(blocks, batch_size, generator)]
        return -model.log_conditionals(batch).gather(2, batch.unsqueeze(-1)).mean()

    return _descend(model.parameters(), loss, steps, learning_rate)


def fit_conditional(
    head: CausalHead | MixtureHead,
    denoiser: Denoiser,
    blocks: Tensor,  # shape: (N, L)
    *,
    steps: int = 300,
    batch_size: int = 64,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> list[float]:
    """Fit a head to blocks with random masks, told what a frozen denoiser says of them, in place.

    The share of masks is uniform from 0 to 1, with at least one mask a block; the objective is ``log p(x_M | x_O, q)``.

    Args:
        head: to be fitted.
        denoiser: is asked about every batch, and not trained.
        blocks: int64, whole texts of the denoiser.
        steps: updates.
        batch_size: blocks an update.
        learning_rate: of the first update; it falls to 0 along a line.
        seed: of the choice of blocks and masks.

    Returns:
        The loss of every update, in nats per masked token.

    Raises:
        ArgumentError: blocks or settings that do not fit.
    """
    _check_blocks(blocks, head.block_length, head.vocab_size)
    if denoiser.spec.vocab_size != head.vocab_size:
        raise ArgumentError(f"head: expected one over {denoiser.spec.vocab_size} tokens, got {head.vocab_size}")
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        batch = blocks[_rows(blocks, batch_size, generator)]
        share, where = (torch.rand(len(batch), n, generator=generator) for n in (1, batch.shape[1]))
        masked = ((where < share) | (where == where.amin(1, keepdim=True))).to(batch.device)
        tokens = batch.masked_fill(masked, denoiser.spec.mask_id)
        with torch.no_grad():
            prediction = Prediction.ask(denoiser, tokens)
        return -head.distribution(prediction, batch, masked).log_prob(batch).sum() / masked.sum()

    return _descend(head.parameters(), loss, steps, learning_rate)


def _descend(
    parameters: Iterable[nn.Parameter], loss_of_batch: Callable[[], Tensor], steps: int, learning_rate: float
) -> list[float]:
    checked_count("steps", steps)
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        loss = loss_of_batch()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ArgumentError(
                f"blocks: the loss became {value} at step {step}; lower learning_rate={learning_rate}, or leave "
                "out blocks that the denoiser calls impossible"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(value)
    return losses


def _rows(blocks: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(len(blocks), (batch_size,), generator=generator).to(blocks.device)


def _check_blocks(blocks: Tensor, length: int, vocab_size: int) -> None:
    if blocks.dim() != 2 or blocks.dtype != torch.int64 or not len(blocks) or blocks.shape[1] != length:
        raise ArgumentError(f"blocks: expected int64 (N, {length}), got {blocks.dtype} {tuple(blocks.shape)}")
    if not 0 <= int(blocks.min()) <= int(blocks.max()) < vocab_size:
        raise ArgumentError(f"blocks: expected ids from 0 to {vocab_size - 1}, got {int(blocks.max())}")
