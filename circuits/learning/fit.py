"""Maximum-likelihood learning of a circuit's weights: one loop for EM, mini-batch EM, Anemone and gradient descent."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuits.arguments import checked_count, checked_number
from circuits.engine.compile import CompiledCircuit, check_compiled
from circuits.errors import ArgumentError, ImpossibleEvidenceError
from circuits.learning._arrays import Table
from circuits.learning._checkpoint import Checkpoint, History, Snapshot, Start
from circuits.learning.distributed import Processes, checked_processes
from circuits.learning.learners import (
    EMName,
    Learner,
    OptimizerFactory,
    build_learner,
    possible_mass,
    possible_total,
)
from circuits.learning.samples import Samples, checked_samples
from circuits.precision import own_precision
from circuits.progress import progress_bar
from circuits.symbolic import build_code

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a fit measured; all likelihoods are means in nats per sample."""

    train_log_likelihood: tuple[float, ...]
    """Per epoch, over the possible samples that observe something, each under the weights before its update."""
    validation_log_likelihood: tuple[float, ...]
    """Per epoch, after it; empty without validation data. -inf if a validation sample is impossible."""
    best_epoch: int
    """The epoch, from 0, that the circuit's weights come from: the best in validation, else the last."""
    stopped_early: bool
    """Whether ``patience`` ran out."""
    num_impossible: int
    """How many training samples had probability zero in the last epoch; nothing is learnt from them."""


@own_precision
def fit(
    pc: CompiledCircuit,
    data: Tensor | np.ndarray | Table,  # shape: (N, D)
    *,
    optimizer: EMName | torch.optim.Optimizer | OptimizerFactory = "em",
    observed: Tensor | np.ndarray | Table | None = None,  # shape: (N, D)
    sample_weights: Tensor | np.ndarray | None = None,  # shape: (N,)
    labels: Tensor | np.ndarray | None = None,  # shape: (N,)
    num_epochs: int = 50,
    batch_size: int = 256,
    step_size: float | None = None,
    momentum: float | None = None,
    pseudocount: float | None = None,
    entropy: float | None = None,
    validation_data: Tensor | np.ndarray | Table | None = None,  # shape: (M, D)
    validation_observed: Tensor | np.ndarray | Table | None = None,  # shape: (M, D)
    validation_labels: Tensor | np.ndarray | None = None,  # shape: (M,)
    patience: int | None = None,
    min_improvement: float = 0.0,
    checkpoint_path: str | os.PathLike[str] | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FitResult:
    """Fit the weights of a circuit to data by maximum likelihood, in place.

    The order of the samples is a function of seed and epoch alone. So a run with a ``checkpoint_path`` that was
    interrupted anywhere, and is started again from the same weights with the same arguments, ends like one that was
    not, to the last bit on one machine; with more ``num_epochs`` it goes on, and a finished one returns at once.

    Args:
        pc: the circuit; its present weights are where the search starts.
        data: (N, D), integers, or floating point with NaN for missing values. They stay where they are, also
            in a file (``np.memmap``), and are looked at in parts; batches are moved to the circuit's device. Other
            tables, such as h5py data sets, need a length and rows by an array of integers.
        optimizer: ``"em"``: full-batch EM, one step an epoch; ``"minibatch_em"``: a step of size s a batch;
            ``"anemone"``: the same with momentum and flow-rescaled steps (Liu et al. 2025), see
            :func:`~circuits.learning.anemone_step`; ``"viterbi_em"``: hard EM, from the most probable explanations of
            all data, see :func:`~circuits.learning.viterbi_flows`; or a ``torch.optim`` optimizer over
            ``pc.parameters()``; or a function from parameters to one, for instance ``lambda p: torch.optim.Adam(p,
            lr=0.1)``. The EM family moves all weights, also those of parameters that require no gradient.
        observed: bool (N, D), False where a value is missing: then its marginal likelihood is maximised.
        sample_weights: how often each sample counts, (N,) >= 0.
        labels: the class of each sample, int64 (N,), for a circuit with ``num_classes``: then likelihoods are
            p(x | class of x), and each class learns from its own samples.
        num_epochs: passes over the data.
        batch_size: the greatest number of samples a batch.
        step_size: s of the EM family, by default 1 for em, 0.1 for minibatch_em, 0.4 for anemone.
        momentum: mu of anemone, by default 0.9.
        pseudocount: a of the EM family, by default 0.01 (samples) for em and minibatch_em, and 1e-6 (of a batch) for
            anemone. Greater than 0, it keeps values that were never seen possible.
        entropy: tau >= 0 of the EM family, by default 0: spreads the weights out, see
            :func:`~circuits.learning.em_step`.
        validation_data: integers (M, D); when given, the circuit ends with the weights of its best epoch.
        validation_observed: bool (M, D), like ``observed``.
        validation_labels: int64 (M,), like ``labels``.
        patience: stop after so many epochs in a row without a better validation likelihood; None: never.
        min_improvement: by how much, in nats per sample, an epoch must be better than the best one to count as such.
        checkpoint_path: a ``.safetensors`` file that the state is written to after every epoch, and that the run
            continues from when it exists. What the circuit's weights, and an optimizer's state, are at the start
            belongs to the run: only those that it started from, or that the file holds, are gone on from.
        process_group: the processes that learn together, see :func:`~circuits.learning.join_processes`: each is called
            with the same arguments, computes its share of every batch, and ends with the same circuit, that of one
            process but for rounding. The first one's initial weights count, and it alone touches the checkpoint.
        seed: an integer >= 0, for the order of the samples.
        progress: draw a progress bar on standard error.

    Raises:
        ArgumentError: an argument has a wrong type, shape or value; or a gradient optimizer diverged, and then the
            weights are those of the last complete epoch.
        ImpossibleEvidenceError: all samples have probability zero.
        CheckpointError: the checkpoint is corrupt, or of another run, or of one that started from other weights.
    """
    _check_options(pc, num_epochs, batch_size, patience, min_improvement, seed, validation_data is not None)
    samples = checked_samples(pc, "data", data, observed, sample_weights, labels)
    validation = None
    for argument, given in (("validation_observed", validation_observed), ("validation_labels", validation_labels)):
        if given is not None and validation_data is None:
            raise ArgumentError(f"{argument}: it says something about validation_data, which is not given; give both")
    if validation_data is not None:
        validation = checked_samples(
            pc, "validation_data", validation_data, validation_observed, None, validation_labels
        )
    options = {"step_size": step_size, "momentum": momentum, "pseudocount": pseudocount, "entropy": entropy}
    learner, method = build_learner(pc, optimizer, options)
    learner.processes = processes = checked_processes(process_group)
    is_identified = checkpoint_path is not None or processes.size > 1  # else nobody asks, and hashing reads all data
    identity = {
        "circuit": hashlib.sha256(f"{build_code(pc.circuit)} {pc.dtype}".encode()).hexdigest(),
        "data": samples.digest() if is_identified else "",
        "validation_data": "none" if validation is None or not is_identified else validation.digest(),
        "optimizer": method,
        "options": f"batch_size={batch_size} patience={patience} min_improvement={min_improvement} seed={seed}",
    }
    start = Start.of(dict(pc.bank.items()), learner.state()) if is_identified else Start(weights="", optimizer="")
    processes.check_same(identity | {"num_epochs": str(num_epochs), "optimizer state": start.optimizer})
    processes.spread(pc.bank.values())
    checkpoint = Checkpoint(checkpoint_path, identity)
    history, best_weights, start = _resume(pc, learner, checkpoint, start, num_epochs)

    is_shown = progress and processes.rank == 0
    with progress_bar("fitting the circuit", num_epochs, enabled=is_shown, completed=history.num_epochs) as advance:
        while history.num_epochs < num_epochs and not _is_out_of_patience(history, patience):
            train, num_impossible = _epoch(pc, learner, samples, batch_size, seed, history.num_epochs)
            heard = None if validation is None else _mean_log_likelihood(pc, validation, batch_size, processes)
            history = _extended(history, train, heard, num_impossible, min_improvement)
            if heard is not None and history.best_epoch == history.num_epochs - 1:
                best_weights = _copied_weights(pc)
            if processes.rank == 0:
                checkpoint.write(
                    Snapshot(
                        weights=_copied_weights(pc), best_weights=best_weights, learner=learner.state(), history=history
                    ),
                    start,
                )
            advance(note=f"train {train:.4f}" + ("" if heard is None else f", validation {heard:.4f}") + " nats")
    if best_weights is not None:
        _set_weights(pc, best_weights)
    return FitResult(
        train_log_likelihood=history.train,
        validation_log_likelihood=history.validation,
        best_epoch=history.best_epoch,
        stopped_early=_is_out_of_patience(history, patience),
        num_impossible=history.num_impossible,
    )


def _epoch(
    pc: CompiledCircuit, learner: Learner, samples: Samples, batch_size: int, seed: int, epoch: int
) -> tuple[float, int]:
    """Learn from all samples once: (mean log-likelihood of the possible ones, number of impossible ones)."""
    order = _shuffled(len(samples.x), seed, epoch) if learner.is_shuffled else None
    total = torch.zeros((), dtype=torch.float64, device=pc.device)
    mass, num_impossible = torch.zeros_like(total), torch.zeros_like(total)
    for batch in samples.batches(batch_size, pc.device, order, learner.processes):
        heard = batch.without_silence()
        log_likelihood = learner.update(heard)
        total += possible_total(log_likelihood, heard.weights)
        mass += possible_mass(log_likelihood, heard.weights)
        num_impossible += (log_likelihood == -torch.inf).sum()
    total, mass, num_impossible = learner.processes.summed(torch.stack([total, mass, num_impossible]))
    if not float(mass) > 0:
        raise ImpossibleEvidenceError(
            f"data: all {len(samples.x)} samples have probability zero under the circuit, or weight zero, or "
            "observe nothing, so there is nothing to learn from; look for zeros in the weights that nodes were given"
        )
    learner.end_epoch()
    return float(total / mass), int(num_impossible)


@torch.no_grad()
def _mean_log_likelihood(pc: CompiledCircuit, samples: Samples, batch_size: int, processes: Processes) -> float:
    total = torch.zeros((), dtype=torch.float64, device=pc.device)
    count = torch.zeros_like(total)
    for batch in samples.batches(batch_size, pc.device, None, processes):
        total += pc.log_partition(batch.evidence).double().sum()
        weights = batch.without_silence().weights
        count += batch.evidence.batch_size if weights is None else weights.sum()
    total, count = processes.summed(torch.stack([total, count]))
    return float(total / count.clamp_min(1))


def _shuffled(num_samples: int, seed: int, epoch: int) -> Tensor:
    mixed = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed[:8], "big"))
    return torch.randperm(num_samples, generator=generator)


def _extended(
    history: History, train: float, validation: float | None, num_impossible: int, min_improvement: float
) -> History:
    epoch = history.num_epochs
    heard = history.validation if validation is None else (*history.validation, validation)
    is_best = validation is None or epoch == 0 or validation > history.validation[history.best_epoch] + min_improvement
    return History(
        train=(*history.train, train),
        validation=heard,
        best_epoch=epoch if is_best else history.best_epoch,
        num_impossible=num_impossible,
    )


def _is_out_of_patience(history: History, patience: int | None) -> bool:
    return patience is not None and history.num_epochs - 1 - history.best_epoch >= patience


def _resume(
    pc: CompiledCircuit, learner: Learner, checkpoint: Checkpoint, start: Start, num_epochs: int
) -> tuple[History, dict[str, Tensor] | None, Start]:
    """Go on from the checkpoint; return (history, best weights, what the run started from)."""
    found = learner.processes.from_first(lambda: checkpoint.read(start))
    if found is None:
        return History(), None, start
    snapshot, start = found
    if snapshot.history.num_epochs > num_epochs:
        raise checkpoint.error(f"has done {snapshot.history.num_epochs} epochs, more than num_epochs={num_epochs}")
    for weights in (snapshot.weights, snapshot.best_weights):
        if weights is not None and not _fits(pc, weights):
            raise checkpoint.error("is corrupt: its weights do not fit the circuit")
    try:
        learner.restore(snapshot.learner)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise checkpoint.error(f"is corrupt: its optimizer state does not fit: {error}") from error
    _set_weights(pc, snapshot.weights)
    best = snapshot.best_weights
    return snapshot.history, None if best is None else {k: w.to(pc.device) for k, w in best.items()}, start


def _fits(pc: CompiledCircuit, weights: dict[str, Tensor]) -> bool:
    return weights.keys() == set(pc.bank) and all(
        weights[name].shape == parameter.shape
        and weights[name].dtype == parameter.dtype
        and bool((weights[name] < torch.inf).all())
        for name, parameter in pc.bank.items()
    )


def _copied_weights(pc: CompiledCircuit) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in pc.bank.items()}


@torch.no_grad()
def _set_weights(pc: CompiledCircuit, weights: dict[str, Tensor]) -> None:
    for name, parameter in pc.bank.items():
        parameter.copy_(weights[name])


def _check_options(
    pc: CompiledCircuit,
    num_epochs: int,
    batch_size: int,
    patience: int | None,
    min_improvement: float,
    seed: int,
    is_validated: bool,
) -> None:
    check_compiled(pc)
    counts = [("num_epochs", num_epochs, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)]
    if patience is not None:
        counts.append(("patience", patience, 1))
    for name, value, least in counts:
        checked_count(name, value, least)
    if patience is not None and not is_validated:
        raise ArgumentError("patience: early stopping compares validation likelihoods; give validation_data too")
    checked_number("min_improvement", min_improvement, "a number of nats per sample")
    if not all(bool((parameter < torch.inf).all()) for parameter in pc.bank.values()):
        raise ArgumentError("pc: its weights have NaN or +inf among them; call pc.randomize(seed=...) first")
