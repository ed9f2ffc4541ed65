"""The demonstration, and the stages from a corpus to a denoiser with a circuit on top of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, get_args

import typer

from diffusion.app.commands.common import (
    CorpusName,
    DeviceName,
    FieldName,
    Out,
    PresetName,
    Quiet,
    app,
    one_of,
    open_workspace,
    preset_recipe,
)
from diffusion.app.models import DEFAULT_OUT
from diffusion.app.terminal import conclusion, print_few_steps, print_gap, say
from diffusion.denoisers.transformer import Attention

_FEW_STEPS = 4


@app.command()
def demo(
    corpus: CorpusName = "embedded",
    field: FieldName = None,
    out: Out = DEFAULT_OUT,
    preset: PresetName = "default",
    device: DeviceName = "auto",
    quiet: Quiet = False,
) -> None:
    """Train a small denoiser, fit a circuit on top of it, and show what the circuit returns."""
    workspace, recipe = open_workspace(out, device, quiet), preset_recipe(preset, corpus, field)
    workspace.train(recipe)
    workspace.fit(recipe)
    table = workspace.evaluate_gap(recipe)
    print_gap(table)
    if corpus == "arithmetic":
        print_few_steps(workspace.evaluate_arithmetic(recipe))
    _print_side_by_side(workspace, recipe)
    say(f"\n[bold]Shown:[/] {conclusion(table.rows[-1])}")
    say(f"[bold]Files:[/] models and results are in {out}/, the picture is {workspace.results / 'gap.png'}")
    say(
        f"[bold]Next:[/] unfactor generate --out {out} --prompt 'If the ' --steps 8 --temperature 1; "
        "unfactor demo --corpus arithmetic --out arithmetic; or --corpus with a text of your own"
    )


@app.command()
def train(
    corpus: CorpusName = "embedded",
    field: FieldName = None,
    out: Out = DEFAULT_OUT,
    preset: PresetName = "default",
    steps: Annotated[int | None, typer.Option(min=1, help="Updates of the denoiser.")] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            help="What a position attends to: 'bidirectional', everything, or 'block_causal', blocks up to its own, "
            "with which `generate --cache` is exact.",
            show_default="the preset's",
        ),
    ] = None,
    device: DeviceName = "auto",
    quiet: Quiet = False,
) -> None:
    """Train a tokenizer and a denoiser on a corpus."""
    recipe = preset_recipe(preset, corpus, field)
    if steps is not None:
        training = replace(recipe.denoiser.training, steps=steps)
        recipe = replace(recipe, denoiser=replace(recipe.denoiser, training=training))
    if attention is not None:
        one_of("attention", attention, get_args(Attention))
        recipe = replace(recipe, denoiser=replace(recipe.denoiser, attention=attention))
    model = open_workspace(out, device, quiet).train(recipe)
    say(f"A denoiser of {model.num_parameters:,} parameters is in {out}/denoiser; next: unfactor fit --out {out}")


@app.command("cache-logits")
def cache_logits(
    out: Out = DEFAULT_OUT,
    blocks: Annotated[int | None, typer.Option(min=1, help="Noised training blocks.")] = None,
    device: DeviceName = "auto",
    quiet: Quiet = False,
) -> None:
    """Cache the denoiser's predictions on disk; `unfactor fit` does it too where they are not there."""
    workspace = open_workspace(out, device, quiet)
    recipe = workspace.recipe()
    if blocks is not None:
        recipe = replace(recipe, circuit=replace(recipe.circuit, cached_blocks=blocks))
    train_cache, held_out = workspace.cache(recipe)
    say(f"{len(train_cache):,} training and {len(held_out):,} held-out blocks are in {out}/cache")


@app.command()
def fit(
    out: Out = DEFAULT_OUT,
    states: Annotated[int | None, typer.Option(min=1, help="States of the hidden Markov model.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates of the circuit on the coupled objective.")] = None,
    calibration: Annotated[
        bool, typer.Option("--calibration/--no-calibration", help="Calibrate the prediction by the noise level.")
    ] = True,
    potentials: Annotated[
        bool | None,
        typer.Option(
            "--potentials/--no-potentials",
            help="Read potentials on the latents from the denoiser's hidden states.",
            show_default="the preset's",
        ),
    ] = None,
    device: DeviceName = "auto",
    quiet: Quiet = False,
) -> None:
    """Fit a circuit to the denoiser of a folder."""
    workspace = open_workspace(out, device, quiet)
    recipe = workspace.recipe()
    if states is not None:
        recipe = replace(recipe, circuit=replace(recipe.circuit, num_states=states))
    if steps is not None:
        training = replace(recipe.circuit.training, steps=steps)
        recipe = replace(recipe, circuit=replace(recipe.circuit, training=training))
    recipe = replace(recipe, circuit=replace(recipe.circuit, is_calibrated=calibration))
    if potentials is not None:
        recipe = replace(recipe, circuit=replace(recipe.circuit, has_potentials=potentials))
    head = workspace.fit(recipe)
    say(f"{head.pc.circuit} is in {out}/head; next: unfactor evaluate --out {out}")


@app.command()
def tune(
    out: Out = DEFAULT_OUT,
    windows: Annotated[int | None, typer.Option(min=2, help="Held-out blocks.")] = None,
    temperature: Annotated[bool, typer.Option("--temperature", help="Choose the temperature too.")] = False,
    device: DeviceName = "auto",
    quiet: Quiet = False,
) -> None:
    """Choose on held-out text at which mask ratios the circuit is used, and store it in the folder's head."""
    workspace = open_workspace(out, device, quiet)
    recipe = workspace.recipe()
    recipe = replace(recipe, gap_windows=windows or recipe.gap_windows)
    print(workspace.tune(recipe, with_temperature=temperature))


def _print_side_by_side(workspace: Any, recipe: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from diffusion.app.writing import continue_prompts

    prompts = workspace.held_out_prompts(recipe, 4)
    length = recipe.denoiser.block_length
    columns = []
    for head in (None, workspace.head()):
        models = workspace.models(head)
        out = continue_prompts(models, prompts, gen_length=length, num_steps=_FEW_STEPS, temperature=1.0)
        columns.append([models.tokenizer.decode(row.tolist()) for row in out.generated])
    title = f"{length} new tokens in {_FEW_STEPS} calls of the same denoiser, at temperature 1 (greedy: mostly spaces)"
    shown = Table(title=title, show_lines=True)
    for column in ("prompt", "without circuit", "with circuit"):
        shown.add_column(column)
    for row in zip(prompts, *columns, strict=True):
        shown.add_row(*(Text(cell) for cell in row))
    Console().print(shown)
