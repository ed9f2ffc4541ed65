"""Measures of what models do: on their own held-out text, on tasks with right answers, and judged from outside."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from diffusion.app.commands.common import Quiet, app, open_workspace
from diffusion.app.models import DEFAULT_OUT, ModelOptions
from diffusion.app.option_groups import MOST, with_options
from diffusion.app.options import CONFIG_HELP, Decode, StrategyName
from diffusion.app.task_options import TaskOptions
from diffusion.app.terminal import print_annotations, print_cells, print_curve, print_few_steps, print_gap, say
from diffusion.decoding.config import DecodingConfig
from diffusion.decoding.names import flags, strategy_named
from diffusion.errors import ArgumentError


@app.command()
@with_options
def evaluate(
    models: ModelOptions,
    tasks: TaskOptions,
    windows: Annotated[int | None, typer.Option(min=2, max=MOST, help="Held-out blocks of the gap table.")] = None,
    texts: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Texts of the few-step and arithmetic tables, and for a scorer.")
    ] = None,
    few_steps: Annotated[
        bool, typer.Option("--few-steps/--no-few-steps", help="Measure text written in 1 to 32 calls; takes minutes.")
    ] = True,
    decode: Decode = None,
    strategy: StrategyName = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            *flags("temperature"),
            help=CONFIG_HELP["temperature"],
            show_default="1; of a task 0, or the head's",
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Measure and draw the gap table, the few-step curve, and the share of what is right where that is known.

    That is known of sums in the arithmetic corpus, and of calculator annotations, as in <<48/2=24>>, wherever they are.

    The few-step curve is always at temperature 1, in mode joint and by entropy. With --task: accuracy, calls and tokens
    per call of a task in every way of decoding that is named, without the circuit and with it. With --scorer:
    perplexity under another model, beside distinct-n. Both go on where they were interrupted.
    """
    chosen: dict[str, Any] = {"decode": decode, "strategy": strategy, "temperature": temperature}
    if tasks.task is not None or tasks.scorer is not None:
        if windows is not None:
            raise ArgumentError("windows: expected none with --task or --scorer, which have no gap table; leave it out")
        _evaluate_task(models, tasks, texts, progress=not quiet, **chosen)
        return
    tasks.check_unused()
    if models.is_named:
        raise ArgumentError("task: expected one with --model, got none; name it with --task")
    workspace = open_workspace(models.out or DEFAULT_OUT, models.device, quiet)
    recipe = workspace.recipe()
    recipe = replace(recipe, gap_windows=windows or recipe.gap_windows, texts=texts or recipe.texts)
    chosen["strategy"] = strategy_named(strategy)
    options: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    options.setdefault("temperature", 1.0)
    DecodingConfig(**options)  # which refuses what it does not know, before anything is measured
    _measure(workspace, recipe, few_steps, options)


def _measure(workspace: Any, recipe: Any, few_steps: bool, options: dict[str, Any]) -> None:
    from diffusion.app.measures import evaluate_annotations
    from diffusion.app.showing import report, report_sections, show_blocks

    gap, curve, annotations = workspace.evaluate_gap(recipe), None, None
    print_gap(gap)
    if few_steps:
        curve = workspace.evaluate_few_steps(recipe)
        print_curve(curve)
        annotations = evaluate_annotations(workspace, recipe)
        if annotations is not None:
            print_annotations(annotations)
    if recipe.text.corpus == "arithmetic":
        print_few_steps(workspace.evaluate_arithmetic(recipe, **options))
    shown = show_blocks(workspace, recipe)
    report(workspace, report_sections(workspace, shown=shown, curve=curve, annotations=annotations, gap=gap), shown)
    say(f"To look at: {workspace.results / 'report.html'}; tables and pictures are beside it")


def _evaluate_task(
    models: ModelOptions, tasks: TaskOptions, texts: int | None, *, progress: bool, **chosen: Any
) -> None:
    from diffusion.app.tasks import (
        SCORED_LENGTH,
        asked_grid,
        asked_task,
        held_out_task,
        results_of,
        run_scorer,
        run_task,
    )

    if tasks.task is not None and texts is not None:
        raise ArgumentError("texts: expected none with --task, whose questions are answered; take --limit for fewer")
    task = None if tasks.task is None else asked_task(tasks)  # before models are loaded, which takes longer
    if task is None and models.is_named:
        raise ArgumentError("task: expected one with --model, got none; name it with --task, its answers are judged")
    folder = None if models.is_named else models.out or DEFAULT_OUT
    opened = models.open(use_circuit=tasks.circuit)
    results = results_of(opened, tasks, folder)
    if task is not None:
        table, judged = run_task(opened, task, asked_grid(tasks, **chosen), tasks, results, progress=progress)
        print_cells(table.title, table.cells())
        if table.comparison():
            print_cells("", table.comparison())
    else:
        workspace = open_workspace(folder or DEFAULT_OUT, models.device, quiet=True)
        recipe, length = workspace.recipe(), tasks.length or SCORED_LENGTH
        held_out = held_out_task(opened, workspace.path, recipe, count=texts or recipe.texts, length=length)
        if chosen["temperature"] is None:
            chosen["temperature"] = 1.0
        grid = asked_grid(tasks, **chosen)
        judged = run_scorer(opened, held_out, grid, tasks, results, progress=progress)
    if judged is not None:
        print_cells("Texts, with 95 % intervals", judged.cells())
    say(f"Answers, tables and pictures are in {results}/")
