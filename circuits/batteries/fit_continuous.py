"""Fitting continuous mixtures: Adam on the network, a fresh shift of the points every step, early stopping."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from circuits.arguments import checked_count, checked_number, is_number
from circuits.batteries.continuous import ContinuousMixture, normal_points, uniform_to_normal
from circuits.digests import digest
from circuits.engine.compile import CompiledCircuit
from circuits.errors import ArgumentError
from circuits.learning.checkpoint import Checkpoint
from circuits.learning.loop import EarlyStopping, ModuleTraining, Plan, mixed_seed, run
from circuits.learning.tables import as_tensor
from circuits.precision import own_precision
from circuits.queries.flows import checked_sample_weights
from circuits.region_graphs.chow_liu import empirical_mutual_information
from circuits.structures.blocks import checked_categories, correlated_blocks

_EVALUATED_ROWS = 1024
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class MixtureNetwork:
    """The network of a continuous mixture.

    Args:
        blocks: the blocks of variables; by default ``ct.structures.correlated_blocks`` of the data.
        max_values: the most joint values of such a block of several variables.
        latent_dim: dimensions of the latent point.
        hidden_units: width of the network's hidden layers.
        num_hidden_layers: how many there are.
        dropout: probability with which a hidden unit is left out in training.
        pseudocount: samples, spread as if variables were independent, that are added to each block's table.

    Raises:
        ArgumentError: an option is out of range.
    """

    blocks: Sequence[Sequence[int]] | None = None
    max_values: int = 16
    latent_dim: int = 4
    hidden_units: int = 128
    num_hidden_layers: int = 3
    dropout: float = 0.0
    pseudocount: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("latent_dim", 1), ("hidden_units", 1), ("num_hidden_layers", 0)):
            checked_count(name, getattr(self, name), least)
        checked_number("pseudocount", self.pseudocount)
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ArgumentError(f"dropout: expected 0 <= dropout < 1, got {self.dropout!r}")


@dataclass(frozen=True, kw_only=True)
class MixtureTraining:
    """How a continuous mixture is trained.

    Args:
        num_components: components of the circuit.
        num_points: points per training step.
        learning_rate: of Adam at its highest; it rises for the first 20th of the steps and then falls along a cosine.
        weight_decay: of AdamW.
        batch_size: samples per step.
        num_steps: of Adam.
        num_evaluations: how often to validate.
        patience: stop after so many evaluations in a row that were not the best so far; None: never.
        seed: for the network's weights, the points, the order of the samples and dropout.

    Raises:
        ArgumentError: an option is out of range.
    """

    num_components: int = 2048
    num_points: int = 1024
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    batch_size: int = 256
    num_steps: int = 2000
    num_evaluations: int = 20
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {"num_components": 2, "num_points": 2, "batch_size": 2, "num_steps": 1, "num_evaluations": 1}
        for name, least in (counts | {"seed": 0}).items():
            checked_count(name, getattr(self, name), least)
        if self.num_evaluations > self.num_steps:
            raise ArgumentError(
                f"num_steps: expected at least num_evaluations={self.num_evaluations}, got {self.num_steps}"
            )
        if self.patience is not None:
            checked_count("patience", self.patience)
        for name in ("learning_rate", "weight_decay"):
            checked_number(name, getattr(self, name))

    def rate(self, step: int) -> float:
        """Return the learning rate of an update."""
        rise = min(1.0, (step + 1) / max(1, self.num_steps // 20))
        return self.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / self.num_steps))


@dataclass(frozen=True, eq=False, kw_only=True)
class ContinuousMixtureFit:
    """A fitted continuous mixture; likelihoods are means in nats per sample."""

    pc: CompiledCircuit
    """The circuit with one component per point."""
    model: ContinuousMixture
    """The network that made it, with which other points can be tried."""
    train_log_likelihood: tuple[float, ...]
    """Between evaluations, over the batches, each under the weights before its update."""
    validation_log_likelihood: tuple[float, ...]
    """Per evaluation; empty without validation data."""
    best_step: int
    """After how many steps the model was best in validation, and so is returned; without, all of them."""


@own_precision
def fit_continuous_mixture(
    data: Any,  # shape: (N, D)
    *,
    num_categories: int | Sequence[int],
    validation_data: Any = None,  # shape: (M, D)
    sample_weights: Tensor | None = None,  # shape: (N,)
    network: MixtureNetwork | None = None,
    training: MixtureTraining | None = None,
    checkpoint_path: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> ContinuousMixtureFit:
    """Fit a :class:`ContinuousMixture` by Adam and return it as a circuit.

    Every step moves the points of the quasi-random lattice by one random shift (Cranley and Patterson 1976), so that
    the network learns a smooth family rather than ``num_points`` single components. All randomness of a step is a
    function of the seed and its number: an interrupted run with a ``checkpoint_path`` ends like one that was not.

    Args:
        data: integers (N, D), all observed, on the device that is to compute; a tensor, an array or lists.
        num_categories: C, one for all variables or one per variable.
        validation_data: integers (M, D); when given, the best model in validation is returned.
        sample_weights: how often each sample counts, (N,) >= 0: samples are drawn in proportion to it.
        network: its options.
        training: its options.
        checkpoint_path: a ``.safetensors`` file to continue from, if it exists, and to write to.
        progress: draw a progress bar on standard error.
        options: fields of ``network`` and ``training``, where these are not given.

    Raises:
        ArgumentError: an argument has a wrong type, shape or value.
        StructureError: the blocks are not a partition of the variables.
        CheckpointError: the checkpoint is corrupt, or of another run.
        Interrupted: long work was asked to stop, see :func:`circuits.progress.request_stop`.
    """
    shape, options = _made("network", network, MixtureNetwork, options)
    config, options = _made("training", training, MixtureTraining, options)
    for name in options:
        raise ArgumentError(f"{name}: expected a field of MixtureNetwork or MixtureTraining, got one of neither")
    x = as_tensor("data", data)
    held_out = None if validation_data is None else as_tensor("validation_data", validation_data)
    weights = _checked(x, num_categories, held_out, sample_weights)
    if config.patience is not None and held_out is None:
        raise ArgumentError("patience: early stopping compares validation likelihoods; give validation_data too")
    categories, blocks = checked_categories(num_categories, x.shape[1]), shape.blocks
    if blocks is None:
        information = empirical_mutual_information(x, num_categories=categories, weights=weights, pseudocount=1.0)
        blocks = correlated_blocks(information, categories, max_values=shape.max_values)
    with torch.random.fork_rng(devices=[] if x.device.type == "cpu" else [x.device]):
        torch.manual_seed(config.seed)
        model = ContinuousMixture(
            x,
            blocks,
            categories,
            sample_weights=weights,
            latent_dim=shape.latent_dim,
            hidden_units=shape.hidden_units,
            num_hidden_layers=shape.num_hidden_layers,
            dropout=shape.dropout,
            pseudocount=shape.pseudocount,
        ).to(x.device)
        learning = _Learning(model, x, weights, held_out, config)
        identity = {
            "data": digest(x, weights, held_out) if checkpoint_path is not None else "",
            "network": str((categories, [list(block) for block in blocks], shape)),
            "training": str(config),
        }
        history, _ = run(learning, _plan(config, held_out), Checkpoint(checkpoint_path, identity), progress=progress)
    return ContinuousMixtureFit(
        pc=model.circuit(learning.points),
        model=model.eval(),
        train_log_likelihood=history.train,
        validation_log_likelihood=history.validation,
        best_step=history.steps[history.best],
    )


def _plan(training: MixtureTraining, held_out: Tensor | None) -> Plan:
    steps, count = training.num_steps, training.num_evaluations
    return Plan(
        num_updates=steps,
        entries=[steps * number // count for number in range(1, count + 1)],
        checkpoint_every=max(1, steps // count),
        keeps_best=held_out is not None,
        early_stopping=None if training.patience is None else EarlyStopping(training.patience),
        title="fitting a continuous mixture",
    )


class _Learning(ModuleTraining):
    """Updates of the network; in validation it is judged as the circuit that it would be."""

    def __init__(
        self,
        model: ContinuousMixture,
        data: Tensor,
        weights: Tensor | None,
        validation_data: Tensor | None,
        config: MixtureTraining,
    ) -> None:
        decay, device = config.weight_decay, data.device
        super().__init__(model, torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=decay))
        self.mixture, self._data, self._weights, self._config = model, data, weights, config
        sobol = torch.quasirandom.SobolEngine(model.latent_dim, scramble=True, seed=config.seed)
        self._lattice = sobol.draw(config.num_points).to(device)
        self.points = normal_points(config.num_components, model.latent_dim, seed=config.seed).to(device)
        self._validation: tuple[Tensor, Tensor] | None = None
        if validation_data is not None:
            rows, counts = torch.unique(validation_data, dim=0, return_counts=True)
            self._validation = rows.to(device), counts.to(device)

    def update(self, step: int) -> Tensor:
        """Do one step of Adam: (mean log-likelihood of the batch, 1)."""
        model, config = self.mixture, self._config
        torch.manual_seed(mixed_seed(config.seed, step))
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate(step)
        batch = self._batch(step)
        shift = torch.rand(model.latent_dim, device=self._lattice.device)
        tables = model.log_tables(uniform_to_normal((self._lattice + shift) % 1))
        log_likelihood = model.log_likelihood(model.encode(batch), tables).mean()
        self.optimizer.zero_grad()
        (-log_likelihood).backward()
        self.optimizer.step()
        total = log_likelihood.detach().double()
        return torch.stack([total, torch.ones_like(total)])

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Return the mean log-likelihood of the validation data, at the points of the circuit."""
        if self._validation is None:
            return None
        (x, counts), model = self._validation, self.mixture.eval()
        tables = model.log_tables(self.points)
        parts = [model.log_likelihood(model.encode(rows), tables) for rows in x.split(_EVALUATED_ROWS)]
        model.train()
        return float((torch.cat(parts).double() * counts).sum() / counts.sum())

    def _batch(self, step: int) -> Tensor:
        """Return part of a shuffled pass over the data, or a draw in proportion to the weights."""
        data, size = self._data, self._config.batch_size
        if self._weights is not None:
            return data[torch.multinomial(self._weights, size, replacement=True)]
        num_batches = max(1, len(data) // size)
        epoch, position = divmod(step, num_batches)
        order = torch.Generator().manual_seed(mixed_seed(self._config.seed, -1 - epoch))
        return data[torch.randperm(len(data), generator=order).tensor_split(num_batches)[position].to(data.device)]


def _made(name: str, given: _T | None, kind: type[_T], options: dict[str, Any]) -> tuple[_T, dict[str, Any]]:
    """Return an object, made of the options that are its fields unless it is given, and the other options."""
    names = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    own = {key: value for key, value in options.items() if key in names}
    if given is not None and own:
        raise ArgumentError(f"{next(iter(own))}: {name} says it already; give it once")
    if given is not None and not isinstance(given, kind):
        raise ArgumentError(f"{name}: expected ct.batteries.{kind.__name__}, got {given!r:.60}")
    rest = {key: value for key, value in options.items() if key not in names}
    return kind(**own) if given is None else given, rest


def _checked(x: Tensor, num_categories: int | Sequence[int], held_out: Tensor | None, weights: Any) -> Tensor | None:
    for name, values in [("data", x)] + ([] if held_out is None else [("validation_data", held_out)]):
        if values.dim() != 2 or not len(values) or values.is_floating_point() or values.dtype == torch.bool:
            raise ArgumentError(
                f"{name}: expected a tensor of integers (N, D) with N >= 1, got {values.dtype} {tuple(values.shape)}"
            )
        if values.shape[1] != x.shape[1]:
            raise ArgumentError(f"{name}: expected {x.shape[1]} variables as in data, got {values.shape[1]}")
        limits = torch.tensor(checked_categories(num_categories, x.shape[1]), device=values.device)
        if bool(((values < 0) | (values >= limits)).any()):
            raise ArgumentError(f"{name}: expected values from 0 to {limits.tolist()} - 1, got others")
    return None if weights is None else checked_sample_weights(weights, torch.ones(len(x), device=x.device))
