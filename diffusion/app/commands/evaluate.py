"""Measures of what the models of a folder do."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from diffusion.app.commands.common import DeviceName, Out, Quiet, app, open_workspace
from diffusion.app.models import DEFAULT_OUT
from diffusion.app.options import CONFIG_HELP, Decode, StrategyName
from diffusion.app.terminal import print_curve, print_few_steps, print_gap, say
from diffusion.decoding.config import DecodingConfig
from diffusion.decoding.names import strategy_named


@app.command()
def evaluate(
    out: Out = DEFAULT_OUT,
    windows: Annotated[int | None, typer.Option(min=2, help="Held-out blocks of the gap table.")] = None,
    texts: Annotated[int | None, typer.Option(min=1, help="Texts of the few-step and arithmetic tables.")] = None,
    few_steps: Annotated[
        bool, typer.Option("--few-steps/--no-few-steps", help="Measure text written in 1 to 32 calls; takes minutes.")
    ] = True,
    decode: Decode = None,
    strategy: StrategyName = None,
    temperature: Annotated[float, typer.Option(help=CONFIG_HELP["temperature"])] = 1.0,
    device: DeviceName = "auto",
    quiet: Quiet = False,
) -> None:
    """Measure and draw the gap table and the few-step curve, and for the arithmetic corpus the share of right texts.

    The few-step curve is always at temperature 1, in mode joint and by entropy.
    """
    workspace = open_workspace(out, device, quiet)
    recipe = workspace.recipe()
    recipe = replace(recipe, gap_windows=windows or recipe.gap_windows, texts=texts or recipe.texts)
    chosen = {"decode": decode, "strategy": strategy_named(strategy), "temperature": temperature}
    options: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    DecodingConfig(**options)  # which refuses what it does not know, before anything is measured
    print_gap(workspace.evaluate_gap(recipe))
    if few_steps:
        print_curve(workspace.evaluate_few_steps(recipe))
    if recipe.text.corpus == "arithmetic":
        print_few_steps(workspace.evaluate_arithmetic(recipe, **options))
    say(f"Tables and pictures are in {workspace.results}/")
