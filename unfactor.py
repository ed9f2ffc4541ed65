"""The program ``unfactor``: from its first line on, a signal ends it with one line, also while it is still loading."""

from __future__ import annotations

import os
import signal
import sys


def _end(number: int, frame: object) -> None:
    # at once: an exception in the middle of an import may be swallowed there, and nothing was written yet
    os.write(2, f"unfactor: stopped by {signal.Signals(number).name} while it was loading\n".encode())
    os._exit(128 + number)


def main() -> None:
    """Run the program."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _end)
    from diffusion.app.cli import main as run

    sys.exit(run())


if __name__ == "__main__":
    main()
