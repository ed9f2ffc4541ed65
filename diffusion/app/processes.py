"""The processes of one command: torchrun starts several of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from circuits.learning import join_processes
from circuits.learning.distributed import Processes


def shard() -> tuple[int, int] | None:
    """Return which of torchrun's processes this is, and of how many; None where there is one."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ["RANK"]), count) if count > 1 else None


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that torchrun started, each on a GPU of its own where there are some, for a block.

    Raises:
        ProcessLostError: another of them ended.
    """
    if shard() is None:
        yield Processes()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with join_processes() as group:
        yield Processes(group)
