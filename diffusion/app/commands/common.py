"""What commands share: the program itself, options that several have, and how they speak."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from diffusion.errors import ArgumentError


class _Ended(BaseException):
    """What ended a command, where typer would make an exit code of it that says nothing."""


class _Commands(TyperGroup):
    def main(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().main(*arguments, **options)
        except _Ended as ended:
            raise ended.__cause__ from None  # type: ignore[misc]

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, OSError, EOFError) as error:
            raise _Ended from error


app = typer.Typer(
    name="unfactor",
    cls=_Commands,
    help="Probabilistic circuits as joint output layers of masked diffusion language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},  # --num_steps is --num-steps
)

Out = Annotated[Path, typer.Option("--out", help="Folder of the models and results.")]
CorpusName = Annotated[
    str,
    typer.Option(
        help="'embedded' (Python's documentation), 'arithmetic', 'gsm8k' (downloaded), a .txt/.jsonl file, also .gz, a "
        ".parquet file, or 'dataset:NAME:CONFIGURATION@SPLIT' (of the hub, or a folder)."
    ),
]
FieldName = Annotated[str | None, typer.Option(help="The key of the text in a .jsonl corpus; of a table its column.")]
PresetName = Annotated[
    str,
    typer.Option(
        help="'default', 'large' (better figures, about 10 minutes), 'gsm8k' (for worked answers, two hours), 'gpu' (a "
        "denoiser of 39 million parameters and 1,024 states, planned for 8 minutes of one H100) or 'tiny' (a test)."
    ),
]
LogDir = Annotated[
    Path | None, typer.Option(help="A folder for TensorBoard, which has to be installed.", show_default=False)
]
DeviceName = Annotated[str, typer.Option(help="'cpu', 'cuda', or 'auto'.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


def open_workspace(out: Path, device: str, quiet: bool, **options: Any) -> Any:
    """Return the folder's workspace, with further options of its own."""
    from diffusion.app.models import chosen_device
    from diffusion.app.workspace import Workspace

    return Workspace(out, progress=not quiet, device=chosen_device(device), **options)


def preset_recipe(preset: str, corpus: str, field: str | None) -> Any:
    """Return a preset for a corpus."""
    from diffusion.app.recipe import PRESETS

    return PRESETS[one_of("preset", preset, tuple(PRESETS))].with_text(corpus, field)


def one_of(name: str, value: str, known: tuple[str, ...]) -> Any:
    """Return the value; raises ArgumentError unless it is known."""
    if value not in known:
        raise ArgumentError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    return value
