"""The program ``unfactor``: its commands, and how it ends."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from diffusion.app.commands import convert, decode, demo, evaluate, harness, pipeline, score
from diffusion.app.commands.common import app
from diffusion.errors import UnfactorError

__all__ = ["app", "convert", "decode", "demo", "evaluate", "harness", "main", "pipeline", "score"]

_UsageErrors: Any = typer.BadParameter.__mro__[2]  # ClickException, of click or of the copy that typer carries


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"unfactor {installed('unfactor')}")
        raise typer.Exit


def main() -> None:
    """Run the program; errors of ours are one line on standard error and exit code 2."""
    try:
        sys.exit(app(standalone_mode=False))
    except _UsageErrors as error:
        _fail(error.format_message(), error.exit_code)
    except UnfactorError as error:
        _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; the same command continues where it stopped", 130)


def _fail(message: str, code: int) -> None:
    print(f"unfactor: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
