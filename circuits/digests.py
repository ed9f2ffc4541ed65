"""What tells tensors from others by their types, shapes and values: hashes, bits, and code that builds them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

_PART_ELEMENTS = 1 << 24


class Rows(Protocol):
    """A tensor, or a table with the part of its interface that reading it in parts needs."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the numbers."""

    @property
    def shape(self) -> torch.Size:
        """Return the lengths of the axes."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Return some of the rows."""


def digest(*values: Rows | str | None) -> str:
    """Return a SHA-256 hash, in hexadecimal, of texts and of the types, shapes and values of tensors, in this order.

    Tensors are read in parts of bounded size, wherever they are; NaN equals a NaN of the same bits.
    """
    sha = hashlib.sha256()
    for value in values:
        if value is None:
            sha.update(b"none")
        elif isinstance(value, str):
            text = value.encode("utf-8", "surrogatepass")
            sha.update(f"text {len(text)} ".encode() + text)
        else:
            sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
            if value.shape.numel():
                for _, part in parts(value):
                    sha.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def named_digest(values: Mapping[str, Rows | str | None]) -> str:
    """Return a hash as :func:`digest` does, of values and their names, whatever their order."""
    return digest(*chain.from_iterable((name, values[name]) for name in sorted(values)))


def parts(table: Rows) -> Iterator[tuple[int, Tensor]]:
    """Yield all rows in parts of bounded size, each with the number of its first row; a single number at once."""
    if isinstance(table, Tensor) and not table.dim():
        yield 0, table
        return
    step = max(1, _PART_ELEMENTS // max(1, table.shape[1:].numel()))
    for start in range(0, len(table), step):
        yield start, table[start : start + step]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers of the same type in the same place; NaN counts as a number."""
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    if one.is_contiguous() and other.is_contiguous() and one.numel() * one.element_size() % 8 == 0:
        one, other = one.view(-1), other.view(-1)
        return torch.equal(one.view(torch.int64), other.view(torch.int64))  # four times as fast as comparing floats
    as_integers = torch.int64 if one.element_size() == 8 else torch.int32
    return torch.equal(one.view(as_integers), other.view(as_integers))


def tensor_code(tensor: Tensor) -> str:
    """Return code that builds a tensor, to the last bit."""
    numbers = str(tensor.detach().tolist()).replace("inf", "torch.inf").replace("nan", "torch.nan")
    is_default = tensor.numel() > 0 and tensor.dtype in (torch.int64, torch.bool, torch.float32)
    return f"torch.tensor({numbers}{'' if is_default else f', dtype={tensor.dtype}'}{device_code(tensor)})"


def device_code(tensor: Tensor) -> str:
    """Return the argument that puts a tensor where this one is; none on a CPU."""
    return "" if tensor.device.type == "cpu" else f", device={str(tensor.device)!r}"
