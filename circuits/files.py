"""Files of which a reader finds an old or a new version, never a part, and whose damage is noticed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from circuits.digests import digest, named_digest
from circuits.errors import CheckpointError, StorageError
from circuits.reading import checked_tensor_file, damaged, open_regular, unreadable

_TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.unfactor-tmp")
_MOST_AT_ONCE = 16
_WAYS_OUT = {
    errno.ENOSPC: "make room there, or give another place",
    errno.EDQUOT: "make room there, or give another place",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or save something smaller",
    errno.EACCES: "give a place that you may write to",
    errno.EPERM: "give a place that you may write to",
    errno.EROFS: "give a place that you may write to",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EISDIR: "remove the folder that is in the way, or give another place",
    errno.ENOTDIR: "remove the file that is in the way, or give another place",
    errno.EEXIST: "remove what is in the way, or give another place",
    errno.ENOTEMPTY: "remove what is in the way, or give another place",
}


@contextlib.contextmanager
def system_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what the system says while ``path`` is written into a StorageError with the way out."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        way_out = _WAYS_OUT.get(error.errno or 0, "look at that place, or give another one")
        raise StorageError(
            f"path: expected a place that can be written, got {error.strerror or error!s:.200} at {path}; {way_out}"
        ) from error


@contextlib.contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a new file; rename it onto ``path``, with all it holds on the disk, if the block succeeds.

    If the block fails, nothing is left of it. The new file has the name of ``path``, for writers that go by the suffix.
    Raises StorageError if it cannot be written.
    """
    path = Path(path)
    with system_errors(path), temporary_folder(path.parent) as temporary:
        new = temporary / path.name
        yield new
        is_final = not is_temporary(path)
        if is_final:
            sync(new)
        os.replace(new, path)
        if is_final:
            sync(path.parent)


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in ``parent``, which is made if it is not there; it is removed at the end.

    What killed processes left of theirs goes first.
    """
    parent.mkdir(parents=True, exist_ok=True)
    remove_litter(parent)
    lock = None
    while lock is None:  # else another process took it for litter just now
        temporary = parent / f".{secrets.token_hex(4)}.unfactor-tmp"
        temporary.mkdir()
        lock = hold(temporary)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def remove_litter(folder: Path) -> None:
    """Remove the temporary folders that killed processes left in a folder; those of living ones are held."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            lock = hold(folder / name, is_needed=True) if is_litter(name) else None
            if lock is not None:
                shutil.rmtree(folder / name, ignore_errors=True)
                os.close(lock)


def is_temporary(path: Path) -> bool:
    """Return whether a file is in a temporary folder: whoever made that waits until all of it is on the disk."""
    return any(map(is_litter, path.absolute().parts))


def is_litter(name: str) -> bool:
    """Return whether a file of this name is a temporary one."""
    return _TEMPORARY.fullmatch(name) is not None


def hold(folder: Path, *, is_needed: bool = False) -> int | None:
    """Lock a folder until the descriptor that is returned is closed, or its process ends, however it does.

    Args:
        folder: which one.
        is_needed: whether to raise OSError on file systems that have no locks; else it goes without one there.

    Returns:
        The descriptor, or None if somebody else holds the folder, or it is gone.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if is_needed or isinstance(error, BlockingIOError):
                raise
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):  # else another one is there by now
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def sync(*paths: Path) -> None:
    """Wait until files, or the lists of what is in folders, are on the disk.

    All are waited for at once: so one commit of a journal, and one emptying of the disk's own memory, is for all.
    """
    try:
        with ThreadPoolExecutor(_MOST_AT_ONCE) as pool:
            list(pool.map(_sync, paths))
    except RuntimeError:  # the interpreter is ending, and starts no thread any more
        for path in paths:
            _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(*([OSError] if path.is_dir() else [])):  # not every file system syncs folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 hash of a regular file's bytes; raise OSError if there is none."""
    sha = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    format: str,
    version: int,
    metadata: Mapping[str, str],
) -> None:
    """Write tensors and texts as one safetensors file, with a hash of all of them; a reader finds it whole.

    Args:
        path: the file.
        tensors: by name; no two of them share memory.
        format: its name.
        version: of the format.
        metadata: texts by name.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    texts = {"format": format, "format_version": str(version), **metadata}
    with replace_file(path) as new:
        write_safetensors(new, stored, {**texts, "sha256": _content_hash(texts, stored)})


def write_safetensors(new: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write contiguous tensors as a new file of a temporary folder, with the umask's mode; raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), new, None if metadata is None else dict(metadata))
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(new)) from error
    os.chmod(new, stat.S_IMODE(os.stat(new.parent).st_mode) & 0o666)  # it is 0600


def read_tensors(
    path: str | os.PathLike[str],
    *,
    format: str,
    versions: Sequence[int],
    way_out: str,
    unhashed: Sequence[int] = (),
    is_verified: bool = False,
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return (metadata, tensors) of a file that :func:`write_tensors` wrote; the tensors are on the CPU.

    Args:
        path: the file.
        format: its name.
        versions: those that can be read.
        way_out: what to do about a file that is of no use, for the message.
        unhashed: versions whose files may lack the hash.
        is_verified: whether a manifest had the file's hash, so that it need not be hashed once more.

    Raises:
        CheckpointError: the file is missing, corrupt, or of another format or version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        checked_tensor_file(path)
        with safe_open(path, framework="pt") as file:
            texts: dict[str, str] = file.metadata() or {}
            # copies are aligned like all tensors: sums of others may be rounded differently
            tensors: dict[str, Tensor] = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise unreadable(path, error, way_out=way_out) from error
    if texts.get("format") != format:
        raise CheckpointError(f"{path}: expected the format {format}, got {texts.get('format')!r:.80}; {way_out}")
    version = texts.get("format_version")
    if version not in [str(known) for known in versions]:
        raise CheckpointError(
            f"{path}: format version: expected {', '.join(map(str, versions))}, got {version!r:.80}; install a newer "
            f"unfactor, or {way_out}"
        )
    sha256 = texts.pop("sha256", None)
    is_sound = is_verified or (sha256 is None and version in [str(known) for known in unhashed])
    if not is_sound and sha256 != _content_hash(texts, tensors):
        raise damaged(path, way_out=way_out)
    return texts, tensors


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of a tensor that has NaN or infinite numbers, None if there is none."""
    return next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)


def check_finite(tensors: Mapping[str, Tensor], path: Path, *, way_out: str) -> None:
    """Raise CheckpointError if a tensor of a file has NaN or infinite numbers."""
    bad = not_finite(tensors)
    if bad is not None:
        raise CheckpointError(f"{path}: {bad}: expected finite numbers, got NaN or infinite ones; {way_out}")


def _content_hash(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    return digest(named_digest(texts), named_digest(tensors))
