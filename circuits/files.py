"""Files and folders of which a reader finds an old or a new version, never a part, and whose damage is noticed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from circuits.digests import digest, named_digest
from circuits.errors import ArgumentError, CheckpointError

_T = TypeVar("_T")
_ATTEMPTS = 100
_FIRST_VERSION = 1
"""Of every format; its files may lack the hash of what they hold."""


@contextlib.contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it onto ``path`` if the block succeeds, else delete it.

    It ends like ``path``, for writers that go by the suffix.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(4)}.tmp.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_folder(
    path: str | os.PathLike[str], names: Collection[str], *, kind: str, kept: Collection[str] = ()
) -> Iterator[Path]:
    """Yield a new folder beside ``path``; rename it to ``path`` if the block succeeds, else delete it.

    Whoever reads with :func:`read_folder`, at any time, gets the version before or this one.

    Args:
        path: the folder to write; it may be absent, empty, or hold a version, which is replaced.
        names: the files and folders that a version consists of.
        kind: what such a folder is called.
        kept: files that others may have put there, and that are copied into the new version.

    Raises:
        ArgumentError: ``path`` holds something else.
    """
    folder = Path(path).resolve()
    if folder.exists() and (not folder.is_dir() or set(os.listdir(folder)) - {*names, *kept}):
        raise ArgumentError(
            f"path: {folder} is not {kind}, and saving would replace it; give a folder that does not exist yet"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(folder, f"{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        for name in kept:
            if (folder / name).exists():
                shutil.copy2(folder / name, temporary / name)
        _swap_in(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_folder(path: str | os.PathLike[str], read: Callable[[Path], _T]) -> _T:
    """Return what ``read`` makes of a folder that :func:`replace_folder` wrote, all of it from one version.

    Args:
        path: the folder. Where a crash left only the version before it, that is read.
        read: a function of the folder's present place; it is called again when the folder was replaced meanwhile.

    Raises:
        CheckpointError: ``read`` raised it, or the folder was replaced again and again.
    """
    path = Path(path).resolve()
    for _ in range(_ATTEMPTS):
        place, version = _present(path)
        failure = None
        try:
            result = read(place)
        except CheckpointError as error:
            failure = error
        if _present(path) != (place, version):
            continue
        if failure is not None:
            raise failure
        return result
    raise CheckpointError(f"{path}: it was replaced {_ATTEMPTS} times while it was read; read it when that is over")


def regular_size(path: str | os.PathLike[str]) -> int:
    """Return the size of a regular file in bytes.

    Raises:
        OSError: it is missing, or no regular file: a pipe would block its reader for ever, a device never ends.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return found.st_size


def file_hash(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 hash of a regular file's bytes; raise OSError if there is none."""
    regular_size(path)
    sha = hashlib.sha256()
    with open(path, "rb") as file:
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
    from safetensors.torch import save_file

    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    texts = {"format": format, "format_version": str(version), **metadata}
    with replace_file(path) as temporary:
        save_file(stored, temporary, {**texts, "sha256": _content_hash(texts, stored)})


def read_tensors(
    path: str | os.PathLike[str], *, format: str, versions: Sequence[int], way_out: str
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return (metadata, tensors) of a file that :func:`write_tensors` wrote; the tensors are on the CPU.

    Args:
        path: the file.
        format: its name.
        versions: those that can be read. Files of version 1 may lack the hash.
        way_out: what to do about a file that is of no use, for the message.

    Raises:
        CheckpointError: the file is missing, corrupt, or of another format or version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        regular_size(path)
        with safe_open(path, framework="pt") as file:
            texts: dict[str, str] = file.metadata() or {}
            # copies are aligned like all tensors: sums of others may be rounded differently
            tensors: dict[str, Tensor] = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; {way_out}") from error
    if texts.get("format") != format:
        raise CheckpointError(f"{path}: expected the format {format}, got {texts.get('format')!r:.80}; {way_out}")
    version = texts.get("format_version")
    if version not in [str(known) for known in versions]:
        raise CheckpointError(
            f"{path} has format version {version!r:.80}, this unfactor reads {', '.join(map(str, versions))}; {way_out}"
        )
    sha256 = texts.pop("sha256", None)
    may_lack_it = version == str(_FIRST_VERSION)
    if sha256 != _content_hash(texts, tensors) and not (sha256 is None and may_lack_it):
        raise CheckpointError(f"{path} is corrupt: its contents do not match their hash; {way_out}")
    return texts, tensors


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of a tensor that has NaN or infinite numbers, None if there is none."""
    return next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)


def _content_hash(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    return digest(named_digest(texts), named_digest(tensors))


def _swap_in(temporary: Path, folder: Path) -> None:
    """Rename ``temporary`` to ``folder``. A crash between the two renames leaves the old version as the backup."""
    backup = _sibling(folder, "backup")
    if folder.exists():
        shutil.rmtree(backup, ignore_errors=True)
        folder.rename(backup)
    try:
        temporary.rename(folder)
    except BaseException:
        if not folder.exists():
            with contextlib.suppress(FileNotFoundError):
                backup.rename(folder)
        raise
    shutil.rmtree(backup, ignore_errors=True)


def _present(path: Path) -> tuple[Path, tuple[int, int] | None]:
    """Return where the present version of a folder is, and what tells it from others."""
    place = path if path.exists() else _sibling(path, "backup")
    try:
        found = place.stat()
    except OSError:
        return place, None
    return place, (found.st_ino, found.st_mtime_ns)


def _sibling(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")
