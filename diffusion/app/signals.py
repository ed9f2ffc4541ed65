"""Signals that end the program: long work stops at its next update, everything else at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from circuits.errors import Interrupted
from circuits.progress import forget_stop, is_stoppable, request_stop

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_received: signal.Signals | None = None


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """While the block runs, SIGINT, SIGTERM and SIGHUP stop it; what they had been handled by before comes back.

    The first asks learning to stop, which writes its checkpoint after the update that runs; where nothing learns, or at
    a second signal, :class:`~circuits.errors.Interrupted` is raised there and then. A signal that was ignored stays so.
    """
    global _received
    _received = None
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, _stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        forget_stop()


def exit_code() -> int:
    """Return the code to end with after an interruption: 128 and the number of the signal that was received."""
    return 128 + (_received or signal.SIGINT)


def _stop(number: int, frame: object) -> None:
    global _received
    is_first, _received = _received is None, signal.Signals(number)
    if is_first and is_stoppable():
        request_stop(f"stopped by {_received.name}")
    else:
        raise Interrupted(f"stopped by {_received.name}; the same command goes on from what was done")
