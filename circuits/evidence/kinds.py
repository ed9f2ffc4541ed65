"""The kinds of factors on variables: dense, listed, intervals, normal densities, nothing, or one here and one there.

Each kind is a few tensors (B, D, ...) and says for itself what its factors are, where it says nothing, what it fits and
which code builds it. Input layers and queries ask it for dense factors, or treat a kind in its own way.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from circuits.arguments import check_range
from circuits.digests import device_code, tensor_code
from circuits.errors import ArgumentError

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class Factors(ABC):
    """Log-factors on the D variables of a batch of B queries; every tensor begins with (B, D)."""

    maker: ClassVar[str]
    """The class method of :class:`~circuits.evidence.Evidence` that takes the tensors."""

    @property
    def stored(self) -> Tensor:
        """A tensor (B, D, ...) that tells the sizes and the device."""
        return next(iter(vars(self).values()))

    def tensors(self) -> list[Tensor]:
        """Return all tensors that the factors are made of."""
        parts = [part for part in vars(self).values() if part is not None]
        return [tensor for part in parts for tensor in (part.tensors() if isinstance(part, Factors) else [part])]

    def map(self, function: Callable[[Tensor], Tensor]) -> Factors:
        """Return the same kind with every tensor changed."""

        def mapped(part: Factors | Tensor | None) -> Factors | Tensor | None:
            if isinstance(part, Factors):
                return part.map(function)
            return None if part is None else function(part)

        return type(self)(*map(mapped, vars(self).values()))

    @abstractmethod
    def at(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the log-factors ``log e_i(x_i)`` of values (S, B, D), or broadcastable with that: (S, B, D)."""

    def dense(self, num_categories: int, dtype: torch.dtype) -> Tensor:
        """Return the log-factors of the values 0 .. num_categories - 1: (B, D, num_categories)."""
        values = torch.arange(num_categories, device=self.stored.device)
        return self.at(values.view(-1, 1, 1), dtype).permute(1, 2, 0)

    def even(self, num_categories: Tensor) -> Tensor:
        """Return the finite log-factor that all values of a variable have, NaN where they differ: (B, D).

        Numbers of categories are those of :meth:`~circuits.evidence.evidence.Evidence.says_nothing`.
        """
        return self._all(torch.nan)

    def known(self) -> Tensor:
        """Return on which variables there are factors at all, bool (B, D)."""
        return self._all(True)

    def check(self, num_categories: Tensor) -> None:  # noqa: B027 - most kinds fit all variables
        """Raise ArgumentError unless the factors fit variables with these numbers of categories, int64 (D,)."""

    def where(self, condition: Tensor, other: Factors) -> Factors:
        """Return these factors where ``condition``, bool (B, D), is True, and ``other`` elsewhere."""
        return Where(condition, self, other)

    def without(self, where: Tensor) -> Factors:
        """Return the factors with nothing known of the variables ``where``, bool (B, D)."""
        return self.where(~where, Nothing(where))

    def code(self) -> str:
        """Return Python code that builds evidence with these factors."""
        return f"ct.Evidence.{self.maker}({', '.join(map(tensor_code, self.tensors()))})"

    def _all(self, value: bool | float) -> Tensor:
        return torch.full(self.stored.shape[:2], value, device=self.stored.device)


@dataclass(frozen=True, eq=False)
class Nothing(Factors):
    """No factors: every variable is missing."""

    place: Tensor
    """Any tensor (B, D, ...): only its shape and its device count."""

    def at(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return (self._all(0.0) + torch.zeros_like(x)).to(dtype)

    def even(self, num_categories: Tensor) -> Tensor:
        return self._all(0.0)

    def known(self) -> Tensor:
        return self._all(False)

    def where(self, condition: Tensor, other: Factors) -> Factors:
        return other.without(condition)

    def without(self, where: Tensor) -> Factors:
        return self

    def code(self) -> str:
        batch_size, num_vars = self.place.shape[:2]
        return f"ct.Evidence.nothing({batch_size}, {num_vars}{device_code(self.place)})"


@dataclass(frozen=True, eq=False)
class Dense(Factors):
    """One log-factor for each of the values 0 .. C - 1; other values are ruled out."""

    maker = "soft"
    log_factors: Tensor
    """(B, D, C)."""

    def at(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.long()
        exists = (x >= 0) & (x < self.log_factors.shape[2])
        index = x.masked_fill(~exists, 0).unsqueeze(-1)
        picked = self.log_factors.to(dtype).expand(len(x), -1, -1, -1).gather(3, index).squeeze(-1)
        return picked.masked_fill(~exists, -torch.inf)

    def dense(self, num_categories: int, dtype: torch.dtype) -> Tensor:
        return self.log_factors[..., :num_categories].to(dtype)

    def even(self, num_categories: Tensor) -> Tensor:
        values = torch.arange(self.log_factors.shape[2], device=num_categories.device)
        is_whole = num_categories <= len(values)
        return _one_level(self.log_factors, is_whole, values < num_categories.unsqueeze(-1), num_categories)

    def check(self, num_categories: Tensor) -> None:
        count, shape = int(num_categories.max()), tuple(self.log_factors.shape)
        if shape[-1] < count:
            raise ArgumentError(f"log_factors: expected at least {count} values per variable, got shape {shape}")


@dataclass(frozen=True, eq=False)
class Listed(Factors):
    """Log-factors of listed values; all others are ruled out. One listed value with the factor 0 is hard evidence."""

    maker = "sparse"
    values: Tensor
    """int64 or floating point (B, D, k)."""
    log_factors: Tensor | None = None
    """(B, D, k); None: 0 for every listed value."""

    def at(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.factors(dtype).masked_fill(self.values != x.unsqueeze(-1), -torch.inf).amax(-1)

    def dense(self, num_categories: int, dtype: torch.dtype) -> Tensor:
        listed, values = self.factors(dtype), self.values
        factors = listed.new_full((*values.shape[:2], num_categories), -torch.inf)
        exists = (values >= 0) & (values < num_categories)  # other families have other values
        values, listed = values.long().masked_fill(~exists, 0), listed.masked_fill(~exists, -torch.inf)
        return factors.scatter_reduce(2, values, listed, "amax")

    def factors(self, dtype: torch.dtype) -> Tensor:
        given = self.log_factors
        return torch.zeros_like(self.values, dtype=dtype) if given is None else given.to(dtype)

    def even(self, num_categories: Tensor) -> Tensor:
        if self.log_factors is None:
            return self._all(torch.nan)
        # what is listed above -inf is distinct, so that counting says whether it is everything
        counts = (self.log_factors > -torch.inf) & (self.values >= 0) & (self.values < num_categories.unsqueeze(-1))
        return _one_level(self.log_factors, counts.sum(-1) == num_categories, counts, num_categories)

    def check_distinct(self) -> None:
        """Check that no possible value is listed twice for a variable."""
        values, log_factors = self.values, self.log_factors
        if log_factors is not None:
            fillers = -1 - torch.arange(values.shape[-1], device=values.device)
            values = torch.where(log_factors.detach() > -torch.inf, values, fillers)
        ordered = values.sort(-1).values
        repeated = (ordered[..., 1:] == ordered[..., :-1]).nonzero()
        if len(repeated):
            batch, var, position = repeated[0].tolist()
            raise ArgumentError(
                f"values: expected distinct values in a row, got {int(ordered[batch, var, position])} twice at batch "
                f"{batch}, variable {var}; add up its factors with torch.logaddexp first"
            )

    def check(self, num_categories: Tensor) -> None:
        check_range(self.values, num_categories.unsqueeze(-1), "x")

    def code(self) -> str:
        if self.log_factors is None and self.values.shape[-1] == 1:
            return f"ct.Evidence.observe({tensor_code(self.values[..., 0])})"
        return Listed(self.values, self.factors(torch.float32)).code() if self.log_factors is None else super().code()


@dataclass(frozen=True, eq=False)
class Interval(Factors):
    """Values between bounds, ``lower < v <= upper``, have the factor 1, others 0; both are (B, D)."""

    maker = "interval"
    lower: Tensor
    upper: Tensor

    def at(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.where((self.lower < x) & (x <= self.upper), 0.0, -torch.inf).to(dtype)

    def even(self, num_categories: Tensor) -> Tensor:
        greatest = torch.where(num_categories > 0, num_categories.double() - 1, torch.inf)
        holds_least = (self.lower == -torch.inf) | ((self.lower < 0) & (num_categories != 0))
        return torch.where(holds_least & (self.upper >= greatest), 0.0, torch.nan)


@dataclass(frozen=True, eq=False)
class Normal(Factors):
    """Factors ``N(v; mean, std^2)``, a measurement with normal noise; both are (B, D)."""

    maker = "gaussian"
    mean: Tensor
    std: Tensor

    def at(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        mean, std = (part.to(torch.promote_types(part.dtype, dtype)) for part in (self.mean, self.std))
        return (-0.5 * ((x - mean) / std).square() - std.log() - _HALF_LOG_TWO_PI).to(dtype)


@dataclass(frozen=True, eq=False)
class Where(Factors):
    """One kind on some variables, others elsewhere; build it with :meth:`Factors.where`, which keeps ``one`` simple."""

    condition: Tensor
    """bool (B, D)."""
    one: Factors
    """The factors where the condition is True, of one of the other kinds."""
    other: Factors
    """The factors elsewhere, of any kind."""

    def at(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.where(self.condition, self.one.at(x, dtype), self.other.at(x, dtype))

    def dense(self, num_categories: int, dtype: torch.dtype) -> Tensor:
        other = 0.0 if isinstance(self.other, Nothing) else self.other.dense(num_categories, dtype)
        return torch.where(self.condition.unsqueeze(-1), self.one.dense(num_categories, dtype), other)

    def even(self, num_categories: Tensor) -> Tensor:
        return torch.where(self.condition, self.one.even(num_categories), self.other.even(num_categories))

    def known(self) -> Tensor:
        return self.condition | self.other.known()

    def check(self, num_categories: Tensor) -> None:
        self.one.check(num_categories)
        self.other.check(num_categories)

    def where(self, condition: Tensor, other: Factors) -> Factors:
        return Where(self.condition & condition, self.one, self.other.where(condition, other))

    def code(self) -> str:
        if bool(self.condition.all()) or not bool(self.condition.any()):
            return (self.one if bool(self.condition.any()) else self.other).code()
        one, condition = self.one.code(), tensor_code(self.condition)
        if isinstance(self.one, Listed) and one.startswith("ct.Evidence.observe") and isinstance(self.other, Nothing):
            return f"{one[:-1]}, observed={condition})"
        return f"ct.Evidence.where({condition}, {one}, {self.other.code()})"


class Indexed(Where):
    """Values that are observed, and rows of factors elsewhere, each of which is kept, and evaluated, once.

    ``index``, int64 (B, D), is the value v >= 0 that is observed, or ``~j`` < 0 where row j of ``rows`` is what is
    known: dense or listed factors, (1, n, ...).
    """

    index: Tensor
    rows: Factors

    def __init__(self, index: Tensor, rows: Factors) -> None:
        vars(self).update(index=index, rows=rows)

    condition = property(lambda self: self.index < 0)
    one = property(lambda self: self.rows.map(self._of_row))
    other = property(lambda self: Listed(self.index.clamp_min(0).unsqueeze(-1)))

    def map(self, function: Callable[[Tensor], Tensor]) -> Factors:
        index = function(self.index)
        return Indexed(index, self.rows.map(lambda part: part.to(index.device)))

    def _of_row(self, part: Tensor) -> Tensor:
        if not part.shape[1]:  # then all is observed
            return part.new_zeros(*self.index.shape, *part.shape[2:])
        return part[0, (~self.index).clamp_min(0)]

    def check(self, num_categories: Tensor) -> None:
        num_rows, least = self.rows.stored.shape[1], int(self.index.min()) if self.index.numel() else 0
        if least < -num_rows:
            raise ArgumentError(f"index: expected values v >= 0, or ~j for one of {num_rows} rows j, got {least}")
        (self.rows if isinstance(self.rows, Dense) else self.one).check(num_categories)
        self.other.check(num_categories)

    def where(self, condition: Tensor, other: Factors) -> Factors:
        return Where(condition, self, other)


def _one_level(log_factors: Tensor, is_whole: Tensor, counts: Tensor, num_categories: Tensor) -> Tensor:
    """Return the one factor of those that count, bool (B, D, C) or (D, C), NaN where they differ or are not all."""
    if not log_factors.shape[-1]:
        return torch.full(log_factors.shape[:2], torch.nan, device=log_factors.device)
    least = greatest = log_factors
    if not bool(counts.all()):
        least, greatest = log_factors.masked_fill(~counts, torch.inf), log_factors.masked_fill(~counts, -torch.inf)
    low, high = least.amin(-1), greatest.amax(-1)
    return torch.where(is_whole & (num_categories > 0) & (low == high) & low.isfinite(), low, torch.nan)
