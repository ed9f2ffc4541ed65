"""Checks of arguments that many public functions take."""

from __future__ import annotations

import math
from numbers import Real

import torch

from circuits.errors import ArgumentError


def checked_count(name: str, value: int, least: int = 1) -> int:
    """Return an argument that is an integer of at least ``least``; raise ArgumentError otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ArgumentError(f"{name}: expected an integer >= {least}, got {value!r}")
    return value


def is_number(value: object) -> bool:
    """Whether a value is a real number, Python's or NumPy's, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)


def checked_number(name: str, value: float, what: str = "a number") -> float:
    """Return an argument that is a finite number of at least 0; ``what`` says in the message what it counts."""
    if not is_number(value) or not 0 <= value < math.inf:
        raise ArgumentError(f"{name}: expected {what} >= 0, got {value!r}")
    return value


def checked_temperature(value: float) -> float:
    """Return a temperature that is 0, or a number whose inverse float32 holds; raise ArgumentError otherwise."""
    if not is_number(value) or not (value == 0 or 1e-37 <= value <= 1e38):
        raise ArgumentError(f"temperature: expected 0, or a number from 1e-37 to 1e38, got {value!r}")
    return value


def checked_dtype(name: str, value: torch.dtype) -> torch.dtype:
    """Return an argument that is a dtype of compiled circuits; raise ArgumentError otherwise."""
    if value not in (torch.float32, torch.float64):
        raise ArgumentError(f"{name}: expected torch.float32 or torch.float64, got {value}")
    return value


def checked_device(name: str, value: torch.device | str) -> torch.device:
    """Return an argument that names a device which is here; raise ArgumentError otherwise."""
    try:
        return torch.empty(0, device=value).device
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:  # torch raises each of them
        reason = str(error).split("\n")[0]
        raise ArgumentError(
            f"{name}: expected a device of this machine, for instance 'cpu', got {value!r}: {reason}"
        ) from error


def checked_seed(name: str, value: int | None) -> int | None:
    """Return an argument that is an integer or None; raise ArgumentError otherwise."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise ArgumentError(f"{name}: expected an integer or None, got {value!r}")
    return value
