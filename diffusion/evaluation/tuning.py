"""How to decode with a head, chosen on validation data by one rule: what makes its text most probable.

Log-likelihoods are those of the masked tokens given the visible ones for the activation threshold, those under tempered
marginals for the temperature, and those of the decoder itself for mode and strategy.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from circuits.arguments import checked_count, is_number, kind_of, shape_of
from circuits.progress import progress_bar
from diffusion.decoding.config import DecodeMode, Strategy
from diffusion.denoisers.base import Denoiser
from diffusion.errors import ArgumentError
from diffusion.evaluation.intervals import Estimate, rounded
from diffusion.evaluation.kept_points import KeptPoints, identity_of
from diffusion.evaluation.likelihood import log_likelihood
from diffusion.evaluation.result_tables import ResultTable, markdown
from diffusion.head import CoupledHead
from diffusion.prediction import Prediction
from diffusion.training.masking import count_masked, mask_fixed_ratio

TEMPERATURES = tuple(round(0.5 + 0.05 * i, 2) for i in range(21))
"""From 0.5 to 1.5: what the temperature is chosen from."""

DECODINGS: tuple[tuple[DecodeMode, Strategy], ...] = tuple(
    (decode, strategy)
    for decode in ("joint", "any_order", "marginal")
    for strategy in get_args(Literal["entropy", "margin", "top_prob", "random"])
)
"""What decoding is chosen from: modes and strategies with which a text has a likelihood; the first is the default above
temperature 0."""

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
class Candidate:
    """One of several settings that were compared.

    Attributes:
        choice: what it is a setting of: "temperature" or "decoding".
        setting: a temperature, or mode and strategy.
        log_likelihood: in nats per token.
        gain: by how much that is more than the default's, with its 95 % interval over windows.
        is_chosen: whether it is the greatest.
    """

    choice: str
    setting: str
    log_likelihood: float
    gain: Estimate
    is_chosen: bool


@dataclass(frozen=True)
class Tuning(ResultTable):
    """What was chosen, and the figures behind it.

    Attributes:
        rows: one per mask ratio.
        activation_threshold: the share of masked positions below which the circuit is used; 1: always, 0: never.
        temperature: tau; None: it was not asked for.
        num_windows: how many blocks it was chosen on.
        candidates: temperatures and ways of decoding that were compared.
        decode: the mode; None: it was not asked for.
        strategy: which positions a step commits; None: it was not asked for.
        num_steps: denoiser calls a block at which modes and strategies were compared; None: they were not.
    """

    rows: tuple[TuningRow, ...]
    activation_threshold: float
    temperature: float | None
    num_windows: int
    candidates: tuple[Candidate, ...] = ()
    decode: DecodeMode | None = None
    strategy: Strategy | None = None
    num_steps: int | None = None

    def cells(self) -> list[tuple[str, ...]]:
        """Return the table in words, a title row first."""
        figures = [
            ("circuit at mask ratio", rounded(row.mask_ratio), row.coupled, row.gain, row.uses_circuit)
            for row in self.rows
        ]
        figures += [(one.choice, one.setting, one.log_likelihood, one.gain, one.is_chosen) for one in self.candidates]
        rows = [
            (choice, setting, rounded(value), str(gain), "yes" if is_chosen else "no")
            for choice, setting, value, gain, is_chosen in figures
        ]
        return [("choice", "setting", "log-likelihood (nats per token)", "gain", "chosen"), *rows]

    def __str__(self) -> str:
        chosen = [f"activation threshold {self.activation_threshold:g}"]
        chosen += [] if self.temperature is None else [f"temperature {self.temperature:g}"]
        chosen += [] if self.decode is None else [f"mode {self.decode}, strategy {self.strategy}"]
        compared = "" if self.num_steps is None else f" Modes and strategies: {self.num_steps} denoiser calls a block."
        chosen_on = f"Chosen on {self.num_windows} held-out blocks: {', '.join(chosen)}."
        return f"{markdown(self.cells())}\n\n{chosen_on}{compared}"

    def apply(self, head: CoupledHead) -> None:
        """Store the choice in a head, which decoding then reads it from; a temperature of 1 counts as none."""
        head.activation_threshold = self.activation_threshold
        if self.temperature is not None:
            head.temperature = self.temperature
        if self.decode is None and not head.decoding:
            return
        options = {**head.decoding, "activation_threshold": self.activation_threshold}  # which go before the head's
        if self.decode is not None:
            options |= {"decode": self.decode, "strategy": self.strategy}
        if self.temperature is not None or "temperature" not in options:
            options |= {"temperature": head.temperature}
            if head.temperature == 1:
                del options["temperature"]
        head.decoding = options


@torch.no_grad()
def tune(
    denoiser: Denoiser,
    head: CoupledHead,
    data: Tensor,  # shape: (N, context length + L)
    *,
    mask_ratios: Sequence[float] = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0),
    temperatures: Sequence[float] | None = None,
    num_steps: int | None = None,
    batch_size: int = 128,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Tuning:
    """Choose how to decode with a head: what makes validation text most probable; of equals what is named first.

    The threshold makes the sum over mask ratios of what the circuit gains, in nats per token, as large as possible. The
    temperature is the one under which the true tokens are most probable by the exact posterior marginals, with the
    circuit where the threshold uses it (temperature scaling, Guo et al. 2017, arXiv 1706.04599). Mode and strategy are
    those of :data:`DECODINGS` under which a decoder of some calls a block, with that threshold, writes the blocks with
    the greatest probability (:func:`~diffusion.evaluation.likelihood.log_likelihood`).

    Args:
        denoiser: the masked-token predictor.
        head: the circuit; what its threshold is now does not matter.
        data: validation windows, int64 (N, context length + L), on the denoiser's device; the context is visible.
        mask_ratios: shares of the block that are masked, each in (0, 1]; those that mask as many positions are one.
        temperatures: to choose from, each above 0; None: no temperature is chosen.
        num_steps: denoiser calls a block at which modes and strategies are compared; None: they are not.
        batch_size: windows per call.
        seed: of the masks, and of random positions.
        folder: where every mask ratio and every way of decoding is kept once it is measured, in a file of its own, and
            found again by a run that goes on; those of another denoiser, head, data or options are measured anew.
            None: nothing is kept.
        progress: draw a progress bar.

    Raises:
        ArgumentError: shapes, ratios, temperatures or calls that do not fit.
        Interrupted: long work was asked to stop, see :func:`circuits.progress.request_stop`.
    """
    length = _checked_length(head, data, mask_ratios, temperatures, num_steps, batch_size, seed)
    counts = sorted({count_masked(length, ratio) for ratio in mask_ratios})
    points = _Points(denoiser, head, data, batch_size, seed, folder)
    taus = tuple(temperatures or ())
    total = len(counts) + (0 if num_steps is None else len(DECODINGS))
    with progress_bar("tuning", total, enabled=progress, way_on=points.kept.way_on) as advance:
        scores = []
        for count in counts:
            scores.append(points.scores(count, taus))  # (N, 2 + 2 temperatures)
            advance()
        rows, threshold = _chosen_rows([count / length for count in counts], scores)
        candidates: list[Candidate] = []
        temperature, (decode, strategy) = None, (None, None)
        if taus:
            used = [row.uses_circuit for row in rows]
            chosen, found = _compared_temperatures(taus, scores, used)
            temperature, candidates = float(taus[chosen]), [*candidates, *found]
        if num_steps is not None:
            losses = []
            for way in DECODINGS:
                losses.append(points.log_likelihood(*way, num_steps, threshold))
                advance()
            chosen, found = _compared("decoding", [", ".join(way) for way in DECODINGS], torch.stack(losses))
            (decode, strategy), candidates = DECODINGS[chosen], [*candidates, *found]
    return Tuning(rows, threshold, temperature, len(data), tuple(candidates), decode, strategy, num_steps)


def _checked_length(
    head: CoupledHead,
    data: Tensor,
    mask_ratios: Sequence[float],
    temperatures: Sequence[float] | None,
    num_steps: int | None,
    batch_size: int,
    seed: int,
) -> int:
    """Return the length of a head's blocks, if the arguments of :func:`tune` fit it."""
    if not isinstance(head, CoupledHead):
        raise ArgumentError(f"head: expected df.CoupledHead, got {kind_of(head)}")
    length = head.block_length
    if not isinstance(data, Tensor) or data.dim() != 2 or len(data) < 2 or data.shape[1] < length:
        raise ArgumentError(f"data: expected int64 (N >= 2, at least {length}), got {shape_of(data)}")
    if not _are_numbers(mask_ratios) or not all(0 < ratio <= 1 for ratio in mask_ratios):
        raise ArgumentError(f"mask_ratios: expected numbers in (0, 1], got {mask_ratios!r}")
    if temperatures is not None and not (
        _are_numbers(temperatures) and all(0 < tau < math.inf for tau in temperatures)
    ):
        raise ArgumentError(f"temperatures: expected numbers above 0, got {temperatures!r}")
    if num_steps is not None and not 1 <= checked_count("num_steps", num_steps) <= length:
        raise ArgumentError(f"num_steps: expected at most the block's {length} tokens, got {num_steps}")
    checked_count("batch_size", batch_size)
    checked_count("seed", seed, 0)
    return length


def _are_numbers(values: object) -> bool:
    return isinstance(values, Sequence) and len(values) > 0 and all(map(is_number, values))


def _chosen_rows(ratios: Sequence[float], scores: Sequence[Tensor]) -> tuple[tuple[TuningRow, ...], float]:
    means = torch.stack([part.mean(0) for part in scores])
    threshold = chosen_threshold(ratios, (means[:, 1] - means[:, 0]).tolist())
    rows = tuple(
        TuningRow(
            ratio,
            float(part[:, 0].mean()),
            float(part[:, 1].mean()),
            _gain(part[:, 1] - part[:, 0]),
            ratio < threshold or threshold >= 1,
        )
        for ratio, part in zip(ratios, scores, strict=True)
    )
    return rows, threshold


def _compared_temperatures(
    temperatures: Sequence[float], scores: Sequence[Tensor], used: Sequence[bool]
) -> tuple[int, list[Candidate]]:
    """Compare temperatures by all mask ratios, with the circuit where it is used."""
    tempered = [one[:, 2:].unflatten(1, (2, -1))[:, int(is_used)] for one, is_used in zip(scores, used, strict=True)]
    default = temperatures.index(1.0) if 1.0 in temperatures else 0
    names = [f"{tau:g}" for tau in temperatures]
    return _compared("temperature", names, torch.stack(tempered).mean(0).T, default)


def _compared(choice: str, settings: Sequence[str], scores: Tensor, default: int = 0) -> tuple[int, list[Candidate]]:
    """Return which setting is best, the first of those that are equal to it, and all of them beside the default.

    Args:
        choice: what they are settings of.
        settings: their names.
        scores: nats per token, (settings, N).
        default: the setting that others are compared with.
    """
    means = scores.mean(1)
    chosen = int((means >= means.max() - _ROUNDING).nonzero()[0])
    return chosen, [
        Candidate(choice, setting, float(means[number]), _gain(scores[number] - scores[default]), number == chosen)
        for number, setting in enumerate(settings)
    ]


class _Points:
    """Log-likelihoods of validation windows, in nats per token, each set of them kept."""

    def __init__(
        self,
        denoiser: Denoiser,
        head: CoupledHead,
        data: Tensor,
        batch_size: int,
        seed: int,
        folder: str | os.PathLike[str] | None,
    ) -> None:
        self.denoiser, self.head, self.data, self.batch_size, self.seed = denoiser, head, data, batch_size, seed
        identity = {} if folder is None else {**identity_of(denoiser, head, data), "seed": str(seed)}
        self.kept = KeptPoints(folder, identity)

    def scores(self, count: int, temperatures: Sequence[float]) -> Tensor:
        """Return those of so many masked tokens, float64 (N, 2 + 2 T), see :func:`_scores`."""

        def measure() -> dict[str, Any]:
            masks = _masks(len(self.data), self.head.block_length, count, self.seed).to(self.data.device)
            batches = zip(self.data.split(self.batch_size), masks.split(self.batch_size), strict=True)
            parts = [_scores(self.denoiser, self.head, *batch, temperatures) for batch in batches]
            return {"scores": (torch.cat(parts) / count).tolist()}

        return self._kept(f"{count} masked", str(temperatures), measure)

    def log_likelihood(self, decode: str, strategy: str, num_steps: int, threshold: float) -> Tensor:
        """Return those of blocks under a decoder, float64 (N,)."""
        length = self.head.block_length
        start = self.data.shape[1] - length
        options: dict[str, Any] = {"decode": decode, "strategy": strategy, "activation_threshold": threshold}

        def measure() -> dict[str, Any]:
            seeds = torch.randint(2**62, (len(self.data),), generator=torch.Generator().manual_seed(self.seed))
            parts = [
                log_likelihood(
                    self.denoiser, rows[:, :start], rows[:, start:], head=self.head, num_steps=num_steps, seeds=own,
                    **options,
                )
                for rows, own in zip(self.data.split(self.batch_size), seeds.split(self.batch_size), strict=True)
            ]  # fmt: skip
            return {"scores": (torch.cat(parts) / length).tolist()}

        return self._kept(f"{decode} {strategy} {num_steps}", str(options), measure)

    def _kept(self, name: str, options: str, measure: Callable[[], dict[str, Any]]) -> Tensor:
        return torch.tensor(self.kept.get(name, options, measure)["scores"], dtype=torch.float64)


def chosen_threshold(mask_ratios: Sequence[float], gains: Sequence[float]) -> float:
    """Return the activation threshold below which the gains have the greatest sum.

    Args:
        mask_ratios: ascending.
        gains: what the circuit gains at each, in nats per token.

    Returns:
        0: the circuit is never used; 1: always; else the middle between two of the ratios.
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
