"""Columns of a data table as categories: distinct values of integer columns, equal bins of floating-point ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from circuits.errors import ArgumentError

Array = np.ndarray[Any, Any]


class Encoded:
    """Data as categories."""

    def __init__(self, codes: Array, observed: Array, possible: Array, log_volume: Array) -> None:
        self.codes = codes
        """int64 (N, D), 0 where nothing is observed."""
        self.observed = observed
        """bool (N, D), False where a value is missing (NaN)."""
        self.possible = possible
        """bool (N,), False for samples with a value that has no category."""
        self.log_volume = log_volume
        """(N,): minus the log-density of a sample within its categories; 0 for integers."""


@dataclass(frozen=True, eq=False)
class IntegerColumns:
    """Integer columns: category k of column d is the value ``values[d][k]``, in ascending order."""

    values: tuple[Array, ...]

    @property
    def num_categories(self) -> tuple[int, ...]:
        """C of every column."""
        return tuple(len(values) for values in self.values)

    def encode(self, data: Array) -> Encoded:
        """Return the categories of integers (N, D), of any dtype; NaN where they are missing."""
        observed = ~np.isnan(data)
        filled = np.where(observed, data, [values[0] for values in self.values])
        codes = np.zeros(data.shape, dtype=np.int64)
        possible = np.ones(len(data), dtype=bool)
        for column, values in enumerate(self.values):
            codes[:, column] = np.searchsorted(values, filled[:, column]).clip(max=len(values) - 1)
            possible &= values[codes[:, column]] == filled[:, column]
        return Encoded(codes, observed, possible, np.zeros(len(data)))

    def decode(self, codes: Array, random: np.random.RandomState) -> Array:
        """Return the values of categories (N, D)."""
        return np.stack([values[codes[:, column]] for column, values in enumerate(self.values)], axis=1)


@dataclass(frozen=True, eq=False)
class BinnedColumns:
    """Floating-point columns: ``num_bins`` equal bins from ``least`` to ``greatest``, (D,) each, and two tails.

    Category 0 is below all bins and the last one above: there the density falls off exponentially, by the factor e per
    width of a bin. So every number has a positive density, and the density integrates to 1.
    """

    least: Array
    greatest: Array
    num_bins: int

    @property
    def num_categories(self) -> tuple[int, ...]:
        """C of every column."""
        return (self.num_bins + 2,) * len(self.least)

    @property
    def widths(self) -> Array:
        """The width of a bin of every column, (D,)."""
        return (self.greatest - self.least) / self.num_bins

    def encode(self, data: Array) -> Encoded:
        """Return the bins of numbers (N, D), NaN where they are missing."""
        observed = ~np.isnan(data)
        filled = np.where(observed, data, self.least)
        below, above = filled < self.least, filled > self.greatest
        inside = filled.clip(self.least, self.greatest)
        bins = np.floor((inside - self.least) / self.widths).astype(np.int64).clip(0, self.num_bins - 1)
        codes = np.select([below, above], [0, self.num_bins + 1], 1 + bins)
        log_volume = observed * (np.log(self.widths) + np.abs(filled - inside) / self.widths)
        return Encoded(codes, observed, np.ones(len(data), dtype=bool), log_volume.sum(axis=1))

    def decode(self, codes: Array, random: np.random.RandomState) -> Array:
        """Draw numbers from bins (N, D): uniformly, or exponentially far from the border in the tails."""
        inside = self.least + (codes - 1 + random.uniform(size=codes.shape)) * self.widths
        distance = random.exponential(size=codes.shape) * self.widths
        return np.select(
            [codes == 0, codes == self.num_bins + 1], [self.least - distance, self.greatest + distance], inside
        )


Columns = IntegerColumns | BinnedColumns


def columns_of(data: Array, categories: str | int | Sequence[int], num_bins: int, *, shared: bool) -> Columns:
    """Learn how to encode data, (N, D): integers as categories, floating-point numbers as bins.

    Floating-point data are integers too where their ``categories`` are given. With ``shared`` all columns are encoded
    in the same way. Raises ArgumentError if ``categories`` or ``num_bins`` do not fit.
    """
    if not _is_count(num_bins):
        raise ArgumentError(f"num_bins: expected an integer >= 1, got {num_bins!r}")
    if isinstance(categories, str):
        if categories != "auto":
            raise ArgumentError(f"categories: expected 'auto', a number or one number per column, got {categories!r}")
        if data.dtype.kind == "f":
            return _binned(data, num_bins, shared)
        return IntegerColumns(tuple(np.unique(data if shared else column) for column in data.T))
    is_list = isinstance(categories, (Sequence, np.ndarray))
    counts: list[Any] = [*categories] if is_list else [categories] * data.shape[1]  # type: ignore[misc]
    if len(counts) != data.shape[1] or not all(_is_count(count) for count in counts):
        raise ArgumentError(
            f"categories: expected 'auto', an integer >= 1 or {data.shape[1]} of them, got {categories!r:.80}"
        )
    return IntegerColumns(tuple(np.arange(count) for count in counts))


def _binned(data: Array, num_bins: int, shared: bool) -> BinnedColumns:
    observed = ~np.isnan(data)
    least = np.where(observed, data, np.inf).min(axis=0)
    greatest = np.where(observed, data, -np.inf).max(axis=0)
    if shared:
        least, greatest = np.full_like(least, least.min()), np.full_like(greatest, greatest.max())
        observed = np.broadcast_to(observed.any(), observed.shape)
    least, greatest = (np.where(observed.any(axis=0), bound, 0.0) for bound in (least, greatest))
    # A constant column still needs a bin that its value lies in.
    with np.errstate(over="ignore"):
        is_wide = ~np.isfinite(greatest - least)
    if is_wide.any():
        raise ArgumentError("X: expected numbers whose range is a finite number, got a wider one; scale the data down")
    too_narrow = (greatest - least) / num_bins <= 1e-12 * np.maximum(np.abs(least), np.abs(greatest))
    margin = np.where(too_narrow, 0.5 * np.maximum(1.0, np.abs(least) * 1e-6), 0.0)
    return BinnedColumns(least - margin, greatest + margin, num_bins)


def _is_count(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) >= 1
