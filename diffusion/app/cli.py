"""The program ``unfactor``: its commands, and how it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
import traceback
from typing import Annotated, Any

import typer

from diffusion.app.commands import convert, decode, demo, evaluate, harness, pipeline, score
from diffusion.app.commands.common import app
from diffusion.app.signals import exit_code, stopped_by_signals
from diffusion.errors import UnfactorError

__all__ = ["app", "convert", "decode", "demo", "evaluate", "harness", "main", "pipeline", "score"]

DEBUG = "--debug"
LONG_WORK = 10.0
"""Seconds from which on a command says what it took."""
_LONGEST_MESSAGE = 1000
_UsageErrors: Any = typer.BadParameter.__mro__[2]  # ClickException, of click or of the copy that typer carries


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show where an error comes from; anywhere in the line.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"unfactor {installed('unfactor')}")
        raise typer.Exit


def main() -> None:
    """Run the program; an error, whatever it is, is one line on standard error and exit code 2."""
    arguments, start = sys.argv[1:], time.monotonic()
    is_debugged = DEBUG in arguments
    for stream in (sys.stdout, sys.stderr):  # a text that the terminal cannot write is shown escaped
        with contextlib.suppress(AttributeError):  # closed
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        with stopped_by_signals():
            code = app([one for one in arguments if one != DEBUG], standalone_mode=False)
            if sys.stdout is not None:
                sys.stdout.flush()
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        if is_debugged:
            traceback.print_exception(error)
        message, code = explained(error)
        _fail(message, code)
    took = time.monotonic() - start
    if took >= LONG_WORK and "--quiet" not in arguments:
        print(f"unfactor: took {duration(took)}", file=sys.stderr)
    sys.exit(code)


def explained(error: BaseException) -> tuple[str, int]:
    """Return what to say about an error, and the exit code."""
    if isinstance(error, _UsageErrors):
        return error.format_message(), error.exit_code
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return str(error) or "interrupted; the same command goes on from what was done", exit_code()
    if isinstance(error, UnfactorError):
        return str(error), 2
    if isinstance(error, OSError):
        if error.filename is None and error.errno in (errno.EPIPE, errno.ENOSPC, errno.EBADF, errno.EIO):
            _leave_stdout()
            return f"the output cannot be written: {error.strerror}", 2
        return f"{error.filename}: {error.strerror}" if error.filename is not None else str(error), 2
    if isinstance(error, MemoryError) or ("alloc" in str(error) and isinstance(error, RuntimeError)):
        return f"expected numbers that fit into the memory, got more: {_first_line(error)}; take smaller ones", 2
    return f"{type(error).__name__}: {_first_line(error)}; with {DEBUG} it says where", 2


def duration(seconds: float) -> str:
    """Return a time in words: 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["nothing more"])[0]


def _leave_stdout() -> None:
    """Keep the interpreter from writing again what could not be written."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> None:
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in " ".join(message.split()))
    if len(line) > _LONGEST_MESSAGE:
        half = _LONGEST_MESSAGE // 2
        line = f"{line[:half]} ... {line[-half:]}"
    with contextlib.suppress(OSError):
        print(f"unfactor: {line}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
