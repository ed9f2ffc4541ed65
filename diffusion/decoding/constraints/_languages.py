"""Languages of texts as automata over the bytes of UTF-8."""

from __future__ import annotations

import itertools

import torch

from circuits.queries import DeterministicAutomaton
from diffusion.decoding.constraints._characters import utf8_ranges
from diffusion.decoding.constraints._pattern import Characters, Choice, Pattern, Repeat, Sequence
from diffusion.errors import ArgumentError

MAX_STATES = 20_000
_BYTES = 256


class _Nondeterministic:
    """Thompson's construction: states with arcs on byte ranges, and free moves (Thompson 1968)."""

    def __init__(self) -> None:
        self.arcs: list[list[tuple[int, int, int]]] = []
        self.free: list[list[int]] = []

    def state(self) -> int:
        if len(self.arcs) >= 10 * MAX_STATES:
            raise ArgumentError(f"pattern: expected one of at most {10 * MAX_STATES} parts; use smaller repetitions")
        self.arcs.append([])
        self.free.append([])
        return len(self.arcs) - 1

    def add(self, pattern: Pattern, start: int) -> int:
        """Add what a pattern matches from ``start`` on; return the state after it."""
        if isinstance(pattern, Characters):
            return self._characters(pattern, start)
        if isinstance(pattern, Sequence):
            for part in pattern.parts:
                start = self.add(part, start)
            return start
        if isinstance(pattern, Choice):
            end = self.state()
            for option in pattern.options:
                self.free[self.add(option, self._after(start))].append(end)
            return end
        return self._repeat(pattern, start)

    def _after(self, start: int) -> int:
        following = self.state()
        self.free[start].append(following)
        return following

    def _characters(self, pattern: Characters, start: int) -> int:
        end = self.state()
        for low, high in pattern.ranges:
            for sequence in utf8_ranges(low, high):
                here = start
                for position, (first, last) in enumerate(sequence):
                    there = end if position == len(sequence) - 1 else self.state()
                    self.arcs[here].append((first, last, there))
                    here = there
        return end

    def _repeat(self, pattern: Repeat, start: int) -> int:
        for _ in range(pattern.least):
            start = self.add(pattern.part, start)
        if pattern.most is None:
            loop = self._after(start)
            self.free[self.add(pattern.part, loop)].append(loop)
            return self._after(loop)
        end = self.state()
        for _ in range(pattern.most - pattern.least):
            self.free[start].append(end)
            start = self.add(pattern.part, self._after(start))
        self.free[start].append(end)
        return end

    def closure(self, states: frozenset[int]) -> frozenset[int]:
        reached, stack = set(states), list(states)
        while stack:
            for following in self.free[stack.pop()]:
                if following not in reached:
                    reached.add(following)
                    stack.append(following)
        return frozenset(reached)


def matching(pattern: Pattern) -> DeterministicAutomaton:
    """Return the automaton of the texts that match a pattern as a whole: the subset construction, minimised.

    Raises ArgumentError if it needs too many states.
    """
    machine = _Nondeterministic()
    first = machine.state()
    last = machine.add(pattern, first)
    start = machine.closure(frozenset([first]))
    number, waiting, rows = {start: 0}, [start], []
    while waiting:
        subset = waiting.pop(0)
        row = torch.full((_BYTES,), -1)
        arcs = [arc for state in subset for arc in machine.arcs[state]]
        borders = sorted({low for low, _, _ in arcs} | {high + 1 for _, high, _ in arcs})
        for low, end in itertools.pairwise(borders):
            targets = frozenset(target for first, last, target in arcs if first <= low <= last)
            if not targets:
                continue
            reached = machine.closure(targets)
            if reached not in number:
                if len(number) >= MAX_STATES:
                    raise ArgumentError(f"pattern: expected one of at most {MAX_STATES} states; use a simpler pattern")
                number[reached] = len(number)
                waiting.append(reached)
            row[low:end] = number[reached]
        rows.append(row)
    accepting = [state for subset, state in number.items() if last in subset]
    return DeterministicAutomaton.from_table(torch.stack(rows), accepting).minimized()


def containing(keyword: str) -> DeterministicAutomaton:
    """Return the automaton of the texts in which a keyword occurs (Knuth, Morris, Pratt 1977)."""
    table = _matched_after(keyword)
    found = len(table)
    return DeterministicAutomaton.from_table(torch.cat([table, torch.full((1, _BYTES), found)]), [found])


def avoiding(keyword: str) -> DeterministicAutomaton:
    """Return the automaton of the texts in which a keyword does not occur."""
    table = _matched_after(keyword)
    return DeterministicAutomaton.from_table(table.masked_fill(table == len(table), -1), range(len(table)))


def _matched_after(keyword: str) -> torch.Tensor:
    """Return how much of a keyword is matched after a byte, given how much was before: int64 (n, 256)."""
    content = keyword.encode()
    table = torch.zeros(len(content), _BYTES, dtype=torch.int64)
    border = 0  # how much would be matched had the first byte not been read
    for matched, byte in enumerate(content):
        table[matched] = table[border] if matched else 0
        following = int(table[border, byte]) if matched else 0
        table[matched, byte] = matched + 1
        border = following
    return table
