"""What may be hostile is read within bounds: regular files only, sizes first, and records of known types alone."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import json
import os
import re
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, BinaryIO, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from circuits.errors import ArgumentError, CheckpointError

MAX_JSON_BYTES = 64 << 20
MAX_SMALL_JSON = 1 << 20
"""What settings, recipes and configurations may take."""
MAX_TENSOR_HEADER = 16 << 20
_MAX_NPY_HEADER = 1 << 10
_BYTES_A_CONTAINER = 8
_FEW_CONTAINERS = 1 << 16
_T = TypeVar("_T")
_NPY = re.compile(
    rb"\{'descr': '([<|][a-z][0-9])', 'fortran_order': False, 'shape': "
    rb"(\(\)|\([0-9]{1,18},\)|\([0-9]{1,18}(?:, [0-9]{1,18}){1,31}\)), ?\} *\n"
)


def regular_size(path: str | os.PathLike[str]) -> int:
    """Return the size in bytes of a regular file; raises OSError for a pipe, which may block for ever, or a device."""
    found = os.stat(path)
    _check_regular(found, path)
    return found.st_size


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file to read its bytes; raise OSError if it is missing, or something else."""
    regular_size(path)  # opening alone may already move a device
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a pipe does not wait for a writer
    try:
        _check_regular(os.fstat(descriptor), path)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | os.PathLike[str], *, limit: int = MAX_JSON_BYTES) -> bytes:
    """Return what a regular file of at most ``limit`` bytes holds; raises OSError if it is none, or cannot be read."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"{size} bytes, more than {limit}", os.fspath(path))
        return file.read(size)


def read_json(path: str | os.PathLike[str], *, limit: int = MAX_JSON_BYTES, way_out: str) -> Any:
    """Return what a JSON file of at most ``limit`` bytes holds; raises CheckpointError, with the way out."""
    try:
        return parsed_json(read_bytes(path, limit=limit))
    except OSError as error:
        raise unreadable(path, error, way_out=way_out) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, got something else: {error}; {way_out}") from error


def unreadable(path: str | os.PathLike[str], error: Exception, *, way_out: str) -> CheckpointError:
    """Return the error about a file that cannot be read, for a reason that the system or another library gives."""
    lines = str(getattr(error, "strerror", None) or error).splitlines() or [type(error).__name__]
    return CheckpointError(f"{path}: expected a file that can be read, got {lines[0]:.300}; {way_out}")


def damaged(path: str | os.PathLike[str], *, way_out: str) -> CheckpointError:
    """Return the error about a file whose content has another hash than the one that was taken of it."""
    return CheckpointError(f"{path}: expected the content that its hash is of, got another, it is damaged; {way_out}")


def parsed_json(content: bytes) -> Any:
    """Return what JSON text says, in memory that is bounded by its length.

    Raises:
        ValueError: it is not JSON in UTF-8, or little but brackets, each of which takes thirty times its own size.
        RecursionError: it is nested too deep.
    """
    containers = content.count(b"[") + content.count(b"{")
    if containers > _FEW_CONTAINERS + len(content) // _BYTES_A_CONTAINER:
        raise ValueError(f"{containers} lists and objects in {len(content)} bytes")
    return json.loads(content.decode("utf-8"))


def checked_tensor_file(path: str | os.PathLike[str]) -> int:
    """Return the size of a safetensors file whose header is within bounds; raises OSError if it is none."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, MAX_TENSOR_HEADER):
        problem = f"a header of {length} bytes, not 2 to {min(size - 8, MAX_TENSOR_HEADER)}"
        raise OSError(errno.EINVAL, problem, os.fspath(path))
    return size


@dataclass(frozen=True)
class ArrayHeader:
    """What the header of a ``.npy`` file says, of an array by rows.

    NumPy's code of its dtype, such as ``<f2``, its sizes, and where in the file its numbers begin.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int


def read_array_header(file: BinaryIO) -> ArrayHeader:
    """Return the header of a ``.npy`` file of version 1.0, as NumPy writes it; raises ValueError for anything else.

    NumPy's own reader evaluates the text as Python, and fails on damaged ones in many ways.
    """
    start = file.read(10)
    length = int.from_bytes(start[8:], "little")
    if len(start) < 10 or start[:8] != b"\x93NUMPY\x01\x00" or length > _MAX_NPY_HEADER:
        raise ValueError("expected the beginning of a .npy file of version 1.0")
    text = file.read(length)
    found = _NPY.fullmatch(text)
    if len(text) != length or found is None:
        raise ValueError(f"expected the header of an array by rows, got {text[:80]!r}")
    shape = tuple(int(size) for size in re.findall(rb"[0-9]+", found[2]))
    return ArrayHeader(found[1].decode(), shape, 10 + length)


def read_text(path: str | os.PathLike[str], *, limit: int = MAX_JSON_BYTES) -> str:
    """Return the UTF-8 text of a regular file; raises OSError, or ValueError where it is no text."""
    return read_bytes(path, limit=limit).decode("utf-8")


def check_keys(record: Mapping[str, Any], required: set[str], optional: set[str] | None = None) -> None:
    """Raise CheckpointError unless the record has all required keys and no unknown one."""
    missing, unknown = sorted(required - record.keys()), sorted(record.keys() - required - (optional or set()))
    if missing:
        raise CheckpointError(f"keys: expected {', '.join(missing)}, got none of that name")
    if unknown:
        raise CheckpointError(f"keys: expected no others, got {short(unknown[0])}{', ...' * (len(unknown) > 1)}")


def short(value: Any) -> str:
    """Write a value that may be of any type, size and depth in few letters."""
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a number beyond 64 bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class Range:
    """What a number of a record may be: ``Annotated[int, Range(1, 100)]``, both ends included."""

    least: float
    greatest: float


_ANY = Range(-(1 << 53), 1 << 53)
_LISTS, _TABLES = (tuple, list, Sequence), (dict, Mapping)
_WORDS = dict.fromkeys(_LISTS, "a list") | dict.fromkeys(_TABLES, "an object with keys")


def record_of(kind: type[_T], content: Any, name: str = "record", *, optional: Collection[str] | None = None) -> _T:
    """Return an object of a dataclass whose fields are what a JSON record says; nothing else gets into it.

    Args:
        kind: the dataclass. Its fields are numbers, truth values, texts, None, literals, tuples, or dataclasses of
            those; numbers are finite and of at most 53 bits, or in their :class:`Range`. Fields that the record lacks
            are at their defaults.
        content: what was read.
        name: of the record, for the message.
        optional: the only fields that the record may lack; by default those that have a default.

    Raises:
        CheckpointError: a key is unknown or missing, or a value has another type or range.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f"{name}: expected an object with keys, got {short(content)}")
    fields = dataclasses.fields(cast(Any, kind))
    if optional is None:
        missing = dataclasses.MISSING
        optional = [one.name for one in fields if one.default is not missing or one.default_factory is not missing]
    required = {one.name for one in fields} - set(optional)
    try:
        check_keys(content, required, set(optional))
        hints = get_type_hints(kind, include_extras=True)
        return kind(**{key: _value_of(hints[key], value, key) for key, value in content.items()})
    except (ArgumentError, CheckpointError) as error:
        raise CheckpointError(f"{name}: {error}") from error


def arguments_of(function: Callable[..., Any], content: Any, name: str = "arguments") -> dict[str, Any]:
    """Return the keyword arguments of a function that a JSON record says: its signature is the schema.

    Args:
        function: or a class. Its parameters are of the types that fields of :func:`record_of` may have, lists or
            tables of those; the ones of other types, or of none, take whatever JSON holds.
        content: what was read.
        name: of the record, for the message.

    Raises:
        CheckpointError: an argument is unknown or missing, or has another type.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f"{name}: expected an object with keys, got {short(content)}")
    parameters = inspect.signature(function).parameters.values()
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    takes_others = any(one.kind == one.VAR_KEYWORD for one in parameters)
    try:
        hints = get_type_hints(function.__init__ if isinstance(function, type) else function, include_extras=True)  # type: ignore[misc]
    except NameError:  # of a module that is imported for type checkers alone
        hints = {}
    try:
        known = {*content} if takes_others else {one.name for one in named}
        check_keys(content, {one.name for one in named if one.default is one.empty}, known)
        return {
            key: _value_of(hints[key], value, key) if _is_of_json(hints.get(key)) else value
            for key, value in content.items()
        }
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _is_of_json(hint: Any) -> bool:
    """Whether :func:`_value_of` knows a type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (*_LISTS, *_TABLES):
        return all(_is_of_json(one) for one in arguments if one is not ...)
    if origin in (Union, UnionType):
        return len(arguments) == 2 and _is_of_json(arguments[0]) and arguments[1] is type(None)
    return origin in (Annotated, Literal) or hint in (int, float, bool, str)


def _value_of(hint: Any, value: Any, key: str) -> Any:
    """Return a value of a record as its type has it; raise CheckpointError if it is of another one."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _number_of(arguments[0], value, key, arguments[1])
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return record_of(cast(type, hint), value, key)
    if origin is Literal and isinstance(value, str) and value in arguments:
        return value
    if origin in _LISTS and isinstance(value, list):
        return (tuple if origin is tuple else list)(_value_of(arguments[0], item, key) for item in value)
    if origin in _TABLES and isinstance(value, dict):
        return {name: _value_of(arguments[1], item, f"{key}[{short(name)}]") for name, item in value.items()}
    if origin in (Union, UnionType):
        return None if value is None else _value_of(arguments[0], value, key)
    if hint in (int, float):
        return _number_of(hint, value, key, _ANY)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    expected = f"one of {', '.join(map(str, arguments))}" if origin is Literal else _WORDS.get(origin) or hint.__name__
    raise CheckpointError(f"{key}: expected {expected}, got {short(value)}")


def _number_of(kind: type, value: Any, key: str, allowed: Range) -> Any:
    is_number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if not is_number or not allowed.least <= value <= allowed.greatest:
        what = "an integer" if kind is int else "a number"
        raise CheckpointError(
            f"{key}: expected {what} from {allowed.least:g} to {allowed.greatest:g}, got {short(value)}"
        )
    return kind(value)


def _check_regular(found: os.stat_result, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "no regular file", os.fspath(path))
