"""Chains, as HMMs are: many sum layers evaluated as one recurrence.

Sum t mixes the product of leaves e_t and sum t + 1, by weights that all share, as in a homogeneous HMM, or by its own.
Layer by layer that is a few dozen calls a step. Here the states are kept in linear space, over scales (Rabiner 1989,
section V.A), so that a step is a product and a GEMM. Where sums are too small for linear space the chain is evaluated
layer by layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from circuits.algebra.logspace import column_peak
from circuits.algebra.semirings import ChoosingSemiring, LogSemiring, MaxSemiring
from circuits.chains.calls import Map
from circuits.chains.given import mixed
from circuits.chains.recurrence import EVERY, Scan, best_path, calls_for, fall, rise_of_maxima, scan, without
from circuits.randomness import RowGenerators, Source
from circuits.weights.forms import JoinedTables, JoinedWeights
from circuits.weights.given import GivenSums
from circuits.weights.latents import LatentFactors

_MAX_SCORES = 1 << 24

Values = Mapping[int, Tensor] | Sequence[Tensor]
"""Values (F, K, B) of layers, by layer."""


class Children(Protocol):
    """What finds one child of every step among the values of the layers below."""

    def __call__(self, values: Values, /) -> Tensor:
        """Return the children's values, (T, K, B)."""

    def adjoint(self, grad: Tensor, gradients: Any, /) -> None:
        """Send their gradient back to where they came from."""

    def reach(self, units: Values, columns: Tensor, chosen: Tensor, /) -> None:
        """Enter which of their units are chosen in some columns, (T, n)."""

    def move(self, function: Callable[[Tensor], Tensor], /) -> None:
        """Apply what ``nn.Module.to`` applies to the tensors of a module."""


class Tables(Protocol):
    """The weights of a bank, (P, K, K)."""

    @property
    def log(self) -> Tensor:
        """Their logarithms."""

    @property
    def linear(self) -> Tensor:
        """Themselves."""


class LayerUnits(dict[int, Tensor]):
    """Which unit of every node was reached, int64 (F, n), by layer; -1 where none was.

    Those of a layer are made when it is asked for: layers inside of long chains are not.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], like: Tensor) -> None:
        self._sizes = sizes
        self._like = like

    def __missing__(self, layer: int) -> Tensor:
        """Make those of a layer."""
        return self.setdefault(layer, self._like.new_full((self._sizes[layer][0], len(self._like)), -1))


@dataclass(frozen=True, eq=False)
class Chain:
    """T sums, one in each of their layers, and the products between them."""

    positions: Sequence[int]
    """The layers of the sums, the first sum's first."""
    inside: Sequence[int]
    """The layers that nothing but the chain reads, in the order in which they are evaluated."""
    leaves: Sequence[Children]
    """What gathers the leaves of all steps, (T, K, B), or of all but the last, by their position in the products."""
    last: Sequence[Children]
    """What gathers the child of the last sum, (1, K, B), unless it is among the leaves."""
    bank: str
    rows: Sequence[int]
    """Where the weights are."""

    @functools.cached_property
    def is_tied(self) -> bool:
        """Whether all sums share their weights."""
        return len(set(self.rows)) == 1

    def scan(
        self,
        values: Values,
        weights: Tables,
        given: Mapping[int, GivenSums],
        latents: Mapping[int, LatentFactors],
        silent: Mapping[int, Tensor],
        *,
        keep: bool = True,
    ) -> Scan | None:
        """Evaluate all steps; None where sums are too small for linear space, or given weights are of another kind.

        Args:
            values: of the layers below.
            weights: of the bank.
            given: weights of sums in place of those of the bank, by layer.
            latents: factors on the children of sums, by layer.
            silent: which sums are the constant 1, bool (1, 1, B), by layer; below a silent one all are.
            keep: whether all steps are wanted, for :meth:`adjoint` and :meth:`climb`.
        """
        leaves = self._factors(values, latents)
        if not given:
            return scan(self._mixing(weights.linear, leaves), leaves, self._silent(silent), keep=keep)
        every = self._weights(weights, given)
        scales = _scales(every)
        leaves = _added(leaves, {step - 1: scale for step, scale in scales.items() if step})
        found = mixed(every, leaves, self._silent(silent), keep=keep)
        return found and found._replace(first=found.first + scales.get(0, 0.0))

    def climb(
        self,
        semiring: ChoosingSemiring,
        values: Values,
        weights: Tables,
        given: Mapping[int, GivenSums],
        latents: Mapping[int, LatentFactors],
        silent: Mapping[int, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return the first sum, (1, K, B), and what all sums mix, (T, K, B), up to a constant per step and column.

        Arguments are those of :meth:`scan`.
        """
        found = self.scan(values, weights, given, latents, silent) if isinstance(semiring, LogSemiring) else None
        if found is not None and found.rise is not None:
            return found.first, found.rise.states.log()
        states = self._factors(values, latents)
        if isinstance(semiring, MaxSemiring) and self._is_plain(given):
            peak, log_weights = column_peak(states), weights.log[self.rows[0]]
            for often in (EVERY[states.dtype], 0):
                best = rise_of_maxima(log_weights, without(peak, states), self._silent(silent), every=often)
                if not bool(best.results[0].isnan().any()):
                    break
            return best.results[:1] + peak.add_(best.scales).sum(0, keepdim=True), best.states
        every = self._weights(weights, given)
        scales = _scales(every)
        states = _added(states, {step - 1: scale for step, scale in scales.items() if step}).clone()
        for step in reversed(range(len(states))):
            sums = every[step].unscaled().contract(semiring, states[step : step + 1])
            if silent:
                sums = sums.masked_fill(silent[self.positions[step]], 0.0)
            if step:
                states[step - 1] += sums[0]
        return sums + scales.get(0, 0.0), states

    def choose(
        self,
        semiring: ChoosingSemiring,
        weights: Tables,
        given: Mapping[int, GivenSums],
        states: Tensor,  # shape: (T, K, B)
        units: Values,
        column: Tensor,  # shape: (n,)
        query: Tensor,  # shape: (n,)
        source_of: Callable[[int], Source],
    ) -> Tensor:
        """Choose what every sum mixes in the columns where the first is reached; enter the leaves' units.

        Returns:
            What the sums mix, int64 (T, columns of ``units``); -1 where the chain is not reached.
        """
        reached = units[self.positions[0]][0]
        chosen = reached.new_full((len(states), len(reached)), -1)
        if isinstance(semiring, MaxSemiring) and states.device.type == "cpu" and self._is_plain(given):
            is_whole = len(column) == len(reached) == states.shape[2]  # then both are in order
            path = best_path(weights.log[self.rows[0]], states if is_whole else states[:, :, query], reached[column])
            chosen = path if is_whole else chosen.index_copy_(1, column, path)
        else:
            size, by_column = max(1, _MAX_SCORES // states.shape[1]), states.mT.contiguous()
            for number, (at, of) in enumerate(zip(column.split(size), query.split(size), strict=True)):
                part = slice(number * size, number * size + len(at))
                state = reached[at]
                for step, (position, row) in enumerate(zip(self.positions, self.rows, strict=True)):
                    source, joined = source_of(position), given[position].parts[0][1] if position in given else None
                    scores = weights.log[row][state] if joined is None else joined.rows(state * 0, of, state)
                    scores += by_column[step][of]
                    state = semiring.choose(scores, source.rows(part) if isinstance(source, RowGenerators) else source)
                    chosen[step, at] = state
        for gather, at in self._gathers():
            gather.reach(units, column, chosen[at][:, column])
        return chosen

    def silent_sums(
        self, silent: Values, unless_heard: Callable[[int, Tensor], Tensor], touched: Collection[int]
    ) -> dict[int, Tensor]:
        """Return which sums are the constant 1, bool (1, 1, B), by layer; below a silent one all are.

        Args:
            silent: of which nodes of the layers below nothing is known, bool (F, 1, B).
            unless_heard: takes those nodes of a layer out that are not silent for another reason.
            touched: the layers for which it does something.
        """
        found = self._gathered(silent, torch.logical_and)
        found = found.clone() if touched else found
        for step, position in enumerate(self.positions if touched else ()):
            if position in touched:
                found[step] = unless_heard(position, found[step : step + 1])[0]
        found = found.flip(0).cumprod(0).flip(0).bool()
        return dict(zip(self.positions, found.split(1), strict=True))

    def adjoint(
        self, grad: Tensor, found: Scan, weights: Tables, silent: Mapping[int, Tensor], flows: Tensor | None
    ) -> Tensor:
        """Return the gradient of all steps' ``e_t + log y_t+1``, (T, K, B), and add that of the weights to ``flows``.

        Args:
            grad: of the first sum's logarithm, (K, B).
            found: of :meth:`scan`.
            weights: of the bank.
            silent: of :meth:`scan`.
            flows: the gradient of the linear weights of the bank, (P, K, K); None: not wanted.
        """
        assert found.rise is not None
        states = found.rise.states

        def flow(at: slice, scales: Tensor) -> None:
            if flows is not None and self.is_tied:
                left, right = (part.transpose(0, 1).flatten(1) for part in (scales, states[at]))
                flows[self.rows[0]].addmm_(left, right.t())
            elif flows is not None:
                for row, scale, state in zip(self.rows[at], scales, states[at], strict=True):
                    flows[row].addmm_(scale, state.t())

        return fall(self._mixing(weights.linear.mT, states), found.rise, grad, self._silent(silent), flow)

    def _is_plain(self, given: Mapping[int, GivenSums]) -> bool:
        """Whether all sums share weights of the bank."""
        return self.is_tied and given.keys().isdisjoint(self.positions)

    def _weights(self, weights: Tables, given: Mapping[int, GivenSums]) -> list[JoinedWeights]:
        """Return the weights of every sum."""
        own = {row: JoinedTables(weights.log[row : row + 1].unsqueeze(1), None) for row in self.rows}
        places = zip(self.positions, self.rows, strict=True)
        return [given[at].parts[0][1] if at in given else own[row] for at, row in places]

    def _mixing(self, tables: Tensor, states: Tensor) -> Tensor | list[Map]:
        """Return the one table of tables (P, K, K), or what multiplies states (T, K, B) by that of every step."""
        if self.is_tied:
            return tables[self.rows[0]]
        calls = calls_for(states)
        return [functools.partial(calls.mix, calls.view(tables[row])) for row in self.rows]

    def _gathered(self, values: Values, times: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        every = functools.reduce(times, [gather(values) for gather in self.leaves])
        return torch.cat([every, *(gather(values) for gather in self.last)]) if self.last else every

    def _gathers(self) -> Iterator[tuple[Children, slice]]:
        """Return what gathers leaves, and of which steps."""
        end = len(self.positions) - len(self.last)
        yield from ((gather, slice(end)) for gather in self.leaves)
        yield from ((gather, slice(end, None)) for gather in self.last)

    def _factors(self, values: Values, latents: Mapping[int, LatentFactors]) -> Tensor:
        """Return the products of every step's leaves, (T, K, B), with the factors on what the sums mix."""
        leaves = self._gathered(values, torch.add)
        known = {self._steps[at]: factors.log for at, factors in latents.items() if at in self._steps}
        return _added(leaves, known)

    @functools.cached_property
    def _steps(self) -> dict[int, int]:
        """The steps by their sums' layers."""
        return {position: step for step, position in enumerate(self.positions)}

    def _silent(self, silent: Mapping[int, Tensor]) -> Tensor | None:
        return torch.cat([silent[position] for position in self.positions]) if silent else None

    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply what ``nn.Module.to`` applies to the tensors of a module."""
        for part in (*self.leaves, *self.last):
            part.move(function)

    def send(self, grads: Tensor, gradients: Any) -> None:
        """Send the gradient of the steps' states, (T, K, B), to the leaves."""
        for gather, at in self._gathers():
            gather.adjoint(grads[at], gradients)


def _scales(weights: Sequence[JoinedWeights]) -> dict[int, Tensor]:
    """Return by step what weights are divided by, (1, K or 1, B or 1), of those that are."""
    return {step: one.log_scale.mT for step, one in enumerate(weights) if one.log_scale is not None}


def _added(leaves: Tensor, factors: Mapping[int, Tensor]) -> Tensor:
    """Add log-factors of some steps, (1, K or 1, B), to a copy of all leaves, (T, K, B), at once."""
    if not factors:
        return leaves
    steps = torch.tensor(list(factors), device=leaves.device)
    return leaves.index_add(0, steps, torch.cat([factor.expand_as(leaves[:1]) for factor in factors.values()]))
