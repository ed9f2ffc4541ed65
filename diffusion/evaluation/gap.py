"""How much of the factorization barrier a circuit removes: perplexities of four models on the same masked tokens.

*one-step*: the denoiser alone, all masked tokens independently; *circuit alone*: the circuit's own conditional, without
the denoiser; *coupled*: their product; *sequential*: the denoiser asked one token at a time, each time with the true
tokens before it revealed, which is what its one-step prediction would need to match.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from circuits import CompiledCircuit, queries
from circuits.arguments import kind_of
from circuits.progress import progress_bar
from diffusion.denoisers.base import Denoiser
from diffusion.errors import ArgumentError
from diffusion.evaluation.intervals import Estimate, interval_of, resamples, rounded
from diffusion.evaluation.kept_points import KeptPoints, circuit_digest, identity_of
from diffusion.evaluation.result_tables import ResultTable
from diffusion.head import CoupledHead
from diffusion.prediction import Prediction
from diffusion.training.masking import count_masked, mask_fixed_ratio

MODELS = ("one_step", "circuit_alone", "coupled", "sequential")

NOT_MEANINGFUL = (
    "not meaningful: asked one token at a time, the denoiser is not measurably better than the circuit alone and than "
    "itself in one step"
)
"""Why a row has no share."""

ABOVE_ONE = (
    "a share above 1: the circuit was fitted to text too, and knows what the denoiser has not made use of; so the "
    "product knows more than the denoiser does even one token at a time"
)
"""What is printed wherever a share above 1 is."""

_ROUNDING = 1e-5  # nats per token: what float32 makes of losses that are equal


@dataclass(frozen=True)
class GapRow:
    """Perplexities on masked tokens at one mask ratio.

    Attributes:
        mask_ratio: share of the block that is masked.
        num_masked: masked tokens per block.
        one_step: the denoiser alone.
        circuit_alone: the circuit's own conditional.
        coupled: the product of both.
        sequential: the denoiser, one token at a time.
        share_closed: (log one-step - log coupled) / (log one-step - log sequential); above 1 where the product knows
            more than the denoiser does even one token at a time. Of no use unless the row is meaningful.
        is_meaningful: whether the denoiser, one token at a time, is better than the circuit alone and than itself in
            one step: the 95 % bootstrap intervals of both differences, window by window, lie above 0 (by more than
            rounding). Otherwise the share measures a weak denoiser or noise, not the barrier.
    """

    mask_ratio: float
    num_masked: int
    one_step: Estimate
    circuit_alone: Estimate
    coupled: Estimate
    sequential: Estimate
    share_closed: Estimate
    is_meaningful: bool


@dataclass(frozen=True)
class GapTable(ResultTable):
    """The misspecification gap at several mask ratios.

    Attributes:
        rows: one per mask ratio.
        num_windows: how many blocks it was measured on.
        seed: of masks, orders and the bootstrap.
    """

    rows: tuple[GapRow, ...]
    num_windows: int
    seed: int

    def cells(self) -> list[tuple[str, ...]]:
        """Return the table in words, a title row first."""
        rows: list[tuple[str, ...]] = []
        for row in self.rows:
            share = str(row.share_closed) if row.is_meaningful else "not meaningful"
            rows.append((rounded(row.mask_ratio), *(str(getattr(row, name)) for name in MODELS), share))
        return [("mask ratio", "one-step", "circuit alone", "coupled", "sequential", "share closed (nats)"), *rows]

    @property
    def notes(self) -> tuple[str, ...]:
        """What has to be said wherever the table is shown: about rows without a share, and about shares above 1."""
        notes = []
        if not all(row.is_meaningful for row in self.rows):
            notes.append(NOT_MEANINGFUL)
        if any(row.is_meaningful and row.share_closed.value > 1 for row in self.rows):
            notes.append(ABOVE_ONE)
        return tuple(notes)


@torch.no_grad()
def misspecification_gap(
    denoiser: Denoiser,
    head: CoupledHead,
    data: Tensor,  # shape: (N, context length + L)
    *,
    mask_ratios: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    circuit_alone: CompiledCircuit | None = None,
    num_bootstrap: int = 1000,
    batch_size: int = 128,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> GapTable:
    """Measure the four models' perplexities on the masked tokens of the last block of each window.

    All models see the same masks. The circuit is used at every mask ratio, whatever the head's activation threshold is.
    Where the circuit is over some of the denoiser's tokens, the denoiser is held to these too, in all columns.

    Args:
        denoiser: the masked-token predictor.
        head: the circuit; its number of variables L is the block length.
        data: held-out windows, int64 (N, context length + L), on the denoiser's device; the context is always visible.
        mask_ratios: shares of the block that are masked, each in (0, 1].
        circuit_alone: the circuit for the column of that name, for instance one fitted by maximum likelihood, over the
            same tokens; by default the head's.
        num_bootstrap: resamples of the N windows behind every confidence interval, at least 1.
        batch_size: windows per call.
        seed: of masks, orders and the bootstrap.
        folder: where each row is kept once it is measured, in a file of its own, and found again by a run that goes on;
            rows of other models, data or options are measured anew. None: nothing is kept.
        progress: draw a progress bar.

    Raises:
        ArgumentError: shapes or ratios that do not fit.
        Interrupted: long work was asked to stop, see :func:`circuits.progress.request_stop`.
    """
    if not isinstance(head, CoupledHead):
        raise ArgumentError(f"head: expected df.CoupledHead, got {kind_of(head)}")
    length = head.block_length
    if data.dim() != 2 or len(data) < 2 or data.shape[1] < length:
        raise ArgumentError(f"data: expected int64 (N >= 2, at least {length}), got {tuple(data.shape)}")
    if not mask_ratios or not all(0 < ratio <= 1 for ratio in mask_ratios):
        raise ArgumentError(f"mask_ratios: expected numbers in (0, 1], got {mask_ratios!r}")
    if num_bootstrap < 1:
        raise ArgumentError(f"num_bootstrap: expected at least 1, got {num_bootstrap}")
    head.check_tokenizer(getattr(denoiser, "tokenizer_fingerprint", None))
    forbidden = head.spec_for(denoiser.spec).forbidden_ids
    block = data[:, -length:]
    head.vocabulary_in(denoiser.spec.vocab_size).known("data", block, torch.ones_like(block, dtype=torch.bool))
    counts = [count_masked(length, ratio) for ratio in mask_ratios]
    num_batches, models = math.ceil(len(data) / batch_size), (denoiser, head, circuit_alone or head.pc)
    kept = _kept_rows(folder, models, data, seed)
    num_calls = num_batches * (sum(counts) + len(counts))

    def row(ratio: float, count: int, advance: Callable[..., None]) -> GapRow:
        left = num_batches * (count + 1)

        def called() -> None:
            nonlocal left
            left -= 1
            advance()

        def measured() -> dict[str, Any]:
            masks = (part.to(data.device) for part in _masks(len(data), length, ratio, seed))
            batches = zip(*(part.split(batch_size) for part in (data, *masks)), strict=True)
            losses = [_losses(*models, batch, called, forbidden) for batch in batches]
            per_token = {name: torch.cat([part[name] for part in losses]).cpu().numpy() / count for name in MODELS}
            return asdict(_summarise(ratio, count, per_token, num_bootstrap, seed))

        found = _row_of(kept.get(f"{ratio}", f"{num_bootstrap}", measured))
        advance(left)  # of a row that was kept
        return found

    with progress_bar("measuring the gap", num_calls, enabled=progress, way_on=kept.way_on) as advance:
        rows = tuple(row(ratio, count, advance) for ratio, count in zip(mask_ratios, counts, strict=True))
    return GapTable(rows, len(data), seed)


def _kept_rows(
    folder: str | os.PathLike[str] | None,
    models: tuple[Denoiser, CoupledHead, CompiledCircuit],
    data: Tensor,
    seed: int,
) -> KeptPoints:
    if folder is None:
        return KeptPoints(None, {})
    denoiser, head, circuit_alone = models
    depends_on = {"circuit_alone": circuit_digest(circuit_alone), "seed": str(seed), "measure": "1"}
    return KeptPoints(folder, {**identity_of(denoiser, head, data), **depends_on})


def _row_of(kept: dict[str, Any]) -> GapRow:
    values: dict[str, Any] = {n: Estimate(**value) if isinstance(value, dict) else value for n, value in kept.items()}
    return GapRow(**values)


def _masks(num_windows: int, length: int, ratio: float, seed: int) -> tuple[Tensor, Tensor]:
    """Draw which positions are masked, bool (N, L), and the order that reveals the n of them, int64 (N, n)."""
    generator = torch.Generator().manual_seed(seed)
    masked = mask_fixed_ratio(torch.ones(num_windows, length, dtype=torch.bool), ratio, generator=generator)
    keys = torch.rand(masked.shape, generator=generator).masked_fill(~masked, math.inf)
    return masked, keys.argsort(1)[:, : count_masked(length, ratio)]


def _losses(
    denoiser: Denoiser,
    head: CoupledHead,
    circuit_alone: CompiledCircuit,
    batch: tuple[Tensor, ...],  # windows (B, context length + L), masked (B, L), order (B, n)
    advance: Any,
    forbidden: Sequence[int],
) -> dict[str, Tensor]:
    """Return each model's negative log-likelihood of the masked tokens, float64 (B,), in nats."""
    windows, masked, order = batch
    one_step = _ask_block(denoiser, windows, masked, forbidden, features=head.needs_features)
    block = windows[:, -masked.shape[1] :]
    categories = head.vocabulary_in(denoiser.spec.vocab_size).categories(block)
    losses = {
        "one_step": -_at(one_step, block).masked_fill(~masked, 0.0).sum(1),
        "coupled": -head.conditional_log_likelihood(one_step, block, masked).double(),
        "circuit_alone": -queries.log_conditional(circuit_alone, categories, ~masked).double(),
    }
    advance()
    losses["sequential"] = _sequential_loss(denoiser, windows, masked, order, advance, forbidden)
    return losses


def _ask_block(
    denoiser: Denoiser, windows: Tensor, masked: Tensor, forbidden: Sequence[int], *, features: bool = False
) -> Prediction:
    """Ask the denoiser about the last block with ``masked`` (B, L) masked."""
    length = masked.shape[1]
    canvas = windows.clone()
    canvas[:, -length:] = canvas[:, -length:].masked_fill(masked, denoiser.spec.mask_id)
    window = (canvas.shape[1] - length, canvas.shape[1])
    return Prediction.ask(denoiser, canvas, window=window, features=features, forbidden_ids=forbidden)


def _sequential_loss(
    denoiser: Denoiser, windows: Tensor, masked: Tensor, order: Tensor, advance: Any, forbidden: Sequence[int]
) -> Tensor:
    """Return the negative log-likelihood of the masked tokens revealed one by one in ``order`` (B, n): (B,)."""
    block = windows[:, -masked.shape[1] :]
    loss = torch.zeros(len(windows), dtype=torch.float64, device=windows.device)
    masked = masked.clone()
    for position in order.unbind(1):
        log_probs = _at(_ask_block(denoiser, windows, masked, forbidden), block)
        loss -= log_probs.gather(1, position.unsqueeze(1)).squeeze(1)
        masked.scatter_(1, position.unsqueeze(1), False)
        advance()
    return loss


def _at(prediction: Prediction, tokens: Tensor) -> Tensor:
    return prediction.log_prob_of(tokens).double()


def _summarise(
    ratio: float, count: int, losses: dict[str, NDArray[np.float64]], num_bootstrap: int, seed: int
) -> GapRow:
    """Turn losses per window, in nats per masked token, into perplexities with bootstrap intervals."""
    rows = resamples(len(losses["one_step"]), seed, num_bootstrap)
    means = {name: float(loss.mean()) for name, loss in losses.items()}
    resampled = {name: loss[rows].mean(1) for name, loss in losses.items()}
    estimates = {name: interval_of(np.exp(means[name]), np.exp(resampled[name])) for name in MODELS}
    share = _share(means["one_step"], means["coupled"], means["sequential"])
    shares = _share(resampled["one_step"], resampled["coupled"], resampled["sequential"])
    with np.errstate(invalid="ignore"):  # of two infinities, which is not above anything
        advantages = [resampled[name] - resampled["sequential"] for name in ("one_step", "circuit_alone")]
    is_meaningful = all(interval_of(math.nan, advantage).low > _ROUNDING for advantage in advantages)
    return GapRow(ratio, count, **estimates, share_closed=interval_of(share, shares), is_meaningful=is_meaningful)


def _share(one_step: Any, coupled: Any, sequential: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(one_step - coupled, one_step - sequential)
