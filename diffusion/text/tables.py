"""Texts in tables: columns of Parquet files, and of datasets of the Hugging Face hub or of a folder.

A table is read a part at a time and a column at a time: what is in memory is a part of the columns that are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from circuits.reading import regular_size, short
from diffusion.errors import ArgumentError, CorpusError
from diffusion.text.tokenizer import is_text

DATASET = "dataset:"
"""What the name of a dataset begins with: ``dataset:NAME``, ``dataset:NAME:CONFIGURATION``, each with ``@SPLIT``."""
_ROWS = 1024

_Parts = Callable[[Sequence[str]], Iterator[Mapping[str, list[Any]]]]


@dataclass(frozen=True)
class Table:
    """Rows of named columns.

    Attributes:
        name: of the file or dataset, for messages.
        columns: their names.
        parts: from names of columns to their values, a part of the rows at a time.
    """

    name: str
    columns: tuple[str, ...]
    parts: _Parts

    def texts(self, *columns: str) -> Iterator[tuple[str, ...]]:
        """Yield the texts of some columns, row by row.

        Raises:
            CorpusError: there is no such column, a value is no text, or the table cannot be read to its end.
        """
        for column in columns:
            if column not in self.columns:
                raise CorpusError(
                    f"{self.name}: expected a column {column!r}, got {', '.join(self.columns):.200}; name one of them"
                )
            count = self.columns.count(column)
            if count > 1:
                raise CorpusError(f"{self.name}: expected one column {column!r}, got {count}; rename all but one")
        number = 0
        for part in self.parts(columns):
            for row in zip(*(part[column] for column in columns), strict=True):
                number += 1
                for column, value in zip(columns, row, strict=True):
                    if not isinstance(value, str) or not is_text(value):
                        found = "half of a surrogate pair in it" if isinstance(value, str) else short(value)
                        raise CorpusError(f"{self.name}, row {number}: {column}: expected text, got {found}")
                yield row


def is_table(source: str) -> bool:
    """Whether a source of texts is a Parquet file or a dataset."""
    return source.startswith(DATASET) or source.endswith(".parquet")


def open_table(source: str) -> Table:
    """Open a Parquet file or a dataset.

    Raises:
        CorpusError: it is missing, or no such table.
        ArgumentError: the package that reads it is not installed.
    """
    return _dataset(source) if source.startswith(DATASET) else _parquet(source)


def absolute_source(source: str) -> str:
    """Return a source that means the same in every folder: a path becomes an absolute one."""
    if not source.startswith(DATASET):
        return os.path.abspath(source)
    name, rest = _split(source)
    return f"{DATASET}{os.path.abspath(name)}{rest}" if os.path.isdir(name) else source


def _parquet(path: str) -> Table:
    try:
        regular_size(path)
    except FileNotFoundError as error:
        raise CorpusError(f"{path}: expected a file, got none there; look at the path") from error
    except OSError as error:
        raise CorpusError(f"{path}: expected a regular file, got {_line(error)}; copy it to one") from error
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ArgumentError(
            f"pyarrow: expected the package to be installed, for {path}, got none; pip install pyarrow"
        ) from error
    try:
        file = ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise CorpusError(f"{path}: expected a whole Parquet file, got {_line(error)}; copy it again") from error

    def parts(columns: Sequence[str]) -> Iterator[Mapping[str, list[Any]]]:
        try:
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=list(columns)):
                    yield batch.to_pydict()
        except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
            raise CorpusError(f"{path}: expected rows to its end, got {_line(error)}; copy it again") from error

    return Table(path, tuple(file.schema_arrow.names), parts)


def _dataset(source: str) -> Table:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ArgumentError(
            f"datasets: expected the package to be installed, for {source}, got none; pip install 'unfactor[hf]'"
        ) from error
    name, rest = _split(source)
    configuration, _, split = rest.removeprefix(":").partition("@")
    try:
        records = load_dataset(name, configuration or None, split=split or "train")
    except Exception as error:  # of the network, the hub or the dataset: many types
        raise CorpusError(
            f"{source}: expected a dataset of the hub or a folder, as {DATASET}NAME:CONFIGURATION@SPLIT, got "
            f"{type(error).__name__}: {_line(error)}; take a .parquet or .jsonl file"
        ) from error

    def parts(columns: Sequence[str]) -> Iterator[Mapping[str, list[Any]]]:
        yield from records.select_columns(list(columns)).iter(batch_size=_ROWS)

    return Table(source, tuple(records.column_names), parts)


def _split(source: str) -> tuple[str, str]:
    """Return the name of a dataset, and what stands after it, from its : or @ on."""
    name = source.removeprefix(DATASET)
    at = min((index for index in (name.find(":"), name.find("@")) if index >= 0), default=len(name))
    return name[:at], name[at:]


def _line(error: Exception) -> str:
    return f"{' '.join(str(error).split()):.200}"
