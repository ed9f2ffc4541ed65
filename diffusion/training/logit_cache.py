"""A denoiser's predictions on disk, so that a circuit can train on them for many epochs without the denoiser.

A cache is a folder of plain arrays that are memory-mapped when read: ``tokens.npy`` (N, L), ``masked.npy`` (N, L),
``log_q.npy`` (N, L, k), ``values.npy`` (N, L, k) unless k = V, and ``features.npy`` (N, L, H) if they were asked for;
and ``meta.json``: how the cache is made, how far it has been filled, and a digest of both.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from circuits.arguments import checked_count
from circuits.digests import digest
from circuits.progress import progress_bar
from circuits.store import locked
from diffusion.denoisers.base import Denoiser
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.json_files import write_json
from diffusion.prediction import Prediction
from diffusion.training.cache_files import FORMAT_VERSION, continue_or_create, extended, read_meta, verified_arrays
from diffusion.training.cache_shards import Joined, shard_folder, shards_of
from diffusion.training.cached import CachedBatch
from diffusion.training.masking import Masks, ScheduleName, mask_tokens, masked_at_end, sample_times, schedule

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

        A folder of shards is read as one cache, one shard after the other.

        Raises:
            CheckpointError: the folder is missing, not a cache, of another format version, damaged, or not complete.
        """
        folder = Path(path)
        shards = [] if (folder / "meta.json").exists() else shards_of(folder)
        if shards:
            return cls._joined(folder, [cls.open(shard) for shard in shards])
        meta = read_meta(folder)
        if meta["done"] < meta["num_examples"]:
            raise CheckpointError(
                f"{folder}: expected {meta['num_examples']} examples, got {meta['done']} so far; call cache_logits with"
                " the same arguments to complete it"
            )
        arrays = verified_arrays(folder, meta, mode="r")
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

    @classmethod
    def _joined(cls, folder: Path, shards: list[LogitCache]) -> LogitCache:
        first = shards[0]
        forms = {
            (one.block_length, one.vocab_size, one.log_q.shape[2], one.forbidden_ids, one.tokenizer_fingerprint)
            for one in shards
        }
        if len(forms) > 1 or len({None if one.features is None else one.features.shape[2] for one in shards}) > 1:
            raise CheckpointError(
                f"{folder}: expected shards of one cache, got those of several; delete them and cache again"
            )

        def joined(name: str) -> Any:
            return None if getattr(first, name) is None else Joined([getattr(one, name) for one in shards])

        return cls(
            np.concatenate([one.tokens for one in shards]),
            np.concatenate([one.masked for one in shards]),
            joined("log_q"),
            joined("values"),
            first.vocab_size,
            digest(*(one.digest for one in shards)),
            joined("features"),
            first.forbidden_ids,
            first.tokenizer_fingerprint,
        )

    def batch(
        self,
        index: NDArray[np.int64] | slice,
        device: torch.device | str = "cpu",
        *,
        masked_only: bool = False,
    ) -> CachedBatch:
        """Read some examples; with ``masked_only`` what was said of masked positions alone."""
        masked = np.array(self.masked[index])

        def read(array: NDArray[np.generic], *, only: bool = False) -> Tensor:
            found = array[index]  # a map, or a copy of what is in it
            return torch.from_numpy(found[masked][None] if only else np.array(found)).to(device)

        return CachedBatch(
            read(self.tokens).long(),
            torch.from_numpy(masked).to(device),
            read(self.log_q, only=masked_only).float(),
            None if self.values is None else read(self.values, only=masked_only).long(),
            self.vocab_size,
            None if self.features is None else read(self.features).float(),
            masked_only,
        )


@torch.no_grad()
def cache_logits(
    denoiser: Denoiser,
    windows: Tensor,  # shape: (N, context length + L)
    path: str | os.PathLike[str],
    *,
    block_length: int,
    valid: Tensor | None = None,  # shape: (N, context length + L)
    suffix_length: int = 0,
    shard: tuple[int, int] | None = None,
    top_k: int | None = None,
    features: bool = False,
    masks: Masks = "random",
    masks_per_window: int = 1,
    schedule_name: ScheduleName = "linear",
    seed: int = 0,
    batch_size: int = 128,
    progress: bool = True,
    device: torch.device | str | None = None,
) -> LogitCache:
    """Mask the last block of each window, and write the denoiser's predictions for it to disk.

    An interrupted call goes on where it stopped when it is repeated with the same arguments; a complete cache of the
    same arguments is opened at once.

    Args:
        denoiser: whose logits are cached.
        windows: int64 tokens, (N, context length + L); the context is always visible.
        path: the folder; created, or continued.
        block_length: L.
        valid: bool, False at padding, which stands at the left of shorter contexts; None: there is none. See
            :func:`~diffusion.training.answers.answer_windows`.
        suffix_length: mask tokens after the block, all of which the denoiser sees: what block decoding shows it of the
            blocks that are to come.
        shard: (index, count): this process caches every count-th window, from index on, in a folder of its own within
            ``path``; :meth:`LogitCache.open` reads all of them as one. None: all windows.
        top_k: keep the k most probable tokens of every position and the true one, k + 1 in all; None: all V.
        features: keep the denoiser's last hidden states too, for conditioners that look at them, in float16.
        masks: which tokens of a block are masked, their number being that of the schedule: ``random`` ones, or its
            ``suffix``, as writing from left to right leaves it.
        masks_per_window: how many noisy versions of every window, each with its own noise level.
        schedule_name: the noise schedule; times are uniform on (0, 1).
        seed: of noise levels and masks.
        batch_size: windows per call of the denoiser.
        progress: draw a progress bar.
        device: of the denoiser; by default that of ``windows``.

    Returns:
        The cache, or this process's shard of it.

    Raises:
        ArgumentError: no windows, unknown masks, windows shorter than a block, ``valid`` that does not fit them or
            pads a block, or a denoiser without the features asked for.
        CheckpointError: the folder holds something else, or a cache made with other arguments, or what was written
            before is damaged.
        StorageError: there is no room for it, the folder cannot be written, or another process caches there.
        Interrupted: long work was asked to stop, see :func:`circuits.progress.request_stop`.
    """
    if windows.dim() != 2 or not len(windows) or not 1 <= block_length <= windows.shape[1]:
        raise ArgumentError(
            f"windows: expected int64 (N >= 1, at least block_length={block_length}), got {tuple(windows.shape)}"
        )
    vocab_size, folder = denoiser.spec.vocab_size, Path(path)
    checked_count("suffix_length", suffix_length, 0)
    if masks not in get_args(Masks):
        raise ArgumentError(f"masks: expected {' or '.join(get_args(Masks))}, got {masks!r}")
    valid = _checked_valid(valid, windows, block_length)
    if shard is not None:
        folder = shard_folder(folder, shard)
        windows, valid = windows[shard[0] :: shard[1]], None if valid is None else valid[shard[0] :: shard[1]]
        if not len(windows):
            raise ArgumentError(f"shard: expected at most as many as there are windows, got {shard[1]}; take fewer")
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
    if valid is not None:
        meta["valid"] = hashlib.sha256(valid.cpu().contiguous().numpy().tobytes()).hexdigest()
    meta |= {"masks": masks} if masks != "random" else {}
    meta |= {"suffix_length": suffix_length} if suffix_length else {}
    meta |= {"shard": list(shard)} if shard is not None else {}
    windows = windows.repeat(masks_per_window, 1)
    valid = None if valid is None else valid.repeat(masks_per_window, 1)
    with locked(folder):
        meta = continue_or_create(folder, meta)
        arrays = verified_arrays(folder, meta, mode="r+") if meta["done"] < meta["num_examples"] else {}

        def fill(rows: slice) -> None:
            generator = torch.Generator().manual_seed(_seed_of(seed, rows.start, *(shard or ())))
            padded = None if valid is None else valid[rows]
            noise = schedule_name, masks, generator
            _fill(arrays, rows, denoiser, (windows[rows], padded), block_length, suffix_length, noise, device)

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
    way_on = f"the same call goes on from {folder}"
    try:
        with progress_bar("caching logits", total, enabled=progress, completed=state[0], way_on=way_on) as advance:
            for start in range(state[0], total, size):
                rows = slice(start, min(start + size, total))
                fill(rows)
                state = rows.stop, extended(state[1], arrays, rows)
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
    padded: tuple[Tensor, Tensor | None],
    block_length: int,
    suffix_length: int,
    noise: tuple[ScheduleName, Masks, torch.Generator],
    device: torch.device | str | None,
) -> None:
    (windows, valid), (schedule_name, masks, generator) = padded, noise
    block = windows[:, -block_length:].cpu()
    t = sample_times(len(windows), generator=generator)
    mask_id = denoiser.spec.mask_id
    _, masked = mask_tokens(block, t, mask_id=mask_id, schedule=schedule(schedule_name), generator=generator)
    masked = masked_at_end(masked) if masks == "suffix" else masked
    noisy = block.masked_fill(masked, mask_id)
    suffix = noisy.new_full((len(noisy), suffix_length), mask_id)
    canvas = torch.cat([windows[:, :-block_length].cpu(), noisy, suffix], 1).to(device or windows.device)
    if valid is not None:
        valid = torch.cat([valid.cpu(), torch.ones_like(suffix, dtype=torch.bool)], 1).to(canvas.device)
    stop = windows.shape[1]
    num_listed = arrays["values"].shape[-1] if "values" in arrays else None
    prediction = Prediction.ask(
        denoiser,
        canvas,
        valid=valid,
        window=(stop - block_length, stop),
        top_k=num_listed,
        include=None if num_listed is None else block.to(canvas.device),
        features="features" in arrays,
    )
    if num_listed is not None:
        prediction = _true_first(prediction, block.to(canvas.device))
    written: dict[str, Any] = {"tokens": block, "masked": masked, "log_q": prediction.log_q.clamp_min(_LOWEST_LOG_Q)}
    features = None if prediction.features is None else prediction.features.float()  # numpy has no bfloat16
    written |= {"values": prediction.values, "features": features}
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


def _checked_valid(valid: Tensor | None, windows: Tensor, block_length: int) -> Tensor | None:
    """Return which tokens of the windows are no padding, bool, or None; raise ArgumentError unless they are."""
    if valid is None:
        return None
    if not isinstance(valid, Tensor) or valid.shape != windows.shape or valid.dtype != torch.bool:
        got = f"{valid.dtype} {tuple(valid.shape)}" if isinstance(valid, Tensor) else type(valid).__name__
        raise ArgumentError(f"valid: expected bool of the windows' shape {tuple(windows.shape)}, got {got}")
    if not bool(valid[:, -block_length:].all()) or bool((valid[:, :-1] & ~valid[:, 1:]).any()):
        raise ArgumentError(
            "valid: expected padding at the left of contexts alone, got some within or after the text; fill blocks up "
            "with the token that ends a text"
        )
    return valid


def _seed_of(seed: int, *parts: int) -> int:
    return int(np.random.SeedSequence([seed, *parts]).generate_state(1)[0])


def _fingerprint(
    denoiser: Denoiser, windows: Tensor, block_length: int, device: torch.device | str | None, features: bool
) -> tuple[str, int]:
    """Digest the predictions on a few fully masked blocks: another denoiser says something else; count its features."""
    canvas = windows.clone().to(device or windows.device)
    canvas[:, -block_length:] = denoiser.spec.mask_id
    window = (canvas.shape[1] - block_length, canvas.shape[1])
    digests = []

    def keep_digest(logits: Tensor) -> Tensor:
        digests.append(hashlib.sha256(logits.float().cpu().numpy().round(3).tobytes()).hexdigest())
        return logits

    said = Prediction.ask(denoiser, canvas, window=window, logits_hook=keep_digest, features=features)
    return digests[0], 0 if said.features is None else said.features.shape[2]
