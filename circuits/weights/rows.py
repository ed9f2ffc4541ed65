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
    numbers, slot = table.unique(return_inverse=True)  # P tables, (P,) and (F,)
    log, linear = (one if len(numbers) == len(one) else one[numbers] for one in (weights.log, weights.linear))
    num_categories, is_row = log.shape[1], index < 0
    chosen, column = _by_table(slot, index, is_row, len(numbers), rows.stored.shape[1])
    own = rows if chosen is None else rows.map(lambda part: part[0, chosen])  # (P, m, ...)
    if isinstance(own, Listed):
        offsets = torch.arange(len(log), device=index.device) * num_categories
        listed = (own.values.long() + offsets.view(-1, 1, 1)).flatten(0, 1), own.factors(log.dtype).flatten(0, 1)
        mixed = semiring.mix(log.flatten(0, 1), *listed, table=linear.flatten(0, 1))
        found = mixed.unflatten(0, own.values.shape[:2]).transpose(1, 2)
    else:
        x = semiring.lift(own.dense(num_categories, log.dtype).transpose(1, 2))  # (P, C, m, *E)
        found = semiring.contract(log.transpose(1, 2), x, weights=linear.transpose(1, 2))
    columns = torch.cat([semiring.lift(log.transpose(1, 2)), found], 2)  # (P, K, C + m, *E)
    column = index.masked_scatter(is_row, column + num_categories) + slot.unsqueeze(1) * columns.shape[2]
    read = columns.transpose(0, 1).flatten(1, 2).index_select(1, column.flatten())
    return read.unflatten(1, index.shape).transpose(0, 1)


def _by_table(
    slot: Tensor, index: Tensor, is_row: Tensor, num_tables: int, num_rows: int
) -> tuple[Tensor | None, Tensor]:
    """Return which rows each of P tables reads, (P, m), None where one reads all, and for each use which of them."""
    pairs, use = (slot.unsqueeze(1) * num_rows + ~index)[is_row].unique(return_inverse=True)
    if num_tables == 1 and len(pairs) == num_rows:
        return None, use
    of_table = pairs // max(1, num_rows)
    counts = of_table.bincount(minlength=num_tables)
    place = torch.arange(len(pairs), device=index.device) - (counts.cumsum(0) - counts)[of_table]
    chosen = pairs.new_zeros(num_tables, int(counts.max()))  # what is left over is read by nobody
    return chosen.index_put((of_table, place), pairs % max(1, num_rows)), place[use]
