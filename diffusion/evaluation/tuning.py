"""When to use the circuit, chosen on validation data: the activation threshold, and if asked the temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.arguments import shape_of
from circuits.progress import progress_bar
from diffusion.denoisers.base import Denoiser
from diffusion.errors import ArgumentError
from diffusion.evaluation.intervals import Estimate, rounded
from diffusion.evaluation.result_tables import ResultTable, markdown
from diffusion.head import CoupledHead
from diffusion.prediction import Prediction
from diffusion.training.masking import count_masked, mask_fixed_ratio

TEMPERATURES = tuple(round(0.5 + 0.05 * i, 2) for i in range(21))
"""From 0.5 to 1.5: what the temperature is chosen from."""

_ROUNDING = 1e-5  # nats per token: what float32 makes of losses that are equal


@dataclass(frozen=True)
class TuningRow:
    """Log-likelihoods at one mask ratio, in nats per masked token.

    Attributes:
        mask_ratio: share of the block that is masked.
        without: of the denoiser alone.
        coupled: of its product with the circuit, the conditional log-likelihood.
        gain: the second less the first, with its 95 % interval over windows.
        uses_circuit: whether the chosen threshold uses the circuit here.
    """

    mask_ratio: float
    without: float
    coupled: float
    gain: Estimate
    uses_circuit: bool


@dataclass(frozen=True)
class Tuning(ResultTable):
    """What was chosen, and the figures behind it.

    Attributes:
        rows: one per mask ratio.
        activation_threshold: the share of masked positions below which the circuit is used; 1: always, 0: never.
        temperature: tau; None: it was not asked for.
        num_windows: how many blocks it was chosen on.
    """

    rows: tuple[TuningRow, ...]
    activation_threshold: float
    temperature: float | None
    num_windows: int

    def cells(self) -> list[tuple[str, ...]]:
        """Return the table in words, a title row first."""
        titles = ("mask ratio", "without circuit", "with circuit", "gain (nats per token)", "used")
        numbers = [(*map(rounded, (row.mask_ratio, row.without, row.coupled)), str(row.gain)) for row in self.rows]
        used = ["yes" if row.uses_circuit else "no" for row in self.rows]
        return [titles, *((*row, last) for row, last in zip(numbers, used, strict=True))]

    def __str__(self) -> str:
        chosen = [f"activation threshold {self.activation_threshold:g}"]
        chosen += [] if self.temperature is None else [f"temperature {self.temperature:g}"]
        return f"{markdown(self.cells())}\n\nChosen on {self.num_windows} held-out blocks: {', '.join(chosen)}."

    def apply(self, head: CoupledHead) -> None:
        """Store the choice in a head, which decoding then reads it from; a temperature of 1 counts as none."""
        head.activation_threshold = self.activation_threshold
        if self.temperature is not None:
            head.temperature = self.temperature


@torch.no_grad()
def tune(
    denoiser: Denoiser,
    head: CoupledHead,
    data: Tensor,  # shape: (N, context length + L)
    *,
    mask_ratios: Sequence[float] = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0),
    temperatures: Sequence[float] | None = None,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = False,
) -> Tuning:
    """Choose below which mask ratio the circuit is used: where it raises the conditional log-likelihood.

    The threshold makes the sum over mask ratios of what the circuit gains, in nats per token, as large as possible. The
    temperature is the one under which the true tokens are most probable by the exact posterior marginals, with the
    circuit where the threshold uses it (temperature scaling, Guo et al. 2017, arXiv 1706.04599).

    Args:
        denoiser: the masked-token predictor.
        head: the circuit; what its threshold is now does not matter.
        data: validation windows, int64 (N, context length + L), on the denoiser's device; the context is visible.
        mask_ratios: shares of the block that are masked, each in (0, 1]; those that mask as many positions are one.
        temperatures: to choose from, each above 0; None: no temperature is chosen.
        batch_size: windows per call.
        seed: of the masks.
        progress: draw a progress bar.

    Raises:
        ArgumentError: shapes, ratios or temperatures that do not fit.
    """
    length = head.block_length
    if not isinstance(data, Tensor) or data.dim() != 2 or len(data) < 2 or data.shape[1] < length:
        raise ArgumentError(f"data: expected int64 (N >= 2, at least {length}), got {shape_of(data)}")
    if not mask_ratios or not all(0 < ratio <= 1 for ratio in mask_ratios):
        raise ArgumentError(f"mask_ratios: expected numbers in (0, 1], got {mask_ratios!r}")
    if temperatures is not None and (not temperatures or not all(0 < tau < math.inf for tau in temperatures)):
        raise ArgumentError(f"temperatures: expected numbers above 0, got {temperatures!r}")
    counts = sorted({count_masked(length, ratio) for ratio in mask_ratios})
    scores = []
    with progress_bar("tuning", len(counts) * -(-len(data) // batch_size), enabled=progress) as advance:
        for count in counts:
            parts = []
            masks = _masks(len(data), length, count, seed).to(data.device)
            for blocks, masked in zip(data.split(batch_size), masks.split(batch_size), strict=True):
                parts.append(_scores(denoiser, head, blocks, masked, temperatures or ()))
                advance()
            scores.append(torch.cat(parts) / count)  # (N, 2 + 2 temperatures)
    ratios = [count / length for count in counts]
    means = torch.stack([part.mean(0) for part in scores])
    threshold = chosen_threshold(ratios, (means[:, 1] - means[:, 0]).tolist())
    used = [ratio < threshold or threshold >= 1 for ratio in ratios]
    rows = tuple(
        TuningRow(ratio, float(part[:, 0].mean()), float(part[:, 1].mean()), _gain(part[:, 1] - part[:, 0]), is_used)
        for ratio, part, is_used in zip(ratios, scores, used, strict=True)
    )
    temperature = None
    if temperatures is not None:
        by_use = means[:, 2:].unflatten(1, (2, -1))  # (ratios, without and with circuit, temperatures)
        total = torch.stack([row[int(is_used)] for row, is_used in zip(by_use, used, strict=True)]).sum(0)
        temperature = float(temperatures[int(total.argmax())])
    return Tuning(rows, threshold, temperature, len(data))


def chosen_threshold(mask_ratios: Sequence[float], gains: Sequence[float]) -> float:
    """Return the activation threshold below which the gains, in nats per token, have the greatest sum.

    0: the circuit is never used; 1: always; else the middle between two of the ratios, which ascend.
    """
    best, threshold, total = 0.0, 0.0, 0.0
    following = [*mask_ratios[1:], None]
    for ratio, after, gain in zip(mask_ratios, following, gains, strict=True):
        total += gain
        if total > best + _ROUNDING:
            best, threshold = total, 1.0 if after is None else (ratio + after) / 2
    return threshold


def _masks(num_windows: int, length: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    everything = torch.ones(num_windows, length, dtype=torch.bool)
    return mask_fixed_ratio(everything, count / length, generator=generator)


def _scores(
    denoiser: Denoiser, head: CoupledHead, windows: Tensor, masked: Tensor, temperatures: Sequence[float]
) -> Tensor:
    """Return log-likelihoods of the masked tokens, float64 (B, 2 + 2 T): without and with the circuit, jointly.

    And by tempered marginals, at each of T temperatures without the circuit, and then with it.
    """
    length = masked.shape[1]
    block, start = windows[:, -length:], windows.shape[1] - length
    canvas = torch.cat([windows[:, :start], block.masked_fill(masked, denoiser.spec.mask_id)], 1)
    prediction = Prediction.ask(denoiser, canvas, window=(start, start + length), features=head.needs_features)

    def score(beliefs: Prediction) -> Tensor:
        return beliefs.log_prob_of(block).double().masked_fill(~masked, 0.0).sum(1)

    found = [score(prediction), head.conditional_log_likelihood(prediction, block, masked).double()]
    if temperatures:
        posterior = head.distribution(prediction, block, masked, include=block).posterior()
        found += [score(beliefs.tempered(tau)) for beliefs in (prediction, posterior) for tau in temperatures]
    return torch.stack(found, 1)


def _gain(differences: Tensor) -> Estimate:
    mean = float(differences.mean())
    half = 1.959964 * float(differences.std()) / math.sqrt(len(differences))
    return Estimate(mean, mean - half, mean + half)
