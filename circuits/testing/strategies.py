"""Hypothesis strategies that draw valid circuits and evidence on them."""

from __future__ import annotations

import builtins
from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from circuits.distributions import Bernoulli, Categorical, Distribution
from circuits.evidence import Evidence
from circuits.graph import Circuit, Input, Node, Sum, inputs, product, sum

T = TypeVar("T", Input, Sum)


@st.composite
def circuits(
    draw: st.DrawFn,
    *,
    min_vars: int = 1,
    max_vars: int = 6,
    max_units: int = 3,
    max_categories: int = 4,
    zero_weights: bool = True,
) -> Circuit:
    """Draw a valid circuit: shared nodes, several children, mixed numbers of categories, tied parameters.

    Args:
        draw: given by Hypothesis.
        min_vars: the least number of variables, >= 1.
        max_vars: the greatest number of variables.
        max_units: the greatest number of units of a node (outer products may have its square).
        max_categories: the greatest number of categories of a variable.
        zero_weights: whether some nodes are given weights with zeros in them.
    """
    num_vars = draw(st.integers(min_vars, max_vars), label="num_vars")
    builder = _Builder(draw, num_vars, max_units, max_categories, zero_weights)
    return Circuit(builder.mixture(tuple(range(num_vars)), num_units=1))


class _Builder:
    """Builds nodes top-down; keeps what it built, to share nodes and to tie parameters."""

    def __init__(self, draw: st.DrawFn, num_vars: int, max_units: int, max_categories: int, zeros: bool) -> None:
        self.draw = draw
        self.max_units = max_units
        self.zeros = zeros
        self.families = [self._family(max_categories) for _ in range(num_vars)]
        self.built: dict[tuple[tuple[int, ...], int], list[Node]] = {}
        self.leaves: dict[Hashable, list[Input]] = {}
        self.mixtures: dict[Hashable, list[Sum]] = {}

    def region(self, scope: tuple[int, ...], num_units: int) -> Node:
        """Build or reuse a node over ``scope`` with ``num_units`` units."""
        known = self.built.setdefault((scope, num_units), [])
        share: bool = self.draw(st.booleans(), label="share a node") if known else False
        if share:
            return known[self.draw(st.integers(0, len(known) - 1))]
        is_leaf = len(scope) == 1 and self.draw(st.integers(0, 3), label="mix inputs") != 3
        node = self.leaf(scope[0], num_units) if is_leaf else self.mixture(scope, num_units)
        known.append(node)
        return node

    def leaf(self, var: int, num_units: int) -> Input:
        """Build input units on ``var``."""
        family = self.families[var]
        shape = (family.num_values, num_units)
        tied_to = self._owner(self.leaves, (family, shape))
        weights = None if tied_to else self._weights(shape, axis=0)
        node = inputs(var, num_units, family, tied_to=tied_to, weights=weights)
        self.leaves.setdefault((family, shape), []).append(node)
        return node

    def mixture(self, scope: tuple[int, ...], num_units: int) -> Sum:
        """Build sum units over one to three children."""
        children = [self.component(scope) for _ in range(self.draw(st.integers(1, 3), label="children"))]
        shape = (num_units, builtins.sum(child.num_units for child in children))
        tied_to = self._owner(self.mixtures, shape)
        weights = None if tied_to else self._weights(shape, axis=1)
        node = sum(*children, num_units=num_units, tied_to=tied_to, weights=weights)
        self.mixtures.setdefault(shape, []).append(node)
        return node

    def component(self, scope: tuple[int, ...]) -> Node:
        """Build one child of a sum: input units, or a product over a random partition of the scope."""
        num_units = self.draw(st.integers(1, self.max_units), label="units")
        if len(scope) == 1:
            return self.leaf(scope[0], num_units)
        order = self.draw(st.permutations(scope), label="partition")
        cut = self.draw(st.integers(1, len(scope) - 1))
        parts = [tuple(sorted(order[:cut])), tuple(sorted(order[cut:]))]
        if len(parts[1]) > 1 and self.draw(st.booleans(), label="three parts"):
            parts[1:] = [parts[1][:1], parts[1][1:]]
        if self.draw(st.booleans(), label="outer"):
            return product(*(self.region(part, self.draw(st.integers(1, 2))) for part in parts), mode="outer")
        return product(*(self.region(part, num_units) for part in parts))

    def _family(self, max_categories: int) -> Distribution:
        count = self.draw(st.integers(1, max_categories), label="categories")
        return Bernoulli() if count == 2 and self.draw(st.booleans(), label="bernoulli") else Categorical(count)

    def _owner(self, owners: Mapping[Hashable, list[T]], key: Hashable) -> T | None:
        """Draw whether to tie to an earlier node with parameters of the same shape, and which."""
        known = owners.get(key, [])
        if known and self.draw(st.integers(0, 2), label="tie parameters") == 2:
            return known[self.draw(st.integers(0, len(known) - 1))]
        return None

    def _weights(self, shape: tuple[int, int], axis: int) -> Tensor | None:
        """Draw weights with some zeros, or None: random ones when compiled."""
        if not self.zeros or self.draw(st.integers(0, 3), label="given weights") != 3:
            return None
        counts = self.draw(st.lists(st.integers(0, 4), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
        weights = torch.tensor(counts, dtype=torch.float64).reshape(shape)
        first = weights.select(axis, 0)
        first[weights.sum(axis) == 0] = 1.0
        return weights / weights.sum(axis, keepdim=True)


@st.composite
def evidence(
    draw: st.DrawFn, circuit: Circuit, *, batch_size: int = 2, largest: float = 6.0, impossible_values: bool = True
) -> Evidence:
    """Draw evidence on a circuit: hard, partly missing, soft, mixed or sparse.

    Args:
        draw: given by Hypothesis.
        circuit: what the evidence is for.
        batch_size: B.
        largest: log-factors lie between minus this and this.
        impossible_values: whether soft evidence may rule values out with -inf (not all of one variable).
    """
    shape = (batch_size, circuit.num_vars)
    categories = circuit.num_categories
    kind = draw(st.sampled_from(["hard", "partly missing", "soft", "mixed", "sparse"]), label="evidence")
    x = torch.tensor([[draw(st.integers(0, count - 1)) for count in categories] for _ in range(batch_size)])
    observed = torch.tensor([[draw(st.booleans()) for _ in categories] for _ in range(batch_size)]).reshape(shape)
    if kind == "hard":
        return Evidence.observe(x)
    if kind == "partly missing":
        return Evidence.observe(x, observed)
    numbers = st.floats(-largest, largest, allow_subnormal=False)
    factor = st.one_of(numbers, st.just(-torch.inf)) if impossible_values else numbers
    size = batch_size * circuit.num_vars * max(categories)
    drawn = draw(st.lists(factor, min_size=size, max_size=size))
    factors = torch.tensor(drawn, dtype=torch.float64).reshape(*shape, -1)
    factors.scatter_(2, x.unsqueeze(-1), draw(numbers))  # one value of every variable stays possible
    if kind == "soft":
        return Evidence.soft(factors)
    if kind == "mixed":
        return Evidence.mixed(x, observed, factors)
    num_listed = draw(st.integers(1, max(categories)), label="listed values")
    offsets = torch.arange(num_listed)
    counts = torch.tensor(categories).reshape(1, -1, 1)
    values = (x.unsqueeze(-1) + offsets) % counts
    listed = factors.gather(2, values).masked_fill(offsets >= counts, -torch.inf)
    return Evidence.sparse(values, listed, missing=observed)
