"""The state of a fit on disk: one safetensors file whose metadata is JSON, replaced as a whole after every epoch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuits._files import replace_file
from circuits.errors import ArgumentError, CheckpointError
from circuits.learning._samples import digest

FORMAT = "unfactor-circuit-fit"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class History:
    """What was measured in every epoch so far."""

    train: tuple[float, ...] = ()
    validation: tuple[float, ...] = ()
    best_epoch: int = 0
    num_impossible: int = 0
    """In the last epoch."""

    @property
    def num_epochs(self) -> int:
        """How many epochs were done."""
        return len(self.train)


@dataclass(frozen=True, eq=False, kw_only=True)
class Snapshot:
    """All that the next epoch depends on."""

    weights: dict[str, Tensor]
    best_weights: dict[str, Tensor] | None
    learner: Any
    """What ``Learner.state`` returned."""
    history: History


class Checkpoint:
    """A file that holds the latest snapshot of one run, or nothing at all when ``path`` is None."""

    def __init__(self, path: str | os.PathLike[str] | None, identity: Mapping[str, str]) -> None:
        self._path = None if path is None else Path(path)
        self._identity = dict(identity)
        if self._path is not None and self._path.is_dir():
            raise ArgumentError(f"checkpoint_path: expected a file, got the folder {self._path}; add a file name to it")

    def write(self, snapshot: Snapshot) -> None:
        """Replace the file; whoever reads it, at any time, finds the snapshot before or this one."""
        if self._path is None:
            return
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        tree = _packed({f.name: getattr(snapshot, f.name) for f in fields(snapshot)}, "", tensors)
        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "run": json.dumps(self._identity),
            "tree": json.dumps(tree),
        }
        metadata["sha256"] = _digest_of(metadata, tensors)
        with replace_file(self._path) as temporary:
            save_file(tensors, temporary, metadata)

    def read(self) -> Snapshot | None:
        """Return the snapshot in the file, None if there is no file.

        Raises:
            ArgumentError: the file could not be written, which is better known before the first epoch than after it.
            CheckpointError: the file is corrupt, of a newer version, or of another run.
        """
        if self._path is None:
            return None
        folder = self._path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            is_writable = os.access(folder, os.W_OK)
        except OSError:
            is_writable = False
        if not is_writable:
            raise ArgumentError(f"checkpoint_path: the folder {folder} cannot be written to; give another place")
        if not self._path.exists():
            return None
        metadata, tensors = self._contents(self._path)
        if metadata.get("format") != FORMAT:
            raise self.error("is not a checkpoint of ct.learning.fit")
        version = metadata.get("format_version")
        if version != str(FORMAT_VERSION):
            raise self.error(f"has format version {version!r} and this library reads version {FORMAT_VERSION}")
        if metadata.get("sha256") != _digest_of(metadata, tensors):
            raise self.error("is corrupt: its contents do not match their hash")
        try:
            differing = _differing(json.loads(metadata["run"]), self._identity)
            if differing:
                raise self.error(f"is of another run, with a different {' and '.join(differing)}")
            tree = _unpacked(json.loads(metadata["tree"]), tensors)
            return Snapshot(**tree | {"history": _history_of(**tree["history"])})
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise self.error(f"is corrupt: {error!r}") from error

    def error(self, problem: str) -> CheckpointError:
        """Return an error that says what is wrong with the file, and the way out."""
        return CheckpointError(f"checkpoint {self._path} {problem}; delete it or give another checkpoint_path")

    def _contents(self, path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                # copies are aligned like all tensors: sums of others may be rounded differently, and the run would end
                # in another last bit
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                return file.metadata() or {}, tensors
        except (SafetensorError, OSError, ValueError) as error:
            raise self.error(f"cannot be read: {error}") from error


def _history_of(train: list[float], validation: list[float], best_epoch: int, num_impossible: int) -> History:
    return History(
        train=tuple(map(float, train)),
        validation=tuple(map(float, validation)),
        best_epoch=int(best_epoch),
        num_impossible=int(num_impossible),
    )


def _digest_of(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    texts = [f"{name}={metadata.get(name)}" for name in ("run", "tree")]
    header = torch.tensor(list("\n".join([*texts, *sorted(tensors)]).encode()), dtype=torch.uint8)
    return digest(header, *(tensors[name] for name in sorted(tensors)))


def _differing(saved: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    return sorted(name for name in saved.keys() | expected.keys() if saved.get(name) != expected.get(name))


def _packed(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` as JSON, in which a list says its kind first; tensors go to ``tensors`` under their paths."""
    if isinstance(value, History):
        value = asdict(value)
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return ["tensor", path]
    if isinstance(value, dict):
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
