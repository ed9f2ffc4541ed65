"""Compiled circuits as folders: ``structure.json``, ``weights.safetensors`` and a manifest, no pickle.

What is read is never trusted: hashes find accidents, and every number is checked before anything is allocated for it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuits.arguments import checked_device
from circuits.engine.compile import CompiledCircuit
from circuits.engine.weights import check_compiled
from circuits.errors import ArgumentError, CheckpointError
from circuits.files import file_hash, write_safetensors
from circuits.io.records import circuit_of, records_of, too_large
from circuits.reading import check_keys, checked_tensor_file, damaged, read_json, short, unreadable
from circuits.store import Manifest, read_folder, replace_folder, write_manifest
from circuits.symbolic import Circuit, Node, ParametricNode, parameter_owner

FORMAT = "unfactor-circuit"
FORMAT_VERSION = 1
STRUCTURE_FILE = "structure.json"
WEIGHTS_FILE = "weights.safetensors"

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_MAX_STRUCTURE_BYTES = 1 << 28
_WAY_OUT = "give the folder that ct.save wrote, or save the circuit again"


def save(pc: CompiledCircuit, path: str | os.PathLike[str], *, made_from: Any = None) -> None:
    """Save a compiled circuit, structure and weights, as a folder.

    The folder is written beside ``path`` and swapped in once it is on the disk, so whoever loads it, at any time, gets
    the version before or this one. ``weights=`` that nodes were given are not stored; the present weights are.

    Args:
        pc: the circuit.
        path: the folder to write; it may be absent, empty, or hold a saved circuit, which is replaced.
        made_from: what it was made from, to be kept in the manifest; anything that JSON can hold.

    Raises:
        ArgumentError: ``path`` holds something else, or a weight is NaN or +inf.
        StorageError: it cannot be written: no space, no permission, ...
    """
    check_compiled(pc)
    problem = too_large(pc.circuit.nodes)
    if problem is not None:
        raise ArgumentError(f"pc: {problem}; such a circuit cannot be saved")
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in pc.bank.items()}
    for name, tensor in weights.items():
        if not _are_sound(pc, name, tensor):
            raise ArgumentError(f"pc: {name} has NaN or +inf, or a unit without weight; such a circuit cannot be saved")
    with replace_folder(path, (STRUCTURE_FILE, WEIGHTS_FILE), kind="a saved circuit") as folder:
        write_safetensors(folder / WEIGHTS_FILE, weights)
        weights_hash = file_hash(folder / WEIGHTS_FILE)
        structure = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "library_version": _library_version(),
            "weights_sha256": weights_hash,
            "dtype": str(pc.dtype).removeprefix("torch."),
            "num_vars": pc.circuit.num_vars,
            "nodes": records_of(pc.circuit),
        }
        if pc.circuit.num_classes is not None:
            structure["num_classes"] = pc.circuit.num_classes
        text = json.dumps({"sha256": _structure_hash(structure), **structure}, separators=(",", ":"))
        if len(text) > _MAX_STRUCTURE_BYTES:
            raise ArgumentError(f"pc: {pc.circuit} takes {len(text)} bytes; the limit is {_MAX_STRUCTURE_BYTES}")
        (folder / STRUCTURE_FILE).write_text(text, encoding="ascii")
        known = {WEIGHTS_FILE: weights_hash}
        write_manifest(folder, format=FORMAT, version=FORMAT_VERSION, made_from=made_from, known=known)


def load(
    path: str | os.PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> CompiledCircuit:
    """Load a compiled circuit that :func:`save` wrote. Nothing in the folder is executed.

    Args:
        path: the folder.
        device: where the parameters go.
        dtype: torch.float32 or torch.float64; None: as they were saved.

    Raises:
        ArgumentError: a wrong ``dtype``, or a device that is not here.
        CheckpointError: the folder is missing, corrupt, hostile, or of a newer format version.
    """
    if dtype is not None and dtype not in _DTYPES.values():
        raise ArgumentError(f"dtype: expected torch.float32, torch.float64 or None, got {dtype}")
    return read_folder(path, _loaded, format=FORMAT).to(device=checked_device("device", device), dtype=dtype)


def _loaded(folder: Path, manifest: Manifest) -> CompiledCircuit:
    path = folder / STRUCTURE_FILE
    structure = _read_structure(path)
    try:
        check_keys(structure, {"library_version", "weights_sha256", "dtype", "num_vars", "nodes"}, {"num_classes"})
        circuit = circuit_of(structure["nodes"], structure["num_vars"], structure.get("num_classes"))
        if not isinstance(structure["dtype"], str) or structure["dtype"] not in _DTYPES:
            raise CheckpointError(f"dtype: expected float32 or float64, got {short(structure['dtype'])}")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; {_WAY_OUT}") from error
    dtype = _DTYPES[structure["dtype"]]
    expected = str(structure["weights_sha256"])
    is_verified = manifest.files.get(WEIGHTS_FILE) == expected
    path = folder / WEIGHTS_FILE
    weights = _read_weights(path, None if is_verified else expected, circuit)
    pc = CompiledCircuit(circuit, dtype=dtype)
    for name in sorted(pc.bank.keys() | weights.keys()):
        expected, found = (_form(tensors.get(name)) for tensors in (dict(pc.bank.items()), weights))
        if found != expected:
            raise CheckpointError(f"{path}: {short(name)}: expected {expected}, got {found}; {_WAY_OUT}")
        if not _are_sound(pc, name, weights[name]):
            problem = "expected weights that give every unit a distribution, got NaN, +inf or a unit without any"
            raise CheckpointError(f"{path}: {name}: {problem}; {_WAY_OUT}")
    with torch.no_grad():
        for name, parameter in pc.bank.items():
            parameter.copy_(weights[name])
    return pc


def _read_structure(path: Path) -> dict[str, Any]:
    """Return the contents of the structure file but for its format, version and hash, which are checked here."""
    structure: Any = read_json(path, limit=_MAX_STRUCTURE_BYTES, way_out=_WAY_OUT)
    if not isinstance(structure, dict) or structure.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path}: format: expected {FORMAT}, got another; {_WAY_OUT}")
    version = structure.get("format_version")
    if isinstance(version, bool) or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version: expected {FORMAT_VERSION}, got {short(version)}, written by unfactor "
            f"{short(structure.get('library_version'))}; install a newer one"
        )
    if structure.pop("sha256", None) != _structure_hash({"format": FORMAT, **structure}):
        raise damaged(path, way_out=_WAY_OUT)
    structure.pop("format_version")
    return structure


def _read_weights(path: Path, expected_hash: str | None, circuit: Circuit) -> dict[str, Tensor]:
    """Return the weights by name; their file has the hash, which is None where it was looked at before."""
    from safetensors import SafetensorError, safe_open

    try:
        if expected_hash is not None and file_hash(path) != expected_hash:
            raise damaged(path, way_out=_WAY_OUT)
        checked_tensor_file(path)
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            stored = _total_size(file.get_slice(name).get_shape() for name in names)
            needed = _num_weights(circuit)
            if stored != needed:  # before as much as the structure says is allocated
                raise CheckpointError(f"{path}: expected {short(needed)} weights, got {stored}; {_WAY_OUT}")
            return {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, RuntimeError) as error:  # torch's, of a file that is gone
        raise unreadable(path, error, way_out=_WAY_OUT) from error


def _num_weights(circuit: Circuit) -> int:
    owners: set[Node] = {parameter_owner(node) for node in circuit.nodes if isinstance(node, ParametricNode)}
    return _total_size(owner.parameter_shape for owner in owners if isinstance(owner, ParametricNode))


def _total_size(shapes: Iterable[Sequence[int]]) -> int:
    total = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        total += size
    return total


def _form(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"


def _are_sound(pc: CompiledCircuit, bank: str, tensor: Tensor) -> bool:
    """Whether every unit gets a distribution from them."""
    if bank in pc.families:
        return pc.families[bank].is_sound(tensor)
    greatest = tensor.amax(-1)
    return bool(((greatest > -torch.inf) & (greatest < torch.inf)).all())  # amax hands NaN on


def _structure_hash(structure: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(structure, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@functools.cache
def _library_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("unfactor")
    except PackageNotFoundError:
        return "unknown"
