"""The data of a task: a local file of JSON lines, or a dataset of the hub where the network allows it."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from circuits.reading import parsed_json, regular_size
from diffusion.errors import ArgumentError
from diffusion.evaluation.tasks.task import Example

_LONGEST_LINE = 1 << 24

Reader = Callable[[dict[str, Any]], Example]
"""From one record of the data to an example; raises KeyError, TypeError or ValueError where it does not fit."""


def read_examples(
    path: str | os.PathLike[str], reader: Reader, *, name: str = "data", limit: int | None = None
) -> tuple[Example, ...]:
    """Read a file with one JSON object a line, ``.jsonl`` or ``.jsonl.gz``, up to a limit; ``name`` is the argument's.

    Raises ArgumentError if it is missing, empty, or not as it has to be.
    """
    found = []
    for number, line in enumerate(_lines(Path(path), name), 1):
        if not line.strip():
            continue
        try:
            record = parsed_json(line.encode())
            if not isinstance(record, dict):
                raise TypeError(f"expected an object with keys, got {type(record).__name__}")
            found.append(reader(record))
        except KeyError as error:
            raise ArgumentError(
                f"{name}: expected every line of {path} to have the key {error}, got {', '.join(record)} in line "
                f"{number}"
            ) from error
        except (TypeError, ValueError, RecursionError) as error:
            raise ArgumentError(f"{name}: {path}, line {number}: {error}") from error
        if limit is not None and len(found) >= limit:
            break
    if not found:
        raise ArgumentError(f"{name}: expected a file with one JSON object a line, got {path} without one")
    return tuple(found)


def download_examples(
    path: str, configuration: str | None, split: str, reader: Reader, *, limit: int | None = None
) -> tuple[Example, ...]:
    """Read a dataset of the Hugging Face hub; needs ``datasets`` (the extra [hf]) and a network, or its cache.

    Raises ArgumentError if it cannot be had.
    """
    try:
        from datasets import load_dataset

        records = load_dataset(path, configuration, split=split)
        count = len(records) if limit is None else min(limit, len(records))
        return tuple(reader(cast("dict[str, Any]", records[number])) for number in range(count))
    except Exception as error:  # of the network, the hub or the dataset: many types
        reason = " ".join(str(error).split())
        raise ArgumentError(
            f"data: expected the dataset {path} from the hub, got {type(error).__name__}: {reason:.200}; name a local "
            "file with --data FILE.jsonl"
        ) from error


def text_of(value: object) -> str:
    """Return a text or a number of a record as text; raises TypeError for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise TypeError(f"expected a text, got {value!r:.60}")


def _lines(path: Path, name: str) -> Iterator[str]:
    try:
        regular_size(path)
        with _opened(path) as file:
            while line := file.readline(_LONGEST_LINE):
                if len(line) == _LONGEST_LINE:
                    raise ArgumentError(f"{name}: {path}: expected lines of at most {_LONGEST_LINE:,} characters")
                yield line
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ArgumentError(f"{name}: expected a file of JSON lines, and {path} cannot be read: {error}") from error


def _opened(path: Path) -> IO[str]:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")
