"""Reads the data of a pickle without running it: numbers, texts, containers, NumPy arrays, and names of classes.

A pickle is a program for a stack machine that may call any function. This is a machine without calls: where the program
wants one, it gets a :class:`Call` that only says what was to be called, and NumPy arrays are put together from their
bytes. So nothing that the file says is imported or executed. Long runs of bytes stay in the file until somebody reads
them, a part at a time.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np

from circuits.errors import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True)
class Name:
    """A class or function that the pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Call:
    """A call that the pickle asks for and does not get."""

    function: Name
    arguments: tuple[Any, ...]
    state: Any = None
    """What the object was to be given afterwards."""


@dataclass(frozen=True)
class FileBytes:
    """A run of bytes in an open file, which is read when it is needed."""

    file: BinaryIO
    start: int
    size: int

    def __len__(self) -> int:
        return self.size

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from ``start`` to ``stop`` of the run; raises CheckpointError if the file lost them."""
        self.file.seek(self.start + start)
        data = self.file.read(stop - start)
        if len(data) != stop - start:
            raise CheckpointError(
                f"pickle: expected {stop - start} bytes, got {len(data)}: the file became shorter while it was read"
            )
        return data


@dataclass(frozen=True, eq=False)
class StoredArray:
    """A NumPy array in a pickle, of which parts can be read; its bytes lie by rows (C) or by columns (F)."""

    data: bytes | bytearray | FileBytes
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: Literal["C", "F"]

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def read(self) -> np.ndarray[Any, Any]:
        """Return all of it."""
        return self._numbers(0, self.size).reshape(self.shape, order=self.order)

    def part(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Return the numbers from ``start`` to ``stop`` of all of them, by rows."""
        if self.order == "C" or len(self.shape) < 2:
            return self._numbers(start, stop)
        return self.read().reshape(-1)[start:stop]

    def _numbers(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        first, last = start * self.dtype.itemsize, stop * self.dtype.itemsize
        data = self.data.read(first, last) if isinstance(self.data, FileBytes) else memoryview(self.data)[first:last]
        return np.frombuffer(data, self.dtype)


_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"}
_TEXTS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_BYTES = {"SHORT_BINBYTES": 1, "BINBYTES": 4, "BINBYTES8": 8, "BYTEARRAY8": 8}
_COUNTED = _BYTES | {"SHORT_BINUNICODE": 1, "BINUNICODE": 4, "BINUNICODE8": 8, "LONG1": 1, "LONG4": 4}
"""How many bytes say the length."""
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_MAX_INSTRUCTIONS = 1 << 22
"""Those of some ten thousand nodes; a million take a second or two."""
_MAX_DEPTH = 64
"""Of containers in each other, where PyJuice's have eight."""
_MAX_OPEN = 1 << 14
"""Containers that wait for what they belong to; a pickle fills them with a thousand at a time."""
_LONG_RUN = 1 << 16
_GREATEST_BITS = 64
_CONSTANTS = _NUMBERS | _TEXTS | set(_BYTES)
_FIXED = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLE_SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_DTYPES = frozenset(["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"])
_NUMPY = ("numpy.core.", "numpy._core.")


def read_pickle(source: bytes | BinaryIO) -> Any:
    """Return what a pickle describes, with a :class:`Call` wherever it wants something called.

    A file has to stay open for as long as arrays of it are read. Raises CheckpointError if it needs more than data.
    """
    try:
        return _Machine().run(io.BytesIO(source) if isinstance(source, bytes) else source)
    except CheckpointError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"pickle: expected a whole one, got a damaged one: {error}") from error


def array_of(value: Any) -> StoredArray:
    """Return the NumPy array of numbers or booleans that was pickled; raises CheckpointError for anything else."""
    if isinstance(value, Call) and value.function.module.startswith(_NUMPY):
        name = value.function.name
        if name == "_reconstruct" and isinstance(value.state, tuple) and len(value.state) == 5:
            _, shape, dtype, is_fortran, data = value.state
            return _array(data, dtype, shape, "F" if is_fortran else "C")
        if name == "_frombuffer" and len(value.arguments) == 4:
            data, dtype, shape, order = value.arguments
            return _array(data, dtype, shape, "F" if order == "F" else "C")
    raise CheckpointError(f"array: expected numbers, got {describe(value)}")


def integer_of(value: Any) -> int:
    """Return a pickled integer, Python's or NumPy's; raises CheckpointError if it is something else."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= _GREATEST_BITS:
        return value
    is_scalar = isinstance(value, Call) and value.function.name == "scalar" and len(value.arguments) == 2
    if is_scalar and value.function.module.startswith(_NUMPY):
        array = _array(value.arguments[1], value.arguments[0], (), "C")
        if array.dtype.kind in "iu":
            return int(array.read())
    raise CheckpointError(f"number: expected an integer, got {describe(value)}")


def describe(value: Any) -> str:
    """Say what a value is, in a few words."""
    if isinstance(value, Call):
        return f"a call of {value.function}"
    if isinstance(value, Name):
        return f"the name {value}"
    if isinstance(value, int) and value.bit_length() > _GREATEST_BITS:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (int, float, bool, str)) or value is None:
        return f"{value!r:.60}"
    return f"a {type(value).__name__}"


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.depths: dict[int, int] = {}
        """Of tuples in tuples, by identity: they are made after what is in them, so nothing else bounds that."""
        self.checked_to = _MAX_OPEN

    def run(self, file: BinaryIO) -> Any:
        for name, argument in _instructions(file):
            if name == "STOP":
                return self.stack.pop()
            if name in _CONSTANTS:
                self.stack.append(argument)
            elif name in _FIXED:
                self.stack.append(_FIXED[name])
            elif name in _TUPLE_SIZES:
                self._push_tuple(self._pop(_TUPLE_SIZES[name]))
            elif name not in ("PROTO", "FRAME"):
                self._step(name, argument)
        raise CheckpointError("pickle: expected its end, got none: the file is cut off")

    def _step(self, name: str, argument: Any) -> None:
        if name == "MEMOIZE":  # the most frequent ones first
            self.memo[len(self.memo)] = self.stack[-1]
        elif name == "MARK":
            self.marks.append(len(self.stack))
            if len(self.marks) > _MAX_DEPTH:
                raise _nested()
        elif name == "EMPTY_LIST":
            self.stack.append([])
            if len(self.stack) > self.checked_to:
                self._check_open()
        elif name == "EMPTY_DICT":
            self.stack.append({})
            if len(self.stack) > self.checked_to:
                self._check_open()
        elif name == "TUPLE":
            self._push_tuple(self._pop_to_mark())
        elif name in ("APPEND", "APPENDS"):
            values = self._pop(1) if name == "APPEND" else self._pop_to_mark()
            self._top(list).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = self._pop(2) if name == "SETITEM" else self._pop_to_mark()
            if not all(isinstance(key, str) for key in values[::2]):  # the hash of a deep tuple overflows C's stack
                raise CheckpointError("pickle: expected texts as keys of a dictionary, got others")
            self._top(dict).update(zip(values[::2], values[1::2], strict=True))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "GLOBAL":
            self.stack.append(Name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            module, attribute = self._pop(2)
            if not isinstance(module, str) or not isinstance(attribute, str):
                raise CheckpointError(f"pickle: expected the name of a module, got {describe(module)}")
            self.stack.append(Name(module, attribute))
        elif name in ("REDUCE", "NEWOBJ"):
            function, arguments = self._pop(2)
            if not isinstance(function, Name) or not isinstance(arguments, tuple):
                raise CheckpointError(f"pickle: expected a call by name, got {describe(function)}")
            self.stack.append(Call(function, arguments))
        elif name == "BUILD":
            state = self._pop(1)[0]
            self._top(Call).state = state
        else:
            raise CheckpointError(f"pickle: expected plain data, got {name}; it is not read")

    def _check_open(self) -> None:
        """Count the containers on the stack, each time that it has doubled."""
        if sum(isinstance(value, (list, dict, tuple)) for value in self.stack) > _MAX_OPEN:
            raise _nested()
        self.checked_to = 2 * len(self.stack)

    def _push_tuple(self, values: list[Any]) -> None:
        made = tuple(values)
        inner = [self.depths.get(id(value), 1) for value in values if type(value) is tuple]
        if inner:
            depth = self.depths[id(made)] = 1 + max(inner)
            if depth > _MAX_DEPTH:
                raise _nested()
        self.stack.append(made)
        if len(self.stack) > self.checked_to:
            self._check_open()

    def _top(self, kind: type[T]) -> T:
        top = self.stack[-1]
        if not isinstance(top, kind):
            raise CheckpointError(f"pickle: expected a {kind.__name__}, got {describe(top)}")
        return top

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise CheckpointError(f"pickle: expected {count} values on its stack, got {len(self.stack)}")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def _pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values


def _nested() -> CheckpointError:
    return CheckpointError(f"pickle: expected at most {_MAX_DEPTH} containers in each other, got more")


def _instructions(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Yield the names of a pickle's instructions and their arguments; long runs of bytes are left where they are."""
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    for _ in range(_MAX_INSTRUCTIONS):
        code = file.read(1)
        if not code:
            return
        opcode = _OPCODES.get(code)
        if opcode is None:
            raise CheckpointError(f"pickle: expected an instruction, got {code!r}")
        if opcode.arg is None:
            yield opcode.name, None
            continue
        start = file.tell()
        if opcode.name in _COUNTED:
            size = int.from_bytes(file.read(_COUNTED[opcode.name]), "little")
            if size > end - file.tell():
                raise CheckpointError(
                    f"pickle: expected {size} bytes more, got {end - file.tell()}: the file is cut off"
                )
        if opcode.name in _BYTES:
            run = FileBytes(file, file.tell(), size)
            after = file.tell() + size
            yield opcode.name, run if size >= _LONG_RUN else run.read(0, size)
            file.seek(after)
        else:
            file.seek(start)
            yield opcode.name, opcode.arg.reader(file)
    raise CheckpointError(f"pickle: expected at most {_MAX_INSTRUCTIONS} instructions, got more")


def _array(data: Any, dtype: Any, shape: Any, order: Literal["C", "F"]) -> StoredArray:
    kind = _dtype_of(dtype)
    if not isinstance(data, (bytes, bytearray, FileBytes)) or not isinstance(shape, tuple) or len(shape) > 8:
        raise CheckpointError(f"array: expected bytes and a shape, got {describe(data)} and {describe(shape)}")
    sizes = [integer_of(size) for size in shape]
    if min(sizes, default=0) < 0 or math.prod(sizes) * kind.itemsize != len(data):
        raise CheckpointError(f"array: expected the bytes of the shape {sizes!s:.60} of {kind}, got {len(data)}")
    return StoredArray(data, kind, tuple(sizes), order)


def _dtype_of(value: Any) -> np.dtype[Any]:
    is_dtype = isinstance(value, Call) and value.function == Name("numpy", "dtype")
    code = value.arguments[0] if is_dtype and value.arguments else None
    if not isinstance(code, str) or code not in _DTYPES:
        raise CheckpointError(
            f"array: expected numbers or booleans ({', '.join(sorted(_DTYPES))}), got {describe(code)}"
        )
    is_swapped = isinstance(value.state, tuple) and len(value.state) > 1 and value.state[1] == ">"
    return np.dtype((">" if is_swapped else "<") + code)
