"""What region-graph algorithms write into: regions as bit sets, and partitions of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from circuits.arguments import checked_count
from circuits.errors import ArgumentError
from circuits.symbolic.scopes import bit_of


def bits_of(scope: Iterable[int]) -> int:
    """Return variables as a bit set."""
    bits = 0
    for var in scope:
        bits |= bit_of(var)
    return bits


class Partition(NamedTuple):
    """One way to split a region into disjoint parts."""

    region: int
    """Position of the region that is split."""
    parts: tuple[int, ...]
    """Positions of the regions that it is split into."""


class Builder:
    """A region graph that is being built; with ``merge`` the same variables, asked for twice, are the same region."""

    def __init__(self, *, merge: bool = False) -> None:
        self.scopes: list[int] = []
        self.partitions: list[Partition] = []
        self._known: dict[int, int] | None = {} if merge else None

    def region(self, scope_bits: int) -> int:
        """Return the position of a region with these variables."""
        if self._known is not None:
            if scope_bits in self._known:
                return self._known[scope_bits]
            self._known[scope_bits] = len(self.scopes)
        self.scopes.append(scope_bits)
        return len(self.scopes) - 1

    def partition(self, region: int, parts: Sequence[int]) -> None:
        """Split a region into others."""
        self.partitions.append(Partition(region, tuple(parts)))

    def merged(self, parts: Sequence[int]) -> int:
        """Return a region that is split into these parts."""
        scope = 0
        for part in parts:
            scope |= self.scopes[part]
        region = self.region(scope)
        self.partition(region, parts)
        return region


def checked_grid(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return (channels, height, width) of a grid given with or without its channels."""
    lengths = tuple(shape) if isinstance(shape, Sequence) else ()
    if len(lengths) not in (2, 3):
        raise ArgumentError(f"shape: expected (height, width) or (channels, height, width), got {shape!r}")
    for length in lengths:
        checked_count("shape", length)
    channels, height, width = lengths if len(lengths) == 3 else (1, *lengths)
    return channels, height, width
