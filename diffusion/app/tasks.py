"""Tasks and judged texts of the program: what is measured, and the files that it leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from circuits.files import replace_file
from diffusion.app.models import Models
from diffusion.app.recipe import Recipe
from diffusion.app.sources import check_corpus, corpus_of, encoded_corpus
from diffusion.app.task_options import RESULTS, TaskOptions, parsed_list
from diffusion.decoding.names import strategy_named
from diffusion.evaluation.scorer import CausalScorer, QualityTable
from diffusion.evaluation.tasks import Grid, Options, Task, TaskTable, answer_task, load_task
from diffusion.evaluation.tasks.quality import judge_texts, text_task
from diffusion.evaluation.tasks.table import TaskPoint
from diffusion.text.corpus import join_documents, windows

SCORED_LENGTH = 64
"""Tokens of a text that is judged, unless told otherwise."""


def asked_task(options: TaskOptions) -> Task:
    """Return the task that the options name; raises ArgumentError as :func:`load_task`."""
    names = ("data", "limit", "shots", "shots_data", "template", "answer_pattern", "allow_code_execution")
    return load_task(options.task, **{name: options.given[name] for name in names})


def asked_grid(options: TaskOptions, *, decode: str | None, strategy: str | None, temperature: float | None) -> Grid:
    """Return the ways of decoding that the options name; strategies are separated by commas."""
    named: dict[str, Any] = {"decode": decode} if decode is not None else {}
    named_strategy: Callable[[str], Any] = strategy_named
    return Grid(
        num_steps=options.list_of("steps", int),
        tokens_per_step=options.list_of("tokens_per_step", int),
        strategies=parsed_list("strategy", strategy, named_strategy),
        thresholds=options.list_of("threshold", float),
        entropy_bounds=options.list_of("entropy_bound", float),
        joint_entropy_bounds=options.list_of("joint_entropy_bound", float),
        temperature=temperature,
        activation_threshold=options.activation_threshold,
        reverse_activation=options.reverse_activation,
        dynamic_windows=options.dynamic_windows,
        gen_length=options.length,
        block_length=options.block,
        **named,
    )


def results_of(models: Models, options: TaskOptions, out: Path | None) -> Path:
    """Return where results go: where the options say, else the folder's own, else one for models by name."""
    if options.results is not None:
        return Path(options.results)
    return RESULTS if out is None else out / "results"


def run_task(
    models: Models, task: Task, grid: Grid, options: TaskOptions, results: Path, *, progress: bool
) -> tuple[TaskTable, QualityTable | None]:
    """Answer a task, judge the answers, and write results/TASK.json, .txt and .png.

    With a scorer also TASK-texts.json and .txt. The answers are kept in ``TASK-answers``.
    """
    from diffusion.evaluation.tasks.plots import draw_task

    scorer = _scorer(models, options)
    answering = Options(batch_size=options.batch_size, chat=options.chat, progress=progress)
    answers = _answers(models, task, grid, results / f"{task.name}-answers", options.seed, answering)
    points = tuple(TaskPoint.of(setting, samples) for setting, samples in answers.items())
    table = TaskTable(task.name, points, len(task.shots), options.seed)
    _keep(table, results / task.name)
    draw_task(table, results / f"{task.name}.png")
    return table, None if scorer is None else _judged(task, answers, scorer, options, results / f"{task.name}-texts")


def run_scorer(
    models: Models, task: Task, grid: Grid, options: TaskOptions, results: Path, *, progress: bool
) -> QualityTable:
    """Write texts after prompts, let the scorer judge them, and write results/texts.json and .txt."""
    scorer = _scorer(models, options)
    assert scorer is not None
    answering = Options(batch_size=options.batch_size, progress=progress)
    answers = _answers(models, task, grid, results / "texts-answers", options.seed, answering)
    return _judged(task, answers, scorer, options, results / "texts")


def held_out_task(models: Models, folder: Path, recipe: Recipe, *, count: int, length: int) -> Task:
    """Return the task to continue parts of held-out text, spread evenly over it, with what really follows them.

    Raises CorpusError if that text is shorter than one part.
    """
    corpus, context = corpus_of(recipe), recipe.denoiser.context_length
    check_corpus(folder, corpus)
    tokenizer = models.tokenizer
    stream = join_documents(encoded_corpus(folder, corpus.held_out, tokenizer), eos_id=tokenizer.eos_id)
    parts = windows(stream, length=context + length, max_windows=count).tolist()
    prompts, follows = (
        [tokenizer.decode(part[cut]) for part in parts] for cut in (slice(context), slice(context, None))
    )
    return text_task(prompts, follows, gen_length=length)


def _scorer(models: Models, options: TaskOptions) -> CausalScorer | None:
    return None if options.scorer is None else CausalScorer.load(options.scorer, device=models.device)


def _answers(models: Models, task: Task, grid: Grid, folder: Path, seed: int, options: Options) -> Any:
    others: dict[str, Any] = {"head": models.head, "folder": folder, "seed": seed, "options": options}
    return answer_task(models.denoiser, models.tokenizer, task, grid, **others)


def _judged(task: Task, answers: Any, scorer: CausalScorer, options: TaskOptions, path: Path) -> QualityTable:
    table = judge_texts(task, answers, scorer, batch_size=options.batch_size, seed=options.seed)
    _keep(table, path)
    return table


def _keep(table: TaskTable | QualityTable, path: Path) -> None:
    table.save(path.with_name(f"{path.name}.json"))
    with replace_file(path.with_name(f"{path.name}.txt")) as temporary:
        temporary.write_text(f"{table}\n", encoding="utf-8")
