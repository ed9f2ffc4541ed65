"""What the sums of a chain make of what they mix, where weights are given at run time: linear maps, step by step.

A step writes into tensors that are there already; gradients of weights are made of all steps at once.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from circuits.chains.calls import Calls, Map
from circuits.weights.forms import JoinedTables, JoinedWeights
from circuits.weights.gates import JoinedGates
from circuits.weights.low_rank import JoinedLowRank

Wanted = Callable[[Tensor], bool]


class Steps(NamedTuple):
    """Some steps, S of them, of a recurrence ``y_s = W_s x_s``, after the pass down."""

    states: Tensor
    """x, (S, K, B)."""
    results: Tensor
    """y, (S, K, B)."""
    scales: Tensor
    """The gradient of y, (S, K, B)."""


class Maps(ABC):
    """The maps W_s of S steps of one kind, (K, K) for each of B queries; the weights' scales are left out."""

    def __init__(self, weights: Sequence[Any], calls: Calls, batch_size: int) -> None:
        self.weights = weights
        self.calls = calls
        self.batch_size = batch_size

    @abstractmethod
    def up(self, step: int) -> Map:
        """Return what writes ``W x``."""

    @abstractmethod
    def down(self, step: int, state: Tensor, wanted: Wanted) -> Map:
        """Return what writes ``W^T q``; ``state`` is x of that step."""

    @abstractmethod
    def gradients(self, steps: Steps, wanted: Wanted) -> list[tuple[Tensor, Tensor]]:
        """Return tensors of the weights and their gradients; a tensor may come more than once."""


class Tables(Maps):
    """One table that all queries and steps share."""

    weights: Sequence[JoinedTables]

    def __init__(self, weights: Sequence[JoinedTables], calls: Calls, batch_size: int) -> None:
        super().__init__(weights, calls, batch_size)
        self.linear = weights[0].log.detach()[0, 0].exp()
        self.table, self.transposed = calls.view(self.linear), calls.view(self.linear.t().contiguous())

    def up(self, step: int) -> Map:
        """Multiply by the table."""
        return functools.partial(self.calls.mix, self.table)

    def down(self, step: int, state: Tensor, wanted: Wanted) -> Map:
        """Multiply by the transposed table."""
        return functools.partial(self.calls.mix, self.transposed)

    def gradients(self, steps: Steps, wanted: Wanted) -> list[tuple[Tensor, Tensor]]:
        """Return that of the logarithms."""
        log = self.weights[0].log
        return [(log, (_outer(steps.scales, steps.states) * self.linear)[None, None])] if wanted(log) else []


class QueryTables(Maps):
    """A table of every query in every step."""

    weights: Sequence[JoinedTables]

    def __init__(self, weights: Sequence[JoinedTables], calls: Calls, batch_size: int) -> None:
        super().__init__(weights, calls, batch_size)
        self.linear = [one.log.detach()[0].exp() for one in weights]  # (B, K, I)
        self.columns = calls.view(torch.empty_like(self.linear[0][:, :, :1]))

    def up(self, step: int) -> Map:
        """Multiply every query by its table."""
        return self._times(self.linear[step])

    def down(self, step: int, state: Tensor, wanted: Wanted) -> Map:
        """Multiply every query by its transposed table."""
        return self._times(self.linear[step].mT)

    def _times(self, tables: Tensor) -> Map:
        view, columns = self.calls.view(tables), self.columns

        def write(x: Any, out: Any) -> None:
            self.calls.mix_each(view, x.T[:, :, None], out=columns)
            out[:] = columns[:, :, 0].T

        return write

    def gradients(self, steps: Steps, wanted: Wanted) -> list[tuple[Tensor, Tensor]]:
        """Return those of the logarithms."""
        return [
            (one.log, torch.bmm(q.t().unsqueeze(2), x.t().unsqueeze(1)).mul_(linear).unsqueeze(0))
            for one, linear, q, x in zip(self.weights, self.linear, steps.scales, steps.states, strict=True)
            if wanted(one.log)
        ]


class Gates(Maps):
    """``W_s = sum_t g_st W_t`` with T tables that the steps share."""

    weights: Sequence[JoinedGates]

    def __init__(self, weights: Sequence[JoinedGates], calls: Calls, batch_size: int) -> None:
        super().__init__(weights, calls, batch_size)
        gates = torch.cat([one.gates.detach().expand(-1, batch_size, -1) for one in weights])
        self.gates = gates.mT.unsqueeze(2).contiguous()  # (S, T, 1, B)
        tables = weights[0].tables.detach()[0]  # (K, T, I)
        self.table = calls.view(tables.flatten(1))
        self.transposed = calls.view(tables.flatten(1).t().contiguous())
        vectors, others = tables.new_empty(2, *tables.shape[1:], batch_size)
        self.vectors = [calls.view(part) for part in (vectors, vectors.flatten(0, 1), others)]
        self.gate_grads = torch.empty_like(self.gates)
        self.views = [list(calls.view(part)) for part in (self.gates, self.gate_grads)]

    def up(self, step: int) -> Map:
        """Multiply the tables side by side by the gated vectors below each other."""
        times, mix, table = self.calls.times, self.calls.mix, self.table
        gates, (gated, flat, _) = self.views[0][step], self.vectors

        def write(x: Any, out: Any) -> None:
            times(gates, x, out=gated)
            mix(table, flat, out=out)

        return write

    def down(self, step: int, state: Tensor, wanted: Wanted) -> Map:
        """Gate what the transposed tables make; without the gates it is what these change."""
        times, mix, total, table = self.calls.times, self.calls.mix, self.calls.total, self.transposed
        (made, flat, others), (gates, gate_grads) = self.vectors, (part[step] for part in self.views)
        x, is_wanted = self.calls.view(state), wanted(self.weights[step].gates)

        def write(q: Any, out: Any) -> None:
            mix(table, q, out=flat)
            times(gates, made, out=others)
            total(others, axis=0, out=out)
            if is_wanted:
                times(made, x, out=others)
                total(others, axis=1, keepdims=True, out=gate_grads)

        return write

    def gradients(self, steps: Steps, wanted: Wanted) -> list[tuple[Tensor, Tensor]]:
        """Return those of the gates, and of the tables."""
        grads = self.gate_grads.squeeze(2).mT.split(1)  # (1, B, T) each
        found = [
            (one.gates, grad.sum_to_size(one.gates.shape))
            for one, grad in zip(self.weights, grads, strict=True)
            if wanted(one.gates)
        ]
        tables = self.weights[0].tables
        if wanted(tables):
            gates, states = self.gates.permute(1, 2, 0, 3), _as_columns(steps.states).t()
            scales = steps.scales.transpose(0, 1).contiguous()
            by_table = [(scales * of_table).flatten(1) @ states for of_table in gates]
            found.append((tables, torch.stack(by_table, 1).unsqueeze(0)))
        return found


class LowRank(Maps):
    """``W_s = (W + v u_s^T) / (1 + v u_s^T 1)`` with W and v that the steps and queries share."""

    weights: Sequence[JoinedLowRank]

    def __init__(self, weights: Sequence[JoinedLowRank], calls: Calls, batch_size: int) -> None:
        super().__init__(weights, calls, batch_size)
        own, self.v = weights[0].own.detach()[0], weights[0].v.detach()[0, 0]
        self.u = [one.u.detach()[0].expand(batch_size, -1, -1) for one in weights]  # (B, I, R)
        self.tables = [calls.view(t.contiguous()) for t in (own, own.t(), self.v, self.v.t())]
        self.reads, sums = own.new_empty(2, len(weights), batch_size, 1, self.v.shape[1])
        """u^T x, (S, B, 1, R)."""
        for u, total in zip(self.u, sums, strict=True):  # by products, which are faster than sums along a middle axis
            calls.mix_each(*map(calls.view, (own.new_ones(1, 1, len(own)), u)), out=calls.view(total))
        self.u_sums = sums[:, :, 0].mT  # (S, R, B)
        self.shares = 1 / (1 + self.v @ self.u_sums)  # (S, K, B)
        shapes = (len(own), batch_size), (self.v.shape[1], batch_size), (batch_size, len(own), 1)
        self.buffers = [calls.view(own.new_empty(shape)) for shape in shapes]
        self.views = [list(map(calls.view, self.u)), *(list(calls.view(part)) for part in (self.reads, self.shares))]

    def up(self, step: int) -> Map:
        """Multiply by the shared table, and by R vectors of every query."""
        calls, (own, _, v, _), (moved, _, _) = self.calls, self.tables, self.buffers
        u, read, share = (part[step] for part in self.views)

        def write(x: Any, out: Any) -> None:
            calls.mix_each(x.T[:, None], u, out=read)
            calls.mix(v, read[:, 0].T, out=moved)
            calls.mix(own, x, out=out)
            calls.plus(out, moved, out=out)
            calls.times(out, share, out=out)

        return write

    def down(self, step: int, state: Tensor, wanted: Wanted) -> Map:
        """The same, transposed."""
        calls, (_, own, _, v), (scaled, few, column) = self.calls, self.tables, self.buffers
        u, _, share = (part[step] for part in self.views)

        def write(q: Any, out: Any) -> None:
            calls.times(q, share, out=scaled)
            calls.mix(v, scaled, out=few)
            calls.mix_each(u, few.T[:, :, None], out=column)
            calls.mix(own, scaled, out=out)
            calls.plus(out, column[:, :, 0].T, out=out)

        return write

    def gradients(self, steps: Steps, wanted: Wanted) -> list[tuple[Tensor, Tensor]]:
        """Return those of u, of v, and of the shared table."""
        found, first = [], self.weights[0]
        scaled = steps.scales * self.shares
        lost = scaled * steps.results  # by the row sums
        if wanted(first.own):
            found.append((first.own, _outer(scaled, steps.states).unsqueeze(0)))
        if wanted(first.v):
            grad = _outer(scaled, self.reads[:, :, 0].mT) - _outer(lost, self.u_sums)
            found.append((first.v, grad[None, None]))
        if any(wanted(one.u) for one in self.weights):
            left = torch.stack([steps.states, torch.ones_like(steps.states)], 3).transpose(1, 2).contiguous()
            right = torch.stack([self.v.t() @ scaled, -(self.v.t() @ lost)], 1).permute(0, 3, 1, 2).contiguous()
            grads = left.new_empty(*left.shape[:3], right.shape[3])  # (S, B, I, R)
            self.calls.mix_each(*map(self.calls.view, (left, right)), out=self.calls.view(grads))
            for one, grad in zip(self.weights, grads.split(1), strict=True):
                found.append((one.u, grad.sum_to_size(one.u.shape)))
        return found


Groups = Sequence[tuple[type[Maps], list[int]]]
"""Kinds of maps, and which steps share them."""


def grouped(weights: Sequence[JoinedWeights]) -> Groups | None:
    """Return the kinds of maps of T steps, and which steps share them; None where some are of another kind."""
    groups: dict[Hashable, tuple[type[Maps], list[int]]] = {}
    for step, one in enumerate(weights):
        shared: Sequence[Tensor]
        kind: type[Maps]
        if isinstance(one, JoinedTables):
            kind, shared = (Tables, [one.log]) if one.batch_size == 1 else (QueryTables, [])
        elif isinstance(one, JoinedGates):
            kind, shared = Gates, [one.tables]
        elif isinstance(one, JoinedLowRank) and one.v.shape[1] == 1:
            kind, shared = LowRank, [one.own, one.v]
        else:
            return None
        groups.setdefault((kind, *map(_identity, shared)), (kind, []))[1].append(step)
    return list(groups.values())


def _identity(tensor: Tensor) -> Hashable:
    """Return what is equal for tensors that are the same numbers, with the same history."""
    place = tensor.data_ptr(), tensor.shape, tensor.stride()
    return id(tensor) if tensor.requires_grad else place


def _as_columns(steps: Tensor) -> Tensor:
    """Return the vectors of all steps, (S, K, B), as columns, (K, S * B)."""
    return steps.transpose(0, 1).flatten(1)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Return the sum of all steps' and queries' outer products, of (S, K, B) and (S, I, B): (K, I)."""
    return _as_columns(left) @ _as_columns(right).t()
