"""Checks of JSON records that are not trusted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from circuits.errors import CheckpointError


def check_keys(record: Mapping[str, Any], required: set[str], optional: set[str] | None = None) -> None:
    """Raise CheckpointError unless the record has all required keys and no unknown one."""
    missing, unknown = sorted(required - record.keys()), sorted(record.keys() - required - (optional or set()))
    if missing:
        raise CheckpointError(f"missing keys: {', '.join(missing)}")
    if unknown:
        raise CheckpointError(f"unknown keys: {short(unknown[0])}{', ...' * (len(unknown) > 1)}")


def short(value: Any) -> str:
    """Write a value that may be of any type, size and depth in few letters."""
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a number beyond 64 bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
