"""The files of a cache of predictions: its arrays, and what says how it is made and how far it has come."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Literal

import numpy as np

from circuits.files import replace_file
from circuits.reading import damaged, open_regular, read_array_header, short, unreadable
from diffusion.errors import CheckpointError
from diffusion.json_files import read_json, write_json

FORMAT_VERSION = 2
_WAY_OUT = "delete the folder and cache again"
_MAX_META = 1 << 24
"""Bytes: all tokens of a vocabulary may be forbidden but one."""


def _array_layout(meta: dict) -> dict[str, tuple[tuple[int, ...], type]]:
    blocks = (meta["num_examples"], meta["block_length"])
    layout: dict[str, tuple[tuple[int, ...], type]] = {
        "tokens": (blocks, np.int32),
        "masked": (blocks, np.bool_),
        "log_q": ((*blocks, meta["num_listed"]), np.float16),
    }
    if meta["num_listed"] < meta["vocab_size"]:
        layout["values"] = ((*blocks, meta["num_listed"]), np.int32)
    if "num_features" in meta:
        layout["features"] = ((*blocks, meta["num_features"]), np.float16)
    return layout


def continue_or_create(folder: Path, meta: dict) -> dict:
    """Return what the folder's meta.json says; where no examples are done yet, create the arrays that are not there.

    Raises:
        CheckpointError: the folder holds something else, or a cache that was made otherwise than ``meta`` says.
        StorageError: there is no room for the arrays.
    """
    if (folder / "meta.json").exists():
        found = read_meta(folder)
        known = {"forbidden_ids": meta["forbidden_ids"], **found}  # caches of before do not say which
        names = [*meta, *sorted(found.keys() - meta.keys() - {"done", "digest"})]
        different = [name for name in names if known.get(name) != meta.get(name)]
        if different:
            raise CheckpointError(
                f"{folder}: expected a cache of these arguments, got one of another {' and '.join(different)}; "
                "delete it, or name another folder"
            )
    elif folder.exists() and not all(path.name.startswith(".") for path in folder.iterdir()):
        raise CheckpointError(
            f"{folder}: expected an empty folder or a logit cache, got other files; delete it, or name another folder"
        )
    else:  # this first, so that what follows may be interrupted
        found = {**meta, "done": 0, "digest": _first_digest(meta)}
        write_json(folder / "meta.json", found)
    for name, (shape, dtype) in _array_layout(meta).items():
        if not found["done"] and not (folder / f"{name}.npy").exists():
            _create_array(folder / f"{name}.npy", shape, np.dtype(dtype))
    return found


def _create_array(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Write an array of zeros for which there is room: one that runs out of it later ends the process."""
    form = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with replace_file(path) as new, open(new, "wb") as file:
        np.lib.format.write_array_header_1_0(file, form)
        size = file.tell() + math.prod(shape) * dtype.itemsize
        file.flush()
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror} for {size:,} bytes") from error


def _first_digest(meta: dict) -> str:
    made_with = {name: value for name, value in meta.items() if name not in ("done", "digest")}
    return hashlib.sha256(json.dumps(made_with).encode()).hexdigest()


def extended(digest: str, arrays: dict[str, np.memmap], rows: slice) -> str:
    """Return the digest of what was written before and of some rows more."""
    state = hashlib.sha256(digest.encode())
    for array in arrays.values():
        state.update(array[rows].view(np.uint8).data)  # the map itself: nothing is copied
    return state.hexdigest()


def verified_arrays(folder: Path, meta: dict, *, mode: Literal["r", "r+"]) -> dict[str, np.memmap]:
    """Open the arrays and compare what is done of them with the digest; raises CheckpointError if they differ."""
    arrays = _open_arrays(folder, meta, mode=mode)
    digest = _first_digest(meta)
    for start in range(0, meta["done"], meta["batch_size"]):
        digest = extended(digest, arrays, slice(start, min(start + meta["batch_size"], meta["done"])))
    if digest != meta["digest"]:
        raise damaged(folder, way_out=_WAY_OUT)
    return arrays


def _open_arrays(folder: Path, meta: dict, *, mode: Literal["r", "r+"]) -> dict[str, np.memmap]:
    return {name: _open_array(folder / f"{name}.npy", *form, mode=mode) for name, form in _array_layout(meta).items()}


def _open_array(path: Path, shape: tuple[int, ...], dtype: type, *, mode: Literal["r", "r+"]) -> np.memmap:
    """Map an array of which everything is known; its file is compared with that before numpy may make it longer."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            header = read_array_header(file)
        expected = header.start + math.prod(shape) * np.dtype(dtype).itemsize
        if (header.shape, header.dtype, size) != (shape, np.dtype(dtype).str, expected):
            raise CheckpointError(
                f"{path}: expected {np.dtype(dtype)} {shape} in {expected} bytes, got {header.dtype} {header.shape} in "
                f"{size}; {_WAY_OUT}"
            )
        return np.memmap(path, dtype=dtype, mode=mode, offset=header.start, shape=shape)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise unreadable(path, error, way_out=_WAY_OUT) from error


def read_meta(folder: Path) -> dict:
    """Return how a cache is made and how far it has come; raises CheckpointError if there is none, or it is damaged."""
    path = folder / "meta.json"
    try:
        meta = read_json(path, limit=_MAX_META)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: expected a logit cache, got none: {error}") from error
    numbers = ["num_examples", "block_length", "vocab_size", "num_listed", "batch_size"]
    if not isinstance(meta, dict) or meta.get("format") != "unfactor-logit-cache":
        raise CheckpointError(f"{path}: format: expected unfactor-logit-cache, got another; name the folder of a cache")
    if meta.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version: expected {FORMAT_VERSION}, got {short(meta.get('format_version'))}; {_WAY_OUT}"
        )
    numbers += {"num_features"} & meta.keys()
    if any(type(meta.get(name)) is not int or meta[name] < 1 for name in numbers):
        raise CheckpointError(f"{path}: expected numbers >= 1 for {', '.join(numbers)}, got others; {_WAY_OUT}")
    if type(meta.get("done")) is not int or not 0 <= meta["done"] <= meta["num_examples"]:
        raise CheckpointError(f"{path}: done: expected 0 to {meta['num_examples']}, got {meta.get('done')}; {_WAY_OUT}")
    if not isinstance(meta.get("digest"), str):
        raise CheckpointError(
            f"{path}: digest: expected that of the arrays, got {short(meta.get('digest'))}; {_WAY_OUT}"
        )
    return meta
