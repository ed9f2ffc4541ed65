"""Gates: a convex combination of tables that queries and nodes share."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from circuits.algebra.logspace import log_sum, product
from circuits.families.base import log_normalized
from circuits.weights.forms import Form, Own, check_log, refused, stacked
from circuits.weights.implicit import ImplicitWeights, at


@dataclass(frozen=True, eq=False)
class Gates(Form):
    """A convex combination of tables, ``W_b = sum_t g_bt W_t``, with gates g and tables W_t as logarithms.

    Nodes whose tables are the same tensor are evaluated together, and the tables are normalised once for all of them.
    T tables cost T times the products of one.

    Args:
        gates: log g, (T,) or (B, T); a log-softmax makes them sum to 1.
        tables: log W_t, (T, K, I); a log-softmax makes their rows sum to 1.
        relative: whether the tables are offsets of the node's own log-weights, ``log W_t = log W + tables[t]``.
            Where they are all 0, W_b is the node's own table, whatever the gates are.
    """

    gates: Tensor
    tables: Tensor
    relative: bool = False
    across_layers = True

    def check(self, who: object, shape: tuple[int, int]) -> None:
        """Raise ArgumentError unless gates and tables fit each other and the node."""
        gates, tables = self.gates, self.tables
        if not isinstance(tables, Tensor) or not tables.is_floating_point() or tuple(tables.shape[1:]) != shape:
            raise refused("log-tables", f"(T, {shape[0]}, {shape[1]})", who, tables)
        is_vector = isinstance(gates, Tensor) and gates.dim() in (1, 2) and gates.is_floating_point()
        if not is_vector or gates.shape[-1] != len(tables) or not len(tables):
            raise refused("log-gates", f"({len(tables)},) or (B, {len(tables)}), T >= 1,", who, gates)

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
            shared[key] = log_tables, _side_by_side(log_tables)
        log_tables, tables = shared[key]
        log_gates = stacked([form.gates.to(own.log) for form in forms], 1)
        check_log("gates", log_gates, -1, need_one=normalize)
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
        return JoinedGates(log_gates.exp(), log_gates, _side_by_side(log_tables), log_tables, log_scale)

    def _tables(self, own: Own, normalize: bool) -> Tensor:
        """Return log W_t, (1 or n, T, K, I)."""
        tables = self.tables.to(own.log).unsqueeze(0)
        if self.relative:
            tables = own.table().unsqueeze(1) + tables
        check_log("tables", tables, -1, need_one=normalize)
        return log_normalized(tables, -1) if normalize else tables


@dataclass(frozen=True, eq=False)
class JoinedGates(ImplicitWeights):
    """Gates of n nodes over the same tables."""

    gates: Tensor
    """(n, B, T)."""
    log_gates: Tensor
    tables: Tensor
    """(1 or n, K, T, I)."""
    log_tables: Tensor
    """(1 or n, T, K, I)."""
    log_scale: Tensor | None
    per_query = ("gates", "log_gates", "log_scale")

    @property
    def num_units(self) -> int:  # type: ignore[override]
        """K."""
        return self.tables.shape[1]

    def support(self) -> JoinedGates:
        """Return weights that are positive where these are."""
        gates, tables = ((t > -torch.inf).to(t.dtype) for t in (self.log_gates, self.log_tables.transpose(1, 2)))
        return dataclasses.replace(self, gates=gates, tables=tables)

    def apply(self, x: Tensor) -> Tensor:
        """Multiply the tables side by side by the gated vectors below each other: one product mixes too."""
        gated = x.unsqueeze(1) * self.gates.transpose(1, 2)[:, :, None, :, None]  # (n, T, I, B, E)
        tables = self.tables.flatten(2).expand(len(x), -1, -1)  # (n, K, T * I)
        return product(tables, gated.flatten(1, 2).flatten(2)).unflatten(2, x.shape[2:])

    @property
    def numbers_per_row(self) -> int:  # type: ignore[override]
        """T * I."""
        return self.tables.shape[2] * self.tables.shape[3]

    def rows_at(self, slot: Tensor, query: Tensor, unit: Tensor) -> Tensor:
        """Mix the rows of all tables."""
        log_tables = self.log_tables[at(self.log_tables, 0, slot), :, unit]  # (m, T, I)
        log_gates = self.log_gates[slot, at(self.log_gates, 1, query)]  # (m, T)
        return log_sum((log_tables + log_gates.unsqueeze(2)).transpose(1, 2))


def _side_by_side(log_tables: Tensor) -> Tensor:
    """Return the tables W_t, (n, K, T, I), of their logarithms, (n, T, K, I)."""
    return log_tables.transpose(1, 2).exp().contiguous()
