"""The inner layers of a compiled circuit: products and sums, and where they find their children and their weights.

A layer evaluates F nodes of equal shape at once. Its output has shape (F, K, B, *E): F folded nodes, K units each, a
batch of B, and the semiring's own trailing dimensions E. The batch comes last so that every sum layer is a GEMM of its
weights with a contiguous (I, B) block, and reductions over units run across contiguous memory.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuits.algebra import logspace
from circuits.algebra.semirings import ChoosingSemiring, LogSemiring, Semiring
from circuits.chains import VectorSemiring, joined
from circuits.engine.gathering import Address, Gather, LayerValues, ParameterRows, Part, UnitGather
from circuits.engine.weights import Weights
from circuits.randomness import RowGenerators, Source
from circuits.symbolic import Node, ProductMode
from circuits.weights.given import GivenSums, Reached
from circuits.weights.latents import LatentFactors

if TYPE_CHECKING:
    from circuits.engine.adjoint import Flows, Gradients

_MAX_SLOTS = 4
_MAX_SCORES = 1 << 24
_LOG = LogSemiring()


class _InnerLayer(Part):
    """F nodes with equally many children, whose units are ``child_units``."""

    slots: list[Gather]
    """What gathers the children, by their position among a node's children."""

    def __init__(self, children: Sequence[Sequence[Address]], child_units: Sequence[int]) -> None:
        self.num_nodes = len(children)
        self.child_units = list(child_units)
        self.addresses = torch.tensor(children)
        """(layer, position) of every child of every node, int64 (F, children, 2)."""
        self._child_layers = [list({addresses[slot][0] for addresses in children}) for slot in range(len(child_units))]
        """Per child, the layers that nodes have it in."""

    def all_of(self, values: LayerValues) -> Tensor:
        """Return of which nodes all children are True, (F, 1, B), from bool (F', 1, B) of the layers below."""
        children = functools.reduce(torch.logical_and, [slot(values) for slot in self.slots]).all(1, keepdim=True)
        if len(children) > self.num_nodes:  # all children of a node in one slot
            return children.unflatten(0, (self.num_nodes, -1)).all(1)
        return children.repeat_interleave(self.num_nodes // len(children), 0)  # siblings share theirs

    def reach(
        self, reached: LayerValues, node: Tensor, column: Tensor, choices: Iterable[tuple[int | Tensor, Tensor]]
    ) -> None:
        """Record in ``reached``, in n columns, which units n nodes chose, (n,), of the same child or of one each."""
        for slot, unit in choices:
            layers, nodes = self.addresses[node, slot].unbind(-1)
            among = self._child_layers[slot] if isinstance(slot, int) else list({*itertools.chain(*self._child_layers)})
            for layer in among:
                here = slice(None) if len(among) == 1 else layers == layer
                reached[layer][nodes[here], column[here]] = unit[here]


class ProductLayer(_InnerLayer):
    """Product units of F nodes with equally many children."""

    def __init__(
        self,
        children: Sequence[Sequence[Address]],
        child_units: Sequence[int],
        mode: ProductMode,
        nodes: Sequence[Node],
    ) -> None:
        super().__init__(children, child_units)
        self.mode, self.nodes = mode, nodes
        self.num_children = len(child_units)
        self.is_stacked = mode == "elementwise" and self.num_children > _MAX_SLOTS
        slots = [tuple(itertools.chain(*children))] if self.is_stacked else zip(*children, strict=True)
        self.slots = [Gather(slot) for slot in slots]

    def __call__(self, semiring: Semiring, values: LayerValues) -> Tensor:
        """Return the products of the children's units, shape (F, K, B, *E)."""
        if isinstance(semiring, VectorSemiring):
            return semiring.multiply(self.nodes, self.factors(values))
        if self.is_stacked:
            return semiring.product(self.slots[0](values).unflatten(0, (-1, self.num_children)))
        out = self.slots[0](values)
        for slot in self.slots[1:]:  # a loop frees each factor at once, which a fold keeps for one turn more
            if self.mode == "outer":
                out = semiring.times(out.unsqueeze(2), slot(values).unsqueeze(1)).flatten(1, 2)
            else:
                out = semiring.times(out, slot(values))
        return out

    def adjoint(self, grad: Tensor, gradients: Gradients) -> None:
        """Send the gradient of the output, (F, K, B), to the children (log semiring)."""
        if self.is_stacked:
            self.slots[0].adjoint(grad.unsqueeze(1).expand(-1, self.num_children, -1, -1).flatten(0, 1), gradients)
            return
        for position, slot in enumerate(self.slots):
            part = grad
            if self.mode == "outer" and self.num_children > 1:
                others = [1 + i for i in range(self.num_children) if i != position]
                part = grad.unflatten(1, self.child_units).sum(others)
            slot.adjoint(part, gradients)

    def factors(self, values: LayerValues) -> list[Tensor]:
        """Return the values of all nodes' first children, of their second ones, and so on, (F, K, B, *E) each."""
        if self.is_stacked:
            return list(self.slots[0](values).unflatten(0, (-1, self.num_children)).unbind(1))
        return [slot(values) for slot in self.slots]

    def child_choices(self, unit: Tensor) -> list[Tensor]:
        """Return which unit of each child a product unit multiplies: (n,) to one (n,) per child."""
        if self.mode == "elementwise":
            return [unit] * self.num_children
        return list(torch.unravel_index(unit, self.child_units))


class SumLayer(_InnerLayer):
    """Dense sum units of F nodes whose children have equally many units.

    *Siblings* are nodes with the same children, S of them in a row of the layer. Their children are gathered and
    exponentiated once, and their weights are multiplied as one matrix of S * K rows: the layer works on F / S *stacks*.
    """

    def __init__(
        self,
        children: Sequence[Sequence[Address]],
        child_units: Sequence[int],
        parameters: ParameterRows,
        num_siblings: int,
        units: Sequence[int],
    ) -> None:
        super().__init__(children, child_units)
        self.parameter_rows = parameters
        self.num_siblings = num_siblings
        stacks = children[::num_siblings]
        if units:
            self.slots: list[Gather] = [UnitGather(stacks, units[::num_siblings], child_units[0])]
        else:
            self.slots = [Gather(slot) for slot in zip(*stacks, strict=True)]
        self.units = torch.tensor(units) if units else None
        """Which unit of each child nodes mix, (F,); None: all."""
        edges = [(slot, unit) for slot, count in enumerate(child_units) for unit in range(1 if units else count)]
        self._edges = torch.tensor(edges)

    def gather(self, values: LayerValues, semiring: Semiring = _LOG, latents: LatentFactors | None = None) -> Tensor:
        """Return the children's units side by side, times the factors of latent evidence, shape (F, I, B, *E)."""
        x = self._gather_stacks(values)
        if self.num_siblings > 1:
            x = x.repeat_interleave(self.num_siblings, 0)
        return x if latents is None else latents.applied(semiring, x)

    def __call__(
        self,
        semiring: Semiring,
        values: LayerValues,
        weights: Weights,
        given: GivenSums | None = None,
        latents: LatentFactors | None = None,
    ) -> Tensor:
        """Return the mixtures, (F, K, B, *E); ``given`` weights are those of some nodes, ``latents`` the evidence."""
        is_plain = given is None and latents is None
        x = self._gather_stacks(values) if is_plain else self.gather(values, semiring, latents)
        if given is not None and given.is_everywhere:
            return given.contract(semiring, x, None)
        log_weights, linear = self._select(weights.log, len(x)), self._select(weights.linear, len(x))
        own = self._unstack(semiring.contract(log_weights, x, weights=linear))
        return own if given is None else given.contract(semiring, x, own)

    def forward_recorded(
        self, values: LayerValues, weights: Weights, latents: LatentFactors | None
    ) -> tuple[Tensor, logspace.Contraction | None]:
        """Return the mixtures in the log semiring and what :meth:`adjoint` needs."""
        x = self._gather_stacks(values) if latents is None else self.gather(values, _LOG, latents)
        log_weights, linear = self._select(weights.log, len(x)), self._select(weights.linear, len(x))
        out, saved = logspace.contract(log_weights, linear, x, record=True)
        return self._unstack(out), saved

    def adjoint(
        self, grad: Tensor, saved: logspace.Contraction, weights: Weights, gradients: Gradients, flows: Flows | None
    ) -> Tensor:
        """Send the gradient of the output, (F, K, B), to the children and, unless None, to the weights' ``flows``.

        Returns:
            The gradient of what was gathered: (F, I, B) under latent evidence, else (F / S, I, B).
        """
        num_stacks = len(saved.scaled)
        grad = grad.reshape(num_stacks, grad.shape[0] * grad.shape[1] // num_stacks, grad.shape[-1])  # B may be 0
        grad_x, scale = logspace.contract_adjoint(grad, self._select(weights.linear, num_stacks), saved)
        if flows is not None:
            self.parameter_rows.add_outer(flows.linear, scale, saved.scaled)
            if saved.repaired:
                extra = torch.zeros(*scale.shape[:2], saved.scaled.shape[1], dtype=scale.dtype, device=scale.device)
                logspace.repaired_weight_flows(grad, saved, extra)
                flows.extra = torch.zeros_like(flows.linear) if flows.extra is None else flows.extra
                self.parameter_rows.add(flows.extra, self._unstack(extra))
        per_stack = grad_x
        if num_stacks * self.num_siblings != self.num_nodes:  # siblings were not stacked
            per_stack = grad_x.unflatten(0, (-1, self.num_siblings)).sum(1)
        parts = [per_stack] if len(self.slots) == 1 else per_stack.split(self.child_units, 1)
        for slot, part in zip(self.slots, parts, strict=True):
            slot.adjoint(part, gradients)
        return grad_x

    def choose(
        self,
        semiring: ChoosingSemiring,
        children: Tensor,
        weights: Weights,
        given: GivenSums | None,
        reached: Reached,
        entry: Tensor | None,
        generator: Source,
    ) -> Tensor:
        """Choose for n reached sum units, at an entry (n,), one of all children's units, by number: (n,)."""
        nodes, units, queries = reached
        chosen = torch.empty_like(units)
        for part in chunks(len(nodes), children.shape[1]):
            node, unit, query = nodes[part], units[part], queries[part]
            scores = weights.log[self.parameter_rows.index[node], unit]
            if given is not None:
                scores = given.replaced(scores, Reached(node, unit, query))
            source = generator.rows(part) if isinstance(generator, RowGenerators) else generator
            mixed = children[node, :, query] if entry is None else children[node, :, query, entry[part]]
            chosen[part] = semiring.choose(scores.add_(mixed), source)
        return chosen

    def child_choices(self, node: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return which child of n nodes is chosen, and which unit of it, by its number among what they mix."""
        slot, unit = self._edges[chosen].unbind(-1)
        return slot, unit if self.units is None else self.units[node]

    def _gather_stacks(self, values: LayerValues) -> Tensor:
        """Return the children's units side by side, once for all siblings, shape (F / S, I, B, *E)."""
        parts = [slot(values) for slot in self.slots]
        return parts[0] if len(parts) == 1 else joined(parts, 1)

    def _select(self, bank: Tensor, num_stacks: int) -> Tensor:
        """Return the rows of a bank that the nodes use, those of siblings below each other, (F / S, S * O, I)."""
        rows = self.parameter_rows.select(bank)
        return rows if num_stacks == self.num_nodes else rows.reshape(num_stacks, -1, rows.shape[-1])

    def _unstack(self, stacks: Tensor) -> Tensor:
        """Return (F, O, ...) of (F / S, S * O, ...)."""
        if len(stacks) == self.num_nodes:
            return stacks
        per_node = stacks.shape[0] * stacks.shape[1] // self.num_nodes  # not -1: B may be 0
        return stacks.reshape(self.num_nodes, per_node, *stacks.shape[2:])


def chunks(length: int, width: int) -> Iterator[slice]:
    """Cut ``length`` rows of ``width`` numbers into slices of bounded size."""
    step = max(1, _MAX_SCORES // max(1, width))
    for start in range(0, length, step):
        yield slice(start, start + step)
