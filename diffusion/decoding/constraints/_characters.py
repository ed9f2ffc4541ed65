"""Sets of Unicode characters, and how UTF-8 writes them: byte ranges, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

LAST = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)
_LAST_OF_LENGTH = (0x7F, 0x7FF, 0xFFFF, LAST)

Range = tuple[int, int]
"""From one code point, or byte, to another, both included."""


def merged(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Return the same set as ranges in order that do not touch."""
    out: list[Range] = []
    for low, high in sorted(ranges):
        if out and low <= out[-1][1] + 1:
            out[-1] = out[-1][0], max(out[-1][1], high)
        else:
            out.append((low, high))
    return tuple(out)


def complement(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Return all other characters."""
    out, start = [], 0
    for low, high in merged(ranges):
        if low > start:
            out.append((start, low - 1))
        start = high + 1
    return (*out, (start, LAST)) if start <= LAST else tuple(out)


def utf8_ranges(low: int, high: int) -> Iterator[tuple[Range, ...]]:
    """Yield sequences of byte ranges that together write exactly the characters from ``low`` to ``high``.

    Surrogates, which UTF-8 cannot write, are left out.
    """
    first, last = _SURROGATES
    if low <= last and high >= first:
        if low < first:
            yield from utf8_ranges(low, first - 1)
        if high > last:
            yield from utf8_ranges(last + 1, high)
        return
    for limit in _LAST_OF_LENGTH:  # both ends with equally many bytes
        if low <= limit < high:
            yield from utf8_ranges(low, limit)
            yield from utf8_ranges(limit + 1, high)
            return
    for bits in (6, 12, 18):  # the ranges of the bytes are independent where the lower bits run over all values
        block = (1 << bits) - 1
        if low >> bits != high >> bits:
            if low & block:
                yield from utf8_ranges(low, low | block)
                yield from utf8_ranges((low | block) + 1, high)
                return
            if high & block != block:
                yield from utf8_ranges(low, (high & ~block) - 1)
                yield from utf8_ranges(high & ~block, high)
                return
    yield tuple(zip(chr(low).encode(), chr(high).encode(), strict=True))
