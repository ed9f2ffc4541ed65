"""Forms of the weights that a sum node is given at run time, and what they become in a layer.

A :class:`Form` is what a user gives one node; forms of a layer that can be evaluated together are joined to
:class:`JoinedWeights`. Here are tables; further forms are in :mod:`circuits.weights`.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from circuits.algebra.semirings import Semiring
from circuits.errors import ArgumentError
from circuits.families.base import log_normalized

J = TypeVar("J", bound="JoinedWeights")


class JoinedWeights(ABC):
    """Weights of n nodes for B queries, or for one that all share: what a form becomes in a layer.

    Its fields are tensors, with the node as their first dimension, of length 1 where all nodes share them.
    """

    per_query: ClassVar[tuple[str, ...]]
    """Fields whose second dimension is the query."""
    log_scale: Tensor | None
    """What each unit was divided by to be normalised, (n, B, K or 1); None: nothing."""

    @property
    def batch_size(self) -> int:
        """B; 1 when all queries share the weights."""
        return max(getattr(self, name).shape[1] for name in self.per_query if getattr(self, name) is not None)

    @functools.cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """All fields, but for None."""
        return tuple(t for t in self._fields().values() if t is not None)

    def with_tensors(self: J, tensors: Sequence[Tensor]) -> J:
        """Return the same weights of other tensors."""
        others = iter(tensors)
        return self._replaced({name: None if t is None else next(others) for name, t in self._fields().items()})

    def unscaled(self: J) -> J:
        """Return the same weights without their scales."""
        return self._replaced({"log_scale": None})

    def detached(self: J) -> J:
        """Return the same weights without their history."""
        return self.with_tensors([t.detach() for t in self.tensors])

    def split(self: J, sizes: Sequence[int]) -> list[J]:
        """Return the weights of the first nodes, of those after them, and so on."""
        if len(sizes) == 1:
            return [self]
        parts = [[t] * len(sizes) if len(t) == 1 else t.split(list(sizes)) for t in self.tensors]
        return [self.with_tensors(tensors) for tensors in zip(*parts, strict=True)]

    def of_queries(self: J, index: Tensor) -> J:
        """Return the weights of some queries, int64 (m,); they may come more than once."""
        chosen = {
            name: t.index_select(1, index)
            for name, t in self._fields().items()
            if name in self.per_query and t is not None and t.shape[1] > 1
        }
        return self._replaced(chosen)

    @abstractmethod
    def contract(self, semiring: Semiring, x: Tensor) -> Tensor:
        """Return the mixtures, (n, K, B, *E), of the nodes' children, (n, I, B, *E)."""

    @abstractmethod
    def rows(self, slot: Tensor, query: Tensor, unit: Tensor) -> Tensor:
        """Return ``log W_nb[k]`` of m rows, (m, I), in parts of bounded size.

        Args:
            slot: which of the n nodes, int64 (m,) like the rest.
            query: whose weights.
            unit: which unit of the node.
        """

    def scaled(self, semiring: Semiring, out: Tensor) -> Tensor:
        """Multiply mixtures, (n, K, B, *E), by the scales of the weights."""
        if self.log_scale is None:
            return out
        return semiring.times(out, semiring.lift(self.log_scale.transpose(1, 2)))

    def _fields(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def _replaced(self: J, changes: dict[str, Any]) -> J:
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


@dataclass(frozen=True, eq=False)
class JoinedTables(JoinedWeights):
    """Tables of n nodes, of sums along their last dimension, of inputs along the one before."""

    log: Tensor
    """(n, B, K, I) of sums, (n, B, C, K) of inputs."""
    log_scale: Tensor | None
    per_query = ("log", "log_scale")

    def contract(self, semiring: Semiring, x: Tensor) -> Tensor:
        """Contract the table of every query with its children."""
        return self._contracted(self.log, semiring, x)

    def contract_inputs(self, semiring: Semiring, x: Tensor) -> Tensor:
        """Return the values of input units, (n, K, B, *E), from those of their variables' values, (n, C, B, *E)."""
        return self._contracted(self.log.transpose(2, 3), semiring, x)

    def rows(self, slot: Tensor, query: Tensor, unit: Tensor) -> Tensor:
        """Look the rows up."""
        return self.log[slot, self.owner(query), unit]

    def owner(self, query: Tensor) -> Tensor:
        """Return where queries are along the second dimension."""
        return query if self.log.shape[1] > 1 else torch.zeros_like(query)

    def _contracted(self, log_weights: Tensor, semiring: Semiring, x: Tensor) -> Tensor:
        if log_weights.shape[1] == 1:
            out = semiring.contract(log_weights[:, 0], x)
        else:
            per_query = x.movedim(2, 1).flatten(0, 1).unsqueeze(2)  # (n * B, I, 1, *E)
            out = semiring.contract(log_weights.flatten(0, 1), per_query).squeeze(2)
            out = out.unflatten(0, (len(x), x.shape[2])).movedim(1, 2)
        return self.scaled(semiring, out)


@dataclass(frozen=True)
class Own:
    """The own log-weights of the nodes that weights are given to."""

    bank: str
    log: Tensor
    """Of all rows of the bank, (P, K, I)."""
    rows: tuple[int, ...]
    """Those of the n nodes."""

    def of(self, nodes: Sequence[int]) -> Own:
        """Return those of some of the nodes."""
        return Own(self.bank, self.log, tuple(self.rows[node] for node in nodes))

    def table(self) -> Tensor:
        """Return the nodes' log-weights, (n, K, I), or (1, K, I) where all are tied."""
        first = self.rows[0]
        return self.log[first : first + 1] if set(self.rows) == {first} else self.log[list(self.rows)]


class Form(ABC):
    """Weights of one sum node, for B queries or for all."""

    across_layers: ClassVar[bool] = False
    """Whether those of several layers are joined too, which copies them: where they are small."""

    @abstractmethod
    def check(self, who: object, shape: tuple[int, int]) -> None:
        """Raise ArgumentError unless the tensors fit a node with a table of some shape, (K, I)."""

    @property
    @abstractmethod
    def batch_size(self) -> int | None:
        """B, or None: for all queries."""

    @abstractmethod
    def group(self) -> Hashable:
        """Return what is equal for forms that are joined."""

    @abstractmethod
    def joined(self: Any, forms: Sequence[Any], own: Own, *, normalize: bool, shared: dict[Hashable, Any]) -> Any:
        """Join forms of one group.

        Args:
            forms: of the n nodes, this one among them.
            own: the nodes' own weights.
            normalize: whether weights are made to sum to 1.
            shared: what was computed for other layers; kept as long as one call.
        """


@dataclass(frozen=True, eq=False)
class Dense(Form):
    """A table: what a plain tensor stands for.

    Args:
        log_weights: (K, I) or (B, K, I).
    """

    log_weights: Tensor

    def check(self, who: object, shape: tuple[int, int]) -> None:
        """Raise ArgumentError unless it is a floating-point table of a shape."""
        table = self.log_weights
        is_table = isinstance(table, Tensor) and table.dim() in (2, 3)
        if not is_table or not table.is_floating_point() or table.shape[-2:] != shape:
            raise refused("log-weights", f"{shape} or (B, {shape[0]}, {shape[1]})", who, table)

    @property
    def batch_size(self) -> int | None:
        """B, or None."""
        return len(self.log_weights) if self.log_weights.dim() == 3 else None

    def group(self) -> Hashable:
        """All tables of a layer are joined."""
        return Dense

    def joined(self, forms: Sequence[Dense], own: Own, *, normalize: bool, shared: dict[Hashable, Any]) -> JoinedTables:
        """Stack and normalise the tables."""
        return joined_tables([form.log_weights.to(own.log) for form in forms], -1, normalize=normalize)


def joined_tables(tables: Sequence[Tensor], axis: int, *, normalize: bool) -> JoinedTables:
    """Stack log-weights of n nodes, sums ([B,] K, I) along axis -1, inputs ([B,] C, K) along axis -2.

    Raises:
        ArgumentError: a weight is NaN or +inf, or a unit has no weight.
    """
    log = stacked(tables, 2)
    has_weight = check_log("log-weights", log, axis, need_one=normalize)
    if normalize:
        return JoinedTables(log_normalized(log, axis), None)
    is_empty = ~has_weight.unsqueeze(axis)  # where a unit has no weight its scale is 1, and its children impossible
    log_scale = torch.logsumexp(log.masked_fill(is_empty, 0.0), axis).masked_fill(~has_weight, 0.0)
    return JoinedTables(log - log_scale.unsqueeze(axis), log_scale)


def stacked(tensors: Sequence[Tensor], num_dims: int) -> Tensor:
    """Stack tensors of ``num_dims`` dimensions, with or without one of queries before: (n, B or 1, ...)."""
    tensors = [t.unsqueeze(0) if t.dim() == num_dims else t for t in tensors]
    batch_size = max(len(t) for t in tensors)
    if len(tensors) == 1:
        return tensors[0].unsqueeze(0)
    return torch.stack([t.expand(batch_size, *t.shape[1:]) for t in tensors])


def check_log(what: str, log: Tensor, axis: int, *, need_one: bool) -> Tensor:
    """Return which rows along an axis have a number above -inf; raise ArgumentError for NaN and +inf, or none."""
    greatest = log.detach().amax(axis)
    if not bool((greatest < torch.inf).all()):  # NaN is handed on by amax
        raise ArgumentError(f"external: expected {what} below +inf (-inf rules a child out), got NaN or +inf")
    has_one = greatest > -torch.inf
    if need_one and not bool(has_one.all()):
        raise ArgumentError(f"external: expected {what} with one above -inf per unit, got a unit without any")
    return has_one


def refused(what: str, shape: str, who: object, got: Any) -> ArgumentError:
    """Return the error of a tensor that does not fit a node."""
    found = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
    return ArgumentError(f"external: expected floating-point {what} {shape} for {who}, got {found}")
