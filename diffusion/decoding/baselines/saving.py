"""Folders that hold a baseline head: its kind and settings, its weights, a circuit; no pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

import circuits as ct
from circuits.files import check_finite, not_finite, read_tensors, write_tensors
from circuits.store import Manifest, read_folder, replace_folder, write_manifest
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.head import circuit_hash

FORMAT = "unfactor-baseline-head"
FORMAT_VERSION = 2  # there never was a version 1
_FILE = "baseline.safetensors"
_WAY_OUT = "save the head again"

KINDS: dict[str, Any] = {}
"""The classes of heads, by what files call them."""

AnyHead = TypeVar("AnyHead")
AnyModule = TypeVar("AnyModule", bound=nn.Module)


class Content(NamedTuple):
    """What a head is built of."""

    settings: dict[str, Any]
    """What JSON can hold."""
    tensors: dict[str, Tensor]
    circuit: ct.CompiledCircuit | None = None

    def needed_circuit(self) -> ct.CompiledCircuit:
        """Return the circuit; raise KeyError if there is none."""
        if self.circuit is None:
            raise KeyError("circuit")
        return self.circuit


def load_head(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Any:
    """Read a head that one of the baselines saved, of whatever kind it is.

    Args:
        path: the folder.
        device: where the head is to be.

    Raises:
        CheckpointError: a file is missing, corrupt, of a newer format, or does not belong to the others.
    """
    return load_content(path, object, device)


def save_content(path: str | os.PathLike[str], kind: str, owner: type, content: Content) -> None:
    """Write the folder of a head of class ``owner``; see :meth:`~.base.BlockHead.save`."""
    if KINDS.get(kind) is not owner:
        raise ArgumentError(
            f"head: expected a class whose kind is its own, got {owner.__name__} with that of another, {kind!r}; give "
            "the class a kind"
        )
    bad = not_finite(content.tensors)
    if bad is not None:
        raise ArgumentError(f"head: {bad} has NaN or infinite numbers; such a head cannot be saved")
    with replace_folder(path, ("circuit", _FILE), kind="a saved baseline head") as folder:
        metadata = {"kind": kind, "settings": json.dumps(content.settings)}
        if content.circuit is not None:
            ct.save(content.circuit, folder / "circuit")
            metadata["circuit_sha256"] = circuit_hash(folder)
        write_tensors(folder / _FILE, content.tensors, format=FORMAT, version=FORMAT_VERSION, metadata=metadata)
        write_manifest(folder, format=FORMAT, version=FORMAT_VERSION)


def load_content(path: str | os.PathLike[str], owner: type[AnyHead], device: torch.device | str) -> AnyHead:
    """Return the head that a folder holds, which has to be an ``owner``; see :meth:`~.base.BlockHead.load`."""

    def read(folder: Path, manifest: Manifest) -> AnyHead:
        is_verified = _FILE in manifest.files
        metadata, tensors = read_tensors(
            folder / _FILE, format=FORMAT, versions=(FORMAT_VERSION,), way_out=_WAY_OUT, is_verified=is_verified
        )
        found = KINDS.get(metadata.get("kind", ""))
        if found is None or not issubclass(found, owner):
            raise CheckpointError(
                f"{folder / _FILE}: expected {owner.__name__}, got a head of kind {metadata.get('kind')!r:.80}; "
                "load it with df.baselines.load_head, once its class is imported"
            )
        circuit = None
        if "circuit_sha256" in metadata:
            if metadata["circuit_sha256"] != circuit_hash(folder):
                raise CheckpointError(
                    f"{folder / _FILE}: expected a head of the circuit beside it, got that of another; {_WAY_OUT}"
                )
            circuit = ct.load(folder / "circuit").to(device)
        check_finite(tensors, folder / _FILE, way_out=_WAY_OUT)
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        try:
            head: AnyHead = found.from_content(Content(json.loads(metadata["settings"]), tensors, circuit))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder / _FILE}: expected what a {found.__name__} is built of, got {error}; {_WAY_OUT}"
            ) from error
        return head

    return read_folder(path, read, format=FORMAT)


def module_of(make: Callable[..., AnyModule], sizes: dict[str, int], tensors: dict[str, Tensor]) -> AnyModule:
    """Build a network of these sizes with these weights, where they are and with their dtype."""
    some = next(iter(tensors.values()))
    module = make(**sizes).to(some.device, some.dtype)
    module.load_state_dict(tensors)
    return module
