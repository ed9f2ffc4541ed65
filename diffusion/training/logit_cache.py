"""A denoiser's predictions on disk, so that a circuit can train on them for many epochs without the denoiser.

A cache is a folder of plain arrays that are memory-mapped when read: ``tokens.npy`` (N, L), ``masked.npy`` (N, L),
``log_q.npy`` (N, L, k), ``values.npy`` (N, L, k) unless k = V, and ``features.npy`` (N, L, H) if they were asked for;
and ``meta.json``: how the cache is made, how far it has been filled, and a digest of both.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from circuits.arguments import checked_count
from circuits.files import regular_size, replace_file
from circuits.progress import progress_bar
from circuits.store import locked
from diffusion._json import read_json, write_json
from diffusion.denoisers.base import Denoiser
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.prediction import Prediction
from diffusion.training.cached import CachedBatch
from diffusion.training.masking import ScheduleName, mask_tokens, sample_times, schedule

FORMAT_VERSION = 2
_WAY_OUT = "delete the folder and cache again"
_LOWEST_LOG_Q = -6e4  # float16 holds it
SECONDS_BETWEEN_RECORDS = 1.0
"""What a run that is killed computes again, at most; how far a cache has come is not written down after every batch."""


@dataclass(frozen=True, eq=False)
class LogitCache:
    """Memory-mapped predictions of a denoiser for N noised blocks of L tokens; open one with :meth:`open`.

    Attributes:
        tokens: the true tokens, (N, L).
        masked: which of them the denoiser did not see, (N, L).
        log_q: its log-probabilities, (N, L, k).
        values: the tokens that ``log_q`` is about, (N, L, k); None: all V.
        vocab_size: V.
        digest: of how the cache was made and of every array in it, taken as they were written.
        features: the denoiser's last hidden states, (N, L, H), or None.
        forbidden_ids: tokens that the denoiser never predicts.
        tokenizer_fingerprint: of the tokenizer whose ids the tokens are, where the denoiser knows it.
    """

    tokens: NDArray[np.int64]
    masked: NDArray[np.bool_]
    log_q: NDArray[np.floating]
    values: NDArray[np.int64] | None
    vocab_size: int
    digest: str
    features: NDArray[np.floating] | None = None
    forbidden_ids: tuple[int, ...] = ()
    tokenizer_fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def block_length(self) -> int:
        """L."""
        return int(self.tokens.shape[1])

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> LogitCache:
        """Open a complete cache; its arrays are read once, to compare them with the digest.

        Raises:
            CheckpointError: the folder is missing, not a cache, of another format version, damaged, or not complete.
        """
        folder = Path(path)
        meta = _read_meta(folder)
        if meta["done"] < meta["num_examples"]:
            raise CheckpointError(
                f"{folder} holds {meta['done']} of {meta['num_examples']} examples; call cache_logits with the same "
                "arguments to complete it"
            )
        arrays = _verified_arrays(folder, meta, mode="r")
        return cls(
            arrays["tokens"],
            arrays["masked"],
            arrays["log_q"],
            arrays.get("values"),
            meta["vocab_size"],
            meta["digest"],
            arrays.get("features"),
            tuple(meta.get("forbidden_ids", ())),
            meta.get("tokenizer"),
        )

    def batch(self, index: NDArray[np.int64] | slice, device: torch.device | str = "cpu") -> CachedBatch:
        """Read some examples."""

        def read(array: NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(np.array(array[index])).to(device)  # a copy: the map is read-only

        return CachedBatch(
            read(self.tokens).long(),
            read(self.masked),
            read(self.log_q).float(),
            None if self.values is None else read(self.values).long(),
            self.vocab_size,
            None if self.features is None else read(self.features).float(),
        )


@torch.no_grad()
def cache_logits(
    denoiser: Denoiser,
    windows: Tensor,  # shape: (N, context length + L)
    path: str | os.PathLike[str],
    *,
    block_length: int,
    top_k: int | None = None,
    features: bool = False,
    masks_per_window: int = 1,
    schedule_name: ScheduleName = "linear",
    seed: int = 0,
    batch_size: int = 128,
    progress: bool = True,
    device: torch.device | str | None = None,
) -> LogitCache:
    """Mask the last block of each window at random, and write the denoiser's predictions for it to disk.

    An interrupted call goes on where it stopped when it is repeated with the same arguments; a complete cache of the
    same arguments is opened at once.

    Args:
        denoiser: whose logits are cached.
        windows: int64 tokens, (N, context length + L); the context is always visible.
        path: the folder; created, or continued.
        block_length: L.
        top_k: keep the k most probable tokens of every position and the true one, k + 1 in all; None: all V.
        features: keep the denoiser's last hidden states too, for conditioners that look at them, in float16.
        masks_per_window: how many noisy versions of every window, each with its own noise level.
        schedule_name: the noise schedule; times are uniform on (0, 1).
        seed: of noise levels and masks.
        batch_size: windows per call of the denoiser.
        progress: draw a progress bar.
        device: of the denoiser; by default that of ``windows``.

    Raises:
        ArgumentError: no windows, windows shorter than a block, or a denoiser without the features asked for.
        CheckpointError: the folder holds something else, or a cache made with other arguments, or what was written
            before is damaged.
        StorageError: there is no room for it, the folder cannot be written, or another process caches there.
    """
    if windows.dim() != 2 or not len(windows) or not 1 <= block_length <= windows.shape[1]:
        raise ArgumentError(
            f"windows: expected int64 (N >= 1, at least block_length={block_length}), got {tuple(windows.shape)}"
        )
    vocab_size = denoiser.spec.vocab_size
    if top_k is not None:
        checked_count("top_k", top_k)
    listed = vocab_size if top_k is None or top_k + 1 >= vocab_size else top_k + 1
    fingerprint, num_features = _fingerprint(denoiser, windows[:4], block_length, device, features)
    meta: dict[str, Any] = {
        "format": "unfactor-logit-cache",
        "format_version": FORMAT_VERSION,
        "num_examples": len(windows) * masks_per_window,
        "block_length": block_length,
        "vocab_size": vocab_size,
        "num_listed": listed,
        "schedule": schedule_name,
        "seed": seed,
        "batch_size": batch_size,
        "windows": hashlib.sha256(windows.cpu().contiguous().numpy().tobytes()).hexdigest(),
        "denoiser": fingerprint,
        "forbidden_ids": list(denoiser.spec.forbidden_ids),
    }
    if features:
        meta["num_features"] = num_features
    tokenizer = getattr(denoiser, "tokenizer_fingerprint", None)
    if tokenizer is not None:
        meta["tokenizer"] = tokenizer
    folder, windows = Path(path), windows.repeat(masks_per_window, 1)
    with locked(folder):
        meta = _continue_or_create(folder, meta)
        arrays = _verified_arrays(folder, meta, mode="r+") if meta["done"] < meta["num_examples"] else {}

        def fill(rows: slice) -> None:
            generator = torch.Generator().manual_seed(_seed_of(seed, rows.start))
            _fill(arrays, rows, denoiser, windows[rows], block_length, schedule_name, generator, device)

        _complete(folder, meta, arrays, fill, progress=progress)
    return LogitCache.open(folder)


def _complete(
    folder: Path, meta: dict, arrays: dict[str, np.memmap], fill: Callable[[slice], None], *, progress: bool
) -> None:
    """Fill all rows that are not done, and write down how far it came: now and then, and however it ends."""
    total, size = meta["num_examples"], meta["batch_size"]
    known = state = meta["done"], meta["digest"]

    def record() -> None:
        for array in arrays.values():
            array.flush()
        write_json(folder / "meta.json", meta | {"done": state[0], "digest": state[1]})

    since = time.monotonic()
    try:
        with progress_bar("caching logits", total, enabled=progress, completed=state[0]) as advance:
            for start in range(state[0], total, size):
                rows = slice(start, min(start + size, total))
                fill(rows)
                state = rows.stop, _extended(state[1], arrays, rows)
                if time.monotonic() - since >= SECONDS_BETWEEN_RECORDS:
                    record()
                    known, since = state, time.monotonic()
                advance(rows.stop - rows.start)
    finally:
        if state != known:
            record()


def _fill(
    arrays: dict[str, np.memmap],
    rows: slice,
    denoiser: Denoiser,
    windows: Tensor,
    block_length: int,
    schedule_name: ScheduleName,
    generator: torch.Generator,
    device: torch.device | str | None,
) -> None:
    block = windows[:, -block_length:].cpu()
    t = sample_times(len(windows), generator=generator)
    noisy, masked = mask_tokens(
        block, t, mask_id=denoiser.spec.mask_id, schedule=schedule(schedule_name), generator=generator
    )
    canvas = torch.cat([windows[:, :-block_length].cpu(), noisy], 1).to(device or windows.device)
    num_listed = arrays["values"].shape[-1] if "values" in arrays else None
    prediction = Prediction.ask(
        denoiser,
        canvas,
        window=(canvas.shape[1] - block_length, canvas.shape[1]),
        top_k=num_listed,
        include=None if num_listed is None else block.to(canvas.device),
        features="features" in arrays,
    )
    if num_listed is not None:
        prediction = _true_first(prediction, block.to(canvas.device))
    written: dict[str, Any] = {"tokens": block, "masked": masked, "log_q": prediction.log_q.clamp_min(_LOWEST_LOG_Q)}
    written |= {"values": prediction.values, "features": prediction.features}
    for name, array in arrays.items():
        array[rows] = written[name].cpu().numpy()


def _true_first(prediction: Prediction, true: Tensor) -> Prediction:
    """Reorder lists of the best tokens and of the true one: the true one first, then the best others, one fewer."""
    assert prediction.values is not None
    is_true = prediction.values == true.unsqueeze(-1)
    is_true[..., -1] &= ~is_true[..., :-1].any(-1)  # the last entry repeats a token that was listed
    rank = torch.arange(prediction.num_listed, device=true.device).expand_as(is_true)
    order = rank.masked_fill(is_true, -1).argsort(-1)[..., :-1]
    values, log_q = prediction.values.gather(2, order), prediction.log_q.gather(2, order)
    return replace(prediction, values=values, log_q=log_q)


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


def _continue_or_create(folder: Path, meta: dict) -> dict:
    """Return what the folder's meta.json says; where no examples are done yet, create the arrays that are not there."""
    if (folder / "meta.json").exists():
        found = _read_meta(folder)
        known = {"forbidden_ids": meta["forbidden_ids"], **found}  # caches of before do not say which
        names = [*meta, *sorted(found.keys() - meta.keys() - {"done", "digest"})]
        different = [name for name in names if known.get(name) != meta.get(name)]
        if different:
            raise CheckpointError(
                f"{folder} is a cache of another {' and '.join(different)}: delete it, or name another folder"
            )
    elif folder.exists() and not all(path.name.startswith(".") for path in folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty and not a logit cache: delete it, or name another folder")
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


def _extended(digest: str, arrays: dict[str, np.memmap], rows: slice) -> str:
    """Return the digest of what was written before and of some rows more."""
    state = hashlib.sha256(digest.encode())
    for array in arrays.values():
        state.update(array[rows].view(np.uint8).data)  # the map itself: nothing is copied
    return state.hexdigest()


def _verified_arrays(folder: Path, meta: dict, *, mode: Literal["r", "r+"]) -> dict[str, np.memmap]:
    """Open the arrays and compare what is done of them with the digest."""
    arrays = _open_arrays(folder, meta, mode=mode)
    digest = _first_digest(meta)
    for start in range(0, meta["done"], meta["batch_size"]):
        digest = _extended(digest, arrays, slice(start, min(start + meta["batch_size"], meta["done"])))
    if digest != meta["digest"]:
        raise CheckpointError(f"{folder} is damaged: its arrays do not match their digest; {_WAY_OUT}")
    return arrays


def _open_arrays(folder: Path, meta: dict, *, mode: Literal["r", "r+"]) -> dict[str, np.memmap]:
    return {name: _open_array(folder / f"{name}.npy", *form, mode=mode) for name, form in _array_layout(meta).items()}


def _open_array(path: Path, shape: tuple[int, ...], dtype: type, *, mode: Literal["r", "r+"]) -> np.memmap:
    """Map an array of which everything is known; its file is compared with that before numpy may make it longer."""
    array = None
    try:
        size = regular_size(path)
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            found = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
        expected = start + math.prod(shape) * np.dtype(dtype).itemsize
        if (version, found, size) == ((1, 0), (shape, False, np.dtype(dtype)), expected):
            array = np.memmap(path, dtype=dtype, mode=mode, offset=start, shape=shape)
    except Exception as error:  # numpy's parser raises whatever Python's does on a damaged header
        raise CheckpointError(f"cannot read {path}: {error!r:.200}; {_WAY_OUT}") from error
    if array is None:
        raise CheckpointError(
            f"{path}: expected {np.dtype(dtype)} {shape} in {expected} bytes, got {found[2]} {found[0]} in {size}; "
            f"{_WAY_OUT}"
        )
    return array


def _read_meta(folder: Path) -> dict:
    path = folder / "meta.json"
    try:
        meta = read_json(path)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is not a logit cache: {error}") from error
    numbers = ["num_examples", "block_length", "vocab_size", "num_listed", "batch_size"]
    if not isinstance(meta, dict) or meta.get("format") != "unfactor-logit-cache":
        raise CheckpointError(f"{path} does not describe a logit cache")
    if meta.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {meta.get('format_version')}, this library reads {FORMAT_VERSION}; {_WAY_OUT}"
        )
    numbers += {"num_features"} & meta.keys()
    if any(type(meta.get(name)) is not int or meta[name] < 1 for name in numbers):
        raise CheckpointError(f"{path} is not complete: expected numbers >= 1 for {', '.join(numbers)}; {_WAY_OUT}")
    if type(meta.get("done")) is not int or not 0 <= meta["done"] <= meta["num_examples"]:
        raise CheckpointError(f"{path}: done: expected 0 to {meta['num_examples']}, got {meta.get('done')}; {_WAY_OUT}")
    if not isinstance(meta.get("digest"), str):
        raise CheckpointError(f"{path} is not complete: expected the digest of what the arrays hold; {_WAY_OUT}")
    return meta


def _seed_of(seed: int, start: int) -> int:
    return int(np.random.SeedSequence([seed, start]).generate_state(1)[0])


def _fingerprint(
    denoiser: Denoiser, windows: Tensor, block_length: int, device: torch.device | str | None, features: bool
) -> tuple[str, int]:
    """Digest the predictions on a few fully masked blocks: another denoiser says something else; count its features."""
    canvas = windows.clone().to(device or windows.device)
    canvas[:, -block_length:] = denoiser.spec.mask_id
    window = (canvas.shape[1] - block_length, canvas.shape[1])
    digests = []

    def digest(logits: Tensor) -> Tensor:
        digests.append(hashlib.sha256(logits.float().cpu().numpy().round(3).tobytes()).hexdigest())
        return logits

    said = Prediction.ask(denoiser, canvas, window=window, logits_hook=digest, features=features)
    return digests[0], 0 if said.features is None else said.features.shape[2]
