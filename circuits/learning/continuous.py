"""Continuous mixtures: infinitely many components whose weights a small network makes from a latent point.

``p(x) = E_{z ~ N(0, I)} p(x | z)`` with p(x | z) a product of joint tables of blocks of variables, and the tables the
output of one network (Correia, Gala, Quaeghebeur, de Campos, Peharz 2023, "Continuous Mixtures of Tractable
Probabilistic Models", there with trees for the components). Neighbouring components share what the network knows, so
thousands of them can be learnt from few samples. The integral is a mean over quasi-random points, and with fixed points
the model *is* a circuit, a mixture with one component per point: :meth:`ContinuousMixture.circuit`.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from circuits._progress import progress_bar
from circuits.compile import CompiledCircuit, compile
from circuits.errors import ArgumentError
from circuits.graph import Sum
from circuits.region_graphs.chow_liu import empirical_mutual_information
from circuits.structures.blocks import block_mixture, checked_categories, correlated_blocks

_LEAST_UNIFORM = 1e-5
_EVALUATED_ROWS = 1024


class ContinuousMixture(nn.Module):
    """A network from latent points to the components of a mixture over blocks of variables.

    Args:
        data: int64 (N, D); the tables start as its relative frequencies.
        blocks: disjoint and together all variables, see ``ct.structures.correlated_blocks``.
        num_categories: C, one for all variables or one per variable.
        sample_weights: how often each sample counts, (N,); once when omitted.
        latent_dim: dimensions of the latent point.
        hidden_units: width of the network's hidden layers.
        num_hidden_layers: how many there are.
        dropout: probability with which a hidden unit is left out in training.
        pseudocount: samples, spread as if the block's variables were independent, that are added to each table.
    """

    def __init__(
        self,
        data: Tensor,
        blocks: Sequence[Sequence[int]],
        num_categories: int | Sequence[int],
        *,
        sample_weights: Tensor | None = None,
        latent_dim: int = 4,
        hidden_units: int = 128,
        num_hidden_layers: int = 3,
        dropout: float = 0.0,
        pseudocount: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_vars = data.shape[1]
        self.categories = checked_categories(num_categories, self.num_vars)
        self.latent_dim = latent_dim
        same_shape: dict[tuple[int, ...], list[Sequence[int]]] = defaultdict(list)
        for block in blocks:
            same_shape[tuple(self.categories[var] for var in block)].append(block)
        self.groups: Sequence[_BlockGroup] = cast(
            Any, nn.ModuleList(_BlockGroup(same, shape) for shape, same in same_shape.items())
        )
        self.blocks = [tuple(block) for group in self.groups for block in group.blocks]
        weights = torch.ones(len(data)) if sample_weights is None else sample_weights.float()
        for group in self.groups:
            group.fit(data, weights, pseudocount)
        widths = [latent_dim, *[hidden_units] * num_hidden_layers]
        hidden = [
            nn.Sequential(nn.Linear(before, after), nn.BatchNorm1d(after), nn.LeakyReLU(), nn.Dropout(dropout))
            for before, after in itertools.pairwise(widths)
        ]
        last = nn.Linear(widths[-1], sum(group.num_outputs for group in self.groups))
        nn.init.zeros_(last.bias)
        self.decoder = nn.Sequential(*hidden, last)

    def log_tables(self, points: Tensor) -> Tensor:
        """Return the components' log-probabilities of all blocks' joint values, side by side: (n, d) to (n, M)."""
        outputs = self.decoder(points).split([group.num_outputs for group in self.groups], 1)
        return torch.cat([group(output).flatten(1) for group, output in zip(self.groups, outputs, strict=True)], 1)

    def encode(self, x: Tensor) -> Tensor:
        """Return which joint value each block has, as indices into the M columns of the tables: (B, D) to (B, G)."""
        offsets, columns = 0, []
        for group in self.groups:
            values = group.joint_values(x)
            starts = torch.arange(values.shape[1], device=x.device) * group.num_values
            columns.append(values + starts + offsets)
            offsets += values.shape[1] * group.num_values
        return torch.cat(columns, 1)

    def log_likelihood(self, encoded: Tensor, log_tables: Tensor) -> Tensor:
        """Return the mean over the points, in log space: (B, G) and (n, M) to (B,)."""
        scores = nn.functional.embedding_bag(encoded, log_tables.t().contiguous(), mode="sum")
        return torch.logsumexp(scores, 1) - math.log(len(log_tables))

    @torch.no_grad()
    def circuit(self, points: Tensor) -> CompiledCircuit:
        """Return the mixture of the components at the given points, (n, d), equally weighted, as a circuit."""
        was_training = self.training
        tables = self.eval().log_tables(points)
        self.train(was_training)
        circuit = block_mixture(self.blocks, len(points), self.categories)
        pc = compile(circuit, device=points.device, seed=0)
        sizes = [group.num_values for group in self.groups for _ in group.blocks]
        for position, table in enumerate(tables.split(sizes, 1)):
            _set(pc, f"table{position}", table.double().exp())
        _set(pc, "components", torch.ones(1, len(points)))
        return pc


class _BlockGroup(nn.Module):
    """Blocks of b variables each with equal numbers of categories, hence G tables of M joint values.

    A table is its relative frequency in the data times a log-linear model: one output of the network per value of a
    variable but the first, and one per pair of such values of two variables.
    """

    variables: Tensor
    strides: Tensor
    features: Tensor
    log_frequencies: Tensor

    def __init__(self, blocks: Sequence[Sequence[int]], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks = blocks
        self.num_values = math.prod(shape)
        values = torch.cartesian_prod(*(torch.arange(count) for count in shape)).reshape(self.num_values, len(shape))
        singles = [nn.functional.one_hot(values[:, i], count)[:, 1:] for i, count in enumerate(shape)]
        pairs = [
            (one.unsqueeze(2) * other.unsqueeze(1)).flatten(1) for one, other in itertools.combinations(singles, 2)
        ]
        self.register_buffer("variables", torch.tensor([list(block) for block in blocks]))
        self.register_buffer("strides", torch.tensor([math.prod(shape[i + 1 :]) for i in range(len(shape))]))
        self.register_buffer("features", torch.cat([*singles, *pairs], 1).float())
        self.register_buffer("log_frequencies", torch.zeros(len(blocks), self.num_values))
        self._shape = shape
        self.num_features = self.features.shape[1]
        self.num_outputs = len(blocks) * self.num_features

    def joint_values(self, x: Tensor) -> Tensor:
        """Number the joint values, the last variable's varying fastest: (B, D) to (B, G)."""
        return (x[:, self.variables].long() * self.strides).sum(2)

    def fit(self, data: Tensor, weights: Tensor, pseudocount: float) -> None:
        """Set the tables to the relative frequencies in data, smoothed towards independence."""
        values = self.joint_values(data)
        counts = torch.stack([torch.bincount(column, weights, self.num_values) for column in values.unbind(1)])
        tables = counts.unflatten(1, self._shape)
        independent = torch.ones_like(tables)
        for axis, count in enumerate(self._shape):
            others = [1 + i for i in range(len(self._shape)) if i != axis]
            marginal = tables.sum(others, keepdim=True) if others else tables
            independent = independent * (marginal + 1 / count) / (weights.sum() + 1)
        smoothed = (counts + pseudocount * independent.flatten(1)) / (weights.sum() + pseudocount)
        self.log_frequencies.copy_(smoothed.clamp_min(torch.finfo(torch.float32).tiny).log())

    def forward(self, outputs: Tensor) -> Tensor:
        """Return the components' log-tables: (n, G * P) to (n, G, M)."""
        logits = outputs.unflatten(1, (len(self.blocks), self.num_features)) @ self.features.t()
        return torch.log_softmax(logits + self.log_frequencies, 2)


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
        patience: stop after so many evaluations in a row that were not the best so far; None: never.
        seed: for the network's weights, the points, the order of the samples and dropout.
        progress: draw a progress bar on standard error.

    Raises:
        ArgumentError: an argument has a wrong type, shape or value.
    """
    weights = _checked(data, num_categories, validation_data, sample_weights)
    categories = checked_categories(num_categories, data.shape[1])
    for name, value in [("num_components", num_components), ("num_points", num_points), ("batch_size", batch_size)]:
        if not isinstance(value, int) or value < 2:
            raise ArgumentError(f"{name}: expected an integer >= 2, got {value!r}")
    if not isinstance(num_steps, int) or not isinstance(num_evaluations, int) or not 1 <= num_evaluations <= num_steps:
        raise ArgumentError(
            f"num_steps: expected integers 1 <= num_evaluations <= num_steps, got {num_evaluations!r} and {num_steps!r}"
        )
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
        fixed = normal_points(num_components, latent_dim, seed=seed).to(data.device)
        batches = _batches(len(data), weights, batch_size)
        judged = None if validation_data is None else _distinct(validation_data)
        train: list[float] = []
        validation: list[float] = []
        best_step, best_state = num_steps, None
        recent = torch.zeros((), device=data.device)
        last_evaluation = 0
        with progress_bar("fitting a continuous mixture", num_steps, enabled=progress) as advance:
            for step in range(1, num_steps + 1):
                shift = torch.rand(latent_dim, device=data.device)
                tables = model.log_tables(uniform_to_normal((lattice + shift) % 1))
                encoded = model.encode(data[next(batches).to(data.device)])
                log_likelihood = model.log_likelihood(encoded, tables).mean()
                optimizer.zero_grad()
                (-log_likelihood).backward()
                optimizer.step()
                schedule.step()
                recent += log_likelihood.detach()
                is_due = step * num_evaluations // num_steps > (step - 1) * num_evaluations // num_steps
                if is_due:
                    train.append(float(recent) / (step - last_evaluation))
                    recent, last_evaluation = torch.zeros_like(recent), step
                    if judged is not None:
                        validation.append(_mean_log_likelihood(model, *judged, fixed))
                        if validation[-1] == max(validation):
                            best_step = step
                            best_state = {name: value.clone() for name, value in model.state_dict().items()}
                advance(note=f"train {train[-1]:.4f} nats" if is_due else None)
                if is_due and patience is not None and validation and len(validation) - _best(validation) > patience:
                    break
    if best_state is not None:
        model.load_state_dict(best_state)
    model.eval()
    return ContinuousMixtureFit(
        pc=model.circuit(fixed),
        model=model,
        train_log_likelihood=tuple(train),
        validation_log_likelihood=tuple(validation),
        best_step=best_step,
    )


def _distinct(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct rows and how often each occurs."""
    rows, counts = torch.unique(x, dim=0, return_counts=True)
    return rows, counts


@torch.no_grad()
def _mean_log_likelihood(model: ContinuousMixture, x: Tensor, counts: Tensor, points: Tensor) -> float:
    model.eval()
    tables = model.log_tables(points)
    log_likelihood = torch.cat([model.log_likelihood(model.encode(rows), tables) for rows in x.split(_EVALUATED_ROWS)])
    model.train()
    return float((log_likelihood.double() * counts).sum() / counts.sum())


def _batches(num_samples: int, weights: Tensor | None, batch_size: int) -> Iterator[Tensor]:
    """Yield batches of sample numbers forever: shuffled passes, or draws in proportion to the weights."""
    while True:
        if weights is not None:
            yield torch.multinomial(weights.cpu(), batch_size, replacement=True)
            continue
        yield from torch.randperm(num_samples).tensor_split(max(1, num_samples // batch_size))


def _warmup_cosine(step: int, num_steps: int) -> float:
    warmup = max(1, num_steps // 20)
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(step, num_steps) / num_steps))


def _best(values: Sequence[float]) -> int:
    """Return how many values there were up to the best one."""
    return 1 + max(range(len(values)), key=values.__getitem__)


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
    if sample_weights.shape != data.shape[:1] or not bool(((sample_weights >= 0) & (sample_weights < torch.inf)).all()):
        raise ArgumentError(
            f"sample_weights: expected finite numbers >= 0 of shape ({len(data)},), got {tuple(sample_weights.shape)}"
        )
    return sample_weights.to(data.device, torch.float32)


def normal_points(num_points: int, dim: int, *, seed: int) -> Tensor:
    """Return quasi-random points whose distribution is the standard normal one, (num_points, dim).

    A scrambled Sobol sequence through the normal quantile function (Owen 1998; L'Ecuyer 2018).
    """
    return uniform_to_normal(torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(num_points))


def uniform_to_normal(uniform: Tensor) -> Tensor:
    """Return the standard normal quantiles of numbers between 0 and 1."""
    return torch.special.ndtri(uniform.clamp(_LEAST_UNIFORM, 1 - _LEAST_UNIFORM))


def _set(pc: CompiledCircuit, name: str, weights: Tensor) -> None:
    node = pc.circuit.node(name)
    assert isinstance(node, Sum)
    pc.set_weights(node, weights)
