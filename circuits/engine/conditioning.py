"""What one batch of queries may change about a circuit: weights of single nodes, factors on latents, and the class.

External weights (neural conditioning) replace a node's own weights, per query if they have a batch dimension. Latent
factors multiply the children of a sum node, and so are evidence on the latent variable that chooses among them. Both
belong to single nodes, not to the parameters that nodes may share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuits.engine.semirings import Semiring
from circuits.errors import ArgumentError
from circuits.families.base import log_normalized

if TYPE_CHECKING:
    from circuits.evidence import Evidence


@dataclass(frozen=True, eq=False)
class ExternalWeights:
    """Log-weights that n of the F nodes of one layer use in place of their own."""

    rows: Tensor
    """Which nodes of the layer, ascending, int64 (n,)."""
    slot: Tensor
    """Where a node of the layer is in ``rows``, int64 (F,); -1: it keeps its own weights."""
    log: Tensor
    """Log-weights that sum to 1, sums (n, B, K, I), inputs (n, B, C, K); B is 1 where all queries share them."""
    log_scale: Tensor | None
    """What each unit was divided by to be normalised, (n, B, K); None: nothing."""

    def of_sums(self, semiring: Semiring, x: Tensor, own: Tensor | None) -> Tensor:
        """Return the layer's mixtures, (F, K, B, *E), given its children, (F, I, B, *E), and those of own weights."""
        return self._placed(self._contract(semiring, self.log, x.index_select(0, self.rows)), own)

    def of_inputs(self, semiring: Semiring, evidence: Evidence, variables: Tensor, own: Tensor | None) -> Tensor:
        """Return the values of the layer's input units, (F, K, B, *E); ``variables`` are the layer's, (F,)."""
        num_given, num_categories = len(self.rows), self.log.shape[2]
        query = torch.arange(evidence.batch_size, device=self.rows.device).repeat(num_given)
        variable = variables[self.rows].repeat_interleave(evidence.batch_size)
        factors = evidence.pick(query, variable).dense(num_categories, self.log.dtype)[:, 0, :num_categories]
        x = semiring.lift(factors.unflatten(0, (num_given, -1)).transpose(1, 2))
        return self._placed(self._contract(semiring, self.log.transpose(2, 3), x), own)

    def replaced(self, log_weights: Tensor, node: Tensor, unit: Tensor, query: Tensor) -> Tensor:
        """Put the given log-weights over the own ones, (m, I), of m reached sum units, in place.

        Args:
            log_weights: the units' own.
            node: row of each unit's node in the layer, like the rest (m,).
            unit: which unit of the node.
            query: whose weights.
        """
        given, slot, owner = self._given(node, query)
        log_weights[given] = self.log[slot, owner, unit[given]]
        return log_weights

    def input_scores(
        self, scores: Tensor, evidence: Evidence, variables: Tensor, node: Tensor, unit: Tensor, query: Tensor
    ) -> Tensor:
        """Put ``log e(v) + log w(v)`` of the given weights over that of the own ones, (m, C), in place."""
        given, slot, owner = self._given(node, query)
        num_categories = scores.shape[1]
        factors = evidence.pick(query[given], variables[node[given]]).dense(num_categories, scores.dtype)
        scores[given] = self.log[slot, owner, :, unit[given]] + factors[:, 0, :num_categories]
        return scores

    def replaced_inputs(self, log_weights: Tensor, values: Tensor, node: Tensor, unit: Tensor, query: Tensor) -> Tensor:
        """Put the given log-weights of some values over the own ones, both (m, k), of m input units, in place."""
        given, slot, owner = self._given(node, query)
        log_weights[given] = self.log[slot.unsqueeze(1), owner.unsqueeze(1), values[given], unit[given].unsqueeze(1)]
        return log_weights

    def _given(self, node: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return which of m reached units have given weights, and where those are in ``log``."""
        slot = self.slot[node]
        given = (slot >= 0).nonzero().flatten()
        owner = query[given] if self.log.shape[1] > 1 else torch.zeros_like(given)
        return given, slot[given], owner

    def detached(self) -> ExternalWeights:
        """Return the same weights without their history."""
        return replace(
            self, log=self.log.detach(), log_scale=None if self.log_scale is None else self.log_scale.detach()
        )

    def _contract(self, semiring: Semiring, log_weights: Tensor, x: Tensor) -> Tensor:
        """Contract (n, B or 1, K, I) with (n, I, B, *E): (n, K, B, *E)."""
        num_given, batch_size = x.shape[0], x.shape[2]
        if log_weights.shape[1] == 1:
            out = semiring.contract(log_weights[:, 0], x)
        else:
            per_query = x.movedim(2, 1).flatten(0, 1).unsqueeze(2)  # (n * B, I, 1, *E)
            out = semiring.contract(log_weights.flatten(0, 1), per_query).squeeze(2)
            out = out.unflatten(0, (num_given, batch_size)).movedim(1, 2)
        if self.log_scale is None:
            return out
        return semiring.times(out, semiring.lift(self.log_scale.transpose(1, 2)))

    def _placed(self, given: Tensor, own: Tensor | None) -> Tensor:
        return given.contiguous() if own is None else own.index_copy(0, self.rows, given)

    @property
    def is_everywhere(self) -> bool:
        """Whether all nodes of the layer are given weights, so that its own need not be evaluated."""
        return len(self.rows) == len(self.slot)


def external_weights(
    given: Mapping[int, Tensor], num_nodes: int, dtype: torch.dtype, axis: int, *, normalize: bool
) -> ExternalWeights:
    """Join the log-weights given to nodes of one layer, by row, sums ([B,] K, I) or inputs ([B,] C, K).

    Raises:
        ArgumentError: batch sizes differ, a weight is NaN or +inf, or a unit has no weight.
    """
    tables = [given[row].to(dtype) for row in sorted(given)]
    tables = [table.unsqueeze(0) if table.dim() == 2 else table for table in tables]
    batch_size = max(len(table) for table in tables)
    if any(len(table) not in (1, batch_size) for table in tables):
        raise ArgumentError(
            f"external: expected one batch size, got {sorted({len(table) for table in tables})} along dimension 0"
        )
    log = torch.stack([table.expand(batch_size, -1, -1) for table in tables])
    greatest = log.detach().amax(axis)
    if not bool((greatest < torch.inf).all()):  # NaN is handed on by amax
        raise ArgumentError("external: expected log-weights below +inf (-inf rules a child out), got NaN or +inf")
    has_weight = greatest > -torch.inf
    if normalize and not bool(has_weight.all()):
        raise ArgumentError("external: expected at least one log-weight above -inf per unit, got a unit without any")
    log_scale = None
    if not normalize:  # where a unit has no weight at all its scale is 1, and all its children stay impossible
        is_empty = ~has_weight.unsqueeze(axis)
        log_scale = torch.logsumexp(log.masked_fill(is_empty, 0.0), axis).masked_fill(~has_weight, 0.0)
        log = log - log_scale.unsqueeze(axis)
    else:
        log = log_normalized(log, axis)
    rows = torch.tensor(sorted(given), device=log.device)
    slot = torch.full((num_nodes,), -1, device=log.device)
    slot[rows] = torch.arange(len(rows), device=log.device)
    return ExternalWeights(rows, slot, log, log_scale)


@dataclass(frozen=True, eq=False)
class LatentFactors:
    """Log-factors on the children of n of the F sum nodes of one layer."""

    rows: Tensor
    """Which nodes of the layer, int64 (n,)."""
    log: Tensor
    """Log-factors, (n, I, B)."""

    def applied(self, semiring: Semiring, x: Tensor) -> Tensor:
        """Multiply the layer's children, (F, I, B, *E), by the factors."""
        factors = semiring.lift(self.log)
        if len(self.rows) == len(x):
            order = self.rows.argsort()
            return semiring.times(x, factors.index_select(0, order))
        return x.index_copy(0, self.rows, semiring.times(x.index_select(0, self.rows), factors))

    def added(self, log_weights: Tensor, node: Tensor, query: Tensor) -> Tensor:
        """Add the factors to the log-weights, (m, I), of m reached sum units, in place; node, query: (m,)."""
        matches = node.unsqueeze(1) == self.rows  # (m, n)
        given, slot = matches.nonzero(as_tuple=True)
        log_weights[given] += self.log[slot, :, query[given]]
        return log_weights


@dataclass(frozen=True, eq=False)
class Conditions:
    """The part of the evidence that is not on variables."""

    latents: Mapping[int, LatentFactors] = field(default_factory=dict)
    """By layer."""
    class_factors: Tensor | None = None
    """Log-factors on the root's units, (R, B); None: the circuit has no classes, or they are kept apart."""
    silent: Mapping[int, Tensor] = field(default_factory=dict)
    """By sum layer, which nodes are the constant 1, bool (F, 1, B); see :func:`~circuits.engine.passes.silent_sums`."""


class LayerValues(list[Any]):
    """Values of the layers in order, (F, K, B, *E) each, or None; with the conditions that they were computed under."""

    def __init__(self, values: Any, conditions: Conditions) -> None:
        super().__init__(values)
        self.conditions = conditions


def conditions_of(values: Any) -> Conditions:
    """Return the conditions that come with layer values; none with a plain list."""
    return values.conditions if isinstance(values, LayerValues) else Conditions()
