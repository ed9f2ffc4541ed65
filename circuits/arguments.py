"""Checks of arguments, for functions that report bad ones like those of this library."""

from circuits._arguments import (
    checked_count,
    checked_device,
    checked_dtype,
    checked_number,
    checked_seed,
    checked_temperature,
    is_number,
)

__all__ = [
    "checked_count",
    "checked_device",
    "checked_dtype",
    "checked_number",
    "checked_seed",
    "checked_temperature",
    "is_number",
]
