"""Forms in which a sum node is given weights at run time, for every query b its own table W_b (K, I).

=============================  ======================================================================================
:class:`Dense`                 W_b itself
:class:`Gates`                 ``W_b = sum_t g_bt W_t``: a convex combination of T tables that queries and nodes share
:class:`LowRank`               ``W_b = (W + v u_b^T) / (1 + v u_b^T 1)``: the node's own table W, moved by a rank R
=============================  ======================================================================================

Only the first makes a table of every query. A step of the others costs T products with a table that queries share, or
one such product and R vectors a query. Where weights do not simply add up (maxima, powers, entropies) the tables of a
few queries at a time are written out; a choice of children writes out the rows of the units that were reached.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from circuits.engine.joined_weights import JoinedGates, JoinedLowRank, JoinedTables
from circuits.engine.logspace import log_sum
from circuits.errors import ArgumentError
from circuits.families.base import log_normalized


@dataclass(frozen=True)
class Own:
    """The own log-weights of the nodes that weights are given to."""

    bank: str
    log: Tensor
    """Of all rows of the bank, (P, K, I)."""
    rows: tuple[int, ...]
    """Those of the n nodes."""

    def table(self) -> Tensor:
        """Return the nodes' log-weights, (n, K, I), or (1, K, I) where all are tied."""
        first = self.rows[0]
        return self.log[first : first + 1] if set(self.rows) == {first} else self.log[list(self.rows)]


class Form(ABC):
    """Weights of one sum node, for B queries or for all."""

    @abstractmethod
    def check(self, who: str, shape: tuple[int, int]) -> None:
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

    def check(self, who: str, shape: tuple[int, int]) -> None:
        """Raise ArgumentError unless it is a floating-point table of a shape."""
        table = self.log_weights
        is_table = isinstance(table, Tensor) and table.dim() in (2, 3)
        if not is_table or not table.is_floating_point() or table.shape[-2:] != shape:
            raise _refused("log-weights", f"{shape} or (B, {shape[0]}, {shape[1]})", who, table)

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


@dataclass(frozen=True, eq=False)
class Gates(Form):
    """A convex combination of tables, ``W_b = sum_t g_bt W_t``, with gates g and tables W_t as logarithms.

    Nodes whose tables are the same tensor are evaluated together, and the tables are normalised once for all of them.
    T tables cost T times the products of one.

    Args:
        gates: log g, (T,) or (B, T); a log-softmax makes them sum to 1.
        tables: log W_t, (T, K, I); a log-softmax makes their rows sum to 1.
        relative: whether the tables are offsets of the node's own log-weights, ``log W_t = log W + tables[t]``. Where
            they are all 0, W_b is the node's own table to the last bit, whatever the gates are.
    """

    gates: Tensor
    tables: Tensor
    relative: bool = False

    def check(self, who: str, shape: tuple[int, int]) -> None:
        """Raise ArgumentError unless gates and tables fit each other and the node."""
        gates, tables = self.gates, self.tables
        if not isinstance(tables, Tensor) or not tables.is_floating_point() or tuple(tables.shape[1:]) != shape:
            raise _refused("log-tables", f"(T, {shape[0]}, {shape[1]})", who, tables)
        is_vector = isinstance(gates, Tensor) and gates.dim() in (1, 2) and gates.is_floating_point()
        if not is_vector or gates.shape[-1] != len(tables) or not len(tables):
            raise _refused("log-gates", f"({len(tables)},) or (B, {len(tables)}), T >= 1,", who, gates)

    @property
    def batch_size(self) -> int | None:
        """B, or None."""
        return len(self.gates) if self.gates.dim() == 2 else None

    def group(self) -> Hashable:
        """Nodes with the same tables are joined."""
        return Gates, id(self.tables), self.relative

    def joined(self, forms: Sequence[Gates], own: Own, *, normalize: bool, shared: dict[Hashable, Any]) -> JoinedGates:
        """Stack the gates, and normalise the tables once."""
        key = (Gates, id(self.tables), normalize, *((own.bank, own.rows) if self.relative else ()))
        if key not in shared:
            log_tables = self._tables(own, normalize)
            shared[key] = log_tables, log_tables.exp()
        log_tables, tables = shared[key]
        log_gates = _stacked([form.gates.to(own.log) for form in forms], 1)
        _check_log("gates", log_gates, -1, need_one=normalize)
        if normalize:
            log_gates = log_normalized(log_gates, -1)
            return JoinedGates(log_gates.exp(), log_gates, tables, log_tables, None)
        peak = log_tables.detach().amax((2, 3))  # (1 or n, T): tables are at most 1, and the gates scale them up
        peak = peak.masked_fill(peak == -torch.inf, 0.0)
        log_gates = log_gates + peak.unsqueeze(1)
        log_tables = log_tables - peak[..., None, None]
        log_scale = log_sum(log_gates)
        log_scale = log_scale.masked_fill(log_scale == -torch.inf, 0.0).unsqueeze(2)
        log_gates = log_gates - log_scale
        return JoinedGates(log_gates.exp(), log_gates, log_tables.exp(), log_tables, log_scale)

    def _tables(self, own: Own, normalize: bool) -> Tensor:
        tables = self.tables.to(own.log)
        if not self.relative:
            _check_log("tables", tables, -1, need_one=normalize)
            return (log_normalized(tables, -1) if normalize else tables).unsqueeze(0)
        log_own = own.table().unsqueeze(1)
        tables = log_own + tables  # (1 or n, T, K, I)
        _check_log("tables", tables, -1, need_one=normalize)
        if not normalize:
            return tables
        # own weights sum to 1 but for rounding; so offsets of 0 change no bit
        return tables - (torch.logsumexp(tables, -1, keepdim=True) - torch.logsumexp(log_own, -1, keepdim=True))


@dataclass(frozen=True, eq=False)
class LowRank(Form):
    """The node's own table W, moved by a rank R: ``W_b[k, i] = (W[k, i] + sum_r v[k, r] u_b[i, r]) / (1 + ...)``.

    The denominator is the row's sum, so W_b is normalised. Factors are numbers >= 0, not logarithms: where one side is
    0, W_b is W to the last bit, and has a gradient in it.

    Args:
        u: of the children, (I, R) or (B, I, R).
        v: of the units, (K, R) or (B, K, R).
    """

    u: Tensor
    v: Tensor

    @classmethod
    def from_logs(cls, log_u: Tensor, log_v: Tensor) -> LowRank:
        """Build the form of logarithms U, V, as PyJuice is given them: ``W + sum_r e^(U[i, r] + V[k, r])``."""
        return cls(log_u.exp(), log_v.exp())

    def check(self, who: str, shape: tuple[int, int]) -> None:
        """Raise ArgumentError unless the factors fit each other and the node."""
        rank = self.u.shape[-1] if isinstance(self.u, Tensor) and self.u.dim() else "R"
        for name, factor, size in (("u", self.u, shape[1]), ("v", self.v, shape[0])):
            is_matrix = isinstance(factor, Tensor) and factor.dim() in (2, 3) and factor.is_floating_point()
            if not is_matrix or tuple(factor.shape[-2:]) != (size, rank):
                raise _refused(name, f"({size}, {rank}) or (B, {size}, {rank})", who, factor)
            least, greatest = torch.aminmax(factor.detach()) if factor.numel() else (factor.new_zeros(()),) * 2
            if not bool((least >= 0) & (greatest < torch.inf)):
                raise ArgumentError(
                    f"external: expected finite numbers >= 0 as {name} of {who}, got others; of logarithms make "
                    "it with LowRank.from_logs"
                )

    @property
    def batch_size(self) -> int | None:
        """B, or None."""
        return next((len(factor) for factor in (self.u, self.v) if factor.dim() == 3), None)

    def group(self) -> Hashable:
        """Nodes of one rank are joined; of one batch size are those that have one."""
        return LowRank, self.u.shape[-1]

    def joined(
        self, forms: Sequence[LowRank], own: Own, *, normalize: bool, shared: dict[Hashable, Any]
    ) -> JoinedLowRank:
        """Stack the factors, but for a v that all nodes share."""
        is_shared = len({id(form.v) for form in forms}) == 1
        v = _stacked([form.v.to(own.log) for form in (forms[:1] if is_shared else forms)], 2)
        u = _stacked([form.u.to(own.log) for form in forms], 2)
        key = (LowRank, own.bank, own.rows)
        if key not in shared:
            log_own = own.table()
            shared[key] = log_own, log_own.exp()
        log_own, table = shared[key]
        return JoinedLowRank(table, log_own, u, v, None)


def joined_tables(tables: Sequence[Tensor], axis: int, *, normalize: bool) -> JoinedTables:
    """Stack log-weights of n nodes, sums ([B,] K, I) along axis -1, inputs ([B,] C, K) along axis -2.

    Raises:
        ArgumentError: a weight is NaN or +inf, or a unit has no weight.
    """
    log = _stacked(tables, 2)
    has_weight = _check_log("log-weights", log, axis, need_one=normalize)
    if normalize:
        return JoinedTables(log_normalized(log, axis), None)
    is_empty = ~has_weight.unsqueeze(axis)  # where a unit has no weight its scale is 1, and its children impossible
    log_scale = torch.logsumexp(log.masked_fill(is_empty, 0.0), axis).masked_fill(~has_weight, 0.0)
    return JoinedTables(log - log_scale.unsqueeze(axis), log_scale)


def _stacked(tensors: Sequence[Tensor], num_dims: int) -> Tensor:
    """Stack tensors of ``num_dims`` dimensions, with or without one of queries before: (n, B or 1, ...)."""
    tensors = [t.unsqueeze(0) if t.dim() == num_dims else t for t in tensors]
    batch_size = max(len(t) for t in tensors)
    if len(tensors) == 1:
        return tensors[0].unsqueeze(0)
    return torch.stack([t.expand(batch_size, *t.shape[1:]) for t in tensors])


def _check_log(what: str, log: Tensor, axis: int, *, need_one: bool) -> Tensor:
    """Return which rows along an axis have a number above -inf; raise ArgumentError for NaN and +inf, or none."""
    greatest = log.detach().amax(axis)
    if not bool((greatest < torch.inf).all()):  # NaN is handed on by amax
        raise ArgumentError(f"external: expected {what} below +inf (-inf rules a child out), got NaN or +inf")
    has_one = greatest > -torch.inf
    if need_one and not bool(has_one.all()):
        raise ArgumentError(f"external: expected {what} with one above -inf per unit, got a unit without any")
    return has_one


def _refused(what: str, shape: str, who: str, got: Any) -> ArgumentError:
    found = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
    return ArgumentError(f"external: expected floating-point {what} {shape} for {who}, got {found}")
