"""Errors of the diffusion half; the shared ones come from ``circuits.errors``."""

from __future__ import annotations

from circuits.errors import (
    ArgumentError,
    CheckpointError,
    ImpossibleEvidenceError,
    Interrupted,
    StorageError,
    UnfactorError,
)


class CorpusError(UnfactorError, ValueError):
    """A corpus is missing, empty, or not in a format that can be read."""


__all__ = [
    "ArgumentError",
    "CheckpointError",
    "CorpusError",
    "ImpossibleEvidenceError",
    "Interrupted",
    "StorageError",
    "UnfactorError",
]
