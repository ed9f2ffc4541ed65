"""Fitting continuous mixtures: Adam on the network, a fresh shift of the points every step, early stopping."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.arguments import checked_count, checked_number, is_number
from circuits.engine.compile import CompiledCircuit
from circuits.errors import ArgumentError
from circuits.learning.continuous import ContinuousMixture, normal_points, uniform_to_normal
from circuits.learning.em import checked_sample_weights
from circuits.precision import own_precision
from circuits.progress import progress_bar
from circuits.region_graphs.chow_liu import empirical_mutual_information
from circuits.structures.blocks import checked_categories, correlated_blocks

_EVALUATED_ROWS = 1024


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
    data: Tensor,  # shape: (N, D)
    *,
    num_categories: int | Sequence[int],
    validation_data: Tensor | None = None,  # shape: (M, D)
    sample_weights: Tensor | None = None,  # shape: (N,)
    blocks: Sequence[Sequence[int]] | None = None,
    max_values: int = 16,
    num_components: int = 2048,
    num_points: int = 1024,
    latent_dim: int = 4,
    hidden_units: int = 128,
    num_hidden_layers: int = 3,
    dropout: float = 0.0,
    pseudocount: float = 1.0,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.0,
    batch_size: int = 256,
    num_steps: int = 2000,
    num_evaluations: int = 20,
    patience: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ContinuousMixtureFit:
    """Fit a :class:`ContinuousMixture` by Adam and return it as a circuit.

    Every step moves the points of the quasi-random lattice by one random shift (Cranley and Patterson 1976), so that
    the network learns a smooth family rather than ``num_points`` single components.

    Args:
        data: integers (N, D), all observed, on the device that is to compute.
        num_categories: C, one for all variables or one per variable.
        validation_data: integers (M, D); when given, the best model in validation is returned.
        sample_weights: how often each sample counts, (N,) >= 0: samples are drawn in proportion to it.
        blocks: the blocks of variables; by default ``ct.structures.correlated_blocks`` of the data.
        max_values: the most joint values of such a block of several variables.
        num_components: components of the circuit.
        num_points: points per training step.
        latent_dim: dimensions of the latent point.
        hidden_units: width of the network's hidden layers.
        num_hidden_layers: how many there are.
        dropout: probability with which a hidden unit is left out in training.
        pseudocount: samples, spread as if variables were independent, that are added to each block's table.
        learning_rate: of Adam at its highest; it rises for the first 20th of the steps and then falls along a cosine.
        weight_decay: of AdamW.
        batch_size: samples per step.
        num_steps: of Adam.
        num_evaluations: how often to validate.
        patience: stop when more than so many evaluations in a row were not the best so far; None: never.
        seed: for the network's weights, the points, the order of the samples and dropout.
        progress: draw a progress bar on standard error.

    Raises:
        ArgumentError: an argument has a wrong type, shape or value.
        StructureError: the blocks are not a partition of the variables.
    """
    weights = _checked(data, num_categories, validation_data, sample_weights)
    categories = checked_categories(num_categories, data.shape[1])
    counts = {"num_components": (num_components, 2), "num_points": (num_points, 2), "batch_size": (batch_size, 2)}
    counts |= {"latent_dim": (latent_dim, 1), "hidden_units": (hidden_units, 1), "seed": (seed, 0)}
    counts |= {"num_hidden_layers": (num_hidden_layers, 0), "patience": (0 if patience is None else patience, 0)}
    for name, (count, least) in counts.items():
        checked_count(name, count, least=least)
    if not isinstance(num_steps, int) or not isinstance(num_evaluations, int) or not 1 <= num_evaluations <= num_steps:
        raise ArgumentError(
            f"num_steps: expected integers 1 <= num_evaluations <= num_steps, got {num_evaluations!r} and {num_steps!r}"
        )
    if patience is not None and validation_data is None:
        raise ArgumentError("patience: early stopping compares validation likelihoods; give validation_data too")
    numbers = {"learning_rate": learning_rate, "weight_decay": weight_decay, "pseudocount": pseudocount}
    for name, number in numbers.items():
        checked_number(name, number)
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise ArgumentError(f"dropout: expected 0 <= dropout < 1, got {dropout!r}")
    if blocks is None:
        information = empirical_mutual_information(data, num_categories=categories, weights=weights, pseudocount=1.0)
        blocks = correlated_blocks(information, categories, max_values=max_values)
    with torch.random.fork_rng(devices=[] if data.device.type == "cpu" else [data.device]):
        torch.manual_seed(seed)
        model = ContinuousMixture(
            data,
            blocks,
            categories,
            sample_weights=weights,
            latent_dim=latent_dim,
            hidden_units=hidden_units,
            num_hidden_layers=num_hidden_layers,
            dropout=dropout,
            pseudocount=pseudocount,
        ).to(data.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, num_steps))
        lattice = torch.quasirandom.SobolEngine(latent_dim, scramble=True, seed=seed).draw(num_points).to(data.device)
        batches = _batches(data, weights, batch_size)
        judge = _Judge(model, validation_data, normal_points(num_components, latent_dim, seed=seed).to(data.device))
        train: list[float] = []
        with progress_bar("fitting a continuous mixture", num_steps, enabled=progress) as advance:
            for evaluation in range(num_evaluations):
                start, stop = (num_steps * count // num_evaluations for count in (evaluation, evaluation + 1))
                total = torch.zeros((), device=data.device)
                for _ in range(start, stop):
                    shifted = (lattice + torch.rand(latent_dim, device=data.device)) % 1
                    tables = model.log_tables(uniform_to_normal(shifted))
                    log_likelihood = model.log_likelihood(model.encode(next(batches)), tables).mean()
                    optimizer.zero_grad()
                    (-log_likelihood).backward()
                    optimizer.step()
                    schedule.step()
                    total += log_likelihood.detach()
                train.append(float(total) / (stop - start))
                judge.evaluate(stop)
                advance(stop - start, note=f"train {train[-1]:.4f} nats")
                if patience is not None and judge.num_evaluations_since_best > patience:
                    break
    best_step = judge.restore(num_steps)
    return ContinuousMixtureFit(
        pc=model.circuit(judge.points),
        model=model.eval(),
        train_log_likelihood=tuple(train),
        validation_log_likelihood=tuple(judge.validation),
        best_step=best_step,
    )


class _Judge:
    """Evaluates the model on validation data as the circuit that it would be, and keeps the best one."""

    def __init__(self, model: ContinuousMixture, validation_data: Tensor | None, points: Tensor) -> None:
        self.points = points
        self.validation: list[float] = []
        self.num_evaluations_since_best = 0
        self._model = model
        self._best: tuple[int, dict[str, Tensor]] | None = None
        self._rows: tuple[Tensor, Tensor] | None = None
        if validation_data is not None:
            rows, counts = torch.unique(validation_data, dim=0, return_counts=True)
            self._rows = rows.to(points.device), counts.to(points.device)

    def evaluate(self, step: int) -> None:
        """Record the mean validation log-likelihood after so many steps; without validation data do nothing."""
        if self._rows is None:
            return
        self.validation.append(_mean_log_likelihood(self._model, *self._rows, self.points))
        self.num_evaluations_since_best += 1
        if self.validation[-1] == max(self.validation):
            self.num_evaluations_since_best = 0
            self._best = step, {name: value.clone() for name, value in self._model.state_dict().items()}

    def restore(self, num_steps: int) -> int:
        """Go back to the best model; return after how many steps that was."""
        if self._best is None:
            return num_steps
        self._model.load_state_dict(self._best[1])
        return self._best[0]


@torch.no_grad()
def _mean_log_likelihood(model: ContinuousMixture, x: Tensor, counts: Tensor, points: Tensor) -> float:
    model.eval()
    tables = model.log_tables(points)
    log_likelihood = torch.cat([model.log_likelihood(model.encode(rows), tables) for rows in x.split(_EVALUATED_ROWS)])
    model.train()
    return float((log_likelihood.double() * counts).sum() / counts.sum())


def _batches(data: Tensor, weights: Tensor | None, batch_size: int) -> Iterator[Tensor]:
    """Yield batches forever: shuffled passes over the data, or draws in proportion to the weights."""
    while True:
        if weights is not None:
            yield data[torch.multinomial(weights, batch_size, replacement=True)]
            continue
        for rows in torch.randperm(len(data)).tensor_split(max(1, len(data) // batch_size)):
            yield data[rows.to(data.device)]


def _warmup_cosine(step: int, num_steps: int) -> float:
    warmup = max(1, num_steps // 20)
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(step, num_steps) / num_steps))


def _checked(
    data: Tensor, num_categories: int | Sequence[int], validation_data: Tensor | None, sample_weights: Tensor | None
) -> Tensor | None:
    for name, x in [("data", data), ("validation_data", validation_data)]:
        if x is None and name == "validation_data":
            continue
        if not isinstance(x, Tensor) or x.dim() != 2 or not len(x) or x.is_floating_point() or x.dtype == torch.bool:
            got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ArgumentError(f"{name}: expected a tensor of integers (N, D) with N >= 1, got {got}")
        if x.shape[1] != data.shape[1]:
            raise ArgumentError(f"{name}: expected {data.shape[1]} variables as in data, got {x.shape[1]}")
        limits = torch.tensor(checked_categories(num_categories, x.shape[1]), device=x.device)
        if bool(((x < 0) | (x >= limits)).any()):
            raise ArgumentError(f"{name}: expected values from 0 to {limits.tolist()} - 1, got others")
    if sample_weights is None:
        return None
    return checked_sample_weights(sample_weights, torch.ones(len(data), device=data.device))
