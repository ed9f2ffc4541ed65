"""The errors that this library raises on purpose; everything else is a bug."""

from __future__ import annotations


class UnfactorError(Exception):
    """Base class of every error that the library raises on purpose."""


class ArgumentError(UnfactorError, ValueError):
    """An argument has a wrong type, shape, dtype or value."""


class StructureError(UnfactorError, ValueError):
    """A circuit's structure is not valid: not smooth, not decomposable, or its shapes do not fit."""


class PropertyError(UnfactorError, ValueError):
    """A query needs a structural property that this circuit does not have."""


class ImpossibleEvidenceError(UnfactorError, ValueError):
    """A query conditions on evidence that has probability zero under the circuit."""


class CheckpointError(UnfactorError, ValueError):
    """A saved circuit or training state is missing, corrupt, hostile, or of a newer format version."""


class ProcessLostError(UnfactorError, RuntimeError):
    """Another of the processes that learn together has ended; the message has its reason."""


class Interrupted(KeyboardInterrupt):
    """Long work ended where it was asked to, at a place from which it can go on; the message says where and how.

    It is asked by :func:`circuits.progress.request_stop`, for instance from a signal handler. Like a KeyboardInterrupt
    it is no :class:`Exception`: what handles errors by going on with the next piece of work is not to swallow it.
    """


class StorageError(UnfactorError, OSError):
    """A file or folder cannot be written: no space, no permission, something in its way, or another process at work."""
