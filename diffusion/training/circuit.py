"""Fitting a circuit to a frozen denoiser: maximum likelihood on plain blocks, then the coupled objective."""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from torch import Tensor, nn

import circuits as ct
from circuits.arguments import checked_number, kind_of
from circuits.digests import digest
from circuits.learning.checkpoint import Checkpoint
from circuits.learning.distributed import Processes, checked_processes
from circuits.learning.loop import EarlyStopping, ModuleTraining, Plan, run
from circuits.precision import own_precision
from diffusion.errors import ArgumentError
from diffusion.head import CoupledHead
from diffusion.training.cached import CachedBatch, blocks_of
from diffusion.training.coupled_em import CoupledAnemone
from diffusion.training.curve import TrainingCurve
from diffusion.training.logit_cache import LogitCache
from diffusion.training.losses import ALONE, Weighting, check_weighting, coupled_loss, losses_by_ratio, per_block
from diffusion.training.plain import PlainText

__all__ = ["CircuitTraining", "OptimizerName", "Weighting", "coupled_loss", "fit_coupled", "losses_by_ratio"]

OptimizerName = Literal["adam", "anemone"]
_MAX_WEIGHT = 1e6
"""Of a second term; far beyond, squares of gradients are no numbers in single precision."""


@dataclass(frozen=True, kw_only=True)
class CircuitTraining:
    """How a circuit is fitted on the coupled objective.

    Attributes:
        steps: optimizer updates.
        batch_size: noised blocks an update.
        learning_rate: of Adam on the log-weights, at the peak; it falls to 0 along a cosine.
        feature_learning_rate: the same for parameters of conditioners that multiply the denoiser's features, whose many
            inputs move a log-factor together and ask for smaller steps.
        weighting: ``masked_mean``: a block's CLL divided by its number of masked tokens, averaged over the blocks that
            have a mask, which under the linear schedule has nearly the expectation of the ELBO, and less variance;
            ``uniform``: CLL per block.
        validate_every: updates between two held-out evaluations; the last update is always followed by one.
        checkpoint_every: updates between two checkpoints.
        seed: of the order of the examples.
        patience: stop after so many held-out evaluations in a row without a better one, and end with the weights of the
            best; None: do all updates, and end with the last weights.
        optimizer: of the circuit's weights: "adam", down the gradient; or "anemone", steps by flows, see
            :mod:`~diffusion.training.coupled_em`, whatever the learning rate is. Conditioners are always Adam's.
        step_size: s of "anemone" at the start, 0 < s <= 1; it falls to 0 along a cosine.
        momentum: mu of "anemone", 0 <= mu < 1.
        likelihood_weight: of the log-likelihood of plain text under the circuit, in the unit of the loss, as a second
            term of the objective, see :mod:`~diffusion.training.plain`; 0: none.
    """

    steps: int = 800
    batch_size: int = 128
    learning_rate: float = 0.03
    feature_learning_rate: float = 1e-3
    weighting: Weighting = "masked_mean"
    validate_every: int = 200
    checkpoint_every: int = 100
    seed: int = 0
    patience: int | None = None
    optimizer: OptimizerName = "adam"
    step_size: float = 0.4
    momentum: float = 0.9
    likelihood_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}: expected an integer >= 1, got {getattr(self, name)}")
        if self.patience is not None:
            EarlyStopping(self.patience)
        if self.optimizer not in get_args(OptimizerName):
            raise ArgumentError(f"optimizer: expected {' or '.join(get_args(OptimizerName))}, got {self.optimizer!r}")
        ct.learning.Anemone(step_size=self.step_size, momentum=self.momentum)  # which refuses what is out of range
        for name in ("learning_rate", "feature_learning_rate"):
            if not getattr(self, name) > 0:
                raise ArgumentError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        check_weighting(self.weighting)
        if checked_number("likelihood_weight", self.likelihood_weight) > _MAX_WEIGHT:
            raise ArgumentError(f"likelihood_weight: expected at most {_MAX_WEIGHT:g}, got {self.likelihood_weight}")


@own_precision
def fit_coupled(
    head: CoupledHead,
    cache: LogitCache,
    held_out: LogitCache | None = None,
    *,
    text: Tensor | None = None,  # shape: (n, L)
    config: CircuitTraining | None = None,
    checkpoint_path: str | os.PathLike[str] | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> TrainingCurve:
    """Raise ``E[w(t) CLL]`` of a frozen denoiser's cached predictions over the head's parameters, in place.

    These are the circuit's weights and those of its conditioners, where the head has some.

    The gradient with respect to the log-weights is the flows at the true tokens minus the flows under the evidence (Li
    et al. 2026, arXiv 2603.00045, section 4). An interrupted run that is repeated from the same weights with the same
    arguments continues, and ends like one that was not interrupted.

    Args:
        head: whose circuit and calibration are trained, with the head's normalisation.
        cache: predictions for training blocks.
        held_out: predictions for held-out blocks, for the curve and for early stopping.
        text: plain blocks of the denoiser's tokens, int64, whose log-likelihood under the circuit counts too, with the
            configuration's ``likelihood_weight``; losses do not count it. None: none.
        config: by default ``CircuitTraining()``.
        checkpoint_path: a ``.safetensors`` file to continue from, if it exists, and to write to.
        process_group: the processes that learn together, see :func:`circuits.learning.join_processes`: each calls this
            with the same arguments, computes its share of every batch, and ends with the same head, that of one process
            but for rounding. The first one's initial weights count, and it alone touches the checkpoint, with which any
            number of processes goes on.
        log_dir: a folder for TensorBoard, written at every entry of the curve, with the held-out loss apart by mask
            ratio; None: none.
        progress: draw a progress bar.

    Returns:
        The learning curve: loss in nats per masked token (``masked_mean``) or per block.

    Raises:
        ArgumentError: cache and circuit do not fit together, or the loss is not finite.
        ProcessLostError: another of the processes ended.
        CheckpointError: the checkpoint is corrupt, or of another run, or of one that started from other weights.
        Interrupted: long work was asked to stop, see :func:`circuits.progress.request_stop`.
    """
    config = config or CircuitTraining()
    _check_caches(head, cache, held_out)
    plan = plan_of(config, held_out, log_dir=log_dir, title="fitting the circuit")
    training = CacheTraining(head, cache, held_out, config, checked_processes(process_group), text=text)
    identity = {
        "configuration": json.dumps(settings_of(config)),
        "head": described(head),
        "cache": cache.digest,
        "held-out cache": "none" if held_out is None else held_out.digest,
    } | ({} if text is None else {"text": digest(text)})
    curve = training.run(plan, checkpoint_path, identity, progress=progress)
    head.tokenizer_fingerprint = head.tokenizer_fingerprint or cache.tokenizer_fingerprint
    return curve


def plan_of(config: CircuitTraining, held_out: object | None, **named: Any) -> Plan:
    """Return when a run of this configuration measures, keeps, and ends, with what else is named.

    Raises:
        ArgumentError: it is to stop early, and nothing is held out.
    """
    stops_early = config.patience is not None
    if stops_early and held_out is None:
        raise ArgumentError("patience: it looks at held-out text, and there is none; give held_out")
    return Plan(
        num_updates=config.steps,
        entries=range(0, config.steps + 1, config.validate_every),
        checkpoint_every=config.checkpoint_every,
        keeps_best=stops_early,
        lower_is_better=True,
        early_stopping=None if config.patience is None else EarlyStopping(config.patience),
        **named,
    )


class HeadTraining(ModuleTraining, ABC):
    """Updates of a head, and of what else is given, on the coupled objective.

    Args:
        head: that is trained.
        config: how.
        model: whose weights the run keeps, the head's among them; None: the head.
        groups: of further parameters, with their learning rates at the peak.
        processes: those that learn together; each moves all parameters by the sums of what they found.
        plain: text whose log-likelihood counts too, or None.
    """

    def __init__(
        self,
        head: CoupledHead,
        config: CircuitTraining,
        *,
        model: nn.Module | None = None,
        groups: Sequence[dict[str, Any]] = (),
        processes: Processes,
        plain: PlainText | None = None,
    ) -> None:
        parameters = [*_parameter_groups(head, config), *groups]
        super().__init__(model or head, torch.optim.Adam(parameters, betas=(0.9, 0.95)))
        self.processes = processes
        self.head, self.config, self.plain = head, config, plain
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        own = set(map(id, head.pc.parameters()))
        moved = [one for group in self.optimizer.param_groups for one in group["params"] if one.requires_grad]
        self._others = [one for one in moved if id(one) not in own]
        is_by_flows = config.optimizer == "anemone"  # then Adam finds no gradients of the circuit's parameters
        self._flows = CoupledAnemone(head.pc, config.momentum, processes) if is_by_flows else None

    def run(
        self,
        plan: Plan,
        checkpoint_path: str | os.PathLike[str] | None,
        identity: dict[str, str],
        *,
        progress: bool,
    ) -> TrainingCurve:
        """Train to the end, from the checkpoint where there is one, all processes from the weights of the first.

        Raises:
            ArgumentError: the processes were called with different arguments, or are more than a batch has blocks.
        """
        self.processes.check_same(identity)
        if self.processes.size > self.num_in_batch:
            raise ArgumentError(
                f"process_group: expected at most a process for each of the {self.num_in_batch} blocks of a batch, got "
                f"{self.processes.size}; start fewer"
            )
        self.processes.spread(self.model.state_dict().values())
        return TrainingCurve.of(run(self, plan, Checkpoint(checkpoint_path, identity), progress=progress)[0])

    @property
    def num_in_batch(self) -> int:
        """Blocks of every batch, those of all processes together."""
        return self.config.batch_size

    @abstractmethod
    def batch(self, step: int) -> CachedBatch:
        """Return this process's share of the batch of one step, a function of the seed and the step alone."""

    def clip(self) -> None:
        """Bound the gradients before they move anything."""

    def update(self, step: int) -> Tensor:
        """Do one update of the parameters: (loss, 1) in the first process, and nothing more in the others."""
        config, flows, batch = self.config, self._flows, self.batch(step)
        decay = (1 + math.cos(math.pi * step / config.steps)) / 2
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * decay
        weights = None
        if flows is not None:
            weights = flows.weights()
        elif self.plain is not None:  # both terms read them once
            weights = self.head.pc.weights()
        dist = batch.distribution(self.head, weights=weights)
        log_partition: Tensor | None = None if flows is None else dist.log_partition
        constant = None if log_partition is None else log_partition.detach()
        log_prob = dist.log_prob(batch.tokens, log_partition=constant)
        losses = per_block(-log_prob, batch.masked, config.weighting)
        own = torch.tensor([float(losses.detach().sum()), len(losses)], dtype=torch.float64)
        total, num_losses = self.processes.summed(own).tolist()
        num_losses = max(1.0, num_losses)
        if not math.isfinite(total):
            raise ArgumentError(
                f"learning_rate: expected one with finite losses, got {config.learning_rate} and a loss of "
                f"{total / num_losses} at step {step}; lower it"
            )
        log_joint, plain_mass = -losses.sum(), 0.0
        text = None if self.plain is None else self.plain.batch(step)
        if self.plain is not None and text is not None and weights is not None:
            per_token = 1 if config.weighting == "uniform" else batch.masked.shape[1]
            plain_mass = config.likelihood_weight * num_losses / per_token
            log_joint = log_joint + plain_mass * self.plain.log_likelihood(self.head.pc, weights, text)
        self.optimizer.zero_grad()
        if flows is None or log_partition is None:
            (-log_joint / num_losses).backward()
        else:
            log_z = per_block(log_partition, batch.masked, config.weighting).sum()
            if self.plain is not None and text is not None and weights is not None:
                log_z = log_z + plain_mass * self.plain.log_normaliser(self.head.pc, weights, text)
            flows.differentiate(log_joint, log_z, self._others, num_losses)
        self._sum_gradients()
        self.clip()
        self.optimizer.step()
        if flows is not None:
            ones = torch.ones(len(batch.masked), dtype=torch.float64)
            mass = self.processes.summed(per_block(ones, batch.masked.cpu(), config.weighting).sum())
            flows.step(float(mass) + plain_mass, step_size=config.step_size * decay)
        is_first = self.processes.rank == 0
        return torch.tensor([total / num_losses, 1.0], dtype=torch.float64) * is_first

    def _sum_gradients(self) -> None:
        """Give every parameter the sum of the processes' gradients; which of them have one is the same in all."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad = self.processes.summed(parameter.grad)

    def state(self) -> Any:
        """Return that of Adam, with the moving averages of flows beside it."""
        return super().state() if self._flows is None else {"adam": super().state(), "flows": self._flows.state()}

    def restore(self, state: Any) -> None:
        """Go on from such a state."""
        if self._flows is None:
            return super().restore(state)
        super().restore(state["adam"])
        self._flows.restore(state["flows"])


class CacheTraining(HeadTraining):
    """Updates of a head on the examples of a cache."""

    def __init__(
        self,
        head: CoupledHead,
        cache: LogitCache,
        held_out: LogitCache | None,
        config: CircuitTraining,
        processes: Processes = ALONE,
        *,
        text: Tensor | None = None,
    ) -> None:
        plain = PlainText.checked(head, text, cache.vocab_size, config, processes)
        super().__init__(head, config, processes=processes, plain=plain)
        self._cache, self._held_out = cache, held_out

    @property
    def num_in_batch(self) -> int:
        """Blocks of every batch; a small cache has fewer than the configuration says."""
        return min(self.config.batch_size, len(self._cache))

    def batch(self, step: int) -> CachedBatch:
        """Read this process's share of the batch of one step."""
        rows = self.processes.share(torch.from_numpy(_rows_of(len(self._cache), self.config, step))).numpy()
        return self._cache.batch(rows, self.head.pc.device, masked_only=not self.head.needs_observed)

    def evaluate(self) -> float | None:
        """Return the loss of the held-out examples."""
        if self._held_out is None:
            return None
        return coupled_loss(self.head, self._held_out, weighting=self.config.weighting, processes=self.processes)

    def details(self) -> dict[str, float]:
        """Return the held-out loss apart by the share of a block that is masked."""
        losses = () if self._held_out is None else losses_by_ratio(self.head, self._held_out)
        return {f"validation by mask ratio/up to {(n + 1) / len(losses):g}": loss for n, loss in enumerate(losses)}


def settings_of(config: CircuitTraining) -> dict[str, Any]:
    """Return a configuration as files name it: options that files of before do not have only where they are chosen."""
    later: dict[str, Any] = {"patience": None, "likelihood_weight": 0.0}
    if config.optimizer == "adam":
        later |= {name: getattr(config, name) for name in ("optimizer", "step_size", "momentum")}
    return {name: value for name, value in asdict(config).items() if name not in later or value != later[name]}


def _check_caches(head: CoupledHead, *caches: LogitCache | None) -> None:
    """Raise ArgumentError unless the head's circuit is over the blocks and the tokens of the caches."""
    if not isinstance(head, CoupledHead):
        raise ArgumentError(f"head: expected df.CoupledHead, got {kind_of(head)}")
    for cache in (cache for cache in caches if cache is not None):
        if cache.block_length != head.block_length:
            raise ArgumentError(
                f"cache: blocks of {cache.block_length} tokens from {cache.vocab_size} do not fit {head.pc.circuit}; "
                f"cache blocks of {head.block_length}"
            )
        head.check_tokenizer(cache.tokenizer_fingerprint)
        unknown = np.isin(cache.tokens, head.unknown_ids(cache.vocab_size, cache.forbidden_ids))
        if bool(unknown.any()):
            raise ArgumentError(
                f"cache: expected tokens of the circuit's vocabulary, got {int(cache.tokens[unknown][0])}; leave such "
                "texts out, or fit a circuit that has this token"
            )


def described(head: CoupledHead) -> str:
    """Return a hash of what a head is but for its weights: structure, what the fit depends on, and what it moves."""
    conditioners = [(type(made).__qualname__, made.settings()) for made in head.conditioners]
    moved = [(name, tuple(parameter.shape), parameter.requires_grad) for name, parameter in head.named_parameters()]
    return digest(repr(head.pc.circuit), head.normalization, str(head.top_k), str(conditioners), str(moved))


def _parameter_groups(head: CoupledHead, config: CircuitTraining) -> list[dict[str, Any]]:
    """Return the head's parameters with their learning rates: those that multiply features apart from the rest."""
    featured = [parameter for one in head.conditioners for parameter in one.feature_parameters()]
    read = set(map(id, featured))
    groups = [
        {"params": [one for one in head.parameters() if id(one) not in read], "lr": config.learning_rate},
        {"params": featured, "lr": config.feature_learning_rate},
    ]
    return [group for group in groups if group["params"]]


def _rows_of(num_blocks: int, config: CircuitTraining, step: int) -> NDArray[np.int64]:
    """Return the blocks of one step, a function of seed and step alone."""
    return np.sort(blocks_of(step, num_blocks, config.batch_size, seed=(config.seed,)))  # in the order of the files
