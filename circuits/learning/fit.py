"""Maximum-likelihood learning of a circuit's weights: EM, mini-batch EM, Anemone and gradient descent."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from circuits.arguments import checked_count, checked_number
from circuits.engine.compile import CompiledCircuit
from circuits.engine.weights import check_compiled
from circuits.errors import ArgumentError, ImpossibleEvidenceError
from circuits.learning.checkpoint import Checkpoint, Start
from circuits.learning.distributed import Processes
from circuits.learning.learners import Learner, possible_mass, possible_total
from circuits.learning.loop import EarlyStopping, Plan, Training, mixed_seed, run
from circuits.learning.optimizers import OptimizerLike, optimizer_of
from circuits.learning.samples import Batch, CheckedSamples, Rows, Samples, checked_samples
from circuits.precision import own_precision

_OF_SAMPLES = {"observed": "observed", "sample_weights": "weights", "labels": "labels", "latents": "latents"}
_OF_VALIDATION = {"validation_observed": "observed", "validation_labels": "labels"}


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a fit measured; all likelihoods are means in nats per sample."""

    train_log_likelihood: tuple[float, ...]
    """Per epoch, over the possible samples that observe something, each under the weights before its update."""
    validation_log_likelihood: tuple[float, ...]
    """Per epoch, after it; empty without validation data. -inf if a validation sample is impossible."""
    best_epoch: int
    """The epoch, from 0, that the circuit's weights come from: the best in validation, else the last."""
    stopped: Literal["converged", "early_stopping", "num_epochs"]
    """Why it ended: the training likelihood gained less than ``tol``, ``patience`` ran out, or all epochs were done."""
    num_impossible: int
    """How many training samples had probability zero in the last epoch; nothing is learnt from them."""

    @property
    def stopped_early(self) -> bool:
        """Whether ``patience`` ran out."""
        return self.stopped == "early_stopping"


@own_precision
def fit(
    pc: CompiledCircuit,
    data: Samples | Rows,  # shape: (N, D)
    *,
    optimizer: OptimizerLike = "em",
    num_epochs: int = 50,
    batch_size: int = 256,
    validation_data: Samples | Rows | None = None,  # shape: (M, D)
    tol: float | None = None,
    patience: int | EarlyStopping | None = None,
    checkpoint_path: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> FitResult:
    """Fit the weights of a circuit to data by maximum likelihood, in place.

    The order of the samples is a function of seed and epoch alone. So a run with a ``checkpoint_path`` that was
    interrupted anywhere, and is started again from the same weights with the same arguments, ends like one that was
    not, to the last bit on one machine; with more ``num_epochs`` it goes on, and a finished one returns at once.

    Args:
        pc: the circuit; its present weights are where the search starts.
        data: values (N, D), integers, or floating point with NaN for missing ones; or :class:`Samples`, which say more.
        optimizer: an object, :class:`EM`, :class:`MiniBatchEM`, :class:`Anemone`, :class:`ViterbiEM` or
            :class:`GradientDescent`; or the name of one of the first four, ``"em"``, ``"minibatch_em"``, ``"anemone"``,
            ``"viterbi_em"``; or a ``torch.optim`` optimizer over ``pc.parameters()``; or a function from parameters to
            one, for instance ``lambda p: torch.optim.Adam(p, lr=0.1)``.
        num_epochs: passes over the data, at most.
        batch_size: the greatest number of samples a batch.
        validation_data: like ``data``; when given, the circuit ends with the weights of its best epoch.
        tol: stop when an epoch raises the mean training log-likelihood by less than this, in nats per sample; None:
            never. For full-batch EM, whose likelihood never falls; that of mini-batches fluctuates.
        patience: stop after so many epochs in a row without a better validation likelihood; or :class:`EarlyStopping`,
            which also says by how much it must be better; None: never.
        checkpoint_path: a ``.safetensors`` file that the state is written to after every epoch, and that the run
            continues from when it exists. What the circuit's weights, and an optimizer's state, are at the start
            belongs to the run: only those that it started from, or that the file holds, are gone on from.
        progress: draw a progress bar on standard error.
        options: what the objects above take, where they are not given as such: ``observed``, ``sample_weights``,
            ``labels``, ``latents`` of the samples, ``validation_observed`` and ``validation_labels``; ``step_size``,
            ``momentum``, ``pseudocount``, ``entropy``, ``frozen``, ``seed``, ``process_group`` of the optimizer;
            ``min_improvement`` of early stopping; and ``log_dir``, a folder for TensorBoard, which is written after
            every epoch.

    Raises:
        ArgumentError: an argument has a wrong type, shape or value; or a gradient optimizer diverged, and then the
            weights are those of the last complete epoch.
        ImpossibleEvidenceError: all samples have probability zero.
        CheckpointError: the checkpoint is corrupt, or of another run, or of one that started from other weights.
        Interrupted: long work was asked to stop, see :func:`circuits.progress.request_stop`.
    """
    _check_options(pc, num_epochs, batch_size, tol)
    log_dir = options.pop("log_dir", None)
    of_samples, of_validation = _taken(options, _OF_SAMPLES), _taken(options, _OF_VALIDATION)
    early_stopping = _early_stopping(patience, options.pop("min_improvement", None), validation_data is not None)
    samples = checked_samples(pc, "data", _with("data", data, of_samples))
    if of_validation and validation_data is None:
        raise ArgumentError(
            f"validation_{next(iter(of_validation))}: it says something about validation_data, which is not given; "
            "give both"
        )
    validation = None
    if validation_data is not None:
        validation = checked_samples(pc, "validation_data", _with("validation_data", validation_data, of_validation))
    chosen = optimizer_of(optimizer, {name: value for name, value in options.items() if value is not None})
    learner = chosen.learner(pc)
    training = _CircuitTraining(learner, samples, validation, batch_size, chosen.seed)
    plan = Plan(
        num_updates=num_epochs * training.num_batches,
        entries=range(training.num_batches, num_epochs * training.num_batches + 1, training.num_batches),
        checkpoint_every=training.num_batches,
        keeps_best=validation is not None,
        early_stopping=early_stopping,
        tol=tol,
        log_dir=log_dir,
        title="fitting the circuit",
    )
    is_identified = checkpoint_path is not None or learner.processes.size > 1  # hashing reads all data
    identity = {} if not is_identified else training.identity(plan)
    start = Start.of(training.weights(), training.state()) if is_identified else None
    if start is not None:
        learner.processes.check_same(identity | {"num_epochs": str(num_epochs), "optimizer state": start.optimizer})
    learner.processes.spread(pc.bank.values())
    history, reason = run(training, plan, Checkpoint(checkpoint_path, identity), progress=progress, start=start)
    return FitResult(
        train_log_likelihood=history.train,
        validation_log_likelihood=history.validation,
        best_epoch=history.best,
        stopped="num_epochs" if reason == "num_updates" else reason,
        num_impossible=int(history.sums[2]),
    )


class _CircuitTraining(Training):
    """Epochs of a learner over samples; an update is a batch."""

    def __init__(
        self, learner: Learner, samples: CheckedSamples, validation: CheckedSamples | None, batch_size: int, seed: int
    ) -> None:
        super().__init__(learner.pc, learner.processes)
        self.num_batches = samples.num_batches(batch_size)
        self._learner = learner
        self._samples = samples
        self._validation = validation
        self._batch_size = batch_size
        self._seed = seed
        self._batches: Iterator[Batch] | None = None

    def identity(self, plan: Plan) -> dict[str, str]:
        """Return what a run depends on, but for what it starts from and how long it is."""
        pc, early = self._learner.pc, plan.early_stopping
        stopping = "" if early is None else f" patience={early.patience} min_improvement={early.min_improvement}"
        return {
            "circuit": hashlib.sha256(f"{pc.circuit!r} {pc.dtype}".encode()).hexdigest(),
            "data": self._samples.digest(),
            "validation_data": "none" if self._validation is None else self._validation.digest(),
            "optimizer": self._learner.description,
            "options": f"batch_size={self._batch_size} seed={self._seed} tol={plan.tol}{stopping}",
        }

    def update(self, step: int) -> Tensor:
        """Learn from a batch: (total log-likelihood of the possible samples, how many these and the others are)."""
        learner, (epoch, position) = self._learner, divmod(step, self.num_batches)
        if position == 0 or self._batches is None:
            order = _shuffled(len(self._samples), self._seed, epoch) if learner.is_shuffled else None
            self._batches = self._samples.batches(self._batch_size, order, learner.processes, position)
        batch = next(self._batches).without_silence()
        log_likelihood = learner.update(batch)
        total, mass = possible_total(log_likelihood, batch.weights), possible_mass(log_likelihood, batch.weights)
        if position == self.num_batches - 1:
            learner.end_epoch()
        return torch.stack([total, mass, (log_likelihood == -torch.inf).double().sum()])

    def measured(self, sums: Tensor) -> float:
        """Return the mean log-likelihood of the possible samples."""
        if not float(sums[1]) > 0:
            given = " with the given latents" if self._samples.latents else ""
            raise ImpossibleEvidenceError(
                f"data: all {len(self._samples)} samples have probability zero under the circuit{given}, or weight "
                "zero, or observe nothing, so there is nothing to learn from; look for zeros in the weights that nodes "
                "were given"
            )
        return super().measured(sums)

    def evaluate(self) -> float | None:
        """Return the mean log-likelihood of the validation data."""
        if self._validation is None:
            return None
        return _mean_log_likelihood(self._learner.pc, self._validation, self._batch_size, self.processes)

    def state(self) -> Any:
        """Return the learner's."""
        return self._learner.state()

    def restore(self, state: Any) -> None:
        """Go on from a state of the learner."""
        self._learner.restore(state)


@torch.no_grad()
def _mean_log_likelihood(pc: CompiledCircuit, samples: CheckedSamples, batch_size: int, processes: Processes) -> float:
    total = torch.zeros((), dtype=torch.float64, device=pc.device)
    count = torch.zeros_like(total)
    for batch in samples.batches(batch_size, None, processes):
        log_likelihood = pc.log_partition(batch.evidence).double()
        weights = batch.without_silence().weights
        total += log_likelihood.sum() if batch.weights is None else _weighted(log_likelihood, batch.weights)
        count += batch.evidence.batch_size if weights is None else weights.sum()
    total, count = processes.summed(torch.stack([total, count]))
    return float(total / count.clamp_min(1))


def _weighted(log_likelihood: Tensor, weights: Tensor) -> Tensor:
    return torch.where(weights > 0, log_likelihood * weights, 0.0).sum()


def _shuffled(num_samples: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(mixed_seed(seed, epoch)))


def _taken(options: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Take the fields of an object out of the options, by their names there."""
    return {field: options.pop(name) for name, field in names.items() if options.get(name) is not None}


def _with(argument: str, data: Any, given: dict[str, Any]) -> Samples:
    """Return data as samples of which more is said."""
    samples = data if isinstance(data, Samples) else Samples(data)
    for field in given:
        if getattr(samples, field) is not None:
            raise ArgumentError(f"{field}: {argument} are samples that say it already; give it once")
    return replace(samples, **given)


def _early_stopping(patience: Any, min_improvement: float | None, is_validated: bool) -> EarlyStopping | None:
    if min_improvement is not None and isinstance(patience, EarlyStopping):
        raise ArgumentError("min_improvement: patience says it already; give it once")
    least = 0.0 if min_improvement is None else checked_number("min_improvement", min_improvement)
    if patience is None:
        return None
    if not is_validated:
        raise ArgumentError("patience: early stopping compares validation likelihoods; give validation_data too")
    return patience if isinstance(patience, EarlyStopping) else EarlyStopping(patience, least)


def _check_options(pc: CompiledCircuit, num_epochs: int, batch_size: int, tol: float | None) -> None:
    check_compiled(pc)
    checked_count("num_epochs", num_epochs)
    checked_count("batch_size", batch_size)
    if tol is not None:
        checked_number("tol", tol, "a number of nats per sample")
    if not all(bool((parameter < torch.inf).all()) for parameter in pc.bank.values()):
        raise ArgumentError("pc: its weights have NaN or +inf among them; call pc.randomize(seed=...) first")
