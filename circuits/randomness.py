"""Randomness by row: what is drawn for one query of a batch does not depend on the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from circuits.errors import ArgumentError

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed integer
_MAX_NUMBERS = 1 << 20
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685


@dataclass(frozen=True, eq=False)
class RowGenerators:
    """Random numbers for B queries from B seeds: a function of the seed and of what is drawn, of nothing else.

    It goes wherever ``ct.queries.sample`` and its relatives take a ``generator``. Each number is a hash of seed and
    place (splitmix64, Steele et al. 2014, "Fast splittable pseudorandom number generators"), so a query gets the same
    numbers whatever the batch is, and on every device.

    Args:
        seeds: int64 (B,).
        offset: of the numbers of :meth:`uniform`, for what is counted from elsewhere than 0; one for all, or int64
            (B,).

    Raises:
        ArgumentError: ``seeds`` is no int64 tensor of shape (B,).
    """

    seeds: Tensor
    offset: int | Tensor = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seeds, Tensor) or self.seeds.dtype != torch.int64 or self.seeds.dim() != 1:
            got = f"{self.seeds.dtype} {tuple(self.seeds.shape)}" if isinstance(self.seeds, Tensor) else self.seeds
            raise ArgumentError(f"seeds: expected int64 of shape (B,), one per query, got {got!r:.80}")

    def at(self, *places: int | Tensor) -> RowGenerators:
        """Return generators of their own for a place: an integer for all rows, or one for each, int64 (B,)."""
        seeds = self.seeds
        for place in places:
            seeds = _mixed(seeds + torch.as_tensor(place, device=seeds.device) * _GOLDEN)
        return RowGenerators(seeds)

    def rows(self, index: Tensor | slice) -> RowGenerators:
        """Return the generators of some rows, int64 (n,); rows may come more than once."""
        return RowGenerators(self.seeds[index])

    def uniform(self, num: int = 1) -> Tensor:
        """Return ``num`` numbers in [0, 1) per row, float64 (B, num)."""
        offset = self.offset.unsqueeze(1) if isinstance(self.offset, Tensor) else self.offset
        counter = torch.arange(1, 1 + num, device=self.seeds.device) + offset
        return _numbers(self.seeds.unsqueeze(1) + counter * _GOLDEN)

    def first_at(self, places: Tensor) -> Tensor:
        """Return the first number of ``at(place)`` for M places of every row, int64 (M, B): float64 (M, B)."""
        return _numbers(_mixed(self.seeds + places * _GOLDEN) + _GOLDEN)

    def choose(self, scores: Tensor) -> Tensor:
        """Draw an index per row of ``scores``, (B, I) or (B, n, I), with probability proportional to exp(score).

        By inversion of the cumulative distribution, with one number per choice; int64 (B,) or (B, n).
        """
        weights = (scores - scores.amax(-1, keepdim=True)).double().exp()
        below = weights.cumsum(-1)
        draws = self.uniform(1 if scores.dim() == 2 else scores.shape[1])
        draws = draws.unsqueeze(-1) if scores.dim() == 3 else draws
        chosen = torch.searchsorted(below, draws * below[..., -1:], right=True).squeeze(-1)
        return chosen.clamp_max(scores.shape[-1] - 1)


@dataclass(frozen=True, eq=False)
class DrawnNumbers(RowGenerators):
    """Generators of B queries whose first number was drawn before, float64 (B,): many at once are drawn faster."""

    first: Tensor = field(kw_only=True)

    def rows(self, index: Tensor | slice) -> DrawnNumbers:
        """Return the numbers of some rows."""
        return DrawnNumbers(self.seeds[index], first=self.first[index])

    def uniform(self, num: int = 1) -> Tensor:
        """Return the number of each row, float64 (B, 1)."""
        assert num == 1
        return self.first.unsqueeze(1)


def source_at(generator: Source, position: int, node: Tensor, column: Tensor) -> Source:
    """Return what draws for n units of a layer, given by node and column: for generators by row, one for each unit."""
    if not isinstance(generator, RowGenerators):
        return generator
    batch_size = len(generator.seeds)
    # one number for sample, layer and node: none of them comes near its bound
    return generator.rows(column % batch_size).at((column // batch_size << 48) + (position << 24) + node)


def numbers_at(generator: Source, sizes: Mapping[int, int], num_samples: int) -> dict[int, Tensor]:
    """Return the first numbers that :func:`source_at` draws for all nodes of some layers, (F, S * B), by layer.

    By the F of each layer. Nothing is drawn of generators that are none by row, which draw in turn, nor where there
    would be too many numbers.
    """
    if not isinstance(generator, RowGenerators):
        return {}
    if sum(sizes.values()) * num_samples * len(generator.seeds) > _MAX_NUMBERS:
        return {}
    device = generator.seeds.device
    places = [(position << 24) + torch.arange(size, device=device) for position, size in sizes.items()]
    sample = torch.arange(num_samples, device=device).repeat_interleave(len(generator.seeds))
    seeds = RowGenerators(generator.seeds.repeat(num_samples))
    numbers = seeds.first_at(torch.cat(places).unsqueeze(1) + (sample << 48))
    return dict(zip(sizes, numbers.split(list(sizes.values())), strict=True))


def _numbers(bits: Tensor) -> Tensor:
    """Return numbers in [0, 1), float64, for counters that are mixed with their seeds."""
    return ((_mixed(bits) >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def _mixed(bits: Tensor) -> Tensor:
    """Mix the bits of int64 numbers; multiplication wraps around."""
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Shift to the right, with zeros from the left."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


Source = torch.Generator | RowGenerators | None
"""Where random numbers come from: a generator for all of a batch, one per row, or PyTorch's own."""
