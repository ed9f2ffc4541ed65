"""Checks of arguments that many public functions take."""

from __future__ import annotations

from numbers import Real

from circuits.errors import ArgumentError


def checked_count(name: str, value: int, least: int = 1) -> int:
    """Return an argument that is an integer of at least ``least``; raise ArgumentError otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ArgumentError(f"{name}: expected an integer >= {least}, got {value!r}")
    return value


def is_number(value: object) -> bool:
    """Whether a value is a real number, Python's or NumPy's, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)
