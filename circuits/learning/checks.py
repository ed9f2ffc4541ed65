"""Checks of the options that several learners take."""

from __future__ import annotations

from circuits.arguments import checked_number, is_number
from circuits.errors import ArgumentError


def check_em_options(
    step_size: float = 1.0, pseudocount: float = 0.0, entropy: float = 0.0, momentum: float = 0.0
) -> None:
    """Raise ArgumentError unless the options of the EM family are in range."""
    if not is_number(step_size) or not 0 < step_size <= 1:
        raise ArgumentError(f"step_size: expected 0 < step_size <= 1, got {step_size!r}")
    checked_number("pseudocount", pseudocount)
    checked_number("entropy", entropy)
    if not is_number(momentum) or not 0 <= momentum < 1:
        raise ArgumentError(f"momentum: expected 0 <= momentum < 1, got {momentum!r}")
