"""What a task measured: accuracy against parallelism, with the circuit and without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diffusion.decoding.config import DecodingConfig
from diffusion.evaluation.intervals import Estimate, rounded, wilson
from diffusion.evaluation.result_tables import ResultTable, markdown
from diffusion.evaluation.tasks.measures import accuracy_at, accuracy_under_parallelism
from diffusion.evaluation.tasks.samples import Sample

WITHOUT, WITH = "without circuit", "with circuit"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way of decoding.

    Attributes:
        config: mode, strategy, temperature and so on.
        gen_length: tokens to generate at most.
        block_length: positions of a block.
        num_steps: denoiser calls in all; None: the strategy decides, and where it does not, one per token.
        with_circuit: whether the circuit is used.
        dynamic_windows: whether the whole text is decoded at once, in windows of the block's length at most, and not
            block by block.
    """

    config: DecodingConfig
    gen_length: int
    block_length: int
    num_steps: int | None = None
    with_circuit: bool = False
    dynamic_windows: bool = False

    @property
    def curve(self) -> str:
        """Which curve it is on: without the circuit, or with it and how, and by which strategy."""
        used = f"{WITH} ({self.config.decode})" if self.with_circuit else WITHOUT
        return f"{used}, {self.config.chosen_strategy}"

    @property
    def amount(self) -> str:
        """What sets the number of calls: steps, or the bound of the strategy."""
        if self.config.chosen_strategy == "threshold":
            return f"{self.config.threshold:g}"
        if self.config.chosen_strategy in ("entropy_bound", "joint_entropy"):
            return f"{self.config.entropy_bound:g}"
        return f"{self.num_steps or self.gen_length} steps"

    @property
    def label(self) -> str:
        """The curve, and the place on it."""
        return f"{self.curve}{' ' if self.num_steps is None else ', '}{self.amount}"


@dataclass(frozen=True)
class TaskPoint:
    """What one way of decoding achieved.

    Attributes:
        setting: the way.
        num_samples: questions.
        accuracy: the share that was answered rightly, with its 95 % Wilson interval.
        tokens_per_call: tokens committed per denoiser call (TPF), over all questions together; padding after the end
            of a text is not counted.
        num_calls: denoiser calls a question, a mean.
        tokens_per_second: tokens committed in a second of decoding, on the machine where it was measured.
        share_coupled: of the windows that were decoded, the share in which the circuit was used.
    """

    setting: Setting
    num_samples: int
    accuracy: Estimate
    tokens_per_call: float
    num_calls: float
    tokens_per_second: float
    share_coupled: float

    @classmethod
    def of(cls, setting: Setting, samples: Sequence[Sample]) -> TaskPoint:
        """Return what some samples, at least one, show."""
        tokens, calls = (sum(getattr(one, name) for one in samples) for name in ("num_tokens", "num_calls"))
        seconds = sum(sample.seconds for sample in samples)
        windows = sum(sample.num_windows for sample in samples)
        return cls(
            setting=setting,
            num_samples=len(samples),
            accuracy=wilson(sum(sample.is_right for sample in samples), len(samples)),
            tokens_per_call=tokens / calls if calls else 0.0,
            num_calls=calls / len(samples),
            tokens_per_second=tokens / seconds if seconds else 0.0,
            share_coupled=sum(sample.num_coupled for sample in samples) / windows if windows else 0.0,
        )


@dataclass(frozen=True)
class TaskTable(ResultTable):
    """Accuracy against parallelism.

    Attributes:
        task: its name.
        points: in the order in which they were asked for.
        num_shots: worked examples before every question.
        seed: of the draws.
    """

    task: str
    points: tuple[TaskPoint, ...]
    num_shots: int
    seed: int

    @property
    def curves(self) -> dict[str, tuple[TaskPoint, ...]]:
        """The points of each curve, from few tokens per call to many."""
        names = dict.fromkeys(point.setting.curve for point in self.points)
        found = {name: [point for point in self.points if point.setting.curve == name] for name in names}
        return {name: tuple(sorted(points, key=lambda one: one.tokens_per_call)) for name, points in found.items()}

    @property
    def aup(self) -> dict[str, float]:
        """The accuracy under parallelism of each curve, with the best accuracy in the table as the best of all."""
        best = 100 * max(point.accuracy.value for point in self.points)
        pairs = {name: _pairs(points) for name, points in self.curves.items()}
        return {name: accuracy_under_parallelism(points, best=best) for name, points in pairs.items() if points}

    def cells(self) -> list[tuple[str, ...]]:
        """Return the table in words, a title row first."""
        titles = ("decoding", "", "accuracy %", "tokens per call", "calls", "tokens a second", "circuit used", "AUP")
        rows, aup = [], self.aup
        for name, points in self.curves.items():
            for point in points:
                end = f"{aup[name]:.1f}" if point is points[-1] and name in aup else ""
                rows.append((name, point.setting.amount, _percent(point.accuracy), *_numbers(point), end))
        return [titles, *rows]

    def comparison(self) -> list[tuple[str, ...]]:
        """Return what else reaches at the tokens per call of each point with the circuit, a title row first.

        Accuracies of the curves without the circuit are linear between their points, and missing outside them.
        """
        curves = self.curves
        others = {name: _pairs(points) for name, points in curves.items() if name.startswith(WITHOUT)}
        rows = [
            (
                point.setting.label,
                f"{point.tokens_per_call:.2f}",
                f"{100 * point.accuracy.value:.1f}",
                *(_or_dash(accuracy_at(pairs, point.tokens_per_call)) for pairs in others.values()),
            )
            for name, points in curves.items()
            if name.startswith(WITH)
            for point in points
        ]
        return [("at equal tokens per call", "tokens per call", "accuracy %", *others), *rows] if rows else []

    def __str__(self) -> str:
        tables = [cells for cells in (self.cells(), self.comparison()) if cells]
        return "\n\n".join([f"{self.title}.", *map(markdown, tables)])

    @property
    def title(self) -> str:
        """What was asked, in words."""
        counts = sorted({point.num_samples for point in self.points})
        return f"{self.task}: {counts[-1]:,} questions, {self.num_shots} worked examples before each"

    def as_record(self) -> dict[str, Any]:
        """Return all of it in values that JSON has."""
        return {**asdict(self), "aup": self.aup}


def _pairs(points: Sequence[TaskPoint]) -> list[tuple[float, float]]:
    return [(point.tokens_per_call, 100 * point.accuracy.value) for point in points if point.tokens_per_call > 0]


def _numbers(point: TaskPoint) -> tuple[str, ...]:
    coupled = rounded(point.share_coupled) if point.setting.with_circuit else ""
    return f"{point.tokens_per_call:.2f}", f"{point.num_calls:.1f}", f"{point.tokens_per_second:.3g}", coupled


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
