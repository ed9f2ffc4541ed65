"""What was measured of every question, kept in a file that only grows: an interrupted run is taken up where it was."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from circuits.digests import digest
from circuits.reading import parsed_json, record_of, regular_size, short
from diffusion.errors import ArgumentError, CheckpointError

_FORMAT, _VERSION = "unfactor samples", 1


@dataclass(frozen=True)
class Sample:
    """One question, answered.

    Attributes:
        index: of the question in the task.
        example: a hash of the question and what is right.
        text: what the model wrote.
        answer: what was found in it, None where nothing was.
        is_right: whether that is right.
        num_tokens: tokens committed; padding after the end of the text is not counted.
        num_calls: denoiser calls that this text took part in.
        num_windows: windows that were decoded.
        num_coupled: in how many of them the circuit was used.
        seconds: its share of the time that its batch took.
    """

    index: int
    example: str
    text: str
    answer: str | None
    is_right: bool
    num_tokens: int
    num_calls: int
    num_windows: int
    num_coupled: int
    seconds: float


class SampleFile:
    """A file of samples of one model with one setting; the name has a hash of both.

    A first line says what the samples were made with, then there is a line a sample. Lines are appended and brought to
    the disk before the next batch begins. What a crash left of a last line is cut off.
    """

    def __init__(self, path: Path, made_with: Mapping[str, Any], file: Any) -> None:
        self.path = path
        self._made_with = made_with
        self._file = file

    @classmethod
    @contextmanager
    def opened(cls, folder: str | os.PathLike[str], made_with: Mapping[str, Any]) -> Iterator[SampleFile]:
        """Open, or begin, the file of what samples are made with; while it is open, no other process can.

        Args:
            folder: of the files.
            made_with: model, settings and task, in values that JSON has.

        Raises:
            CheckpointError: another process has it open, or it is damaged.
            ArgumentError: it cannot be written.
        """
        described = json.dumps(made_with, sort_keys=True)
        path = Path(folder) / f"{digest(described)[:16]}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                regular_size(path)
            file = path.open("a+b")
        except OSError as error:
            raise ArgumentError(f"out: expected a folder that can be written, and {path} cannot be: {error}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise CheckpointError(
                    f"{path}: expected it for this run alone, got another run at work; wait for that, or stop it"
                ) from error
            yield cls(path, json.loads(described), file)

    def read(self) -> dict[int, Sample]:
        """Return what is there, by index.

        Raises CheckpointError if a line other than the last is damaged, or the file was made with something else.
        """
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # a line that a crash has cut
            self._file.truncate(whole)
        lines = content[:whole].splitlines()
        if not lines:
            self._write([{"format": _FORMAT, "format_version": _VERSION, "made_with": self._made_with}])
            return {}
        header = self._parsed(lines[0], 1)
        if header.get("format") != _FORMAT or header.get("format_version") != _VERSION:
            raise CheckpointError(
                f"{self.path}: line 1: expected the head of a file of samples, got another; delete it and start again"
            )
        if header.get("made_with") != self._made_with:
            raise CheckpointError(
                f"{self.path}: made_with: expected the settings that its name is of, got others; delete it"
            )
        samples = [self._sample(line, number) for number, line in enumerate(lines[1:], 2)]
        return {sample.index: sample for sample in samples}

    def append(self, samples: Sequence[Sample]) -> None:
        """Write samples to the disk, all of them or none after a crash of the machine but for a part that is cut off.

        Raises ArgumentError if the disk is full, or the like.
        """
        self._write([asdict(sample) for sample in samples])

    def _write(self, records: Sequence[Mapping[str, Any]]) -> None:
        try:
            self._file.write("".join(f"{json.dumps(record)}\n" for record in records).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ArgumentError(f"out: {self.path} cannot be written: {error.strerror or error}") from error

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = parsed_json(line)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{self.path}: line {number}: expected JSON, got something else: {error}; delete it and start again"
            ) from error
        if not isinstance(record, dict):
            raise CheckpointError(f"{self.path}: line {number}: expected an object, got {short(record)}; delete it")
        return record

    def _sample(self, line: bytes, number: int) -> Sample:
        record = self._parsed(line, number)
        try:
            return record_of(Sample, record, f"line {number}", optional=())
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}; delete it and start again") from error
