"""A finite automaton as a list of arcs whose labels are sets of value classes: what its product with a chain reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from circuits.queries.automata import Automaton
from circuits.queries.deterministic import DeterministicAutomaton


class Arcs(NamedTuple):
    """S states, E arcs between them, M labels that arcs share, K classes of values that labels are made of."""

    source: Tensor
    """int64 (E,)."""
    target: Tensor
    """int64 (E,)."""
    label: Tensor
    """int64 (E,)."""
    log_label: Tensor
    """(M, K), the log-weight with which a label reads a class; -inf: not at all."""
    classes: Tensor
    """int64 (V,), the class of every value."""
    log_start: Tensor
    """(S,)."""
    log_accept: Tensor
    """(S,)."""

    @property
    def num_states(self) -> int:
        """How many states the automaton has."""
        return len(self.log_start)

    def to(self, device: torch.device, dtype: torch.dtype) -> Arcs:
        """Return the arcs on another device, their numbers in another type."""
        return Arcs(*(t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in self))

    def reversed(self) -> Arcs:
        """Return the arcs of the automaton that reads backwards."""
        swapped = {"source": self.target, "target": self.source}
        return self._replace(**swapped, log_start=self.log_accept, log_accept=self.log_start)

    def with_idle(self) -> Arcs:
        """Return the arcs with one more label, M, of loops at every state: for variables that are not read."""
        states = torch.arange(self.num_states, device=self.source.device)
        return self._replace(
            source=torch.cat([self.source, states]),
            target=torch.cat([self.target, states]),
            label=torch.cat([self.label, torch.full_like(states, len(self.log_label))]),
        )


def arcs_of(automaton: Automaton | DeterministicAutomaton) -> Arcs:
    """Return the arcs of an automaton."""
    if isinstance(automaton, DeterministicAutomaton):
        return _deterministic(automaton)
    by_value = automaton.log_transition.transpose(0, 1).flatten(1)  # (V, S * S)
    columns, classes = torch.unique(by_value, dim=0, return_inverse=True)
    weights = columns.t().unflatten(0, (automaton.log_transition.shape[0], -1))  # (S, S', K)
    source, target = (weights > -torch.inf).any(2).nonzero(as_tuple=True)
    log_label, label = torch.unique(weights[source, target], dim=0, return_inverse=True)
    return Arcs(source, target, label, log_label, classes, automaton.log_start, automaton.log_accept)


def _deterministic(automaton: DeterministicAutomaton) -> Arcs:
    source, read = (automaton.transition >= 0).nonzero(as_tuple=True)
    target = automaton.transition[source, read]
    pairs, arc = torch.unique(source * automaton.num_states + target, return_inverse=True)
    reads = torch.zeros(len(pairs), automaton.num_classes, dtype=torch.bool, device=automaton.device)
    reads[arc, read] = True
    label_reads, label = torch.unique(reads, dim=0, return_inverse=True)
    is_start = torch.arange(automaton.num_states, device=automaton.device) == automaton.start
    return Arcs(
        pairs // automaton.num_states,
        pairs % automaton.num_states,
        label,
        log_indicator(label_reads),
        automaton.classes,
        log_indicator(is_start),
        log_indicator(automaton.accepting),
    )


def log_indicator(condition: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return 0 where a condition holds and -inf elsewhere."""
    return torch.zeros(condition.shape, dtype=dtype, device=condition.device).masked_fill(~condition, -torch.inf)
