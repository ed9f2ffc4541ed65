"""Weights that single nodes of a layer are given at run time, in place of their own (neural conditioning)."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from circuits.algebra.semirings import Semiring
from circuits.errors import ArgumentError
from circuits.evidence import Evidence
from circuits.families import Finite
from circuits.symbolic import Input, Node, ParametricNode
from circuits.weights.forms import Dense, Form, JoinedTables, JoinedWeights, Own, joined_tables


class Reached(NamedTuple):
    """m units of a layer that a choice has reached, int64 (m,) each."""

    node: Tensor
    """Which node of the layer."""
    unit: Tensor
    """Which unit of the node."""
    query: Tensor
    """For which query."""


class ExternalWeights(ABC):
    """Weights that some of the F nodes of one layer use in place of their own."""

    rows: Tensor
    """Which nodes of the layer, ascending, int64 (n,)."""
    num_nodes: int
    """F."""

    @property
    @abstractmethod
    def joined(self) -> Sequence[JoinedWeights]:
        """The weights, as they are evaluated together."""

    @abstractmethod
    def detached(self) -> ExternalWeights:
        """Return the same weights without their history."""

    @abstractmethod
    def of_queries(self, index: Tensor) -> ExternalWeights:
        """Return the weights of some queries, int64 (m,)."""

    @functools.cached_property
    def batch_size(self) -> int:
        """B; 1 where all queries share the weights."""
        return max(weights.batch_size for weights in self.joined)

    @property
    def tensors(self) -> list[Tensor]:
        """All that the weights are made of."""
        return [t for weights in self.joined for t in weights.tensors]

    @property
    def is_everywhere(self) -> bool:
        """Whether all nodes of the layer are given weights, so that its own need not be evaluated."""
        return len(self.rows) == self.num_nodes


@dataclass(frozen=True, eq=False)
class GivenSums(ExternalWeights):
    """Weights of nodes of a sum layer, in one form or several."""

    parts: tuple[tuple[Sequence[int], JoinedWeights], ...]
    """Nodes of the layer, and the weights of these."""
    num_nodes: int

    @property
    def joined(self) -> Sequence[JoinedWeights]:
        """The weights of every part."""
        return [weights for _, weights in self.parts]

    @property
    def rows(self) -> Tensor:  # type: ignore[override]
        """Which nodes of the layer, ascending, int64 (n,)."""
        return self._index(sorted(row for rows, _ in self.parts for row in rows))

    @property
    def scaled_rows(self) -> Tensor:
        """Which nodes have weights that need not sum to 1, int64."""
        return self._index([row for rows, weights in self.parts if weights.log_scale is not None for row in rows])

    @property
    def is_everywhere(self) -> bool:
        """Whether all nodes of the layer are given weights, so that its own need not be evaluated."""
        return sum(len(rows) for rows, _ in self.parts) == self.num_nodes

    def contract(self, semiring: Semiring, x: Tensor, own: Tensor | None) -> Tensor:
        """Return the layer's mixtures, (F, K, B, *E), given its children, (F, I, B, *E), and those of own weights."""
        if len(self.parts) == 1 and self.is_everywhere:
            return self.parts[0][1].contract(semiring, x).contiguous()
        given = [weights.contract(semiring, x.index_select(0, self._index(rows))) for rows, weights in self.parts]
        rows = self._index([row for rows, _ in self.parts for row in rows])
        if own is None:
            return torch.cat(given).index_select(0, rows.argsort())
        return own.index_copy(0, rows, torch.cat(given))

    def replaced(self, log_weights: Tensor, reached: Reached) -> Tensor:
        """Put the given log-weights over the own ones, (m, I), of m reached sum units, in place."""
        node, unit, query = reached
        for rows, weights in self.parts:
            slot = _slots(self._index(rows), self.num_nodes)[node]
            given = (slot >= 0).nonzero().flatten()
            if len(given):
                log_weights[given] = weights.rows(slot[given], query[given], unit[given])
        return log_weights

    def detached(self) -> GivenSums:
        """Return the same weights without their history."""
        return replace(self, parts=tuple((rows, weights.detached()) for rows, weights in self.parts))

    def of_queries(self, index: Tensor) -> GivenSums:
        """Return the weights of some queries, int64 (m,)."""
        return replace(self, parts=tuple((rows, weights.of_queries(index)) for rows, weights in self.parts))

    def _index(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self.parts[0][1].tensors[0].device)


@dataclass(frozen=True, eq=False)
class GivenInputs(ExternalWeights):
    """Tables of nodes of an input layer of a finite family."""

    rows: Tensor
    slot: Tensor
    """Where a node of the layer is in ``rows``, int64 (F,); -1: it keeps its own weights."""
    tables: JoinedTables
    """(n, B or 1, C, K)."""

    @property
    def joined(self) -> Sequence[JoinedWeights]:
        """The tables."""
        return [self.tables]

    @property
    def num_nodes(self) -> int:  # type: ignore[override]
        """F."""
        return len(self.slot)

    @property
    def scaled_rows(self) -> Tensor:
        """Which nodes have weights that need not sum to 1, int64."""
        return self.rows if self.tables.log_scale is not None else self.rows[:0]

    def values(self, semiring: Semiring, evidence: Evidence, variables: Tensor, own: Tensor | None) -> Tensor:
        """Return the values of the layer's input units, (F, K, B, *E); ``variables`` are the layer's, (F,)."""
        num_given, num_categories = len(self.rows), self.tables.log.shape[2]
        query = torch.arange(evidence.batch_size, device=self.rows.device).repeat(num_given)
        variable = variables[self.rows].repeat_interleave(evidence.batch_size)
        factors = evidence.pick(query, variable).dense(num_categories, self.tables.log.dtype)[:, 0, :num_categories]
        x = semiring.lift(factors.unflatten(0, (num_given, -1)).transpose(1, 2))
        given = self.tables.contract_inputs(semiring, x)
        return given.contiguous() if own is None else own.index_copy(0, self.rows, given)

    def scores(self, scores: Tensor, evidence: Evidence, variables: Tensor, reached: Reached) -> Tensor:
        """Put ``log e(v) + log w(v)`` of the given weights over that of the own ones, (m, C), in place."""
        node, unit, query = reached
        given, slot, owner = self._given(node, query)
        num_categories = scores.shape[1]
        factors = evidence.pick(query[given], variables[node[given]]).dense(num_categories, scores.dtype)
        scores[given] = self.tables.log[slot, owner, :, unit[given]] + factors[:, 0, :num_categories]
        return scores

    def replaced(self, log_weights: Tensor, values: Tensor, reached: Reached) -> Tensor:
        """Put the given log-weights of some values over the own ones, both (m, k), of m input units, in place."""
        given, slot, owner = self._given(reached.node, reached.query)
        at = slot.unsqueeze(1), owner.unsqueeze(1), values[given], reached.unit[given].unsqueeze(1)
        log_weights[given] = self.tables.log[at]
        return log_weights

    def detached(self) -> GivenInputs:
        """Return the same weights without their history."""
        return replace(self, tables=self.tables.detached())

    def of_queries(self, index: Tensor) -> GivenInputs:
        """Return the weights of some queries, int64 (m,)."""
        return replace(self, tables=self.tables.of_queries(index))

    def _given(self, node: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return which of m reached units have given weights, and where those are in the tables."""
        slot = self.slot[node]
        given = (slot >= 0).nonzero().flatten()
        return given, slot[given], self.tables.owner(query[given])


def checked_form(given: Tensor | Form, node: Node) -> Form:
    """Return the weights of a node as a form.

    Raises:
        ArgumentError: they do not fit the node, or it has no weights.
    """
    if not isinstance(node, ParametricNode):
        raise ArgumentError(f"external: expected sum or input nodes, which have weights, got {node}")
    form = given if isinstance(given, Form) else Dense(given)
    rows, columns = node.parameter_shape
    if isinstance(node, Input):
        if not isinstance(node.distribution, Finite) or not isinstance(form, Dense):
            raise ArgumentError(
                "external: inputs take weights at run time as tables, if they have finitely many values, got "
                f"{type(form).__name__} for {node}"
            )
        rows = node.distribution.num_values
    form.check(node, (rows, columns))
    return form


def joined_by_layer(
    forms: Mapping[int, Mapping[int, Form]], own: Mapping[int, Own], num_input_layers: int, *, normalize: bool
) -> dict[int, ExternalWeights]:
    """Join the weights that nodes are given, by layer.

    Args:
        forms: the weights by layer and row.
        own: those of all nodes of these layers.
        num_input_layers: how many layers, the first ones, are of inputs.
        normalize: whether weights are made to sum to 1.

    Raises:
        ArgumentError: batch sizes differ, a weight is NaN or +inf, or, with ``normalize``, a unit has no weight.
    """
    batch_sizes = (form.batch_size for of_layer in forms.values() for form in of_layer.values())
    sizes = {size for size in batch_sizes if size is not None and size != 1}
    if len(sizes) > 1:
        raise ArgumentError(f"external: expected one batch size, got {sorted(sizes)} along dimension 0")
    parts: dict[int, list[tuple[Sequence[int], JoinedWeights]]] = defaultdict(list)
    groups: dict[Hashable, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for layer, of_layer in forms.items():
        for row, form in sorted(of_layer.items()) if layer >= num_input_layers else ():
            key = (own[layer].bank, form.batch_size) if form.across_layers else layer
            groups[form.group(), key][layer].append(row)
    shared: dict[Hashable, Any] = {}
    for group in groups.values():
        of_group = [forms[layer][row] for layer, rows in group.items() for row in rows]
        owned = [own[layer].of(rows) for layer, rows in group.items()]
        joint = Own(owned[0].bank, owned[0].log, tuple(row for one in owned for row in one.rows))
        joined = of_group[0].joined(of_group, joint, normalize=normalize, shared=shared)
        for layer, part in zip(group, joined.split([len(rows) for rows in group.values()]), strict=True):
            parts[layer].append((group[layer], part))
    return {
        layer: GivenSums(tuple(parts[layer]), len(own[layer].rows))
        if layer in parts
        else _given_inputs(of_layer, own[layer], normalize)
        for layer, of_layer in forms.items()
    }


def _given_inputs(forms: Mapping[int, Any], own: Own, normalize: bool) -> GivenInputs:
    rows = sorted(forms)
    index = torch.tensor(rows, device=own.log.device)
    tables = [forms[row].log_weights.to(own.log) for row in rows]
    return GivenInputs(index, _slots(index, len(own.rows)), joined_tables(tables, -2, normalize=normalize))


def _slots(rows: Tensor, num_nodes: int) -> Tensor:
    """Return where nodes are among some rows, int64 (num_nodes,); -1 where they are not."""
    slots = torch.full((num_nodes,), -1, device=rows.device)
    slots[rows] = torch.arange(len(rows), device=rows.device)
    return slots
