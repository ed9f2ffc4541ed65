"""Structure learning: split variables that are independent, cluster rows where none are, and go on with the parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from circuits.arguments import checked_count, checked_seed
from circuits.errors import ArgumentError
from circuits.families import Categorical
from circuits.region_graphs.chow_liu import checked_categories, empirical_mutual_information
from circuits.symbolic import Circuit, Input, Node, Sum, inputs, product, sum

_NUM_EM_STEPS = 20
_MAX_ELEMENTS = 1 << 24


def learn_spn(
    data: Tensor,
    *,
    num_categories: int | Sequence[int] | None = None,
    num_clusters: int = 2,
    min_rows: int = 50,
    significance: float = 0.0015,
    smoothing: float = 0.1,
    seed: int | None = None,
) -> Circuit:
    """Learn a circuit, structure and weights, from data (LearnSPN: Gens and Domingos 2013).

    Some rows of some variables become: the smoothed frequencies of a single variable; a product of the connected
    groups of variables that pairwise G-tests find dependent, if there are several; otherwise a sum over clusters of
    the rows, found by EM on a mixture of fully factorized distributions. Fewer than ``min_rows`` rows are fully
    factorized. All nodes have one unit; ``ct.learning.fit`` can go on from the learned weights.

    Args:
        data: int64 (N, D), on any device.
        num_categories: C, one for all variables or one each; by default one more than each variable's largest value.
        num_clusters: how many clusters a sum divides its rows into at most.
        min_rows: rows below which no test is made.
        significance: two variables are dependent if independent ones would look like them with less than this
            probability.
        smoothing: added to the count of every value at the leaves (Laplace).
        seed: of the clusters' first centres.

    Returns:
        a circuit whose nodes have their weights; ``ct.compile`` uses them.

    Raises:
        ArgumentError: an argument has a wrong type, shape or value.
    """
    counts = checked_categories(data, num_categories)
    checked_count("min_rows", min_rows)
    checked_count("num_clusters", num_clusters, least=2)
    for name, value, greatest in (("significance", significance, 1.0), ("smoothing", smoothing, float("inf"))):
        if not isinstance(value, (int, float)) or not 0 < value < greatest:
            raise ArgumentError(f"{name}: expected a number above 0 and below {greatest}, got {value!r}")
    checked_seed("seed", seed)
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    learner = _Learner(data.long(), counts, num_clusters, min_rows, significance, smoothing, generator)
    root = learner.learned()
    return Circuit(root if isinstance(root, Sum) else sum(root, num_units=1))


@dataclass
class _Part:
    """Some rows of some variables, and how they were split."""

    rows: Tensor
    variables: list[int]
    may_be_independent: bool = True
    """False where the variables are a group that a test has just found connected."""
    kind: Literal["leaf", "product", "sum"] = "leaf"
    children: list[_Part] = field(default_factory=list)


@dataclass(frozen=True)
class _Learner:
    data: Tensor
    counts: Tensor
    num_clusters: int
    min_rows: int
    significance: float
    smoothing: float
    generator: torch.Generator

    def learned(self) -> Node:
        """Split all data from the top down, then build the nodes from the bottom up."""
        everything = torch.arange(len(self.data), device=self.data.device)
        parts = [_Part(everything, list(range(self.data.shape[1])))]
        for part in parts:
            self._split(part)
            parts += part.children
        nodes: dict[int, Node] = {}
        for part in reversed(parts):
            below = [nodes[id(child)] for child in part.children]
            if part.kind == "leaf":
                nodes[id(part)] = self._leaf(part)
            elif part.kind == "product":
                nodes[id(part)] = product(*below)
            else:
                sizes = torch.tensor([[len(child.rows) for child in part.children]], dtype=torch.float64)
                nodes[id(part)] = sum(*below, num_units=1, weights=sizes / sizes.sum())
        return nodes[id(parts[0])]

    def _split(self, part: _Part) -> None:
        if len(part.variables) == 1:
            return
        if len(part.rows) < self.min_rows:
            self._factorize(part)
            return
        groups = self._groups(part) if part.may_be_independent else [part.variables]
        if len(groups) > 1:
            part.kind = "product"
            part.children = [_Part(part.rows, group, may_be_independent=False) for group in groups]
            return
        clusters = self._clusters(part)
        if len(clusters) < 2:
            self._factorize(part)
            return
        part.kind = "sum"
        part.children = [_Part(rows, part.variables) for rows in clusters]

    def _factorize(self, part: _Part) -> None:
        part.kind = "product"
        part.children = [_Part(part.rows, [var]) for var in part.variables]

    def _leaf(self, part: _Part) -> Input:
        (var,) = part.variables
        num_categories = int(self.counts[var])
        found = torch.bincount(self.data[part.rows, var], minlength=num_categories).double() + self.smoothing
        return inputs(var, 1, Categorical(num_categories), weights=(found / found.sum()).unsqueeze(1).cpu())

    def _groups(self, part: _Part) -> list[list[int]]:
        """Return the connected groups of variables that G-tests find dependent: ``G = 2 N I(i, j)``."""
        from scipy.sparse.csgraph import connected_components
        from scipy.stats import chi2

        x = self._values(part)
        information = empirical_mutual_information(
            x, num_categories=self.counts[part.variables].tolist(), pseudocount=0.0
        ).cpu()
        num_seen = torch.tensor([len(column.unique()) for column in x.t()], dtype=torch.float64)
        freedom = torch.outer(num_seen - 1, num_seen - 1)
        threshold = torch.from_numpy(chi2.isf(self.significance, freedom.clamp_min(1).numpy()))
        is_dependent = (2 * len(x) * information > threshold) & (freedom > 0)
        num_groups, group_of = connected_components(is_dependent.numpy(), directed=False)
        groups: list[list[int]] = [[] for _ in range(num_groups)]
        for variable, group in zip(part.variables, group_of, strict=True):
            groups[group].append(variable)
        return sorted(groups)

    def _clusters(self, part: _Part) -> list[Tensor]:
        """Return the rows of every cluster: the most probable component of a mixture that EM fits."""
        x = self._values(part)
        size = int(self.counts[part.variables].max())
        flat = x + torch.arange(x.shape[1], device=x.device) * size  # (n, d): columns of a table (K, d * C)
        distance = self._distances_to_centres(x)
        nearest = distance.argmin(1)
        shares = torch.nn.functional.one_hot(nearest, distance.shape[1]).double()
        for _ in range(_NUM_EM_STEPS):
            prior = (shares.sum(0) / len(x)).log()
            table = self._fitted(flat, shares, size)
            scores = prior + torch.cat([table[:, rows].sum(2).t() for rows in flat.split(self._chunk(flat))])
            shares = scores.softmax(1)
        likeliest = shares.argmax(1)
        chosen = likeliest if bool((likeliest != likeliest[0]).any()) else nearest  # EM may leave one component only
        return [part.rows[chosen == k] for k in chosen.unique()]

    def _distances_to_centres(self, x: Tensor) -> Tensor:
        """Return in how many variables each row differs from random centres, all of them different: (n, K)."""
        order = torch.randperm(len(x), generator=self.generator).to(x.device)
        distances = [(x != x[order[0]]).sum(1)]
        is_new = distances[0] > 0
        while len(distances) < self.num_clusters and bool(is_new.any()):
            centre = order[is_new[order].to(torch.int8).argmax()]
            distances.append((x != x[centre]).sum(1))
            is_new &= distances[-1] > 0
        return torch.stack(distances, 1)

    def _fitted(self, flat: Tensor, shares: Tensor, size: int) -> Tensor:
        """Return the components' smoothed log-frequencies, (K, d * C)."""
        num_components, width = shares.shape[1], flat.shape[1] * size
        counts = torch.full((num_components, width), self.smoothing, dtype=torch.float64, device=flat.device)
        for rows, part in zip(flat.split(self._chunk(flat)), shares.split(self._chunk(flat)), strict=True):
            for component, share in enumerate(part.t()):
                share = share.unsqueeze(1).expand_as(rows).flatten()
                counts[component] += torch.bincount(rows.flatten(), share, minlength=width)
        return (counts / counts.unflatten(1, (-1, size)).sum(2).repeat_interleave(size, 1)).log()

    def _chunk(self, flat: Tensor) -> int:
        return max(1, _MAX_ELEMENTS // (flat.shape[1] * self.num_clusters))

    def _values(self, part: _Part) -> Tensor:
        return self.data[part.rows][:, part.variables]
