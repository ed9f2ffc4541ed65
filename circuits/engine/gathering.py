"""Where a layer finds its children's values and its weights, and where gradients and choices go back to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuits.chains import joined

if TYPE_CHECKING:
    from circuits.engine.adjoint import Gradients

Address = tuple[int, int]
"""Where a node lives: (layer, position within the layer)."""
LayerValues = Mapping[int, Tensor] | Sequence[Tensor]
"""Values (F, K, B, *E) of the layers that are still needed, by layer."""

_MAX_PIECES = 4


class Part:
    """What holds tensors, or other parts that do, as attributes or in lists."""

    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply what ``nn.Module.to`` applies to the tensors of a module."""
        vars(self).update({name: _moved(value, function) for name, value in vars(self).items()})


class Gather(Part):
    """Gathers the values of n nodes of earlier layers: as slices where they are evenly spaced, else by index."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        pieces = _runs_by_layer(addresses)
        self.order: Tensor | None = None
        self.inverse: Tensor | None = None
        if len(pieces) > _MAX_PIECES:
            by_layer = sorted(range(len(addresses)), key=addresses.__getitem__)
            pieces = _runs_by_layer([addresses[i] for i in by_layer])
            self.order = torch.tensor(by_layer)
            self.inverse = self.order.argsort()
        self.lengths = [len(nodes) for _, nodes in pieces]
        self.pieces: list[tuple[int, slice | Tensor]] = [
            (layer, _as_slice(nodes) or torch.tensor(nodes)) for layer, nodes in pieces
        ]

    def __call__(self, values: LayerValues) -> Tensor:
        """Return the values of the nodes, (n, K, B, *E)."""
        pieces = [
            values[layer][at] if isinstance(at, slice) else values[layer].index_select(0, at)
            for layer, at in self.pieces
        ]
        gathered = pieces[0] if len(pieces) == 1 else joined(pieces, 0)
        return gathered if self.inverse is None else gathered.index_select(0, self.inverse)

    def adjoint(self, grad: Tensor, gradients: Gradients) -> None:
        """Send the gradient of what was gathered, (n, K, B), back to where it came from."""
        if self.order is not None:
            grad = grad.index_select(0, self.order)
        parts = [grad] if len(self.lengths) == 1 else grad.split(self.lengths)
        for (layer, at), part in zip(self.pieces, parts, strict=True):
            gradients.add(layer, at, part)

    def reach(self, units: LayerValues, column: Tensor, chosen: Tensor) -> None:
        """Record in ``units`` which unit of each node was chosen, from (n, m), in the columns (m,)."""
        chosen = chosen if self.order is None else chosen.index_select(0, self.order)
        for (layer, at), part in zip(self.pieces, chosen.split(self.lengths), strict=True):
            rows = torch.arange(len(units[layer]), device=column.device)[at]
            units[layer][rows.unsqueeze(1), column] = part


class UnitGather(Gather):
    """Gathers one unit of each of C nodes, side by side: for n lists of C nodes, all of K units, that unit's number."""

    def __init__(self, children: Sequence[Sequence[Address]], units: Sequence[int], num_units: int) -> None:
        lists = {tuple(nodes): number for number, nodes in enumerate(dict.fromkeys(map(tuple, children)))}
        super().__init__(list(itertools.chain(*lists)))
        self.num_lists = len(lists)
        self.list_of = torch.tensor([lists[tuple(nodes)] for nodes in children])
        self.units, self.num_units = torch.tensor(units), num_units

    def __call__(self, values: LayerValues) -> Tensor:
        """Return the values of the units, (n, C, B, *E)."""
        by_unit = super().__call__(values).unflatten(0, (self.num_lists, -1)).transpose(1, 2)
        return by_unit.flatten(0, 1).index_select(0, self._rows(by_unit.shape[1]))

    def adjoint(self, grad: Tensor, gradients: Gradients) -> None:
        """Send the gradient of what was gathered, (n, C, B), back to where it came from."""
        by_unit = grad.new_zeros(self.num_lists * self.num_units, *grad.shape[1:])
        by_unit.index_copy_(0, self._rows(self.num_units), grad)
        super().adjoint(by_unit.unflatten(0, (self.num_lists, -1)).transpose(1, 2).flatten(0, 1), gradients)

    def _rows(self, num_units: int) -> Tensor:
        """Return which of all units of the lists are gathered; of what is equal for all units of a node it is one."""
        return self.list_of * num_units + self.units.clamp_max(num_units - 1)


class ParameterRows(Part):
    """Selects the rows of a parameter bank (P, O, I) that F folded nodes use; tied nodes share rows."""

    def __init__(self, bank: str, rows: Sequence[int]) -> None:
        self.bank = bank
        self.num_nodes = len(rows)
        self.is_tied = len(set(rows)) == 1
        self.slice = slice(rows[0], rows[0] + 1, 1) if self.is_tied else _as_slice(rows)
        self.index = torch.tensor(rows)

    def select(self, bank: Tensor, *, expand: bool = True) -> Tensor:
        """Return the rows of ``bank`` for each node, (F, O, I); (1, O, I) for tied nodes unless ``expand``."""
        if self.slice is None:
            return bank.index_select(0, self.index)
        rows = bank[self.slice]
        return rows.expand(self.num_nodes, -1, -1) if expand and self.is_tied and self.num_nodes > 1 else rows

    def add(self, bank: Tensor, rows: Tensor) -> None:
        """Add ``rows`` (F, O, I) to the rows of ``bank`` that the nodes use."""
        bank.index_add_(0, self.index, rows)

    def add_outer(self, bank: Tensor, left: Tensor, right: Tensor) -> None:
        """Add ``left (N, M, B) @ right (N, I, B)^T``, seen as (F, O, I), to the rows of ``bank`` that the nodes use."""
        right = right.transpose(1, 2)
        if self.slice is not None and not (self.is_tied and self.num_nodes > 1):
            rows = bank[self.slice]
            if left.shape[0] == rows.shape[0]:
                rows.baddbmm_(left, right)
                return
            if self.slice.step == 1:
                rows.view(*left.shape[:2], -1).baddbmm_(left, right)
                return
        self.add(bank, torch.bmm(left, right).reshape(self.num_nodes, *bank.shape[1:]))


def _moved(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Part):
        value.move(function)
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(part, function) for part in value)
    return function(value) if isinstance(value, Tensor) else value


def _as_slice(numbers: Sequence[int]) -> slice | None:
    """Return the slice that selects exactly ``numbers`` in order, or None if there is none."""
    if len(numbers) == 1:
        return slice(numbers[0], numbers[0] + 1, 1)
    step = numbers[1] - numbers[0]
    if step < 1 or any(b - a != step for a, b in itertools.pairwise(numbers)):
        return None
    return slice(numbers[0], numbers[-1] + 1, step)


def _runs_by_layer(addresses: Sequence[Address]) -> list[tuple[int, list[int]]]:
    """Cut ``addresses`` into runs of consecutive entries in the same layer: (layer, positions)."""
    runs: list[tuple[int, list[int]]] = []
    for layer, position in addresses:
        if not runs or runs[-1][0] != layer:
            runs.append((layer, []))
        runs[-1][1].append(position)
    return runs
