"""Hypothesis strategies that draw valid circuits and evidence on them."""

from __future__ import annotations

import builtins
from collections.abc import Hashable, Mapping
from typing import Literal, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from circuits.evidence import Evidence
from circuits.families import (
    Bernoulli,
    Binomial,
    Categorical,
    DiscretizedLogistic,
    Distribution,
    EmbeddingCategorical,
    Gaussian,
    Poisson,
)
from circuits.families import Literal as LiteralFamily
from circuits.symbolic import Circuit, Input, Node, Sum, inputs, product, sum

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
    families: Literal["table", "finite", "all"] = "finite",
    max_classes: int | None = None,
) -> Circuit:
    """Draw a valid circuit: shared nodes, several children, mixed families and categories, tied parameters.

    Args:
        draw: given by Hypothesis.
        min_vars: the least number of variables, >= 1.
        max_vars: the greatest number of variables.
        max_units: the greatest number of units of a node (outer products may have its square).
        max_categories: the greatest number of categories of a variable.
        zero_weights: whether some nodes are given weights with zeros in them, or are literals.
        families: of the inputs: "table": categorical and Bernoulli; "finite": all that have finitely many values, so
            that enumeration is possible; "all": also Poisson and Gaussian.
        max_classes: draw class-conditional circuits with 1 up to this number of classes; None: with one root unit.
    """
    num_vars = draw(st.integers(min_vars, max_vars), label="num_vars")
    builder = _Builder(draw, num_vars, max_units, max_categories, zero_weights, families)
    scope = tuple(range(num_vars))
    if max_classes is None:
        return Circuit(builder.mixture(scope, num_units=1))
    num_classes = draw(st.integers(1, max_classes), label="num_classes")
    is_sum = draw(st.integers(0, 3), label="root") != 3
    root = builder.mixture(scope, num_classes) if is_sum else builder.factorized(scope, num_classes)
    return Circuit(root, num_classes=num_classes)


class _Builder:
    """Builds nodes top-down; keeps what it built, to share nodes and to tie parameters."""

    def __init__(
        self, draw: st.DrawFn, num_vars: int, max_units: int, max_categories: int, zeros: bool, families: str
    ) -> None:
        self.draw = draw
        self.max_units = max_units
        self.zeros = zeros
        self.kind = families
        self.counts = [self._count(max_categories) for _ in range(num_vars)]
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
        family = self._family(self.counts[var], num_units)
        shape = family.parameter_shape(num_units)
        tied_to = self._owner(self.leaves, (family, shape))
        is_table = isinstance(family.stored_as, Categorical)
        weights = self._weights(shape, axis=0) if is_table and not tied_to else None
        node = inputs(var, num_units, family, tied_to=tied_to, weights=weights)
        self.leaves.setdefault((family, shape), []).append(node)
        return node

    def mixture(self, scope: tuple[int, ...], num_units: int) -> Sum:
        """Build sum units over one to three children."""
        children = [self.component(scope) for _ in range(self.draw(st.integers(1, 3), label="children"))]
        sizes = [child.num_units for child in children]
        unit = None
        if len(set(sizes)) == 1 and self.draw(st.integers(0, 3), label="one unit of each") == 3:
            unit = self.draw(st.integers(0, sizes[0] - 1))
        shape = (num_units, builtins.sum(sizes) if unit is None else len(sizes))
        tied_to = self._owner(self.mixtures, shape)
        weights = None if tied_to else self._weights(shape, axis=1)
        node = sum(*children, num_units=num_units, unit=unit, tied_to=tied_to, weights=weights)
        self.mixtures.setdefault(shape, []).append(node)
        return node

    def factorized(self, scope: tuple[int, ...], num_units: int) -> Node:
        """Build input units, or an elementwise product of single variables' nodes."""
        parts = [self.region((var,), num_units) for var in scope]
        return parts[0] if len(parts) == 1 else product(*parts)

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

    def _count(self, max_categories: int) -> int:
        """Draw a variable's number of values; 0: whole numbers, -1: real numbers."""
        if self.kind == "all" and self.draw(st.booleans(), label="infinitely many values"):
            return self.draw(st.sampled_from([0, -1]), label="counts or real numbers")
        return self.draw(st.integers(1, max_categories), label="categories")

    def _family(self, count: int, num_units: int) -> Distribution:
        """Draw a family for a variable; one variable may have several of the same values."""
        if count < 1:
            return Poisson() if count == 0 else Gaussian()
        if count == 2 and self.draw(st.booleans(), label="bernoulli"):
            return Bernoulli()
        if self.kind == "table" or not self.draw(st.booleans(), label="another family"):
            return Categorical(count)
        kinds = ["binomial", "logistic", "embedding", *["literal"] * self.zeros]
        kind = self.draw(st.sampled_from(kinds), label="family")
        if kind == "binomial" and count > 1:
            return Binomial(count - 1)
        if kind == "literal":
            values = self.draw(st.lists(st.integers(0, count - 1), min_size=num_units, max_size=num_units))
            return LiteralFamily(count, tuple(values))
        if kind == "embedding":
            return EmbeddingCategorical(count, self.draw(st.integers(1, 2), label="rank"))
        return DiscretizedLogistic(count)

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
    """Draw evidence on a circuit: hard, partly missing, soft, mixed, sparse, or intervals.

    Circuits with variables of infinitely many values get hard or partly missing evidence, in floating point, or
    intervals.

    Args:
        draw: given by Hypothesis.
        circuit: what the evidence is for.
        batch_size: B.
        largest: log-factors lie between minus this and this.
        impossible_values: whether soft evidence may rule values out with -inf (not all of one variable).
    """
    shape = (batch_size, circuit.num_vars)
    categories = circuit.num_categories
    kinds = ["hard", "partly missing", "interval", "soft", "mixed", "sparse"]
    kind = draw(st.sampled_from(kinds if all(categories) else kinds[:3]), label="evidence")
    x = torch.tensor([[_value(draw, domain) for domain in _domains(circuit)] for _ in range(batch_size)])
    observed = torch.tensor([[draw(st.booleans()) for _ in categories] for _ in range(batch_size)]).reshape(shape)
    if kind == "hard":
        return Evidence.observe(x)
    if kind == "partly missing":
        return Evidence.observe(x, observed)
    if kind == "interval":
        widths = torch.tensor(draw(st.lists(st.sampled_from([0.5, 1.0, 2.0, torch.inf]), min_size=2, max_size=2)))
        return Evidence.interval((x - widths[0]).double(), (x.double() + widths[1]).masked_fill(~observed, torch.inf))
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


def _domains(circuit: Circuit) -> list[Distribution]:
    """Return a family of every variable."""
    families = {node.var: node.distribution for node in circuit.inputs}
    return [families[var] for var in range(circuit.num_vars)]


def _value(draw: st.DrawFn, family: Distribution) -> int | float:
    if family.num_values:
        return draw(st.integers(0, family.num_values - 1))
    return draw(st.integers(0, 6) if family.is_discrete else st.floats(-3, 3, allow_subnormal=False))
