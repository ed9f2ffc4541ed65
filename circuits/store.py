"""Folders that are published as a whole: of which a reader finds an old or a new version, never a part or a mixture.

A version is written beside its place with a manifest, which has the hash of every file, and swapped in once all of it
is on the disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from circuits.digests import digest
from circuits.errors import ArgumentError, CheckpointError, StorageError
from circuits.files import file_hash, hold, is_temporary, remove_litter, sync, system_errors, temporary_folder
from circuits.reading import MAX_SMALL_JSON, damaged, read_json, short, unreadable

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
LOCK = ".lock"
"""The file that says who works in a folder."""

_T = TypeVar("_T")
_WAY_OUT = "save the folder again"
_ATTEMPTS = 100
_MAX_FILES = 64
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder says of itself, once it was compared with the files.

    Attributes:
        files: SHA-256 of every file, by its name; of a published folder in it, of its manifest. Empty for a folder that
            was written before there were manifests: nothing was compared.
        made_from: what it was made from, as whoever wrote it says.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    made_from: Any = None


@contextlib.contextmanager
def replace_folder(
    path: str | os.PathLike[str], names: Collection[str], *, kind: str, kept: Collection[str] = ()
) -> Iterator[Path]:
    """Yield a new folder; swap it in at ``path``, with all it holds on the disk, if the block succeeds.

    If the block fails, nothing is left of it. Of several writers at once, the last one wins. Whoever reads with
    :func:`read_folder`, at any time, gets the version before or this one.

    Args:
        path: the folder to write; it may be absent, empty, or hold a version, which is replaced.
        names: the files and folders that a version consists of, besides its manifest.
        kind: what such a folder is called.
        kept: files that others may have put there, and that are copied into the new version.

    Raises:
        ArgumentError: ``path`` holds something else.
        StorageError: it cannot be written.
    """
    folder = Path(os.path.realpath(path))
    with system_errors(folder):
        if folder.exists() and (not folder.is_dir() or set(os.listdir(folder)) - {*names, *kept, MANIFEST, LOCK}):
            raise ArgumentError(
                f"path: {folder} is not {kind}, and saving would replace it; give a folder that does not exist yet"
            )
        with temporary_folder(folder.parent) as temporary:
            new = temporary / folder.name
            new.mkdir()
            yield new
            for name in kept:
                with contextlib.suppress(FileNotFoundError):
                    shutil.copy2(folder / name, new / name)
            is_final = not is_temporary(folder)
            if is_final:
                sync(new, *new.rglob("*"))
            _swap_in(new, folder)
            if is_final:
                sync(folder.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder, if it is there, as a whole: whoever looks finds all of it, or nothing.

    Raises StorageError if it cannot be removed.
    """
    with system_errors(path), contextlib.suppress(FileNotFoundError):
        if path.exists():
            with temporary_folder(path.parent) as temporary:
                os.rename(path, temporary / path.name)


def write_manifest(
    folder: Path, *, format: str, version: int, made_from: Any = None, known: Mapping[str, str] | None = None
) -> None:
    """Write the manifest of a new folder whose other files are all there.

    Args:
        folder: what :func:`replace_folder` gave.
        format: what the folder holds.
        version: of the format.
        made_from: what it was made from; anything that JSON can hold.
        known: hashes of files that were taken already, by name.
    """
    content = {
        "format": format,
        "format_version": version,
        "manifest_version": MANIFEST_VERSION,
        "files": {name: file_hash(folder / name) for name in _names(folder) - (known or {}).keys()} | dict(known or {}),
        "made_from": made_from,
    }
    text = json.dumps({**content, "sha256": _own_hash(content)}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path, format: str) -> Manifest:
    """Return the manifest of a folder, all of whose files have the hashes in it.

    Args:
        folder: the folder.
        format: what it is to hold.

    Raises:
        CheckpointError: it holds something else, or a file is missing or damaged.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return Manifest()
    content = _verified(path)
    if content.get("format") != format:
        raise CheckpointError(f"{folder}: expected the format {format}, got {content.get('format')!r:.80}; see {path}")
    version = content.get("manifest_version")
    if type(version) is not int or version > MANIFEST_VERSION:
        raise CheckpointError(
            f"{path}: manifest version: expected {MANIFEST_VERSION}, got {version!r:.80}; install a newer unfactor"
        )
    return Manifest(files=content["files"], made_from=content.get("made_from"))


def is_whole(folder: Path) -> bool:
    """Return whether a folder has a manifest that all its files match, whatever it holds and whoever wrote it."""
    try:
        return bool(_verified(folder / MANIFEST))
    except CheckpointError:
        return False


def read_folder(path: str | os.PathLike[str], read: Callable[[Path, Manifest], _T], *, format: str) -> _T:
    """Return what ``read`` makes of a folder that :func:`replace_folder` wrote, all of it from one version.

    Args:
        path: the folder.
        read: a function of the folder's present place and of its manifest, all of whose files were found whole; it is
            called again when the folder was replaced meanwhile.
        format: what the folder is to hold.

    Raises:
        CheckpointError: ``read`` raised it, the files do not match the manifest, or the folder was replaced again and
            again.
    """
    path = Path(os.path.realpath(path))
    for _ in range(_ATTEMPTS):
        place, version = _present(path)
        failure = None
        try:
            result = read(place, read_manifest(place, format))
        except CheckpointError as error:
            failure = error
        if _present(path) != (place, version):
            continue
        if failure is not None:
            raise failure
        return result
    raise CheckpointError(
        f"{path}: expected one version for as long as reading takes, got {_ATTEMPTS} in turn; read it when that is over"
    )


def made_from(path: str | os.PathLike[str], format: str) -> Any:
    """Return what a folder says that it was made from, None if it does not; raises CheckpointError if it is damaged."""
    return read_folder(path, lambda _, manifest: manifest.made_from, format=format)


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Keep everybody else from working in a folder; it is made if it is not there, and goes if nothing came into it.

    The lock of a process that has died, however it did, is gone with it; what it left half done in the folder goes now.
    Raises StorageError if somebody else works there, and says who that is.
    """
    folder = Path(path)
    with system_errors(folder):
        made = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock = hold(folder)
        if lock is None:
            raise StorageError(
                f"path: expected {folder} for this process alone, got {_holder(folder)} at work there; wait until it "
                "is done, or choose another folder"
            )
    note = folder / LOCK
    try:
        remove_litter(folder)
        try:
            with system_errors(folder):
                since = time.strftime("%Y-%m-%d %H:%M:%S")
                note.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {since},\n")
            yield
        finally:
            with contextlib.suppress(OSError):
                note.unlink()
                for place in made:
                    place.rmdir()
    finally:
        os.close(lock)


def _holder(folder: Path) -> str:
    try:
        return " ".join((folder / LOCK).read_text()[:200].split()) or "another process"
    except OSError:
        return "another process"


def _swap_in(new: Path, folder: Path) -> None:
    """Put a folder at its place; what was there is at the place of the new one afterwards, or gone."""
    backup = _backup(folder)
    for _ in range(_ATTEMPTS):
        if _exchange(new, folder):
            break
        try:
            new.rename(folder)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        # A file system that cannot exchange: for a moment the version before is the backup, which readers know of.
        shutil.rmtree(backup, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(backup)
    else:
        raise StorageError(
            f"path: expected {folder} to stay as it is for a moment, got {_ATTEMPTS} others in its place; save when "
            "that is over"
        )
    shutil.rmtree(backup, ignore_errors=True)


def _exchange(new: Path, folder: Path) -> bool:
    """Swap two folders in one step that cannot be seen half done; False where one is missing or the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    sys.audit("os.rename", os.fspath(new), os.fspath(folder), -1, -1)  # as for any other renaming
    if not rename(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(folder), _RENAME_EXCHANGE):
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOENT, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), os.fspath(folder))


def _present(path: Path) -> tuple[Path, tuple[int, int] | None]:
    """Return where the present version of a folder is, and what tells it from others."""
    place = path if path.exists() else _backup(path)
    try:
        found = place.stat()
    except OSError:
        return path, None
    return place, (found.st_ino, found.st_mtime_ns)


def _backup(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.backup")


def _names(folder: Path) -> set[str]:
    """Return the names of all files; of a published folder in the folder, that of its manifest alone."""
    names = set()
    for place, inside, files in os.walk(folder):
        here = Path(place).relative_to(folder)
        if here.parts and MANIFEST in files:
            inside[:], files = [], [MANIFEST]
        names |= {(here / file).as_posix() for file in files}
    return names - {MANIFEST}


def _is_name(name: str) -> bool:
    path = PurePosixPath(name)
    return path.as_posix() == name and not path.is_absolute() and not {"..", "."} & {*path.parts}


def _verified(path: Path) -> dict[str, Any]:
    """Return what a manifest says, after it and the files of its folder were compared with their hashes."""
    content = _read(path)
    files, sha256 = content.get("files"), content.pop("sha256", None)
    if sha256 != _own_hash(content) or not isinstance(files, dict):
        raise damaged(path, way_out=_WAY_OUT)
    if len(files) > _MAX_FILES or not all(map(_is_name, files)):
        raise CheckpointError(f"{path}: expected at most {_MAX_FILES} files of its folder, got others; {_WAY_OUT}")
    for name, expected in files.items():
        try:
            found = file_hash(path.parent / name)
        except OSError as error:
            raise unreadable(path.parent / name, error, way_out=_WAY_OUT) from error
        if found != expected:
            raise damaged(path.parent / name, way_out=_WAY_OUT)
    return content


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path, limit=MAX_SMALL_JSON, way_out=_WAY_OUT)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected an object with keys, got {short(content)}; {_WAY_OUT}")
    return content


def _own_hash(content: Mapping[str, Any]) -> str:
    return digest(json.dumps(content, sort_keys=True))
