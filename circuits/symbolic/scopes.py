"""Scopes as bit sets: bit ``v`` is set when variable ``v`` belongs to the scope."""

from __future__ import annotations

from collections.abc import Iterator

from circuits.errors import StructureError


def bit_of(var: int) -> int:
    """Return the scope of one variable; raise StructureError unless that is an integer >= 0."""
    if not isinstance(var, int) or isinstance(var, bool) or var < 0:
        raise StructureError(f"unknown variable {var!r}: variables are the integers from 0")
    return 1 << var


def variables_of(scope_bits: int) -> Iterator[int]:
    """Yield the variables of a bit set in ascending order."""
    while scope_bits:
        lowest = scope_bits & -scope_bits
        yield lowest.bit_length() - 1
        scope_bits ^= lowest


def format_scope(scope_bits: int, limit: int = 8) -> str:
    """Write a scope as ``{0, 1, 2}``, shortened when it has more than ``limit`` variables."""
    variables: list[str] = []
    for var in variables_of(scope_bits):
        if len(variables) == limit:
            return "{" + ", ".join(variables) + f", ... {scope_bits.bit_count()} in all}}"
        variables.append(str(var))
    return "{" + ", ".join(variables) + "}"
