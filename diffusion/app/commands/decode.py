"""Text from the models: prompts continued, and holes filled."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from diffusion.app.commands.common import app
from diffusion.app.models import ModelOptions, Models
from diffusion.app.option_groups import MOST, with_options
from diffusion.app.options import DecodingOptions
from diffusion.decoding.names import elsewhere, flags
from diffusion.decoding.plans import DynamicWindows
from diffusion.errors import ArgumentError

_STEPS_OF_BLOCK = 4


@app.command()
@with_options
def generate(
    models: ModelOptions,
    decoding: DecodingOptions,
    prompt: Annotated[str, typer.Option(help="The beginning of the text.")] = "",
    length: Annotated[
        int,
        typer.Option(
            "--length",
            "--gen-length",
            *flags("gen_length"),
            min=1,
            max=MOST,
            help=f"Tokens to generate at most.{elsewhere('gen_length')}",
        ),
    ] = 64,
    block: Annotated[
        int | None,
        typer.Option(
            "--block",
            "--block-length",
            *flags("block_length"),
            min=1,
            max=MOST,
            help=f"Tokens of a block.{elsewhere('block_length')}",
            show_default="the head's",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--num-steps",
            *flags("num_steps"),
            min=1,
            max=MOST,
            help=f"Denoiser calls.{elsewhere('num_steps')}",
            show_default="4 a block",
        ),
    ] = None,
    tokens_per_step: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Tokens a denoiser call, in place of --num-steps.", show_default=False),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=MOST, help="How many texts.")] = 1,
) -> None:
    """Write text with the models of a folder, or with a real one.

    The default is greedy, and a weak model then writes little but spaces: --temperature 1 draws from the model.
    """
    opened = models.open(use_circuit=decoding.circuit)
    block_length = block or opened.block_length
    options = lengths(decoding, length, block_length, steps, tokens_per_step)
    _write(opened, [prompt] * samples, decoding, is_infill=False, **options)


def lengths(
    decoding: DecodingOptions, length: int, block_length: int, steps: int | None, tokens_per_step: int | None
) -> dict[str, Any]:
    """Return how long a text is, and the order in which it is decoded, as arguments of ``df.generate``.

    Denoiser calls are ``steps``, or those of ``tokens_per_step``, or 4 a block; raises ArgumentError if both are given.
    """
    if steps is not None and tokens_per_step is not None:
        raise ArgumentError(f"tokens_per_step: expected it or steps, got {tokens_per_step} and {steps}")
    if tokens_per_step is not None:
        steps = -(-length // tokens_per_step)
    steps = steps or min(length, _STEPS_OF_BLOCK * -(-length // block_length))
    if decoding.dynamic_windows:
        return {"gen_length": length, "plan": DynamicWindows(steps, block_length)}
    return {"gen_length": length, "block_length": block_length, "num_steps": steps}


@app.command()
@with_options
def infill(
    models: ModelOptions,
    decoding: DecodingOptions,
    text: Annotated[
        str,
        typer.Argument(help="With holes: ___ is as many tokens as it has underscores, <mask> is one, <mask*8> eight."),
    ],
    steps: Annotated[
        int | None,
        typer.Option(
            "--num-steps", *flags("num_steps"), min=1, max=MOST, help="Denoiser calls.", show_default="one a token"
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=MOST, help="How many texts.")] = 1,
) -> None:
    """Fill the holes in a text with the models of a folder, or with a real one."""
    _write(models.open(use_circuit=decoding.circuit), [text] * samples, decoding, is_infill=True, num_steps=steps)


def _write(models: Models, texts: list[str], decoding: DecodingOptions, *, is_infill: bool, **options: Any) -> None:
    """Decode, draw what was asked for, and print the texts, with a separator between them."""
    from diffusion.app.stream import SEPARATOR, streamed
    from diffusion.app.writing import continue_prompts, fill_holes
    from diffusion.decoding.pictures import checked_picture, draw_trajectory

    if decoding.record is not None:
        checked_picture(decoding.record)
    tokenizer = models.tokenizer
    options |= decoding.changes
    options |= {"controls": decoding.controls(tokenizer), "constraint": decoding.constraint(tokenizer)}
    options |= {"seed": decoding.seed, "record": decoding.record is not None, "cache": decoding.cache}
    write = fill_holes if is_infill else continue_prompts
    if decoding.stream:
        with streamed(tokenizer) as on_step:
            out = write(models, texts, on_step=on_step, **options)
    else:
        out = write(models, texts, **options)
    if decoding.record is not None:
        draw_trajectory(out, tokenizer, decoding.record)
    written = [tokenizer.decode(row.tolist()) for row in out.generated]
    whole = written if is_infill else [text + new for text, new in zip(texts, written, strict=True)]
    print(f"\n{SEPARATOR}\n".join(whole))
