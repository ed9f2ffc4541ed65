"""Input families: the univariate distributions that input units are made of.

A family with finite support is a table of log-weights over its categories, stored category-major, shape (C, K), because
hard and sparse evidence read whole rows of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from circuits.errors import ArgumentError


@dataclass(frozen=True)
class Categorical:
    """A categorical distribution over the values 0 .. ``num_categories`` - 1, each with its own weight.

    Args:
        num_categories: number of values, C >= 1.

    Raises:
        ArgumentError: if ``num_categories`` is not a positive integer.
    """

    num_categories: int

    def __post_init__(self) -> None:
        if not isinstance(self.num_categories, int) or isinstance(self.num_categories, bool) or self.num_categories < 1:
            raise ArgumentError(f"num_categories: expected an integer >= 1, got {self.num_categories!r}")


@dataclass(frozen=True)
class Bernoulli:
    """A Bernoulli distribution: the values 0 and 1, with one weight each (C = 2)."""

    @property
    def num_categories(self) -> int:
        """The number of values, 2."""
        return 2


Distribution = Categorical | Bernoulli
