"""The stages from a corpus to a denoiser with a circuit on top of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, get_args

import typer

from diffusion.app.commands.common import (
    MOST,
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
from diffusion.app.recipe import Transitions
from diffusion.app.terminal import say
from diffusion.denoisers.transformer import Attention


@app.command()
def train(
    corpus: CorpusName = "embedded",
    field: FieldName = None,
    out: Out = DEFAULT_OUT,
    preset: PresetName = "default",
    steps: Annotated[int | None, typer.Option(min=1, max=1 << 31, help="Updates of the denoiser.")] = None,
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
    blocks: Annotated[int | None, typer.Option(min=1, max=1 << 31, help="Noised training blocks.")] = None,
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
    states: Annotated[int | None, typer.Option(min=1, max=1 << 16, help="States of the hidden Markov model.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1 << 31, help="Updates of the circuit on the coupled objective.")
    ] = None,
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
    transitions: Annotated[
        str | None,
        typer.Option(
            help="What the denoiser's hidden states make of transitions: static, gates or low_rank.",
            show_default="the preset's",
        ),
    ] = None,
    hidden: Annotated[
        int | None,
        typer.Option(min=1, max=1 << 16, help="Units of a hidden layer that reads the denoiser's hidden states."),
    ] = None,
    joint: Annotated[
        bool | None,
        typer.Option(
            "--joint/--no-joint",
            help="Train denoiser and circuit together after that.",
            show_default="the preset's",
        ),
    ] = None,
    device: DeviceName = "auto",
    quiet: Quiet = False,
) -> None:
    """Fit a circuit to the denoiser of a folder."""
    if transitions is not None:
        one_of("transitions", transitions, get_args(Transitions))
    workspace = open_workspace(out, device, quiet)
    recipe = workspace.recipe()
    if states is not None:
        recipe = replace(recipe, circuit=replace(recipe.circuit, num_states=states))
    if steps is not None:
        training = replace(recipe.circuit.training, steps=steps)
        recipe = replace(recipe, circuit=replace(recipe.circuit, training=training))
    recipe = replace(recipe, circuit=replace(recipe.circuit, is_calibrated=calibration))
    chosen = {"has_potentials": potentials, "transitions": transitions, "hidden_units": hidden}
    given = {name: value for name, value in chosen.items() if value is not None}
    recipe = replace(recipe, circuit=replace(recipe.circuit, **given))
    if joint is not None:
        from diffusion.training.joint import JointTraining

        config = (recipe.circuit.joint or JointTraining()) if joint else None
        recipe = replace(recipe, circuit=replace(recipe.circuit, joint=config))
    head = workspace.fit(recipe)
    say(f"{head.pc.circuit} is in {out}/head; next: unfactor evaluate --out {out}")


@app.command()
def tune(
    out: Out = DEFAULT_OUT,
    windows: Annotated[int | None, typer.Option(min=2, max=MOST, help="Held-out blocks.")] = None,
    temperature: Annotated[bool, typer.Option("--temperature", help="Choose the temperature too.")] = False,
    device: DeviceName = "auto",
    quiet: Quiet = False,
) -> None:
    """Choose on held-out text at which mask ratios the circuit is used, and store it in the folder's head."""
    workspace = open_workspace(out, device, quiet)
    recipe = workspace.recipe()
    recipe = replace(recipe, gap_windows=windows or recipe.gap_windows)
    print(workspace.tune(recipe, with_temperature=temperature))


@app.command(hidden=True)
def pack(
    to: Annotated[Path, typer.Argument(help="The folder to write.")],
    out: Out = DEFAULT_OUT,
    corpus: Annotated[str, typer.Option(help="What the text is to be called.")] = "gsm8k",
    documents: Annotated[int, typer.Option(min=1, max=MOST, help="Held-out documents that go with the models.")] = 512,
) -> None:
    """Write the models of a folder as they are shipped: half precision, held-out documents, a model card."""
    from diffusion.app.packing import pack as packed

    size = packed(open_workspace(out, "cpu", quiet=True), to, corpus=corpus, documents=documents)
    say(f"{size:,} bytes are in {to}/")
