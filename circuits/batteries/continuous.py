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
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from circuits.arguments import checked_count, checked_seed
from circuits.engine.compile import CompiledCircuit, compile
from circuits.errors import ArgumentError, StructureError
from circuits.structures.blocks import block_mixture, checked_blocks, checked_categories
from circuits.symbolic import Sum

_LEAST_UNIFORM = 1e-5


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

    Raises:
        ArgumentError: not one number of categories, or one per variable.
        StructureError: the blocks are not a partition of the data's variables.
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
        self.num_vars = checked_blocks(blocks)
        if data.shape[1] != self.num_vars:
            raise StructureError(f"blocks: expected {data.shape[1]} variables as in data, got {self.num_vars}")
        self.categories = checked_categories(num_categories, self.num_vars)
        self.latent_dim = latent_dim
        same_shape: dict[tuple[int, ...], list[Sequence[int]]] = defaultdict(list)
        for block in blocks:
            same_shape[tuple(self.categories[var] for var in block)].append(block)
        self.groups: Sequence[_BlockGroup] = cast(
            Any, nn.ModuleList(_BlockGroup(same, shape) for shape, same in same_shape.items())
        )
        self.blocks = [tuple(block) for group in self.groups for block in group.blocks]
        weights = torch.ones(len(data)) if sample_weights is None else sample_weights.float().cpu()
        for group in self.groups:
            group.fit(data.cpu(), weights, pseudocount)
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


def normal_points(num_points: int, dim: int, *, seed: int) -> Tensor:
    """Return quasi-random points whose distribution is the standard normal one, (num_points, dim).

    A scrambled Sobol sequence through the normal quantile function (Owen 1998; L'Ecuyer 2018). Raises ArgumentError if
    an argument is no integer in its range; there are sequences of up to 21,201 dimensions.
    """
    checked_count("num_points", num_points)
    if checked_count("dim", dim) > torch.quasirandom.SobolEngine.MAXDIM:
        raise ArgumentError(f"dim: expected at most {torch.quasirandom.SobolEngine.MAXDIM} dimensions, got {dim}")
    checked_seed("seed", seed)
    return uniform_to_normal(torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(num_points))


def uniform_to_normal(uniform: Tensor) -> Tensor:
    """Return the standard normal quantiles of numbers between 0 and 1."""
    return torch.special.ndtri(uniform.clamp(_LEAST_UNIFORM, 1 - _LEAST_UNIFORM))


def _set(pc: CompiledCircuit, name: str, weights: Tensor) -> None:
    node = pc.circuit.node(name)
    assert isinstance(node, Sum)
    pc.set_weights(node, weights)
