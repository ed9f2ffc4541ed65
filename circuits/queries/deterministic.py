"""Deterministic finite automata over large alphabets: values fall into classes that the automaton does not tell apart.

A regular expression over a vocabulary of 100,000 tokens needs a few dozen states and about as many classes of tokens,
so the table of next states is (S, K), not (S, V) (Hopcroft, Motwani, Ullman 2006, "Introduction to Automata Theory").
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from circuits.arguments import checked_count, kind_of
from circuits.errors import ArgumentError

REJECTED = -1


@dataclass(frozen=True, eq=False)
class DeterministicAutomaton:
    """A deterministic finite automaton with S states that reads values 0 .. V - 1 by their K classes.

    ``a & b`` accepts what both accept. All tables lie on one device.

    Attributes:
        classes: int64 (V,), the class of every value.
        transition: int64 (S, K), the next state after reading a value of a class; -1: rejected.
        accepting: bool (S,), in which states a sequence may end.
        start: the state before anything is read.

    Raises:
        ArgumentError: the tables do not fit together.
    """

    classes: Tensor
    transition: Tensor
    accepting: Tensor
    start: int = 0

    def __post_init__(self) -> None:
        named = {"classes": (self.classes, 1), "transition": (self.transition, 2)}
        for name, (table, dim) in named.items():
            if not isinstance(table, Tensor) or table.dtype != torch.int64 or table.dim() != dim or 0 in table.shape:
                raise ArgumentError(
                    f"{name}: expected int64 with {dim} dimension(s), none of them empty, got {kind_of(table)}"
                )
        num_states, num_classes = self.transition.shape
        if not isinstance(self.accepting, Tensor) or self.accepting.dtype != torch.bool:
            raise ArgumentError(f"accepting: expected bool ({num_states},), got {self.accepting!r}")
        if tuple(self.accepting.shape) != (num_states,):
            raise ArgumentError(f"accepting: expected bool ({num_states},), got shape {tuple(self.accepting.shape)}")
        _check_range("classes", self.classes, 0, num_classes)
        _check_range("transition", self.transition, REJECTED, num_states)
        if not 0 <= self.start < num_states:
            raise ArgumentError(f"start: expected a state from 0 to {num_states - 1}, got {self.start}")

    @classmethod
    def from_table(
        cls,
        transition: Tensor,  # shape: (S, V)
        accepting: Iterable[int],
        *,
        start: int = 0,
    ) -> DeterministicAutomaton:
        """Build an automaton from a table of next states per value, and find its classes.

        Args:
            transition: int64 (S, V), the next state after reading a value; -1: rejected.
            accepting: the accepting states.
            start: the state to begin in.

        Raises:
            ArgumentError: a state out of range, or a wrong shape or type.
        """
        if not isinstance(transition, Tensor) or transition.dtype != torch.int64 or transition.dim() != 2:
            raise ArgumentError(f"transition: expected an int64 tensor of shape (S, V), got {transition!r}")
        num_states = len(transition)
        accepted = torch.tensor(sorted(set(accepting)), dtype=torch.int64, device=transition.device)
        _check_range("accepting", accepted, 0, num_states)
        classes, members = _same_columns(transition)
        is_accepting = torch.zeros(num_states, dtype=torch.bool, device=transition.device)
        is_accepting[accepted] = True
        return cls(classes, transition[:, members], is_accepting, start)

    @property
    def num_states(self) -> int:
        """S."""
        return self.transition.shape[0]

    @property
    def num_classes(self) -> int:
        """K."""
        return self.transition.shape[1]

    @property
    def num_values(self) -> int:
        """V."""
        return self.classes.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tables lie."""
        return self.classes.device

    def to(self, device: torch.device | str) -> DeterministicAutomaton:
        """Return the automaton on another device."""
        tables = {name: getattr(self, name).to(device) for name in ("classes", "transition", "accepting")}
        return replace(self, **tables)

    def step(
        self,
        states: Tensor,  # shape: (...)
        values: Tensor,  # shape: (...)
    ) -> Tensor:  # shape: (...)
        """Return the states after one more value, int64; -1 stays -1."""
        reached = self.transition[states.clamp_min(0), self.classes[values]]
        return torch.where(states < 0, REJECTED, reached)

    def run(
        self,
        values: Tensor,  # shape: (B, L)
        states: Tensor | None = None,  # shape: (B,)
    ) -> Tensor:  # shape: (B, L + 1)
        """Return the states before, between and after the values of B sequences; -1 once rejected.

        Args:
            values: int64 (B, L).
            states: to begin in, int64 (B,); None: the start.
        """
        if states is None:
            states = torch.full(values.shape[:1], self.start, device=values.device)
        path = [states]
        for column in values.unbind(1):
            path.append(self.step(path[-1], column))
        return torch.stack(path, 1)

    def accepts(
        self,
        values: Tensor,  # shape: (B, L)
    ) -> Tensor:  # shape: (B,)
        """Return which of B sequences, int64 (B, L), are accepted: bool (B,)."""
        end = self.run(values)[:, -1]
        return (end >= 0) & self.accepting[end.clamp_min(0)]

    @cached_property
    def reaches(self) -> Tensor:
        """Whether some value leads from one state to another, bool (S, S)."""
        return self.reaches_by(torch.ones_like(self.classes, dtype=torch.bool))

    def reaches_by(
        self,
        allowed: Tensor,  # shape: (V,)
    ) -> Tensor:  # shape: (S, S)
        """Return whether some *allowed* value, bool (V,), leads from one state to another."""
        used = self.transition[:, self.classes[allowed].unique()]
        source, column = (used >= 0).nonzero(as_tuple=True)
        reaches = torch.zeros(self.num_states, self.num_states, dtype=torch.bool, device=self.device)
        reaches[source, used[source, column]] = True
        return reaches

    def can_accept_in(self, num_values: int) -> Tensor:
        """Return whether a sequence can be accepted after exactly 0, 1, .. n more values: bool (n + 1, S)."""
        checked_count("num_values", num_values, 0)
        table = [self.accepting]
        for _ in range(num_values):
            table.append((self.reaches & table[-1]).any(1))
        return torch.stack(table)

    @property
    def is_empty(self) -> bool:
        """Whether no sequence, of any length, is accepted."""
        return not bool(self._is_live[self.start])

    def __and__(self, other: DeterministicAutomaton) -> DeterministicAutomaton:
        """Return the automaton that accepts what both accept, with as few states as possible.

        Raises ArgumentError if they read different numbers of values.
        """
        if not isinstance(other, DeterministicAutomaton):
            return NotImplemented
        if other.num_values != self.num_values:
            raise ArgumentError(f"other: expected an automaton over {self.num_values} values, got {other.num_values}")
        pairs, classes = torch.unique(self.classes * other.num_classes + other.classes, return_inverse=True)
        ones, twos = pairs // other.num_classes, pairs % other.num_classes
        found = torch.tensor([self.start * other.num_states + other.start], device=self.device)
        known = found
        while len(found):  # the pairs of states that can be reached, in waves
            found = torch.unique(self._joint_step(other, found, ones, twos))
            found = found[(found >= 0) & ~torch.isin(found, known)]
            known = torch.cat([known, found])
        known, order = known.sort()
        reached = self._joint_step(other, known, ones, twos)
        transition = torch.where(reached >= 0, torch.searchsorted(known, reached.contiguous()), REJECTED)
        accepting = self.accepting[known // other.num_states] & other.accepting[known % other.num_states]
        start = int((order == 0).nonzero())
        return DeterministicAutomaton(classes, transition, accepting, start).minimized()

    def _joint_step(self, other: DeterministicAutomaton, pairs: Tensor, ones: Tensor, twos: Tensor) -> Tensor:
        """Return the pairs of states, as numbers ``s S' + s'``, after each pair of classes; -1: one rejects."""
        left = self.transition[pairs // other.num_states][:, ones]
        right = other.transition[pairs % other.num_states][:, twos]
        return torch.where((left >= 0) & (right >= 0), left * other.num_states + right, REJECTED)

    def minimized(self) -> DeterministicAutomaton:
        """Return the smallest automaton that accepts the same sequences (Moore 1956), start first.

        States that cannot be reached are gone, and so are those from which nothing is accepted: what led there is
        rejected at once. Classes that are no longer told apart are one.
        """
        transition = self._without_dead_ends
        block, num_blocks = self.accepting.unique(return_inverse=True)[1], 0
        while num_blocks != int(block.max()) + 1:  # states in one block accept the same, as far as is known
            num_blocks = int(block.max()) + 1
            following = torch.where(transition >= 0, block[transition.clamp_min(0)], REJECTED)
            block = torch.unique(torch.cat([block.unsqueeze(1), following], 1), dim=0, return_inverse=True)[1]
        representative = torch.zeros(num_blocks, dtype=torch.int64, device=self.device)
        representative[block] = torch.arange(len(block), device=self.device)
        following = transition[representative]
        merged = torch.where(following >= 0, block[following.clamp_min(0)], REJECTED)
        order = self._reached_from(int(block[self.start]), merged)
        rank = torch.full((num_blocks + 1,), REJECTED, device=self.device)
        rank[order] = torch.arange(len(order), device=self.device)
        table = rank[merged[order]]  # -1 picks the last entry, which is -1
        joined, members = _same_columns(table)
        return DeterministicAutomaton(joined[self.classes], table[:, members], self.accepting[representative[order]], 0)

    @cached_property
    def _is_live(self) -> Tensor:
        """From which states something is accepted, bool (S,)."""
        live = self.accepting
        while True:
            more = live | (self.reaches & live).any(1)
            if bool((more == live).all()):
                return live
            live = more

    @property
    def _without_dead_ends(self) -> Tensor:
        target = self.transition
        return torch.where((target >= 0) & self._is_live[target.clamp_min(0)], target, REJECTED)

    @staticmethod
    def _reached_from(start: int, transition: Tensor) -> Tensor:
        """Return the states that can be reached, breadth first."""
        order = torch.tensor([start], device=transition.device)
        wave = order
        while len(wave):
            wave = transition[wave].unique()
            wave = wave[(wave >= 0) & ~torch.isin(wave, order)]
            order = torch.cat([order, wave])
        return order

    def __repr__(self) -> str:
        return (
            f"DeterministicAutomaton({self.num_states} states, {self.num_values} values in {self.num_classes} classes, "
            f"{int(self.accepting.sum())} accepting)"
        )


def _same_columns(table: Tensor) -> tuple[Tensor, Tensor]:
    """Return which columns of a table (S, V) are equal: their class, (V,), and a member of every class, (K,).

    One row after the other, because sorting columns of 100,000 values at once costs a hundred times as much.
    """
    classes = torch.zeros(table.shape[1], dtype=torch.int64, device=table.device)
    for row in table:
        classes = torch.unique(classes * (len(table) + 1) + row + 1, return_inverse=True)[1]
    members = torch.zeros(int(classes.max()) + 1, dtype=torch.int64, device=table.device)
    members[classes] = torch.arange(len(classes), device=table.device)
    return classes, members


def _check_range(name: str, table: Tensor, least: int, end: int) -> None:
    if bool(((table < least) | (table >= end)).any()):
        raise ArgumentError(
            f"{name}: expected numbers from {least} to {end - 1}, got {int(table.min())} to {int(table.max())}"
        )
