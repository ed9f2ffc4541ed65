"""How much of the factorization barrier a circuit removes: perplexities of four models on the same masked tokens.

*one-step*: the denoiser alone, all masked tokens independently; *circuit alone*: the circuit's own conditional, without
the denoiser; *coupled*: their product; *sequential*: the denoiser asked one token at a time, each time with the true
tokens before it revealed, which is what its one-step prediction would need to match.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from circuits import CompiledCircuit, queries
from circuits.progress import progress_bar
from diffusion._json import write_json
from diffusion.denoisers.base import Denoiser
from diffusion.errors import ArgumentError
from diffusion.head import CoupledHead
from diffusion.prediction import Prediction
from diffusion.training.masking import mask_fixed_ratio

MODELS = ("one_step", "circuit_alone", "coupled", "sequential")


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % bootstrap confidence interval over windows."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def is_below(self, other: Estimate) -> bool:
        """Whether this interval lies below the other one without touching it."""
        return self.high < other.low


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
        share_closed: (log one-step - log coupled) / (log one-step - log sequential).
        is_meaningful: False when the denoiser, one token at a time, is no better than the circuit alone or than itself
            in one step: then the share measures a weak denoiser, not the barrier.
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
class GapTable:
    """The misspecification gap at several mask ratios.

    Attributes:
        rows: one per mask ratio.
        num_windows: how many blocks it was measured on.
        seed: of masks, orders and the bootstrap.
    """

    rows: tuple[GapRow, ...]
    num_windows: int
    seed: int

    def __str__(self) -> str:
        names = ("mask ratio", "one-step", "circuit alone", "coupled", "sequential", "share closed (nats)")
        lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
        for row in self.rows:
            flag = "" if row.is_meaningful else " (not meaningful: the denoiser is too weak)"
            cells = (row.one_step, row.circuit_alone, row.coupled, row.sequential)
            lines.append(f"| {row.mask_ratio:.2f} | {' | '.join(map(str, cells))} | {row.share_closed}{flag} |")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, atomically."""
        write_json(path, asdict(self))


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
    progress: bool = False,
) -> GapTable:
    """Measure the four models' perplexities on the masked tokens of the last block of each window.

    All models see the same masks. The circuit is used at every mask ratio, whatever the head's activation threshold is.

    Args:
        denoiser: the masked-token predictor.
        head: the circuit; its number of variables L is the block length.
        data: held-out windows, int64 (N, context length + L), on the denoiser's device; the context is always visible.
        mask_ratios: shares of the block that are masked, each in (0, 1].
        circuit_alone: the circuit for the column of that name, for instance one fitted by maximum likelihood; by
            default the head's.
        num_bootstrap: resamples of the N windows behind every confidence interval.
        batch_size: windows per call.
        seed: of masks, orders and the bootstrap.
        progress: draw a progress bar.

    Raises:
        ArgumentError: shapes or ratios that do not fit.
    """
    length = head.block_length
    if data.dim() != 2 or len(data) < 2 or data.shape[1] < length:
        raise ArgumentError(f"data: expected int64 (N >= 2, at least {length}), got {tuple(data.shape)}")
    if not mask_ratios or not all(0 < ratio <= 1 for ratio in mask_ratios):
        raise ArgumentError(f"mask_ratios: expected numbers in (0, 1], got {mask_ratios!r}")
    counts = [max(1, round(ratio * length)) for ratio in mask_ratios]
    num_calls = math.ceil(len(data) / batch_size) * (sum(counts) + len(counts))
    rows = []
    with progress_bar("measuring the gap", num_calls, enabled=progress) as advance:
        for ratio, count in zip(mask_ratios, counts, strict=True):
            generator = torch.Generator().manual_seed(seed)
            losses: dict[str, list[Tensor]] = {name: [] for name in MODELS}
            for windows in data.split(batch_size):
                maskable = torch.ones(len(windows), length, dtype=torch.bool)
                masked = mask_fixed_ratio(maskable, ratio, generator=generator)
                order = torch.rand(masked.shape, generator=generator).masked_fill(~masked, 2.0).argsort(1)[:, :count]
                masked, order = masked.to(data.device), order.to(data.device)
                block = windows[:, -length:]
                one_step = _ask_block(denoiser, windows, masked, features=head.needs_features)
                losses["one_step"].append(-(_at(one_step, block) * masked).sum(1))
                losses["coupled"].append(-head.conditional_log_likelihood(one_step, block, masked))
                alone = circuit_alone or head.pc
                losses["circuit_alone"].append(-queries.log_conditional(alone, block, ~masked))
                advance()
                losses["sequential"].append(_sequential_loss(denoiser, windows, masked, order, advance))
            row = {name: torch.cat(parts).double().cpu().numpy() / count for name, parts in losses.items()}
            rows.append(_summarise(ratio, count, row, num_bootstrap, seed))
    return GapTable(tuple(rows), len(data), seed)


def _ask_block(denoiser: Denoiser, windows: Tensor, masked: Tensor, *, features: bool = False) -> Prediction:
    """Ask the denoiser about the last block with ``masked`` (B, L) masked."""
    length = masked.shape[1]
    canvas = windows.clone()
    canvas[:, -length:] = canvas[:, -length:].masked_fill(masked, denoiser.spec.mask_id)
    return Prediction.ask(denoiser, canvas, window=(canvas.shape[1] - length, canvas.shape[1]), features=features)


def _sequential_loss(denoiser: Denoiser, windows: Tensor, masked: Tensor, order: Tensor, advance: Any) -> Tensor:
    """Return the negative log-likelihood of the masked tokens revealed one by one in ``order`` (B, n): (B,)."""
    block = windows[:, -masked.shape[1] :]
    loss = torch.zeros(len(windows), device=windows.device)
    masked = masked.clone()
    for position in order.unbind(1):
        log_probs = _at(_ask_block(denoiser, windows, masked), block)
        loss -= log_probs.gather(1, position.unsqueeze(1)).squeeze(1)
        masked.scatter_(1, position.unsqueeze(1), False)
        advance()
    return loss


def _at(prediction: Prediction, tokens: Tensor) -> Tensor:
    return prediction.log_prob_of(tokens)


def _summarise(
    ratio: float, count: int, losses: dict[str, NDArray[np.float64]], num_bootstrap: int, seed: int
) -> GapRow:
    """Turn losses per window, in nats per masked token, into perplexities with bootstrap intervals."""
    num_windows = len(losses["one_step"])
    resamples = np.random.default_rng(seed).integers(num_windows, size=(num_bootstrap, num_windows))
    means = {name: float(loss.mean()) for name, loss in losses.items()}
    resampled = {name: loss[resamples].mean(1) for name, loss in losses.items()}
    estimates = {name: _estimate(np.exp(means[name]), np.exp(resampled[name])) for name in MODELS}
    share = _share(means["one_step"], means["coupled"], means["sequential"])
    shares = _share(resampled["one_step"], resampled["coupled"], resampled["sequential"])
    is_meaningful = means["sequential"] < min(means["circuit_alone"], means["one_step"])
    return GapRow(ratio, count, **estimates, share_closed=_estimate(share, shares), is_meaningful=is_meaningful)


def _share(one_step: Any, coupled: Any, sequential: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(one_step - coupled, one_step - sequential)


def _estimate(value: float, resampled: NDArray[np.float64]) -> Estimate:
    low, high = np.quantile(resampled, [0.025, 0.975], method="inverted_cdf")  # which never subtracts infinities
    return Estimate(float(value), float(low), float(high))
