"""The state of a run of learning on disk: one safetensors file whose metadata is JSON, replaced as a whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from circuits.digests import digest, named_digest
from circuits.errors import ArgumentError, CheckpointError
from circuits.files import read_tensors, write_tensors
from circuits.reading import short

FORMAT = "unfactor-training"
FORMAT_VERSION = 1
_WAY_OUT = "delete it or give another checkpoint_path"
_EARLIER = ("unfactor-circuit-fit", "unfactor-denoiser-training")


@dataclass(frozen=True, kw_only=True)
class History:
    """How far a run has come, and what was measured on the way: one entry after some of its updates."""

    step: int = 0
    """Updates done."""
    steps: tuple[int, ...] = ()
    """Updates done at every entry."""
    train: tuple[float, ...] = ()
    """Per entry, over the updates since the entry before."""
    validation: tuple[float, ...] = ()
    """Per entry; empty where nothing is held out."""
    best: int = 0
    """The best entry in validation, without one the last."""
    sums: tuple[float, ...] = ()
    """What the updates before the last entry added up to."""

    @property
    def is_at_entry(self) -> bool:
        """Whether the last update was followed by an entry."""
        return self.steps[-1:] == (self.step,)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Hashes of what a run starts from."""

    weights: str
    optimizer: str
    """Of the optimizer's state, which one that was used before brings along."""

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], optimizer: Any) -> Start:
        """Return the hashes of weights and of the state of an optimizer."""
        tensors: dict[str, Tensor] = {}
        tree = json.dumps(_packed(optimizer, "", tensors))
        return cls(weights=named_digest(weights), optimizer=digest(tree, named_digest(tensors)))


@dataclass(frozen=True, eq=False, kw_only=True)
class Snapshot:
    """All that the next update depends on."""

    weights: dict[str, Tensor]
    best_weights: dict[str, Tensor] | None = None
    optimizer: Any = None
    sums: Tensor | None = None
    """What the updates since the last entry add up to."""
    history: History = field(default_factory=History)


class Checkpoint:
    """A file that holds the latest snapshot of one run, or nothing at all when ``path`` is None.

    Args:
        path: the file.
        identity: names of what the run depends on, with a text that changes whenever that does.

    Raises:
        ArgumentError: the path is a folder.
    """

    def __init__(self, path: str | os.PathLike[str] | None, identity: Mapping[str, str]) -> None:
        self.path = None if path is None else Path(path)
        self._identity = dict(identity)
        if self.path is not None and self.path.is_dir():
            raise ArgumentError(f"checkpoint_path: expected a file, got the folder {self.path}; add a file name to it")

    def write(self, snapshot: Snapshot, start: Start) -> None:
        """Replace the file; whoever reads it, at any time, finds the snapshot before or this one."""
        if self.path is None:
            return
        tensors: dict[str, Tensor] = {}
        tree = _packed({f.name: getattr(snapshot, f.name) for f in fields(snapshot)}, "", tensors)
        texts = {"run": self._identity, "start": asdict(start), "tree": tree}
        metadata = {name: json.dumps(value) for name, value in texts.items()}
        write_tensors(self.path, tensors, format=FORMAT, version=FORMAT_VERSION, metadata=metadata)

    def read(self, start: Start) -> tuple[Snapshot, Start] | None:
        """Return the snapshot in the file and what its run started from, None if there is no file.

        Args:
            start: what is to be gone on from: that start, or what the file holds.

        Raises:
            ArgumentError: the file could not be written, which is better known before the first update than after it.
            CheckpointError: the file is corrupt, of another version, or of another run.
        """
        if self.path is None:
            return None
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            is_writable = os.access(folder, os.W_OK)
        except OSError:
            is_writable = False
        if not is_writable:
            raise ArgumentError(f"checkpoint_path: the folder {folder} cannot be written to; give another place")
        if not self.path.exists():
            return None
        try:
            metadata, tensors = read_tensors(self.path, format=FORMAT, versions=(FORMAT_VERSION,), way_out=_WAY_OUT)
        except CheckpointError as error:
            if any(f"got '{earlier}'" in str(error) for earlier in _EARLIER):
                raise self.error(
                    "expected a run of this version, got one of an earlier, with which it does not go on"
                ) from None
            raise
        try:
            differing = _differing(json.loads(metadata["run"]), self._identity)
            if differing:
                raise self.error(f"expected this run, got one with a different {' and '.join(differing)}")
            tree = _unpacked(json.loads(metadata["tree"]), tensors)
            snapshot = Snapshot(**tree | {"history": _history_of(tree["history"])})
            recorded = Start(**json.loads(metadata["start"]))
            self._check_start(start, recorded, snapshot)
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise self.error(f"expected the state of a run, got a part that is none: {short(repr(error))}") from error
        return snapshot, recorded

    def error(self, problem: str) -> CheckpointError:
        """Return an error that says what is wrong with the file, and the way out."""
        return CheckpointError(f"{self.path}: {problem}; {_WAY_OUT}")

    def _check_start(self, start: Start, recorded: Start, snapshot: Snapshot) -> None:
        kept = [weights for weights in (snapshot.weights, snapshot.best_weights) if weights is not None]
        known = [recorded, *(Start.of(weights, snapshot.optimizer) for weights in kept)]
        for name, what in (("weights", "weights"), ("optimizer", "state of the optimizer")):
            if getattr(start, name) not in [getattr(other, name) for other in known]:
                raise self.error(
                    f"expected the {what} of its first call, or those in the checkpoint, got others: it is of a run "
                    "that started elsewhere; make model and optimizer as for that call (with its seed)"
                )


def _history_of(entries: Mapping[str, Any]) -> History:
    return History(
        step=int(entries["step"]),
        steps=tuple(map(int, entries["steps"])),
        train=tuple(map(float, entries["train"])),
        validation=tuple(map(float, entries["validation"])),
        best=int(entries["best"]),
        sums=tuple(map(float, entries["sums"])),
    )


def _differing(saved: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    return sorted(name for name in saved.keys() | expected.keys() if saved.get(name) != expected.get(name))


def _packed(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` as JSON, in which a list says its kind first; tensors go to ``tensors`` under their paths."""
    if isinstance(value, History):
        value = asdict(value)
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return ["tensor", path]
    if isinstance(value, Mapping):
        return ["dict", [[key, _packed(item, f"{path}/{key}", tensors)] for key, item in value.items()]]
    if isinstance(value, (list, tuple)):
        return ["list", [_packed(item, f"{path}/{position}", tensors) for position, item in enumerate(value)]]
    if value is None or isinstance(value, (bool, int, float, str)):
        return ["value", value]
    raise ArgumentError(
        f"optimizer: its state has a {type(value).__name__} at {path}, which a checkpoint cannot hold; fit without "
        "checkpoint_path, or use another optimizer"
    )


def _unpacked(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    kind, content = packed
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpacked(item, tensors) for key, item in content}
    if kind == "list":
        return [_unpacked(item, tensors) for item in content]
    return content
