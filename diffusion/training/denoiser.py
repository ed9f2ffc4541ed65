"""Training a denoiser from scratch: the masked-diffusion objective on the last block of random windows."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from circuits.digests import digest
from circuits.learning.checkpoint import Checkpoint
from circuits.learning.loop import ModuleTraining, Plan, run
from circuits.precision import own_precision
from diffusion.denoisers.base import Denoiser
from diffusion.denoisers.questions import check_logits
from diffusion.denoisers.transformer import TransformerDenoiser
from diffusion.errors import ArgumentError
from diffusion.text.corpus import random_windows, windows
from diffusion.training.curve import TrainingCurve
from diffusion.training.masking import ScheduleName, mask_tokens, sample_times, schedule

__all__ = ["DenoiserTraining", "TrainingCurve", "held_out_loss", "train_denoiser"]


@dataclass(frozen=True, kw_only=True)
class DenoiserTraining:
    """How a denoiser is trained.

    Attributes:
        steps: optimizer updates.
        batch_size: windows an update.
        learning_rate: the peak; it rises linearly over ``warmup_steps`` and then falls to 0 along a cosine.
        warmup_steps: updates until the peak.
        weight_decay: of matrices; vectors do not decay.
        gradient_clip: largest norm of the gradient.
        schedule: which noise levels are drawn.
        loss: ``masked_mean``: the negative log-likelihood per masked token of a sequence, averaged over the sequences
            that have a mask, which under the linear schedule has nearly the expectation of the bound, and less
            variance; ``elbo``: the bound itself.
        short_context_probability: share of the updates in which the left part of the context is missing, so that the
            model also knows the beginnings of texts.
        precision: ``auto`` is bfloat16 matrix products where the hardware has them, with float32 for the rest.
        validate_every: updates between two held-out evaluations; the last update is always followed by one.
        validation_windows: held-out windows an evaluation.
        checkpoint_every: updates between two checkpoints: the most that an interruption loses.
        seed: of windows, noise levels and masks.
    """

    steps: int = 5000
    batch_size: int = 24
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    schedule: ScheduleName = "linear"
    loss: Literal["masked_mean", "elbo"] = "masked_mean"
    short_context_probability: float = 0.1
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    validate_every: int = 500
    validation_windows: int = 512
    checkpoint_every: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "validate_every", "validation_windows", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}: expected an integer >= 1, got {getattr(self, name)}")
        for name in ("steps", "warmup_steps", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ArgumentError(f"{name}: expected an integer >= 0, got {getattr(self, name)}")
        for name in ("learning_rate", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise ArgumentError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        if not 0 <= self.short_context_probability <= 1:
            raise ArgumentError(
                f"short_context_probability: expected a probability, got {self.short_context_probability}"
            )
        schedule(self.schedule)
        if self.loss not in ("masked_mean", "elbo"):
            raise ArgumentError(f"loss: expected masked_mean or elbo, got {self.loss!r}")


@own_precision
def train_denoiser(
    model: TransformerDenoiser,
    train_tokens: Tensor,  # shape: (N,)
    held_out_tokens: Tensor | None = None,  # shape: (M,)
    *,
    config: DenoiserTraining | None = None,
    checkpoint_path: str | os.PathLike[str] | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> TrainingCurve:
    """Train a denoiser in place to fill in the last block of a window, given the context before it.

    Every update draws random windows of ``context_length + block_length`` tokens, leaves the context visible, masks
    block tokens at random and lowers the cross-entropy at the masked ones with AdamW.

    All randomness of an update derives from the seed and the update's number. So a run that was interrupted anywhere
    and is started again from the same weights, with the same arguments and ``checkpoint_path``, ends like one that was
    not, on one machine. A model with other weights, but for those in the checkpoint, is refused.

    Args:
        model: the denoiser, on the device to train on.
        train_tokens: token stream from ``join_documents``, int64, shape (N,).
        held_out_tokens: token stream for the held-out curve, shape (M,).
        config: by default ``DenoiserTraining()``.
        checkpoint_path: a ``.safetensors`` file to continue from, if it exists, and to write to.
        log_dir: a folder for TensorBoard, written at every entry of the curve; None: none.
        progress: draw a progress bar on standard error.

    Returns:
        The learning curve, from the first update on, also when the run was continued.

    Raises:
        CheckpointError: the checkpoint is corrupt, or of another model, configuration or text, or of a run that started
            from other weights.
        Interrupted: long work was asked to stop, see :func:`circuits.progress.request_stop`.
        CorpusError: a token stream is shorter than a window.
        ArgumentError: a token is outside the model's vocabulary.
    """
    config = config or DenoiserTraining()
    checkpoint = Checkpoint(
        checkpoint_path,
        {
            "configuration": json.dumps(asdict(config)),
            "model": json.dumps(model.config.to_dict()),
            "training text": digest(train_tokens),
            "held-out text": digest(held_out_tokens),
        },
    )
    held_out = None
    if held_out_tokens is not None:
        held_out = windows(held_out_tokens, length=model.config.span, max_windows=config.validation_windows)
        held_out = held_out.to(model.device)
    plan = Plan(
        num_updates=config.steps,
        entries=range(0, config.steps + 1, config.validate_every),
        checkpoint_every=config.checkpoint_every,
        log_dir=log_dir,
        title="training the denoiser",
    )
    training = _Training(model, train_tokens, held_out, config)
    return TrainingCurve.of(run(training, plan, checkpoint, progress=progress)[0])


class _Training(ModuleTraining):
    """Updates of a denoiser on random windows of a token stream."""

    def __init__(
        self, model: TransformerDenoiser, stream: Tensor, held_out: Tensor | None, config: DenoiserTraining
    ) -> None:
        super().__init__(model, _optimizer(model, config))
        self.denoiser, self._stream, self._held_out, self._config = model, stream, held_out, config

    def update(self, step: int) -> Tensor:
        """Do one update of the weights: (loss, 1)."""
        loss = _update(self.denoiser, self.optimizer, self._stream, self._config, step)
        return torch.tensor([loss, 1.0], dtype=torch.float64)

    def evaluate(self) -> float | None:
        """Return the loss of the held-out windows."""
        if self._held_out is None:
            return None
        return held_out_loss(self.denoiser, self._held_out, block_length=self.denoiser.config.block_length)


@torch.no_grad()
def held_out_loss(
    denoiser: Denoiser,
    held_out: Tensor,  # shape: (N, context length + block_length)
    *,
    block_length: int,
    seed: int = 0,
    batch_size: int = 128,
) -> float:
    """Return the negative evidence lower bound of each window's last block given its context, in nats per token.

        (1 / L) sum_{k=1..L} E_{masks of size k} [ (1 / k) sum_{i masked} -log q_i(x_i | visible tokens) ]

    It is the same for every schedule, and is the mean cost per token of revealing the block one by one in random order
    (Uria et al. 2014, arXiv 1310.1757). The estimate is unbiased, and whatever N and L are, every mask size has the
    weight 1/L in it and every window the weight 1/N: the windows, in random order, cut a line into N equal pieces, the
    sizes cut it into L; where a window and a size overlap, the window is masked at that size once, and the overlap is
    its weight. These are N evaluations where L divides N, and never more than N + L - 1.

    Args:
        denoiser: what to evaluate.
        held_out: int64 token windows, shape (N, context length + block_length), on the denoiser's device.
        block_length: L, at least 1.
        seed: of the masks and of which window meets which size; the same seed gives the same masks.
        batch_size: windows per call of the denoiser.

    Raises:
        ArgumentError: there are no windows, or they are shorter than ``block_length``; or the logits have a wrong shape
            or dtype, or at a masked position NaN, +inf or no token above -inf.
    """
    if held_out.ndim != 2 or not len(held_out) or not 1 <= block_length <= held_out.shape[1]:
        raise ArgumentError(
            f"held_out: expected windows of shape (N >= 1, length) with length >= block_length = {block_length} >= 1, "
            f"got shape {tuple(held_out.shape)}"
        )
    length = held_out.shape[1]
    block = (length - block_length, length)
    generator = torch.Generator().manual_seed(seed)
    rows, sizes, weights = _spread_sizes(len(held_out), block_length, generator)
    rank = torch.rand(len(rows), block_length, generator=generator).argsort(dim=1)
    masked = (rank < sizes[:, None]).to(held_out.device)
    total = 0.0
    for chosen, hidden, weight in zip(*(part.split(batch_size) for part in (rows, masked, weights)), strict=True):
        tokens = held_out[chosen.to(held_out.device)]
        context, text = tokens.split([block[0], block_length], dim=1)
        canvas = torch.cat([context, text.masked_fill(hidden, denoiser.spec.mask_id)], 1)
        logits = denoiser.logits(canvas, window=block)
        check_logits(denoiser, logits, canvas, block)
        surprisal = _surprisal(logits, text).masked_fill(~hidden, 0.0)  # what stands elsewhere may be anything
        if bool(surprisal.isnan().any()):
            raise ArgumentError(
                f"denoiser: expected rows with at least one finite entry and no NaN or +inf at masked positions, got "
                f"others from {type(denoiser).__name__}; mend its weights"
            )
        total += float(weight @ _mean_per_sequence(surprisal, hidden).double().cpu())
    return total


def _spread_sizes(num_windows: int, num_sizes: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pair windows with mask sizes 1..L: windows, sizes and weights, which sum to 1/N per window and 1/L per size.

    On a line of N * L units a window takes L of them and a size takes N, so that all ends are whole numbers.
    """
    line = num_windows * num_sizes
    starts = torch.cat([torch.arange(0, line, num_sizes), torch.arange(0, line, num_windows)]).unique()
    weights = torch.cat([starts, torch.tensor([line])]).diff().double() / line
    order = torch.randperm(num_windows, generator=generator)
    return order[starts // num_sizes], 1 + starts // num_windows, weights


def _update(
    model: TransformerDenoiser, optimizer: torch.optim.Optimizer, stream: Tensor, config: DenoiserTraining, step: int
) -> float:
    """Do one update of the weights and return its loss."""
    for group in optimizer.param_groups:
        group["lr"] = _learning_rate(step, config)
    loss = _loss(model, stream, config, step)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
    optimizer.step()
    return float(loss.detach())


def _loss(model: TransformerDenoiser, stream: Tensor, config: DenoiserTraining, step: int) -> Tensor:
    shape = model.config
    # A function of seed and step alone: this is what makes an interrupted run continue exactly.
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([config.seed, step]).generate_state(1)[0]))
    tokens = random_windows(stream, length=shape.span, num_windows=config.batch_size, generator=generator)
    context, block = tokens.split([shape.context_length, shape.block_length], dim=1)
    if float(torch.rand((), generator=generator)) < config.short_context_probability:
        # Only distances count in the model: a context cut at its left is what a padded one looks like.
        cut = int(torch.randint(shape.context_length + 1, (), generator=generator))
        context = context[:, cut:]
    t = sample_times(config.batch_size, generator=generator)
    noise = schedule(config.schedule)
    noisy, masked = mask_tokens(block, t, mask_id=shape.mask_id, schedule=noise, generator=generator)
    noisy = torch.cat([context, noisy], dim=1).to(model.device)
    block, masked = block.to(model.device), masked.to(model.device)
    with _autocast(model.device, config.precision):
        logits = model.logits(noisy, window=(context.shape[1], noisy.shape[1]))
    surprisal = _surprisal(logits, block)
    if config.loss == "masked_mean":
        # A sequence without a mask, one of L + 1 under the linear schedule, has no loss: it is not one of 0.
        return _mean_per_sequence(surprisal, masked).sum() / masked.any(dim=1).sum().clamp(min=1)
    weight = noise.elbo_weight(t).to(model.device)
    return (weight * (surprisal * masked).mean(dim=1)).mean()


def _surprisal(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def _mean_per_sequence(surprisal: Tensor, masked: Tensor) -> Tensor:
    """Return the mean of ``surprisal`` (B, L) over each sequence's masked tokens, 0 where it has none: (B,)."""
    return (surprisal * masked).sum(dim=1) / masked.sum(dim=1).clamp(min=1)


def _optimizer(model: TransformerDenoiser, config: DenoiserTraining) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def _learning_rate(step: int, config: DenoiserTraining) -> float:
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (1 + math.cos(math.pi * done)) / 2


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    wanted = precision == "bfloat16" or (precision == "auto" and _multiplies_bfloat16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 matrix products; emulated ones are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, lambda: False)() for name in names)
    return False
