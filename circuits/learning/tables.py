"""Tables that are read a few rows at a time: those that do not fit in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from circuits.arguments import check_stored
from circuits.errors import ArgumentError

if TYPE_CHECKING:
    import numpy as np


class Table(Protocol):
    """What data may be beside tensors and numpy arrays: a table that is read by rows, such as an h5py data set."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def __getitem__(self, rows: np.ndarray, /) -> Any:
        """Return the samples of some rows, given by increasing integers, as a numpy array or a tensor."""


class StoredRows:
    """A table with the part of a tensor's interface that samples need; every read is one small tensor."""

    device = torch.device("cpu")

    def __init__(self, name: str, table: Table) -> None:
        self._name = name
        self._table = table
        self._num_rows = len(table)
        first = self[torch.arange(min(1, self._num_rows))]
        self.dtype = first.dtype
        self.shape = torch.Size((self._num_rows, *first.shape[1:]))

    def __len__(self) -> int:
        return self._num_rows

    def dim(self) -> int:
        """Return the number of axes."""
        return len(self.shape)

    def is_floating_point(self) -> bool:
        """Return whether the table has floating-point numbers."""
        return self.dtype.is_floating_point

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        if isinstance(rows, slice):
            rows = torch.arange(*rows.indices(self._num_rows))
        increasing, order = rows.sort()
        read = as_tensor(self._name, self._table[increasing.numpy()])
        if len(read) != len(rows):
            raise ArgumentError(f"{self._name}: asked for {len(rows)} rows, it gave {len(read)}")
        return read[order.argsort()]


def as_rows(name: str, data: Any) -> Tensor | StoredRows:
    """Return data as a tensor where they are in memory or in a mapped file, else as a table that is read by rows."""
    import numpy as np

    is_small = isinstance(data, (Tensor, np.ndarray, list, tuple, dict, str, bytes))
    is_frame = hasattr(data, "__array__") and not hasattr(data, "dtype")  # whose [] selects columns
    if is_small or is_frame or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        return as_tensor(name, data)
    return StoredRows(name, data)


def as_tensor(name: str, data: Any) -> Tensor:
    """Return lists as a tensor, an array as one that shares its memory, or the file it maps, where that is possible."""
    if isinstance(data, Tensor):
        check_stored(name, data)
        return data.detach()
    if not hasattr(data, "__array__") and not isinstance(data, (list, tuple)):
        raise ArgumentError(
            f"{name}: expected a tensor, a numpy array, lists of numbers, or a table whose rows can be read with an "
            f"array of integers, got {type(data).__name__}"
        )
    import warnings

    import numpy as np

    try:
        array = np.asarray(data)
    except ValueError as error:
        raise ArgumentError(
            f"{name}: expected lists of one length, got others: {error}; fill short ones up and say so in `observed`"
        ) from None
    if any(stride < 0 for stride in array.strides):
        array = np.ascontiguousarray(array)
    try:
        with warnings.catch_warnings():
            # read-only arrays, such as maps of files, are not copied: batches are, and nothing else is written to
            warnings.filterwarnings("ignore", message=".*not writable")
            return torch.from_numpy(array)
    except (TypeError, ValueError):
        raise ArgumentError(f"{name}: expected an array of numbers, got one of {array.dtype}") from None
