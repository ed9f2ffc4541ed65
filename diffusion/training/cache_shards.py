"""Caches that several processes wrote side by side: a folder of shards, read as one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from circuits.arguments import checked_count
from diffusion.errors import ArgumentError, CheckpointError

_NAME = re.compile(r"shard-(\d{5})-of-(\d{5})")


class Joined:
    """Arrays one after the other along their first axis, read like one; they stay where they are, on disk.

    Args:
        parts: of equal shapes but for the first axis.
    """

    def __init__(self, parts: Sequence[NDArray[Any]]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.shape = (int(self._ends[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: NDArray[np.int64] | slice) -> NDArray[Any]:
        rows = np.arange(len(self))[index]
        which = np.searchsorted(self._ends, rows, side="right")
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for number, part in enumerate(self._parts):
            here = which == number
            found[here] = part[rows[here] - (self._ends[number] - len(part))]
        return found


def shard_folder(folder: Path, shard: tuple[int, int]) -> Path:
    """Return the folder of shard (index, count); raises ArgumentError unless 0 <= index < count."""
    index, count = shard
    checked_count("shard", count)
    if not 0 <= index < count <= 99_999:
        raise ArgumentError(f"shard: expected (index, count) with 0 <= index < count <= 99999, got {shard}")
    return folder / f"shard-{index:05d}-of-{count:05d}"


def shards_of(folder: Path) -> list[Path]:
    """Return a folder's shards in order, none where it has none.

    Raises:
        CheckpointError: one is missing, or they are of different numbers.
    """
    found = sorted(path for path in folder.glob("shard-*") if _NAME.fullmatch(path.name))
    counts = {int(path.name[-5:]) for path in found}
    if len(counts) > 1 or counts - {len(found)}:
        raise CheckpointError(
            f"{folder}: expected {' or '.join(map(str, sorted(counts)))} shards, got {len(found)}; complete them by "
            "calling cache_logits in as many processes, or delete those of another number"
        )
    return found
