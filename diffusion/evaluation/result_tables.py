"""What the tables of results have in common: words, Markdown, and JSON on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from diffusion.json_files import write_json


class ResultTable:
    """A dataclass of results, which says what its cells are."""

    def cells(self) -> list[tuple[str, ...]]:
        """Return the table in words, a title row first."""
        raise NotImplementedError

    @property
    def notes(self) -> tuple[str, ...]:
        """What has to be said wherever the table is shown."""
        return ()

    def __str__(self) -> str:
        return "".join([markdown(self.cells()), *(f"\n\n({note})" for note in self.notes)])

    def as_record(self) -> dict[str, Any]:
        """Return all of it in values that JSON has."""
        return asdict(self)  # type: ignore[call-overload]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, atomically."""
        write_json(path, self.as_record())


def markdown(cells: Sequence[tuple[str, ...]]) -> str:
    """Return a table in words, a title row first, as Markdown."""
    titles, *rows = ("| " + " | ".join(row) + " |" for row in cells)
    return "\n".join([titles, "|" + "---|" * len(cells[0]), *rows])
