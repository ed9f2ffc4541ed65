"""Tables of input units under rows of factors: each row is multiplied once with every table that reads it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from circuits.algebra.semirings import Semiring
from circuits.evidence import Factors, Listed


class Tables(Protocol):
    """The tables of a bank, (P, C, K)."""

    @property
    def log(self) -> Tensor:
        """Their logarithms."""

    @property
    def linear(self) -> Tensor:
        """Themselves."""


def values_of_rows(
    semiring: Semiring,
    rows: Factors,
    index: Tensor,  # shape: (F, B)
    table: Tensor,  # shape: (F,)
    weights: Tables,
) -> Tensor:  # shape: (F, K, B, *E)
    """Return the values of F nodes under :class:`~circuits.evidence.Indexed` factors.

    Args:
        semiring: what plus and times mean.
        rows: dense or listed, (1, n, ...).
        index: by node: the value that is observed, or ``~j`` for row j.
        table: which of the bank's tables each node reads.
        weights: the bank.
    """
    numbers = table.unique().tolist()
    nodes = [(table == number).nonzero().flatten() for number in numbers]
    parts = [
        _of_table(semiring, rows, index[some], weights.log[number], weights.linear[number])
        for number, some in zip(numbers, nodes, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts).index_select(0, torch.cat(nodes).argsort())


def _of_table(semiring: Semiring, rows: Factors, index: Tensor, log_table: Tensor, table: Tensor) -> Tensor:
    """Return the values of nodes that read one table, (C, K): every row, and what is observed, are columns to read."""
    is_row = index < 0
    wanted, place = (~index[is_row]).unique(return_inverse=True)
    columns = semiring.lift(log_table.t().unsqueeze(0))  # (1, K, C, *E)
    if len(wanted):
        chosen = rows if len(wanted) == rows.stored.shape[1] else rows.map(lambda part: part[:, wanted])
        if isinstance(chosen, Listed):
            factors = chosen.factors(log_table.dtype)[0]
            found = semiring.mix(log_table, chosen.values[0].long(), factors, table=table).transpose(0, 1).unsqueeze(0)
        else:
            x = semiring.lift(chosen.dense(len(log_table), log_table.dtype).transpose(1, 2))  # (1, C, n, *E)
            found = semiring.contract(log_table.t().unsqueeze(0), x, weights=table.t().unsqueeze(0))
        columns = torch.cat([columns, found], 2)
    column = index.masked_scatter(is_row, place + len(log_table))
    return columns[0].index_select(1, column.flatten()).unflatten(1, index.shape).transpose(0, 1)
