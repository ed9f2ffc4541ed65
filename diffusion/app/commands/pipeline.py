"""The stages from a corpus to a denoiser with a circuit on top of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

import typer

from diffusion.app.commands.common import (
    CorpusName,
    DeviceName,
    FieldName,
    LogDir,
    Out,
    PresetName,
    Quiet,
    app,
    one_of,
    open_workspace,
    preset_recipe,
)
from diffusion.app.models import DEFAULT_OUT, ModelOptions
from diffusion.app.option_groups import GREATEST_SEED, MOST, OptionGroup, count, flag, optional, with_options
from diffusion.app.recipe import CircuitRecipe, Structure, Transitions
from diffusion.app.terminal import say
from diffusion.coupling import Normalization
from diffusion.denoisers.transformer import Attention
from diffusion.errors import ArgumentError
from diffusion.training.circuit import OptimizerName
from diffusion.training.joint import JointTraining


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
    log_dir: LogDir = None,
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
    model = open_workspace(out, device, quiet, log_dir=_checked_log(log_dir)).train(recipe)
    say(f"A denoiser of {model.num_parameters:,} parameters is in {out}/denoiser; next: unfactor fit --out {out}")


class TextOptions(OptionGroup):
    """Which texts a denoiser's predictions are cached of, and how."""

    OPTIONS: ClassVar[Mapping[str, Any]] = {
        "text": optional(
            str,
            "Texts of yours: .jsonl, .txt, .fasta or .fa, also .gz, .parquet, or dataset:NAME:CONFIGURATION@SPLIT. By "
            "default the folder's own.",
        ),
        "field": Annotated[str, typer.Option(help="The key of the text in .jsonl; of a table its column.")],
        "prompt_field": optional(
            str,
            "The key or column of what stands before a text, which is always visible.",
            shown="prompt, if it is there",
        ),
        "to": optional(Path, "The cache's folder, with --text; torchrun's processes write shards of it."),
        "context": Annotated[int, typer.Option(min=0, max=MOST, help="Tokens before a block, with --text.")],
        "block": count("Tokens of a block, with --text.", shown="the model's"),
        "suffix": Annotated[
            int, typer.Option(min=0, max=MOST, help="Mask tokens after a block, as block decoding shows them.")
        ],
        "masks": Annotated[
            str, typer.Option(help="Which tokens of a block are masked: 'random' ones, or its 'suffix', with --text.")
        ],
        "top_k": count("Keep so many tokens of each position and the true one."),
        "features": flag("Keep the denoiser's hidden states too.", "--features"),
        "seed": Annotated[int, typer.Option(min=0, max=GREATEST_SEED, help="Of noise levels and masks.")],
    }
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "field": "text",
        "context": 512,
        "suffix": 0,
        "masks": "random",
        "features": False,
        "seed": 0,
    }


@app.command("cache-logits")
@with_options
def cache_logits(
    models: ModelOptions,
    texts: TextOptions,
    blocks: Annotated[int | None, typer.Option(min=1, max=1 << 31, help="Noised training blocks.")] = None,
    quiet: Quiet = False,
) -> None:
    """Cache the denoiser's predictions on disk; `unfactor fit` does it too where they are not there."""
    if texts.text is not None:
        from diffusion.app.caching import cache_texts

        cache = cache_texts(models.open(use_circuit=False), texts, num_blocks=blocks, progress=not quiet)
        say(f"{len(cache):,} blocks are in {texts.to}; read them with df.LogitCache.open")
        return
    if models.is_named:
        raise ArgumentError("text: expected a file with --model, got none; name it with --text")
    for name, value in texts.given.items():
        if value != texts.DEFAULTS.get(name):
            raise ArgumentError(
                f"{name}: expected none without --text, for the folder's own cache is that of its recipe, got {value}; "
                "name your texts with --text, or leave it out"
            )
    out = models.out or DEFAULT_OUT
    workspace = open_workspace(out, models.device, quiet)
    recipe = workspace.recipe()
    if blocks is not None:
        recipe = replace(recipe, circuit=replace(recipe.circuit, cached_blocks=blocks))
    train_cache, held_out = workspace.cache(recipe)
    say(f"{len(train_cache):,} training and {len(held_out):,} held-out blocks are in {out}/cache")


class FitOptions(OptionGroup):
    """What a head is fitted as; what is not named is the preset's."""

    OPTIONS: ClassVar[Mapping[str, Any]] = {
        "states": count("States of the hidden Markov model.", most=1 << 16),
        "grow": optional(
            int,
            "How often the states of a smaller model are split in two on the way to these, each time fitted again.",
            shown="the preset's",
            min=0,
            max=16,
        ),
        "structure": optional(
            str,
            "hmm, or auto: validation chooses among models of half to twice the states, and by position.",
            shown="the preset's",
        ),
        "steps": count("Updates of the circuit on the coupled objective.", most=1 << 31),
        "optimizer": optional(
            str, "Of the circuit's weights on that objective: adam, or anemone, steps by flows.", shown="the preset's"
        ),
        "likelihood_weight": optional(
            float,
            "Of the log-likelihood of plain text under the circuit, as a second term of that objective.",
            shown="the preset's",
        ),
        "calibration": flag("Calibrate the prediction by the noise level.", "--calibration/--no-calibration"),
        "matching": optional(
            int,
            "Steps towards the denoiser's own marginals, in place of the calibration, two passes each; 0 for none.",
            shown="the preset's",
            min=0,
            max=64,
        ),
        "mixture": optional(
            bool,
            "Mix the circuit with the plain prediction, by weights that noise and context decide.",
            "--mixture/--no-mixture",
            shown="the preset's",
        ),
        "potentials": optional(
            bool,
            "Read potentials on the latents from the denoiser's hidden states.",
            "--potentials/--no-potentials",
            shown="the preset's",
        ),
        "transitions": optional(
            str,
            "What the denoiser's hidden states make of transitions: static, gates or low_rank.",
            shown="the preset's",
        ),
        "normalization": optional(
            str, "Of the product of prediction and circuit: global, or local, by input unit.", shown="the preset's"
        ),
        "hidden": count("Units of a hidden layer that reads the denoiser's hidden states.", most=1 << 16),
        "joint": optional(
            bool, "Train denoiser and circuit together after that.", "--joint/--no-joint", shown="the preset's"
        ),
    }
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"calibration": True}

    def changed(self, circuit: CircuitRecipe) -> CircuitRecipe:
        """Return a recipe with what is named; raises ArgumentError for a name that is not known."""
        known_names = {
            "structure": Structure,
            "transitions": Transitions,
            "optimizer": OptimizerName,
            "normalization": Normalization,
        }
        for name, known in known_names.items():
            if self.given[name] is not None:
                one_of(name, self.given[name], get_args(known))
        training = {"steps": self.steps, "optimizer": self.optimizer, "likelihood_weight": self.likelihood_weight}
        chosen = {
            "structure": self.structure,
            "num_states": self.states,
            "num_splits": self.grow,
            "is_calibrated": self.calibration,
            "num_matching_steps": self.matching,
            "has_mixture": self.mixture,
            "has_potentials": self.potentials,
            "transitions": self.transitions,
            "hidden_units": self.hidden,
            "normalization": self.normalization,
            "training": replace(circuit.training, **_named(training)),
        }
        if self.joint is not None:
            circuit = replace(circuit, joint=(circuit.joint or JointTraining()) if self.joint else None)
        return replace(circuit, **_named(chosen))


def _checked_log(log_dir: Path | None) -> Path | None:
    """Return the folder; raises ArgumentError, before anything is trained, if TensorBoard is not there for it."""
    if log_dir is not None:
        from circuits.learning.scalars import summary_writer

        summary_writer()
    return log_dir


def _named(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


@app.command()
@with_options
def fit(
    how: FitOptions,
    out: Out = DEFAULT_OUT,
    log_dir: LogDir = None,
    device: DeviceName = "auto",
    quiet: Quiet = False,
) -> None:
    """Fit a circuit to the denoiser of a folder; the processes that torchrun starts share every batch."""
    from diffusion.app.processes import joined

    with joined() as processes:
        workspace = open_workspace(out, device, quiet, processes=processes, log_dir=_checked_log(log_dir))
        recipe = workspace.recipe()
        head = workspace.fit(replace(recipe, circuit=how.changed(recipe.circuit)))
        if workspace.is_first:
            say(f"{head.pc.circuit} is in {out}/head; next: unfactor evaluate --out {out}")


@app.command()
def tune(
    out: Out = DEFAULT_OUT,
    windows: Annotated[int | None, typer.Option(min=2, max=MOST, help="Held-out blocks.")] = None,
    temperature: Annotated[bool, typer.Option("--temperature", help="Choose the temperature too.")] = False,
    strategy: Annotated[bool, typer.Option("--strategy", help="Choose mode and strategy of decoding too.")] = False,
    num_steps: Annotated[
        int, typer.Option(min=1, max=MOST, help="Denoiser calls a block at which these are compared.")
    ] = 4,
    device: DeviceName = "auto",
    quiet: Quiet = False,
) -> None:
    """Choose on held-out text how the folder's head is decoded with, and store it there.

    That is at which mask ratios the circuit is used; and if asked temperature, mode and strategy. The rule is one: what
    makes the text most probable.
    """
    workspace = open_workspace(out, device, quiet)
    recipe = workspace.recipe()
    recipe = replace(recipe, gap_windows=windows or recipe.gap_windows)
    print(workspace.tune(recipe, with_temperature=temperature, num_steps=num_steps if strategy else None))


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
