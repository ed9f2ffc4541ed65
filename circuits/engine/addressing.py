"""Addressing: which rows of earlier layers, and which rows of a parameter bank, a folded layer uses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Address = tuple[int, int]
"""Where a node lives: (layer, row within the layer)."""

_MAX_PIECES = 4


class Gradients:
    """Gradients of the layers' outputs, (F, K, B) each, that add up; nothing is copied until a second one arrives."""

    def __init__(self, sizes: Sequence[tuple[int, int]], batch_size: int) -> None:
        self._sizes = sizes
        self._batch_size = batch_size
        self._values: dict[int, Tensor] = {}
        self._owned: set[int] = set()

    def pop(self, layer: int) -> Tensor | None:
        """Return the gradient of a layer's output and forget it; None if nothing was added."""
        return self._values.pop(layer, None)

    def add(self, layer: int, rows: slice | Tensor, grad: Tensor) -> None:
        """Add ``grad`` to some rows of a layer's gradient."""
        current = self._values.get(layer)
        num_nodes, num_units = self._sizes[layer]
        if isinstance(rows, slice) and rows == slice(0, num_nodes, 1):
            self._values[layer] = grad if current is None else current + grad
            if current is not None:
                self._owned.add(layer)
            return
        if current is None:
            current = grad.new_zeros(num_nodes, num_units, self._batch_size)
        elif layer not in self._owned:
            current = current.clone()
        self._owned.add(layer)
        self._values[layer] = current
        if isinstance(rows, slice):
            current[rows] += grad
        else:
            current.index_add_(0, rows, grad)


class Rows:
    """Gathers n rows from the outputs of earlier layers: as slices where they are evenly spaced, else by index.

    Not a module, because long chains have tens of thousands of them: its layer moves it between devices.
    """

    def __init__(self, addresses: Sequence[Address]) -> None:
        pieces = _runs_by_layer(addresses)
        self.order: Tensor | None = None
        self.inverse: Tensor | None = None
        if len(pieces) > _MAX_PIECES:
            by_layer = sorted(range(len(addresses)), key=addresses.__getitem__)
            pieces = _runs_by_layer([addresses[i] for i in by_layer])
            self.order = torch.tensor(by_layer)
            self.inverse = self.order.argsort()
        self.layers = [layer for layer, _ in pieces]
        self.lengths = [len(rows) for _, rows in pieces]
        self.pieces: list[slice | Tensor] = [as_slice(rows) or torch.tensor(rows) for _, rows in pieces]

    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply what ``nn.Module.to`` applies to the tensors of a module."""
        self.order = None if self.order is None else function(self.order)
        self.inverse = None if self.inverse is None else function(self.inverse)
        self.pieces = [rows if isinstance(rows, slice) else function(rows) for rows in self.pieces]

    def __call__(self, outputs: Sequence[Tensor | None]) -> Tensor:
        """Return the rows of ``outputs`` (each (F, K, B, *E)), shape (n, K, B, *E)."""
        pieces = []
        for layer, rows in zip(self.layers, self.pieces, strict=True):
            output = outputs[layer]
            assert output is not None
            pieces.append(output[rows] if isinstance(rows, slice) else output.index_select(0, rows))
        gathered = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return gathered if self.inverse is None else gathered.index_select(0, self.inverse)

    def adjoint(self, grad: Tensor, gradients: Gradients) -> None:
        """Send the gradient of the gathered rows, (n, K, B), back to where the rows came from."""
        if self.order is not None:
            grad = grad.index_select(0, self.order)
        parts = [grad] if len(self.lengths) == 1 else grad.split(self.lengths)
        for layer, rows, part in zip(self.layers, self.pieces, parts, strict=True):
            gradients.add(layer, rows, part)


class ParameterRows(nn.Module):
    """Selects the rows of a parameter bank (P, O, I) that F folded nodes use; tied nodes share rows."""

    index: Tensor

    def __init__(self, bank: str, rows: Sequence[int]) -> None:
        super().__init__()
        self.bank = bank
        self.num_nodes = len(rows)
        self.is_tied = len(set(rows)) == 1
        self.slice = slice(rows[0], rows[0] + 1, 1) if self.is_tied else as_slice(rows)
        self.register_buffer("index", torch.tensor(rows), persistent=False)

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


def as_slice(rows: Sequence[int]) -> slice | None:
    """Return the slice that selects exactly ``rows`` in order, or None if there is none."""
    if len(rows) == 1:
        return slice(rows[0], rows[0] + 1, 1)
    step = rows[1] - rows[0]
    if step < 1 or any(b - a != step for a, b in itertools.pairwise(rows)):
        return None
    return slice(rows[0], rows[-1] + 1, step)


def _runs_by_layer(addresses: Sequence[Address]) -> list[tuple[int, list[int]]]:
    """Cut ``addresses`` into runs of consecutive entries in the same layer: (layer, rows)."""
    runs: list[tuple[int, list[int]]] = []
    for layer, row in addresses:
        if not runs or runs[-1][0] != layer:
            runs.append((layer, []))
        runs[-1][1].append(row)
    return runs
