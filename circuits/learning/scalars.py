"""What a run measures on its way, written for TensorBoard."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from circuits.errors import ArgumentError
from circuits.files import system_errors

Write = Callable[[int, Mapping[str, float]], None]
"""From the number of updates done and measures by name."""


@contextlib.contextmanager
def scalar_log(log_dir: str | os.PathLike[str], start: int) -> Iterator[Write]:
    """Yield a function that writes scalars into a folder for TensorBoard.

    Args:
        log_dir: the folder of one run.
        start: updates done before; what an interrupted run wrote of later ones no longer counts.

    Raises:
        ArgumentError: TensorBoard is not installed.
        StorageError: the folder cannot be written.
    """
    writer_type = summary_writer()
    with system_errors(log_dir):
        writer = writer_type(os.fspath(log_dir), purge_step=start + 1)

    def write(step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    try:
        yield write
    finally:
        writer.close()


def summary_writer() -> Any:
    """Return TensorBoard's type of writers; raises ArgumentError if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ArgumentError("log_dir: expected the package tensorboard, got none; pip install tensorboard") from error
    return SummaryWriter
