"""What every long loop has: a progress bar, and a place where it looks whether it is to stop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(description: str, total: int, *, enabled: bool, completed: int = 0) -> Iterator[Callable[..., None]]:
    """Yield ``advance(n=1, note="")``; draws on standard error, and nothing at all when not ``enabled``."""
    if not enabled:
        yield lambda n=1, note="": None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total, completed=completed, note="")
        yield lambda n=1, note="": progress.update(task, advance=n, note=note)


_stop_reason: str | None = None
_num_stoppable = 0


def request_stop(reason: str = "asked to stop") -> None:
    """Ask long work to end at its next update; safe in a signal handler.

    A run of learning then writes its checkpoint and raises :class:`~circuits.errors.Interrupted`.

    Args:
        reason: why, for the message; for instance the name of a signal.
    """
    global _stop_reason
    _stop_reason = reason


def stop_requested() -> str | None:
    """Return the reason for which long work is to end, None where it is to go on."""
    return _stop_reason


def forget_stop() -> None:
    """Let work go on again."""
    global _stop_reason
    _stop_reason = None


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """While the block runs, :func:`stop_requested` is looked at again and again; elsewhere nobody would notice it."""
    global _num_stoppable
    _num_stoppable += 1
    try:
        yield
    finally:
        _num_stoppable -= 1


def is_stoppable() -> bool:
    """Return whether somebody looks at :func:`stop_requested` now."""
    return _num_stoppable > 0
