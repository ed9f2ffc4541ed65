"""The few-step curve: how probable, how varied and how like real text what few denoiser calls write is.

A block is generated after each held-out prompt, without the circuit and with it, at several numbers of calls. What came
out is judged by the denoiser itself asked one token at a time, which knows the dependencies that one call cannot write;
since repetition is probable too, the n-grams are counted beside it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from circuits.arguments import shape_of
from circuits.digests import digest
from circuits.progress import progress_bar
from diffusion.decoding.config import DecodeMode, DecodingConfig, Strategy
from diffusion.denoisers.base import Denoiser
from diffusion.errors import ArgumentError
from diffusion.evaluation.blocks import blocks_after
from diffusion.evaluation.intervals import Estimate, interval_of, resamples, rounded
from diffusion.evaluation.kept_points import KeptPoints, identity_of
from diffusion.evaluation.likelihood import log_likelihood
from diffusion.evaluation.result_tables import ResultTable
from diffusion.head import CoupledHead

TRUE_TEXT, WITHOUT = "true text", "without circuit"
_LONGEST_GRAM = 3
_Z = 1.959964


@dataclass(frozen=True)
class Quality:
    """What some texts are like, with 95 % intervals over them.

    Attributes:
        loss: negative log-likelihood per token under the denoiser asked one token at a time, in nats; bootstrap.
        distinct: for n = 1, 2, 3 the share of a text's n-grams that are different, a mean over texts; bootstrap.
        divergence: Jensen-Shannon divergence of all texts' trigrams to those of held-out text, in nats, at most log 2.
            Its interval is the jackknife's: in a bootstrap a text counts twice, and that alone raises the divergence.
            Few texts raise it too, so compare it with that of as many true texts.
    """

    loss: Estimate
    distinct: tuple[Estimate, ...]
    divergence: Estimate


@dataclass(frozen=True)
class CurvePoint:
    """One way of decoding at one number of calls.

    Attributes:
        curve: which curve it is on: without the circuit or with it, and by which strategy.
        num_steps: the denoiser calls that were asked for; None where the strategy decides.
        num_calls: the denoiser calls that a text took, a mean over texts.
        quality: of what was written.
    """

    curve: str
    num_steps: int | None
    num_calls: float
    quality: Quality


@dataclass(frozen=True)
class FewStepCurve(ResultTable):
    """Quality against denoiser calls per block.

    Attributes:
        points: curve by curve, from few calls to many.
        true_text: the same measures of what really follows the prompts.
        num_texts: how many texts each point was measured on.
        block_length: tokens of each text.
        seed: of draws, orders and the bootstrap.
        judge_samples: at how many noise levels each text was judged; None: one token at a time.
    """

    points: tuple[CurvePoint, ...]
    true_text: Quality
    num_texts: int
    block_length: int
    seed: int
    judge_samples: int | None = None

    @property
    def curves(self) -> dict[str, tuple[CurvePoint, ...]]:
        """The points of each curve."""
        names = dict.fromkeys(point.curve for point in self.points)
        return {name: tuple(point for point in self.points if point.curve == name) for name in names}

    def cells(self) -> list[tuple[str, ...]]:
        """Return the table in words, a title row first."""
        num_grams = len(self.true_text.distinct)
        titles = ("decoding", "calls", "loss", *(f"distinct-{n + 1}" for n in range(num_grams)), "divergence")
        rows = [(point.curve, f"{point.num_calls:.3g}", *_words(point.quality)) for point in self.points]
        return [titles, *rows, (TRUE_TEXT, "", *_words(self.true_text))]


def few_step_curve(
    denoiser: Denoiser,
    head: CoupledHead,
    data: Tensor,  # shape: (N, P + L)
    reference: Tensor,  # shape: (M, R)
    *,
    steps: Sequence[int] = (1, 2, 4, 8, 16, 32),
    decode: DecodeMode = "joint",
    batch_size: int = 128,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> FewStepCurve:
    """Generate one block after each prompt at temperature 1, and measure what was written.

    Strategy ``entropy`` commits equal counts per step, without the circuit and with it; without it also ``threshold``
    0.9 and ``entropy_bound`` 0.1, each at the number of calls that it takes. Every text is judged in one random order
    of its positions, the same for all ways of decoding and for the true text.

    Args:
        denoiser: the masked-token predictor; also the judge.
        head: the circuit over one block of L positions.
        data: held-out windows of prompt and block, int64, on the denoiser's device.
        reference: held-out texts that are not in ``data``, int64, for their n-grams.
        steps: denoiser calls per block, each from 1 to L.
        decode: how the circuit is used.
        batch_size: texts at a time.
        seed: of draws, orders and the bootstrap.
        folder: where each point is kept once it is measured, in a file of its own, and found again by a run that goes
            on; points of another denoiser, head, data or options are measured anew. None: nothing is kept.
        progress: draw a progress bar.

    Raises:
        ArgumentError: data, reference or steps do not fit.
        Interrupted: long work was asked to stop, see :func:`circuits.progress.request_stop`.
    """
    settings = _settings(_checked(head, data, reference, steps), decode)
    judge = _Judge(denoiser, data[:, : -head.block_length], reference, batch_size, seed)
    return _measured(judge, head, data, settings, folder, progress)


def few_step_sketch(
    denoiser: Denoiser,
    head: CoupledHead,
    data: Tensor,  # shape: (N, P + L)
    reference: Tensor,  # shape: (M, R)
    *,
    steps: Sequence[int] = (1, 2, 4, 8),
    judge_samples: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> FewStepCurve:
    """Measure what :func:`few_step_curve` does in a fraction of its calls, for a first look at few texts.

    Each text is judged at a few noise levels, the same for all ways of decoding: method ``elbo`` of
    :func:`~diffusion.evaluation.likelihood.log_likelihood`, whose expectation is the mean of ``sequential`` over all
    orders. The strategies that decide themselves how many calls they take are left out.

    Arguments and errors are those of :func:`few_step_curve`, but for:

    Args:
        judge_samples: how many noise levels, evenly spread.
        seed: of draws, noise and the bootstrap.
    """
    settings = [one for one in _settings(_checked(head, data, reference, steps), "joint") if one[1] is not None]
    judge = _Judge(denoiser, data[:, : -head.block_length], reference, len(data), seed, judge_samples)
    return _measured(judge, head, data, settings, None, progress)


def _checked(head: CoupledHead, data: Tensor, reference: Tensor, steps: Sequence[int]) -> list[int]:
    """Return the steps in order; raise ArgumentError if something does not fit."""
    length = head.block_length
    if not isinstance(data, Tensor) or data.dim() != 2 or len(data) < 2 or data.shape[1] < length:
        raise ArgumentError(f"data: expected int64 (N >= 2, at least {length}), got {shape_of(data)}")
    longest = min(_LONGEST_GRAM, length)
    if not isinstance(reference, Tensor) or reference.dim() != 2 or 0 in reference[:, longest - 1 :].shape:
        raise ArgumentError(f"reference: expected int64 (M >= 1, at least {longest}), got {shape_of(reference)}")
    if not steps or not all(isinstance(count, int) and 1 <= count <= length for count in steps):
        raise ArgumentError(f"steps: expected integers from 1 to the block length, {length}, got {steps!r}")
    return sorted(steps)


def _measured(
    judge: _Judge,
    head: CoupledHead,
    data: Tensor,
    settings: Sequence[tuple[str, int | None, DecodingConfig]],
    folder: str | os.PathLike[str] | None,
    progress: bool,
) -> FewStepCurve:
    denoiser, length, seed = judge.denoiser, head.block_length, judge.seed
    measure = f"1 {judge.samples}"  # the number changes with what is measured
    depends_on = {"reference": digest(judge.reference), "seed": str(seed), "measure": measure}
    kept = KeptPoints(folder, {} if folder is None else {**identity_of(denoiser, head, data), **depends_on})

    def measured(curve: str, num_steps: int | None, config: DecodingConfig) -> CurvePoint:
        used = None if curve.startswith(WITHOUT) else head
        options = {"num_steps": num_steps, "head": used, "config": config}
        outs = list(blocks_after(denoiser, judge.prompts, length, batch_size=judge.batch_size, seed=seed, **options))
        num_calls = float(torch.cat([out.row_calls.double() for out in outs]).mean())
        return CurvePoint(curve, num_steps, num_calls, judge.quality(torch.cat([out.generated for out in outs])))

    points = []
    title, total = "measuring the few-step curve", len(settings) + 1
    with progress_bar(title, total, enabled=progress, way_on=kept.way_on) as advance:
        true_text = _quality_of(kept.get(TRUE_TEXT, "", lambda: asdict(judge.quality(data[:, -length:]))))
        advance()
        for setting in settings:
            curve, num_steps, config = setting
            point = kept.get(
                curve if num_steps is None else f"{curve} {num_steps}",
                f"{num_steps} {config}",
                lambda setting=setting: asdict(measured(*setting)),  # type: ignore[misc]
            )
            points.append(CurvePoint(curve, num_steps, point["num_calls"], _quality_of(point["quality"])))
            advance()
    return FewStepCurve(tuple(points), true_text, len(data), length, seed, judge.samples)


def _quality_of(kept: dict[str, Any]) -> Quality:
    return Quality(
        Estimate(**kept["loss"]), tuple(Estimate(**share) for share in kept["distinct"]), Estimate(**kept["divergence"])
    )


def _settings(steps: Sequence[int], decode: DecodeMode) -> list[tuple[str, int | None, DecodingConfig]]:
    """Return the name of the curve, the number of steps and the options of every point."""

    def config(strategy: Strategy) -> DecodingConfig:
        return DecodingConfig(decode=decode, strategy=strategy, temperature=1.0, threshold=0.9, entropy_bound=0.1)

    counted: list[tuple[str, int | None, DecodingConfig]] = [
        (curve, count, config("entropy")) for curve in (WITHOUT, f"with circuit ({decode})") for count in steps
    ]
    adaptive: list[tuple[str, int | None, DecodingConfig]] = [
        (f"{WITHOUT}, threshold 0.9", None, config("threshold")),
        (f"{WITHOUT}, entropy bound 0.1", None, config("entropy_bound")),
    ]
    return [*counted, *adaptive]


@dataclass(frozen=True, eq=False)
class _Judge:
    denoiser: Denoiser
    prompts: Tensor  # (N, P)
    reference: Tensor  # (M, R)
    batch_size: int
    seed: int
    samples: int | None = None

    def quality(self, texts: Tensor) -> Quality:
        """Return what blocks after the prompts are like, int64 (N, L)."""
        loss = self._loss(texts)
        rows = resamples(len(loss), self.seed)
        tokens, held_out = texts.cpu().numpy(), self.reference.cpu().numpy()
        longest = min(_LONGEST_GRAM, tokens.shape[1])
        distinct = (distinct_share(tokens, n) for n in range(1, longest + 1))
        return Quality(
            _bootstrap(loss, rows),
            tuple(_bootstrap(shares, rows) for shares in distinct),
            gram_divergence(tokens, held_out, longest),
        )

    def _loss(self, texts: Tensor) -> NDArray[np.float64]:
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.rand(texts.shape, generator=generator).argsort(1)
        seeds = torch.randint(2**62, (len(texts),), generator=generator)
        parts = zip(*(part.split(self.batch_size) for part in (self.prompts, texts, order, seeds)), strict=True)
        log_probs = [
            log_likelihood(self.denoiser, prompt, text, method="sequential", order=turns)
            if self.samples is None
            else log_likelihood(self.denoiser, prompt, text, method="elbo", num_samples=self.samples, seeds=seeds_of)
            for prompt, text, turns, seeds_of in parts
        ]
        return np.asarray(-torch.cat(log_probs).cpu().numpy() / texts.shape[1])


def distinct_share(texts: NDArray[np.int64], n: int) -> NDArray[np.float64]:
    """Return the share of each text's n-grams that are different (Li et al. 2016, "distinct-n"): (N, L) to (N,)."""
    grams = np.lib.stride_tricks.sliding_window_view(texts, n, axis=1)  # (N, L - n + 1, n)
    return np.array([len(np.unique(row, axis=0)) / len(row) for row in grams])


def gram_divergence(texts: NDArray[np.int64], reference: NDArray[np.int64], n: int) -> Estimate:
    """Return the Jensen-Shannon divergence of the n-grams of texts (N, L) and of others (M, R), in nats.

    With a 95 % interval from the jackknife over texts.
    """
    grams = np.lib.stride_tricks.sliding_window_view(texts, n, axis=1)
    held_out = np.lib.stride_tricks.sliding_window_view(reference, n, axis=1).reshape(-1, n)
    everything = np.concatenate([grams.reshape(-1, n), held_out])
    names, index = np.unique(everything, axis=0, return_inverse=True)
    index = index.reshape(-1)
    split = grams.shape[0] * grams.shape[1]
    q = np.bincount(index[split:], minlength=len(names)) / len(held_out)
    counts = np.zeros((len(texts), len(names)))
    np.add.at(counts, (np.repeat(np.arange(len(texts)), grams.shape[1]), index[:split]), 1.0)
    total = counts.sum(0)
    value = float(_jensen_shannon(total[None], q)[0])
    without = np.concatenate(
        [_jensen_shannon(total - part, q) for part in np.array_split(counts, -(-len(texts) // 32))]
    )
    error = float(np.sqrt((len(texts) - 1) * np.var(without)))
    return Estimate(value, max(0.0, value - _Z * error), min(float(np.log(2)), value + _Z * error))


def _jensen_shannon(counts: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the divergence of each row of counts, (S, G), made a distribution, and q, (G,)."""
    p = counts / counts.sum(1, keepdims=True)
    middle = np.where(p + q > 0, (p + q) / 2, 1.0)
    parts = [np.where(one > 0, one * np.log(np.where(one > 0, one, 1.0) / middle), 0.0) for one in (p, q)]
    return np.asarray(sum(part.sum(-1) for part in parts) / 2)


def _bootstrap(values: NDArray[np.float64], rows: NDArray[np.int64]) -> Estimate:
    return interval_of(values.mean(), values[rows].mean(1))


def _words(quality: Quality) -> tuple[str, ...]:
    shares = (rounded(share.value) for share in quality.distinct)
    return (str(quality.loss), *shares, str(quality.divergence))
