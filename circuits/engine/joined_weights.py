"""Weights of several nodes of a layer at run time, evaluated together; what forms are joined to.

Tables of every query (:class:`JoinedTables`) are contracted as they are. The others (:class:`ImplicitWeights`) are
applied to the children, where weights add up; else the tables of a few queries at a time are written out. A choice of
children writes out the rows of the units that were reached.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from circuits.engine.logspace import log_sum, product
from circuits.engine.operators import log_apply
from circuits.engine.semirings import Semiring

_NUMBERS_AT_ONCE = 1 << 22
"""How many numbers of tables that are written out exist at a time."""

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

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All fields, but for None."""
        return tuple(t for t in self._fields().values() if t is not None)

    def with_tensors(self: J, tensors: Sequence[Tensor]) -> J:
        """Return the same weights of other tensors."""
        others = iter(tensors)
        return self._replaced({name: None if t is None else next(others) for name, t in self._fields().items()})

    def detached(self: J) -> J:
        """Return the same weights without their history."""
        return self.with_tensors([t.detach() for t in self.tensors])

    def of_node(self: J, slot: int) -> J:
        """Return the weights of one node alone."""
        return self.with_tensors([t[slot : slot + 1] if len(t) > 1 else t for t in self.tensors])

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

    def _scaled(self, semiring: Semiring, out: Tensor) -> Tensor:
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
        return self._scaled(semiring, out)


class ImplicitWeights(JoinedWeights):
    """Weights that do not exist as tables, but as a linear map that queries share the costly part of."""

    num_units: int
    """K."""
    numbers_per_row: int
    """How many numbers exist while a row of a table is written out."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Return ``W_nb x_nb``: (n, I, B, E) to (n, K, B, E)."""

    @abstractmethod
    def support(self: J) -> J:
        """Return weights that are positive exactly where the logarithms of these are above -inf."""

    @abstractmethod
    def rows_at(self, slot: Tensor, query: Tensor, unit: Tensor) -> Tensor:
        """Return all rows at once, see :meth:`rows`; of a dimension of length 1 the only entry is read."""

    def rows(self, slot: Tensor, query: Tensor, unit: Tensor) -> Tensor:
        """Write the rows out, a few at a time."""
        step = max(1, _NUMBERS_AT_ONCE // self.numbers_per_row)
        parts = zip(*(index.split(step) for index in (slot, query, unit)), strict=True)
        return torch.cat([self.rows_at(*part) for part in parts])

    def contract(self, semiring: Semiring, x: Tensor) -> Tensor:
        """Apply the map where weights add up, else write out tables."""
        if semiring.is_linear:
            out = log_apply(self, x.reshape(*x.shape[:3], math.prod(x.shape[3:])))
            return self._scaled(semiring, out.reshape(*out.shape[:3], *x.shape[3:]))
        return self._scaled(semiring, self._by_tables(semiring, x))

    def _by_tables(self, semiring: Semiring, x: Tensor) -> Tensor:
        """Write out the tables of a few nodes and queries at a time; with gradients, once more on the way back."""
        num_nodes, num_children, batch_size = x.shape[:3]
        is_shared = self.batch_size == 1
        pairs = x if is_shared else x.movedim(2, 1).flatten(0, 1).unsqueeze(2)  # (n or n * B, I, B or 1, *E)

        def contracted(start: int, part: Tensor) -> Tensor:
            pair = torch.arange(start, start + len(part), device=x.device).repeat_interleave(self.num_units)
            slot, query = (pair, pair * 0) if is_shared else (pair // batch_size, pair % batch_size)
            unit = torch.arange(self.num_units, device=x.device).repeat(len(part))
            return semiring.contract(self.rows(slot, query, unit).unflatten(0, (len(part), self.num_units)), part)

        out, per_part = [], max(1, _NUMBERS_AT_ONCE // (self.num_units * num_children))
        for i, part in enumerate(pairs.split(per_part)):
            if torch.is_grad_enabled():
                again = checkpoint(contracted, i * per_part, part, use_reentrant=False, preserve_rng_state=False)
                out.append(again)
            else:
                out.append(contracted(i * per_part, part))
        joined = torch.cat(out)
        return joined if is_shared else joined.squeeze(2).unflatten(0, (num_nodes, batch_size)).movedim(1, 2)


@dataclass(frozen=True, eq=False)
class JoinedGates(ImplicitWeights):
    """Gates of n nodes over the same tables."""

    gates: Tensor
    """(n, B, T)."""
    log_gates: Tensor
    tables: Tensor
    """(1 or n, T, K, I)."""
    log_tables: Tensor
    log_scale: Tensor | None
    per_query = ("gates", "log_gates", "log_scale")

    @property
    def num_units(self) -> int:  # type: ignore[override]
        """K."""
        return self.tables.shape[2]

    def support(self) -> JoinedGates:
        """Return weights that are positive where these are."""
        gates, tables = ((t > -torch.inf).to(t.dtype) for t in (self.log_gates, self.log_tables))
        return dataclasses.replace(self, gates=gates, tables=tables)

    def apply(self, x: Tensor) -> Tensor:
        """Multiply by all tables at once, and mix.

        The mixture is taken relative to its greatest term and divided by the sum of the gates: where all terms are the
        same number, it is that number.
        """
        num_tables, num_units = self.tables.shape[1:3]
        stacked = self.tables.flatten(1, 2).expand(len(x), -1, -1)  # (n, T * K, I)
        terms = product(stacked, x.flatten(2)).reshape(len(x), num_tables, num_units, *x.shape[2:])
        if num_tables == 1:
            return terms.squeeze(1)
        gates = self.gates.transpose(1, 2)[:, :, None, :, None]  # (n, T, 1, B, 1)
        peak = terms.detach().amax(1)
        peak = torch.where(peak > 0, peak, 1.0)
        total = functools.reduce(torch.add, gates.unbind(1)).clamp_min(torch.finfo(x.dtype).tiny)
        mixed = functools.reduce(torch.add, (terms / peak.unsqueeze(1) * gates).unbind(1))
        return mixed / total * peak

    @property
    def numbers_per_row(self) -> int:  # type: ignore[override]
        """T * I."""
        return self.tables.shape[1] * self.tables.shape[3]

    def rows_at(self, slot: Tensor, query: Tensor, unit: Tensor) -> Tensor:
        """Mix the rows of all tables."""
        log_tables = self.log_tables[_at(self.log_tables, 0, slot), :, unit]  # (m, T, I)
        log_gates = self.log_gates[slot, _at(self.log_gates, 1, query)]  # (m, T)
        return log_sum((log_tables + log_gates.unsqueeze(2)).transpose(1, 2))


@dataclass(frozen=True, eq=False)
class JoinedLowRank(ImplicitWeights):
    """Tables of n nodes, moved by a low rank."""

    own: Tensor
    """(1 or n, K, I)."""
    log_own: Tensor
    u: Tensor
    """(n, B or 1, I, R)."""
    v: Tensor
    """(1 or n, B or 1, K, R)."""
    log_scale: Tensor | None
    per_query = ("u", "v", "log_scale")

    @property
    def num_units(self) -> int:  # type: ignore[override]
        """K."""
        return self.own.shape[1]

    def support(self) -> JoinedLowRank:
        """Return weights that are positive where these are."""
        own = (self.log_own > -torch.inf).to(self.own.dtype)
        return dataclasses.replace(self, own=own, u=(self.u > 0).to(own), v=(self.v > 0).to(own))

    def apply(self, x: Tensor) -> Tensor:
        """Multiply by the shared tables, and by R vectors of every query."""
        own = product(self.own.expand(len(x), -1, -1), x.flatten(2)).unflatten(2, x.shape[2:])
        moved = torch.einsum("nbkr,nbre->nkbe", self.v, torch.einsum("nbir,nibe->nbre", self.u, x))
        row_sums = 1 + torch.einsum("nbkr,nbr->nkb", self.v, self.u.sum(2))
        return (own + moved) / row_sums.unsqueeze(3)

    @property
    def numbers_per_row(self) -> int:  # type: ignore[override]
        """I * (R + 1)."""
        return self.u.shape[2] * (self.u.shape[3] + 1)

    def rows_at(self, slot: Tensor, query: Tensor, unit: Tensor) -> Tensor:
        """Add up the node's own row and R others."""
        own = self.log_own[_at(self.log_own, 0, slot), unit]
        u = self.u[_at(self.u, 0, slot), _at(self.u, 1, query)]  # (m, I, R)
        v = self.v[_at(self.v, 0, slot), _at(self.v, 1, query), unit]  # (m, R)
        moved = _log(u) + _log(v).unsqueeze(1)
        row_sum = 1 + (v * u.sum(1)).sum(1, keepdim=True)
        return log_sum(torch.cat([own.unsqueeze(2), moved], 2)) - row_sum.log()


def _log(x: Tensor) -> Tensor:
    """Return the logarithm, with gradient 0 where it is -inf."""
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).log(), -torch.inf)


def _at(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """Return the index along a dimension that has length 1 where its entry is shared."""
    return index if tensor.shape[dim] > 1 else torch.zeros_like(index)
