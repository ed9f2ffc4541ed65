"""The one loop of learning: updates, measurements, checkpoints, and the reasons to stop."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from circuits.arguments import checked_count, checked_number
from circuits.errors import Interrupted
from circuits.learning.checkpoint import Checkpoint, History, Snapshot, Start
from circuits.learning.distributed import Processes
from circuits.learning.scalars import scalar_log
from circuits.progress import progress_bar, stop_requested, stoppable

StopReason = Literal["converged", "early_stopping", "num_updates"]
_NOTE_SECONDS = 1.0


@dataclass(frozen=True)
class EarlyStopping:
    """Stop when validation has not become better for a while.

    Args:
        patience: so many entries in a row, or epochs of a fit, without a better one.
        min_improvement: by how much an entry must be better than the best one to count as such.

    Raises:
        ArgumentError: an argument is out of range.
    """

    patience: int
    min_improvement: float = 0.0

    def __post_init__(self) -> None:
        checked_count("patience", self.patience)
        checked_number("min_improvement", self.min_improvement, "a number of nats per sample")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """When a run measures, writes its checkpoint, and ends.

    Args:
        num_updates: of the whole run.
        entries: after which updates something is measured; after the last one always.
        checkpoint_every: updates between two checkpoints; the last one is always followed by one.
        keeps_best: whether the model ends with the weights of the best entry in validation.
        lower_is_better: whether that is the least, as of losses, or the greatest, as of likelihoods.
        early_stopping: ends the run; None: it does not.
        tol: end when an entry of training is less than so much greater than the one before; None: never.
        log_dir: a folder that every entry is also written to, for TensorBoard; None: none.
        title: of the progress bar.
    """

    num_updates: int
    entries: Container[int]
    checkpoint_every: int
    keeps_best: bool = False
    lower_is_better: bool = False
    early_stopping: EarlyStopping | None = None
    tol: float | None = None
    log_dir: str | os.PathLike[str] | None = None
    title: str = "learning"

    def reason_to_stop(self, history: History) -> StopReason | None:
        """Return why a run with this history is over, None if it is not."""
        if (self.early_stopping is not None or self.tol is not None) and history.is_at_entry:
            patience = None if self.early_stopping is None else self.early_stopping.patience
            if patience is not None and len(history.steps) - 1 - history.best >= patience:
                return "early_stopping"
            if self.tol is not None and len(history.train) > 1 and history.train[-1] - history.train[-2] < self.tol:
                return "converged"
        return "num_updates" if history.step >= self.num_updates else None


class Training(ABC):
    """What the loop runs: a model, and how it is updated and measured.

    Args:
        model: whose ``state_dict`` are the weights.
        processes: those that learn together; the loop is run in all of them, and the first one keeps the checkpoint.
    """

    def __init__(self, model: nn.Module, processes: Processes | None = None) -> None:
        self.model = model
        self.processes = processes or Processes()

    @abstractmethod
    def update(self, step: int) -> Tensor:
        """Do update number ``step``, from 0; return (total, mass, ...), float64: what is measured is total over mass.

        All randomness is a function of ``step``: so a run that is continued ends like one that was never interrupted.
        """

    def measured(self, sums: Tensor) -> float:
        """Return the measure of training from what the updates since the last entry add up to."""
        return float(sums[0] / sums[1])

    def evaluate(self) -> float | None:
        """Return the measure of validation; None: nothing is held out."""
        return None

    def details(self) -> dict[str, float]:
        """Return further measures by name, for a log; called in the first of several processes alone."""
        return {}

    @abstractmethod
    def state(self) -> Any:
        """Return all that the next update depends on but the weights: nested dicts and lists of tensors and numbers."""

    @abstractmethod
    def restore(self, state: Any) -> None:
        """Go on from a state; the model has the weights that belong to it."""

    def weights(self) -> dict[str, Tensor]:
        """Return copies of the weights."""
        return {name: weight.detach().clone() for name, weight in self.model.state_dict().items()}

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the weights by others of the same shapes."""
        for name, own in self.model.state_dict().items():
            own.copy_(weights[name])


class ModuleTraining(Training):
    """The training of a module by an optimizer of torch."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(model)
        self.optimizer = optimizer

    def state(self) -> Any:
        """Return the optimizer's."""
        return self.optimizer.state_dict()

    def restore(self, state: Any) -> None:
        """Go on from a state of the optimizer."""
        self.optimizer.load_state_dict(state)


def run(
    training: Training, plan: Plan, checkpoint: Checkpoint, *, progress: bool, start: Start | None = None
) -> tuple[History, StopReason]:
    """Run a training to its end, from its checkpoint where there is one.

    Before every update it looks whether long work is to stop, see :func:`circuits.progress.request_stop`.

    Args:
        training: what is trained, in place.
        plan: when it measures, keeps, and ends.
        checkpoint: of this run.
        progress: draw a progress bar on standard error.
        start: what it starts from, where the caller has asked already.

    Returns:
        ``(history, reason)``: what was measured, from the first update on, and why the run is over.

    Raises:
        CheckpointError: the checkpoint is corrupt, of another run, or of one that started from other weights.
        Interrupted: long work was asked to stop; the checkpoint is written.
    """
    if start is None and checkpoint.path is not None:
        start = Start.of(training.weights(), training.state())
    snapshot, start = _resumed(training, plan, checkpoint, start or Start(weights="", optimizer=""))
    history, sums, best = snapshot.history, snapshot.sums, snapshot.best_weights
    processes, kept_step, shown_at, note = training.processes, history.step, time.monotonic(), ""

    def keep() -> None:
        nonlocal kept_step
        state, total = training.state(), None if sums is None else processes.summed(sums)
        if processes.rank == 0 and checkpoint.path is not None:
            weights = training.weights()
            kept = Snapshot(weights=weights, best_weights=best, optimizer=state, sums=total, history=history)
            checkpoint.write(kept, start)
        kept_step = history.step

    is_shown = progress and processes.rank == 0
    folder = plan.log_dir if processes.rank == 0 else None
    shown = progress_bar(plan.title, plan.num_updates, enabled=is_shown, completed=history.step)
    written = contextlib.nullcontext() if folder is None else scalar_log(folder, history.step)
    with written as log, stoppable(), shown as advance:
        while (reason := plan.reason_to_stop(history)) is None:
            if processes.is_any(stop_requested() is not None):
                if kept_step < history.step:
                    keep()
                raise _interrupted(plan, checkpoint, history.step)
            measured = training.update(history.step)
            sums = measured if sums is None else sums.to(measured) + measured
            history = replace(history, step=history.step + 1)
            is_last = history.step == plan.num_updates
            if is_last or history.step in plan.entries:
                history, sums = _with_entry(history, training, processes.summed(sums), plan), None
                if plan.keeps_best and history.best == len(history.steps) - 1:
                    best = training.weights()
                note = _note(history.train[-1], *history.validation[-1:])
                if log is not None:
                    log(history.step, _scalars(history) | training.details())
            elif is_shown and time.monotonic() - shown_at > _NOTE_SECONDS:
                note, shown_at = _note(training.measured(sums)), time.monotonic()
            if is_last or history.step % plan.checkpoint_every == 0:
                keep()
            advance(note=note)
    if best is not None:
        training.set_weights(best)
    return history, reason


def mixed_seed(seed: int, number: int) -> int:
    """Return the seed of one of many parts of a run, such as an update or an epoch: 64 bits, a function of both."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8], "big")


def _scalars(history: History) -> dict[str, float]:
    heard = {"validation": history.validation[-1]} if history.validation else {}
    return {"train": history.train[-1], **heard}


def _with_entry(history: History, training: Training, sums: Tensor, plan: Plan) -> History:
    train, heard = training.measured(sums), training.evaluate()
    validation = history.validation if heard is None else (*history.validation, heard)
    entry, least = len(history.steps), 0.0 if plan.early_stopping is None else plan.early_stopping.min_improvement
    sign = -1 if plan.lower_is_better else 1
    is_best = heard is None or entry == 0 or sign * (heard - history.validation[history.best]) > least
    return History(
        step=history.step,
        steps=(*history.steps, history.step),
        train=(*history.train, train),
        validation=validation,
        best=entry if is_best else history.best,
        sums=tuple(sums.tolist()),
    )


def _resumed(training: Training, plan: Plan, checkpoint: Checkpoint, start: Start) -> tuple[Snapshot, Start]:
    """Go on from the checkpoint; return its snapshot, or an empty one, and what the run started from."""
    found = training.processes.from_first(lambda: checkpoint.read(start))
    if found is None:
        return Snapshot(weights={}), start
    snapshot, start = found
    if snapshot.history.step > plan.num_updates:
        raise checkpoint.error(
            f"has done {snapshot.history.step} updates, more than the {plan.num_updates} of this call"
        )
    own = training.weights()
    for weights in (snapshot.weights, snapshot.best_weights):
        if weights is not None and not _fits(own, weights):
            raise checkpoint.error("expected weights that fit the model, got others")
    training.set_weights(snapshot.weights)
    try:
        training.restore(snapshot.optimizer)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        training.set_weights(own)
        raise checkpoint.error(f"expected a state of this optimizer, got one that does not fit: {error}") from error
    if training.processes.rank and snapshot.sums is not None:  # the first process goes on with all of them
        snapshot = replace(snapshot, sums=torch.zeros_like(snapshot.sums))
    return snapshot, start


def _fits(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> bool:
    return found.keys() == own.keys() and all(
        found[name].shape == weight.shape
        and found[name].dtype == weight.dtype
        and (not weight.is_floating_point() or bool((found[name] < torch.inf).all()))
        for name, weight in own.items()
    )


def _interrupted(plan: Plan, checkpoint: Checkpoint, step: int) -> Interrupted:
    way_on = (
        "there was no checkpoint_path to go on from"
        if checkpoint.path is None
        else f"the same call goes on from {checkpoint.path}"
    )
    reason = stop_requested() or "asked to stop"  # in another process
    return Interrupted(f"{plan.title}: {reason} after {step} of {plan.num_updates} updates; {way_on}")


def _note(train: float, *validation: float) -> str:
    heard = "".join(f", validation {value:.4f}" for value in validation if value == value)
    return f"train {train:.4f}{heard} nats"
