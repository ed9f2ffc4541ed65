"""The product of a chain circuit with a finite automaton given by its arcs: log Z, and choices of latents and arcs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from circuits.algebra.semirings import ChoosingSemiring, MaxSemiring
from circuits.chains import padded
from circuits.constrained.arcs import Arcs
from circuits.engine.choices import Climb, climb
from circuits.engine.question import Question
from circuits.queries.automata import StateSemiring
from circuits.queries.temperature import TemperedSemiring
from circuits.randomness import RowGenerators, Source, source_at
from circuits.symbolic import Node


class ArcSemiring(StateSemiring):
    """Values of single variables are by label, and a choice that follows an arc is one of its label.

    Args:
        entries: of single entries.
        order: in which the circuit's products split off the variables.
        arcs: of the automaton that reads them in this order.
    """

    def __init__(self, entries: ChoosingSemiring, order: Sequence[int], arcs: Arcs) -> None:
        super().__init__(entries, order, self._read)
        self.arcs = arcs
        self.num_entries = max(arcs.num_states, len(arcs.log_label) + 1)

    def _read(self, single: Tensor, after: Tensor) -> Tensor:
        """Add up, over the arcs out of every state, a variable restricted to the label times what follows."""
        arcs = self.arcs
        terms = single.index_select(-1, arcs.label) + after.index_select(-1, arcs.target)  # (..., E)
        index = arcs.source.expand_as(terms)
        empty = terms.new_full((*terms.shape[:-1], arcs.num_states), -torch.inf)
        peak = empty.scatter_reduce(-1, index, terms.detach(), "amax")
        if isinstance(self.entries, MaxSemiring):
            return peak
        peak, tau = peak.masked_fill(peak == -torch.inf, 0.0), temperature_of(self.entries)
        shares = ((terms - peak.index_select(-1, arcs.source)) / tau).exp()
        total = torch.zeros_like(empty).index_add(-1, arcs.source, shares)
        possible = total > 0
        return torch.where(possible, torch.where(possible, total, 1.0).log() * tau + peak, -torch.inf)

    def choose_arc(self, single: Tensor, after: Tensor, state: Tensor, generator: Source) -> Tensor:
        """Choose an arc out of each of n states, (n,), from the values of a variable and of what follows, (n, *)."""
        scores = single.index_select(1, self.arcs.label) + after.index_select(1, self.arcs.target)
        return self.choose(scores.masked_fill(self.arcs.source != state.unsqueeze(1), -torch.inf), generator)

    def split(
        self, nodes: Sequence[Node], factors: Sequence[Tensor], node: Tensor, entry: Tensor, generator: Source
    ) -> list[Tensor]:
        """Choose an arc for every single variable; entries are their labels, and the state before what follows."""
        orders = self.orders(nodes)
        if len(orders) > 1:
            chosen = [entry.clone() for _ in factors]
            for rows in orders.values():
                here = torch.isin(node, torch.tensor(rows, device=node.device)).nonzero().flatten()
                source = generator.rows(here) if isinstance(generator, RowGenerators) else generator
                part = self.split([nodes[rows[0]]], [x[here] for x in factors], node[here], entry[here], source)
                for own, found in zip(chosen, part, strict=True):
                    own[here] = found
            return chosen
        (order,) = orders
        *front, after = (factors[child] for child in order)
        follows = [after]
        for single in reversed(front[1:]):
            follows.insert(0, self.read(single, follows[0]))
        chosen = list(factors)
        for child, single, after in zip(order, front, follows, strict=False):
            source = generator.at(child) if isinstance(generator, RowGenerators) else generator
            arc = self.choose_arc(single, after, entry, source)
            chosen[child], entry = self.arcs.label[arc], self.arcs.target[arc]
        chosen[order[-1]] = entry
        return chosen


def temperature_of(semiring: ChoosingSemiring) -> float:
    """Return tau of a semiring whose plus is ``tau log sum exp(. / tau)``."""
    return semiring.temperature if isinstance(semiring, TemperedSemiring) else 1.0


class Choices(NamedTuple):
    """One explanation per column: S copies of the batch of B."""

    units: list[Tensor]
    """The chosen unit of every node of each input layer, -1 where a node was not reached: int64 (F, S * B) each."""
    labels: Tensor
    """With which label the automaton reads every variable, int64 (S * B, D)."""
    query: Tensor
    """The query of every column, int64 (S * B,)."""


@dataclass(frozen=True, eq=False)
class Chain:
    """A question about a chain circuit and an automaton, and its input units' values.

    Attributes:
        question: its weights, and evidence on latents and the class.
        semiring: the automaton's.
        by_label: of every input layer the log-values of its units by label, (F, K, B, M).
        log_start: (B, S), of the state before the first variable that is read.
        log_accept: (B, S), of the state after the last.
    """

    question: Question
    semiring: ArcSemiring
    by_label: Sequence[Tensor]
    log_start: Tensor
    log_accept: Tensor

    def log_z(self) -> Tensor:
        """Return the log-value of every query, (B,)."""
        return self._total(self._asked.root(self.semiring))

    def climb(self) -> tuple[Tensor, Climb]:
        """Return the log-value of every query, (B,), and the values that :meth:`choose` goes back down along."""
        found = climb(self._asked, self.semiring)
        root = found.root[..., : self.semiring.arcs.num_states] + self.log_start
        log_z = self._total(self.question.mixed(self.semiring, found.root))
        return log_z, found._replace(root=padded(root, self.semiring.num_entries))

    @torch.no_grad()
    def choose(self, found: Climb, num_samples: int, generator: Source) -> Choices:
        """Choose child units and arcs from the root down, for ``num_samples`` copies of the batch."""
        choice = self.question.choose(self.semiring, num_samples, generator, found=found)
        pc, arcs, size = self.question.pc, self.semiring.arcs, self.semiring.num_entries
        units, labels = [], choice.query.new_zeros(len(choice.query), pc.circuit.num_vars)
        for position, (layer, reached) in enumerate(zip(pc.input_layers, choice.units, strict=True)):
            node, column = (reached >= 0).nonzero(as_tuple=True)
            entry = reached[node, column] % size
            (last,) = (layer.variables[node] == self.semiring.last).nonzero(as_tuple=True)
            if len(last):  # reached in a state: one more arc
                at, query = (node[last], column[last]), choice.query[column[last]]
                single = self.by_label[position][node[last], reached[at] // size, query]
                source = source_at(generator, position, *at)
                arc = self.semiring.choose_arc(single, self.log_accept[query], entry[last], source)
                entry[last] = arcs.label[arc]
            labels[column, layer.variables[node]] = entry
            units.append(reached // size)
        return Choices(units, labels, choice.query)

    @property
    def _asked(self) -> Question:
        """The question with the values of the input units."""
        return self.question.with_inputs(self.semiring.inputs(self.question.pc, self.by_label, self.log_accept))

    def _total(self, root: Tensor) -> Tensor:
        """Add up over the states before everything, (B, S or more) to (B,)."""
        scores = (root[:, : self.semiring.arcs.num_states] + self.log_start).t().unsqueeze(0)
        return self.semiring.entries.contract(scores.new_zeros(1, 1, scores.shape[1]), scores)[0, 0]
