"""The harness of others, with models of ours."""

from __future__ import annotations

from typing import Annotated

import typer

from diffusion.app.commands.common import app


@app.command(
    "lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def lm_eval(
    arguments: Annotated[list[str] | None, typer.Argument(help="Those of `lm-eval`.", show_default=False)] = None,
) -> None:
    """Run lm-evaluation-harness, with --model unfactor --model_args pretrained=FOLDER_OR_NAME,head=...,num_steps=...

    All arguments are those of `lm-eval` itself; needs the extra [eval].
    """
    from diffusion.app.harness import run_harness

    run_harness(arguments or [])
