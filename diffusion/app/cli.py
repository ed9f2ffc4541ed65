"""The command ``unfactor``: a demonstration, and its stages one by one."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from diffusion.app.options import CONFIG_HELP, Decode, DecodingOptions, StrategyName, with_decoding
from diffusion.decoding.config import DecodingConfig
from diffusion.errors import ArgumentError, UnfactorError

app = typer.Typer(
    name="unfactor",
    help="Probabilistic circuits as joint output layers of masked diffusion language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Out = Annotated[Path, typer.Option("--out", help="Folder of the models and results.")]
CorpusName = Annotated[
    str, typer.Option(help="'embedded' (Python's documentation), 'arithmetic', or a .txt/.jsonl file, also .gz.")
]
FieldName = Annotated[str | None, typer.Option(help="The key of the text in a .jsonl corpus.")]
PresetName = Annotated[
    str, typer.Option(help="'default', 'large' (better figures, about 10 minutes) or 'tiny' (a test).")
]
DeviceName = Annotated[str, typer.Option(help="'cpu', 'cuda', or 'auto'.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]

_DEFAULT_OUT = Path("unfactor-demo")
_FEW_STEPS = 4
_STEPS_OF_BLOCK = 4
_UsageErrors: Any = typer.BadParameter.__mro__[2]  # ClickException, of click or of the copy that typer carries


@app.command()
def demo(
    corpus: CorpusName = "embedded",
    field: FieldName = None,
    out: Out = _DEFAULT_OUT,
    preset: PresetName = "default",
    device: DeviceName = "auto",
    quiet: Quiet = False,
) -> None:
    """Train a small denoiser, fit a circuit on top of it, and show what the circuit returns."""
    workspace, recipe = _workspace(out, device, quiet), _recipe(preset, corpus, field)
    workspace.train(recipe)
    workspace.fit(recipe)
    table = workspace.evaluate_gap(recipe)
    _print_gap(table)
    if corpus == "arithmetic":
        _print_few_steps(workspace.evaluate_arithmetic(recipe))
    _print_side_by_side(workspace, recipe)
    _say(f"\n[bold]Shown:[/] {_conclusion(table.rows[-1])}")
    _say(f"[bold]Files:[/] models and results are in {out}/, the picture is {workspace.results / 'gap.png'}")
    _say(
        f"[bold]Next:[/] unfactor generate --out {out} --prompt 'If the ' --steps 8 --temperature 1; "
        "unfactor demo --corpus arithmetic --out arithmetic; or --corpus with a text of your own"
    )


@app.command()
def train(
    corpus: CorpusName = "embedded",
    field: FieldName = None,
    out: Out = _DEFAULT_OUT,
    preset: PresetName = "default",
    steps: Annotated[int | None, typer.Option(min=1, help="Updates of the denoiser.")] = None,
    device: DeviceName = "auto",
    quiet: Quiet = False,
) -> None:
    """Train a tokenizer and a denoiser on a corpus."""
    recipe = _recipe(preset, corpus, field)
    if steps is not None:
        training = replace(recipe.denoiser.training, steps=steps)
        recipe = replace(recipe, denoiser=replace(recipe.denoiser, training=training))
    model = _workspace(out, device, quiet).train(recipe)
    _say(f"A denoiser of {model.num_parameters:,} parameters is in {out}/denoiser; next: unfactor fit --out {out}")


@app.command("cache-logits")
def cache_logits(
    out: Out = _DEFAULT_OUT,
    blocks: Annotated[int | None, typer.Option(min=1, help="Noised training blocks.")] = None,
    device: DeviceName = "auto",
    quiet: Quiet = False,
) -> None:
    """Cache the denoiser's predictions on disk; `unfactor fit` does it too where they are not there."""
    workspace = _workspace(out, device, quiet)
    recipe = workspace.recipe()
    if blocks is not None:
        recipe = replace(recipe, circuit=replace(recipe.circuit, cached_blocks=blocks))
    train_cache, held_out = workspace.cache(recipe)
    _say(f"{len(train_cache):,} training and {len(held_out):,} held-out blocks are in {out}/cache")


@app.command()
def fit(
    out: Out = _DEFAULT_OUT,
    states: Annotated[int | None, typer.Option(min=1, help="States of the hidden Markov model.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates of the circuit on the coupled objective.")] = None,
    calibration: Annotated[
        bool, typer.Option("--calibration/--no-calibration", help="Calibrate the prediction by the noise level.")
    ] = True,
    device: DeviceName = "auto",
    quiet: Quiet = False,
) -> None:
    """Fit a circuit to the denoiser of a folder."""
    workspace = _workspace(out, device, quiet)
    recipe = workspace.recipe()
    if states is not None:
        recipe = replace(recipe, circuit=replace(recipe.circuit, num_states=states))
    if steps is not None:
        training = replace(recipe.circuit.training, steps=steps)
        recipe = replace(recipe, circuit=replace(recipe.circuit, training=training))
    recipe = replace(recipe, circuit=replace(recipe.circuit, is_calibrated=calibration))
    head = workspace.fit(recipe)
    _say(f"{head.pc.circuit} is in {out}/head; next: unfactor evaluate --out {out}")


@app.command()
@with_decoding
def generate(
    decoding: DecodingOptions,
    out: Out = _DEFAULT_OUT,
    prompt: Annotated[str, typer.Option(help="The beginning of the text.")] = "",
    length: Annotated[
        int, typer.Option("--length", "--gen-length", "--max-new-tokens", min=1, help="Tokens to generate at most.")
    ] = 64,
    block: Annotated[
        int | None,
        typer.Option(
            "--block", "--block-length", "--block-size", min=1, help="Tokens of a block.", show_default="the denoiser's"
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", "--num-steps", min=1, help="Denoiser calls.", show_default="4 a block")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many texts.")] = 1,
    device: DeviceName = "auto",
) -> None:
    """Write text with the models of a folder.

    The default is greedy, and a weak model then writes little but spaces: --temperature 1 draws from the model.
    """
    workspace = _workspace(out, device, quiet=True)
    block_length = block or workspace.denoiser().config.block_length
    options = {"gen_length": length, "block_length": block_length}
    options["num_steps"] = steps or min(length, _STEPS_OF_BLOCK * -(-length // block_length))
    _write(workspace, [prompt] * samples, decoding, is_infill=False, **options)


@app.command()
@with_decoding
def infill(
    decoding: DecodingOptions,
    text: Annotated[
        str,
        typer.Argument(help="With holes: ___ is as many tokens as it has underscores, <mask> is one, <mask*8> eight."),
    ],
    out: Out = _DEFAULT_OUT,
    steps: Annotated[
        int | None,
        typer.Option("--steps", "--num-steps", min=1, help="Denoiser calls.", show_default="one a token"),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many texts.")] = 1,
    device: DeviceName = "auto",
) -> None:
    """Fill the holes in a text with the models of a folder."""
    _write(_workspace(out, device, quiet=True), [text] * samples, decoding, is_infill=True, num_steps=steps)


@app.command()
def tune(
    out: Out = _DEFAULT_OUT,
    windows: Annotated[int | None, typer.Option(min=2, help="Held-out blocks.")] = None,
    temperature: Annotated[bool, typer.Option("--temperature", help="Choose the temperature too.")] = False,
    device: DeviceName = "auto",
    quiet: Quiet = False,
) -> None:
    """Choose on held-out text at which mask ratios the circuit is used, and store it in the folder's head."""
    workspace = _workspace(out, device, quiet)
    recipe = workspace.recipe()
    recipe = replace(recipe, gap_windows=windows or recipe.gap_windows)
    print(workspace.tune(recipe, with_temperature=temperature))


@app.command()
def evaluate(
    out: Out = _DEFAULT_OUT,
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
    workspace = _workspace(out, device, quiet)
    recipe = workspace.recipe()
    recipe = replace(recipe, gap_windows=windows or recipe.gap_windows, texts=texts or recipe.texts)
    chosen = {"decode": decode, "strategy": strategy, "temperature": temperature}
    options: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    DecodingConfig(**options)  # which refuses what it does not know, before anything is measured
    _print_gap(workspace.evaluate_gap(recipe))
    if few_steps:
        _print_curve(workspace.evaluate_few_steps(recipe))
    if recipe.text.corpus == "arithmetic":
        _print_few_steps(workspace.evaluate_arithmetic(recipe, **options))
    _say(f"Tables and pictures are in {workspace.results}/")


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


def _workspace(out: Path, device: str, quiet: bool) -> Any:
    import torch

    from diffusion.app.workspace import Workspace

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Workspace(out, progress=not quiet, device=device)


def _recipe(preset: str, corpus: str, field: str | None) -> Any:
    from diffusion.app.recipe import PRESETS

    return PRESETS[_one_of("preset", preset, tuple(PRESETS))].with_text(corpus, field)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise ArgumentError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    return value


def _write(workspace: Any, texts: list[str], decoding: DecodingOptions, *, is_infill: bool, **options: Any) -> None:
    """Decode, draw what was asked for, and print the texts, with a separator between them."""
    from diffusion.app.stream import SEPARATOR, streamed
    from diffusion.app.writing import continue_prompts, fill_holes
    from diffusion.decoding.pictures import checked_picture, draw_trajectory

    if decoding.record is not None:
        checked_picture(decoding.record)
    tokenizer = workspace.tokenizer()
    options |= decoding.changes
    options |= {"controls": decoding.controls(tokenizer), "constraint": decoding.constraint(tokenizer)}
    options |= {"use_circuit": decoding.circuit, "seed": decoding.seed, "record": decoding.record is not None}
    write = fill_holes if is_infill else continue_prompts
    if decoding.stream:
        with streamed(tokenizer) as on_step:
            out = write(workspace, texts, on_step=on_step, **options)
    else:
        out = write(workspace, texts, **options)
    if decoding.record is not None:
        draw_trajectory(out, tokenizer, decoding.record)
    written = [tokenizer.decode(row.tolist()) for row in out.generated]
    whole = written if is_infill else [text + new for text, new in zip(texts, written, strict=True)]
    print(f"\n{SEPARATOR}\n".join(whole))


def _say(message: str) -> None:
    from rich.console import Console

    Console(soft_wrap=True, highlight=False).print(message)


def _conclusion(row: Any) -> str:
    """Say in words what a row of the gap table shows, and what it does not."""
    from diffusion.evaluation.gap import ABOVE_ONE, NOT_MEANINGFUL, rounded

    one_step, coupled, sequential = (rounded(getattr(row, n).value, 1) for n in ("one_step", "coupled", "sequential"))
    masked = "every token of a block" if row.mask_ratio == 1 else f"a share of {rounded(row.mask_ratio)} of a block"
    seen = (
        f"with {masked} masked, one step of the denoiser alone has perplexity {one_step}, with the circuit {coupled}, "
        f"one token at a time {sequential}"
    )
    if not row.is_meaningful:
        return f"{seen}. What share of the gap the circuit closes is {NOT_MEANINGFUL}; train it longer."
    closed = f"{seen}: the circuit closes {row.share_closed} of the gap, in nats".replace("[", "\\[")  # not markup
    return f"{closed} ({ABOVE_ONE})." if row.share_closed.value > 1 else f"{closed}."


def _print_gap(table: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from diffusion.evaluation.gap import MODELS, rounded

    shown = Table(
        title=f"Perplexity of masked tokens, {table.num_windows} held-out blocks (95 % interval)", title_justify="left"
    )
    for column in ("mask ratio", "one-step", "circuit alone", "coupled", "sequential", "share closed"):
        shown.add_column(column, justify="right")
    for row in table.rows:
        share = _with_interval(row.share_closed) if row.is_meaningful else "not\nmeaningful"
        shown.add_row(rounded(row.mask_ratio), *(_with_interval(getattr(row, name)) for name in MODELS), share)
    Console().print(shown)
    for note in table.notes:
        _say(f"({note})")


def _print_few_steps(table: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"Share of {table.num_texts} texts: {table.criterion} (95 % interval)", title_justify="left")
    for column in ("steps per block", "without circuit", f"with circuit ({table.decode})"):
        shown.add_column(column, justify="right")
    for row in table.rows:
        shown.add_row(str(row.num_steps), _with_interval(row.without), _with_interval(row.coupled))
    Console().print(shown)


def _print_curve(table: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    titles, *rows = table.cells()
    shown = Table(
        title=f"{table.block_length} tokens in few calls, {table.num_texts} texts (nats per token, 95 % intervals)",
        title_justify="left",
    )
    for column, title in enumerate(titles):
        shown.add_column(title, justify="right" if column else "left")
    for row in rows:
        name, *numbers = row
        lines = (number.replace(" [", "\n\\[") for number in numbers)  # so that seven columns fit a terminal of 80
        shown.add_row(name.replace(", ", ",\n").replace(" (", "\n("), *lines)
    Console().print(shown)


def _with_interval(estimate: Any) -> str:
    """Write the interval below the value, so that six columns fit a terminal of 80."""
    from diffusion.evaluation.gap import rounded

    low, high = (rounded(end, 2 if estimate.high < 10 else 1) for end in (estimate.low, estimate.high))
    return f"{rounded(estimate.value)}\n[dim]{low}..{high}[/]"


def _print_side_by_side(workspace: Any, recipe: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    prompts = workspace.held_out_prompts(recipe, 4)
    length = recipe.denoiser.block_length
    columns = [
        workspace.write(prompts, gen_length=length, num_steps=_FEW_STEPS, use_circuit=used, temperature=1.0)
        for used in (False, True)
    ]
    title = f"{length} new tokens in {_FEW_STEPS} calls of the same denoiser, at temperature 1 (greedy: mostly spaces)"
    shown = Table(title=title, show_lines=True)
    for column in ("prompt", "without circuit", "with circuit"):
        shown.add_column(column)
    for row in zip(prompts, *columns, strict=True):
        shown.add_row(*(Text(cell) for cell in row))
    Console().print(shown)


if __name__ == "__main__":
    main()
