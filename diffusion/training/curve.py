"""What a run of training measured on its way."""

from __future__ import annotations

import math
from dataclasses import dataclass

from circuits.learning.checkpoint import History


@dataclass(frozen=True)
class TrainingCurve:
    """What was measured after ``steps[i]`` updates, in nats per block token.

    Attributes:
        steps: numbers of updates done.
        train: mean training loss of the updates since the entry before.
        held_out: ``held_out_loss``; NaN where there was no held-out text.
    """

    steps: tuple[int, ...] = ()
    train: tuple[float, ...] = ()
    held_out: tuple[float, ...] = ()

    @classmethod
    def of(cls, history: History) -> TrainingCurve:
        """Return the curve of a run."""
        return cls(history.steps, history.train, history.validation or (math.nan,) * len(history.steps))
