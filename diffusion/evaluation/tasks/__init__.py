"""Tasks with right answers: accuracy, denoiser calls and what both say together."""

from diffusion.evaluation.tasks.catalogue import load_task
from diffusion.evaluation.tasks.measures import accuracy_at, accuracy_under_parallelism
from diffusion.evaluation.tasks.runner import Grid, Options, answer_task, evaluate_task
from diffusion.evaluation.tasks.samples import Sample
from diffusion.evaluation.tasks.table import Setting, TaskPoint, TaskTable
from diffusion.evaluation.tasks.task import Example, Task

__all__ = [
    "Example",
    "Grid",
    "Options",
    "Sample",
    "Setting",
    "Task",
    "TaskPoint",
    "TaskTable",
    "accuracy_at",
    "accuracy_under_parallelism",
    "answer_task",
    "evaluate_task",
    "load_task",
]
