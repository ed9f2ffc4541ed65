"""What every long loop has: a progress bar, and a place where it looks whether it is to stop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from circuits.errors import Interrupted


@contextlib.contextmanager
def progress_bar(
    description: str, total: int, *, enabled: bool, completed: int = 0, way_on: str | None = None
) -> Iterator[Callable[..., None]]:
    """Yield ``advance(n=1, note="")``, to be called after every part of some long work.

    Args:
        description: of the work, which messages begin with.
        total: how many parts it has.
        enabled: whether it is drawn on standard error.
        completed: how many parts are done already.
        way_on: how the work goes on after it was stopped, for the message: while the block runs, :func:`check_stop`
            ends it. None: it does not.
    """
    done = completed

    def message(reason: str) -> str:
        return f"{description}: {reason} after {done} of {total} parts; {way_on}"

    with contextlib.ExitStack() as stack:
        if way_on is not None:
            stack.enter_context(stoppable(message))
        drawn = stack.enter_context(_drawn(description, total, completed)) if enabled else None

        def advance(n: int = 1, note: str = "") -> None:
            nonlocal done
            done += n
            if drawn is not None:
                drawn(n, note)

        yield advance


@contextlib.contextmanager
def _drawn(description: str, total: int, completed: int) -> Iterator[Callable[[int, str], None]]:
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
        yield lambda n, note: progress.update(task, advance=n, note=note)


_stop_reason: str | None = None
_messages: list[Callable[[str], str] | None] = []
"""Of the pieces of work that look whether they are to stop, the innermost last."""


def request_stop(reason: str = "asked to stop") -> None:
    """Ask long work to end at its next update or batch; safe in a signal handler.

    It then writes down how far it came and raises :class:`~circuits.errors.Interrupted` with the reason, for instance
    the name of a signal.
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
def stoppable(message: Callable[[str], str] | None = None) -> Iterator[None]:
    """While the block runs, :func:`stop_requested` is looked at again and again; elsewhere nobody would notice it.

    ``message`` is what :func:`check_stop` says, by reason; None: it lets the work go on, which looks itself.
    """
    _messages.append(message)
    try:
        yield
    finally:
        _messages.pop()


def check_stop() -> None:
    """Raise Interrupted if the work that runs is to end and says how it goes on; called before whatever takes long."""
    message = _messages[-1] if _messages else None
    if _stop_reason is not None and message is not None:
        raise Interrupted(message(_stop_reason))


def is_stoppable() -> bool:
    """Return whether somebody looks at :func:`stop_requested` now."""
    return bool(_messages)
