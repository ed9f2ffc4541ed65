"""Fitting a circuit to a frozen denoiser: maximum likelihood on plain blocks, then the coupled objective."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from circuits.progress import progress_bar
from diffusion.errors import ArgumentError
from diffusion.head import CoupledHead
from diffusion.training.checkpoint import TrainingCheckpoint, TrainingCurve
from diffusion.training.logit_cache import CachedBatch, LogitCache


@dataclass(frozen=True, kw_only=True)
class CircuitTraining:
    """How a circuit is fitted on the coupled objective.

    Attributes:
        steps: optimizer updates.
        batch_size: noised blocks an update.
        learning_rate: of Adam on the log-weights, at the peak; it falls to 0 along a cosine.
        weighting: ``masked_mean``: every block's CLL divided by its number of masked tokens, which under the linear
            schedule has nearly the expectation of the ELBO, and less variance; ``uniform``: CLL per block.
        validate_every: updates between two held-out evaluations; the last update is always followed by one.
        checkpoint_every: updates between two checkpoints.
        seed: of the order of the examples.
    """

    steps: int = 800
    batch_size: int = 128
    learning_rate: float = 0.03
    weighting: Literal["masked_mean", "uniform"] = "masked_mean"
    validate_every: int = 200
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ArgumentError(f"learning_rate must be positive, got {self.learning_rate}")


def fit_coupled(
    head: CoupledHead,
    cache: LogitCache,
    held_out: LogitCache | None = None,
    *,
    config: CircuitTraining | None = None,
    checkpoint_path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> TrainingCurve:
    """Raise ``E[w(t) CLL]`` of a frozen denoiser's cached predictions over the head's parameters, in place.

    These are the circuit's weights and, where the head has one, its calibration.

    The gradient with respect to the log-weights is the flows at the true tokens minus the flows under the evidence (Li
    et al. 2026, arXiv 2603.00045, section 4). An interrupted run that is repeated with the same arguments continues,
    and ends like one that was not interrupted.

    Args:
        head: whose circuit and calibration are trained, with the head's normalisation.
        cache: predictions for training blocks.
        held_out: predictions for held-out blocks, for the curve.
        config: by default ``CircuitTraining()``.
        checkpoint_path: a ``.safetensors`` file to continue from, if it exists, and to write to.
        progress: draw a progress bar.

    Returns:
        The learning curve: loss in nats per masked token (``masked_mean``) or per block.

    Raises:
        ArgumentError: cache and circuit do not fit together, or the loss is not finite.
        CheckpointError: the checkpoint is corrupt or of another run.
    """
    config = config or CircuitTraining()
    if cache.block_length != head.block_length or {cache.vocab_size} != set(head.pc.circuit.num_categories):
        raise ArgumentError(
            f"cache: blocks of {cache.block_length} tokens from {cache.vocab_size} do not fit {head.pc.circuit} of "
            f"{sorted(set(head.pc.circuit.num_categories))} categories"
        )
    optimizer = torch.optim.Adam(head.parameters(), lr=config.learning_rate, betas=(0.9, 0.95))
    checkpoint = TrainingCheckpoint(
        Path(checkpoint_path) if checkpoint_path is not None else None,
        {
            "configuration": json.dumps(asdict(config)),
            "circuit": repr([(name, tuple(p.shape)) for name, p in head.named_parameters()]) + head.normalization,
            "cache": cache.digest,
            "held-out cache": "none" if held_out is None else held_out.digest,
        },
    )
    state = checkpoint.restore(head, optimizer)
    with progress_bar("fitting the circuit", config.steps, enabled=progress, completed=state.step) as advance:
        while state.step < config.steps:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * (1 + math.cos(math.pi * state.step / config.steps)) / 2
            loss = _loss(head, _training_batch(cache, head, config, state.step), config)
            optimizer.zero_grad()
            loss.backward()
            if not bool(loss.isfinite()):
                raise ArgumentError(
                    f"the loss became {float(loss)} at step {state.step}: lower learning_rate={config.learning_rate}"
                )
            optimizer.step()
            state = state.after_update(float(loss.detach()))
            is_last = state.step == config.steps
            if is_last or state.step % config.validate_every == 0:
                state = state.after_validation(
                    math.nan if held_out is None else coupled_loss(head, held_out, weighting=config.weighting)
                )
            if is_last or state.step % config.checkpoint_every == 0:
                checkpoint.write(head, optimizer, state)
            advance(note=f"{state.losses[-1] if state.losses else state.curve.train[-1]:.3f} nats/token")
    return state.curve


@torch.no_grad()
def coupled_loss(
    head: CoupledHead,
    cache: LogitCache,
    *,
    weighting: Literal["masked_mean", "uniform"] = "masked_mean",
    batch_size: int = 256,
) -> float:
    """Return the mean coupled loss over a whole cache, in nats per masked token (or per block with ``uniform``)."""
    config = CircuitTraining(weighting=weighting)
    total = 0.0
    for start in range(0, len(cache), batch_size):
        batch = cache.batch(slice(start, start + batch_size), head.pc.device)
        total += float(_loss(head, batch, config)) * len(batch.tokens)
    return total / len(cache)


def _loss(head: CoupledHead, batch: CachedBatch, config: CircuitTraining) -> Tensor:
    cll = batch.distribution(head).log_prob(batch.tokens)
    if config.weighting == "masked_mean":
        cll = cll / batch.masked.sum(-1).clamp_min(1)
    return -cll.mean()


def _training_batch(cache: LogitCache, head: CoupledHead, config: CircuitTraining, step: int) -> CachedBatch:
    """Read the batch of one step: every epoch is a permutation of its own, a function of seed and step alone."""
    per_epoch = max(1, len(cache) // config.batch_size)
    epoch, position = divmod(step, per_epoch)
    order = np.random.default_rng([config.seed, epoch]).permutation(len(cache))
    rows = np.sort(order[position * config.batch_size : (position + 1) * config.batch_size])
    return cache.batch(rows, head.pc.device)
