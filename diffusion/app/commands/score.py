"""The log-probability of texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from diffusion.app.commands.common import app
from diffusion.app.models import ModelOptions, Models
from diffusion.app.option_groups import GREATEST_SEED, OptionGroup, count, optional, with_options
from diffusion.app.terminal import new_table


class MethodOptions(OptionGroup):
    """Whose probability is asked for."""

    OPTIONS: ClassVar[Mapping[str, Any]] = {
        "method": Annotated[str, typer.Option(help="Whose probability: 'decoder', 'elbo' or 'sequential'.")],
        "block": count("Tokens of a block.", "--block", "--block-length", shown="the head's, or all"),
        "steps": count("Calls of the decoder.", "--steps", "--num-steps", shown="one a token"),
        "strategy": optional(str, "Of the decoder.", shown="entropy"),
        "decode": optional(str, "How the decoder uses the circuit.", shown="joint"),
        "samples": count("Noise levels of elbo a block.", shown="32"),
    }
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"method": "sequential"}


@app.command()
@with_options
def score(
    models: ModelOptions,
    how: MethodOptions,
    text: Annotated[list[str] | None, typer.Argument(help="The texts.", show_default=False)] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="In place of texts: a .jsonl file (also .gz) with the key text, and prompt if need be."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="What stands before each text, and is not scored itself.")] = "",
    circuit: Annotated[
        bool, typer.Option("--circuit/--no-circuit", help="With and without the circuit, or only without.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0, max=GREATEST_SEED, help="Of what is random.")] = 0,
    json: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
) -> None:
    """Say how probable texts are, in nats, without the circuit and with it.

    decoder: that a few-step decoder with these options writes exactly this. sequential: of the denoiser asked one token
    at a time, from left to right. elbo: an estimate of the evidence lower bound.
    """
    from diffusion.app.scoring import given_texts, method_options, score_texts

    pairs = given_texts(text or [], file, prompt)
    options = method_options(
        how.method, num_steps=how.steps, strategy=how.strategy, decode=how.decode, num_samples=how.samples
    )
    opened = models.open(use_circuit=circuit)
    scores = score_texts(opened, pairs, method=how.method, block_length=how.block, seed=seed, options=options)
    _print(opened, scores)
    if json is not None:
        scores.save(json)


def _print(models: Models, scores: Any) -> None:
    from rich.console import Console
    from rich.text import Text

    shown = new_table(f"Log-probability ({scores.method}), in nats, and perplexity per token")
    shown.add_column("text")
    shown.add_column("tokens", justify="right")
    for column in scores.columns:
        shown.add_column(column, justify="right")
    for row in scores.rows:
        numbers = (f"{value:.3f}\n({row.perplexity(value):.4g})" for value in row.log_probs)
        shown.add_row(Text(row.text), str(row.num_tokens), *numbers)
    Console().print(shown)
