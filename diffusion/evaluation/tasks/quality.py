"""What a denoiser wrote, judged by a causal language model that is not ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffusion.evaluation.scorer import CausalScorer, QualityRow, QualityTable
from diffusion.evaluation.tasks.samples import Sample
from diffusion.evaluation.tasks.table import Setting
from diffusion.evaluation.tasks.task import Example, Task

TRUE_TEXT = "true text"


def text_task(prompts: Sequence[str], continuations: Sequence[str] | None = None, *, gen_length: int = 64) -> Task:
    """Return a task that asks for nothing but text: no answer of it is right.

    Args:
        prompts: what is to be continued.
        continuations: what really follows; None: it is not known.
        gen_length: tokens to generate at most.
    """
    follows = [""] * len(prompts) if continuations is None else continuations
    return Task(
        name="text",
        examples=tuple(Example(prompt, (), text) for prompt, text in zip(prompts, follows, strict=True)),
        template="{question}",
        extract=lambda text: None,
        is_right=lambda answer, example: False,
        gen_length=gen_length,
    )


def judge_texts(
    task: Task, answers: Mapping[Setting, Sequence[Sample]], scorer: CausalScorer, *, batch_size: int = 8, seed: int = 0
) -> QualityTable:
    """Return the perplexity and the different n-grams of what was written in each way, and of the true text.

    Args:
        task: what was asked, with the true text as its solutions where that is known.
        answers: of :func:`~diffusion.evaluation.tasks.runner.answer_task`.
        scorer: the judge.
        batch_size: texts at a time.
        seed: of the bootstrap.

    Raises:
        ArgumentError: nothing was written in some way, or the judge cannot read texts of that length.
    """
    prompts = [task.prompt(example) for example in task.examples]
    rows = []
    for setting, samples in answers.items():
        quality = scorer.quality([sample.text for sample in samples], prompts, batch_size=batch_size, seed=seed)
        num_calls = sum(sample.num_calls for sample in samples) / len(samples)
        rows.append(QualityRow(setting.label, num_calls, quality))
    solutions = [example.solution for example in task.examples]
    if all(solutions):
        rows.append(QualityRow(TRUE_TEXT, None, scorer.quality(solutions, prompts, batch_size=batch_size, seed=seed)))
    return QualityTable(scorer.name, tuple(rows))
