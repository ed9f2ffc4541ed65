"""Structural properties of circuits: what each is, whether a circuit has it, and which node breaks it."""

from circuits.queries.determinism import is_deterministic
from circuits.queries.structural import (
    chain_order,
    compatible,
    is_chain,
    is_decomposable,
    is_smooth,
    is_structured_decomposable,
)

__all__ = [
    "chain_order",
    "compatible",
    "is_chain",
    "is_decomposable",
    "is_deterministic",
    "is_smooth",
    "is_structured_decomposable",
]
