"""Small distributions over texts, as tables: the distances between them, and whether samples follow one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffusion.errors import ArgumentError

_LEAST_EXPECTED = 5.0
_ROUNDING = 1e-6

AnyTable = TypeVar("AnyTable", bound="Table")


@dataclass(frozen=True, eq=False)
class Table:
    """A distribution over texts of L tokens: the texts that have a probability, and their probabilities.

    ``Table(samples)`` is the empirical distribution of samples.

    Attributes:
        support: int64 (n, L), distinct texts in lexicographic order; rows that are given twice are added up.
        probs: float64 (n,), positive, of sum 1; by default every given row counts the same.

    Raises:
        ArgumentError: no texts, a wrong shape or dtype, or probabilities that are negative or do not sum to 1.
    """

    support: Tensor
    probs: Tensor = None  # type: ignore[assignment]  # always there once it is made

    def __post_init__(self) -> None:
        texts = torch.as_tensor(self.support)
        if texts.dim() != 2 or texts.dtype != torch.int64 or not texts.numel():
            raise ArgumentError(
                f"support: expected int64 texts of shape (n, L), n and L at least 1, got {texts.dtype} of shape "
                f"{tuple(texts.shape)}"
            )
        texts = texts.detach().cpu()
        count = len(texts)
        given = torch.full((count,), 1 / count) if self.probs is None else torch.as_tensor(self.probs).detach().cpu()
        probs = given.double()
        if probs.shape != (count,) or not bool((probs >= 0).all()) or abs(float(probs.sum()) - 1) > _ROUNDING:
            raise ArgumentError(
                f"probs: expected {count} numbers >= 0 that sum to 1, one per text, got shape {tuple(probs.shape)} and "
                f"sum {float(probs.sum()):.6g}; divide weights by their sum"
            )
        possible = probs > 0
        support, row = torch.unique(texts[possible], dim=0, return_inverse=True)
        merged = torch.zeros(len(support), dtype=torch.float64).index_add_(0, row, probs[possible])
        object.__setattr__(self, "support", support)
        object.__setattr__(self, "probs", merged / merged.sum())

    @classmethod
    def from_joint(
        cls: type[AnyTable],
        log_probs: Tensor,  # shape: (V,) * L
        **options: Any,
    ) -> AnyTable:
        """Make the table from the log-probabilities of all texts, as ``ct.testing.enumerate_joint`` returns them.

        Args:
            log_probs: (V_0, ..., V_L-1), normalised, -inf where a text is impossible.
            options: what else the class takes.
        """
        cells = (log_probs > -torch.inf).nonzero()
        return cls(cells, log_probs[tuple(cells.t())].exp(), **options)

    @property
    def length(self) -> int:
        """L, the number of tokens of a text."""
        return self.support.shape[1]

    @property
    def entropy(self) -> float:
        """``-sum p log p``, in nats."""
        return float(-(self.probs * self.probs.log()).sum())

    def prob(
        self,
        texts: Tensor,  # shape: (*, L)
    ) -> Tensor:  # shape: (*,)
        """Return the probabilities of texts, float64; 0 outside the support."""
        indices = self._indices(texts)
        probs = torch.where(indices >= 0, self.probs[indices.clamp_min(0)], 0.0)
        return probs.reshape(texts.shape[:-1])

    def log_prob(
        self,
        texts: Tensor,  # shape: (*, L)
    ) -> Tensor:  # shape: (*,)
        """Return the log-probabilities of texts, float64, in nats; -inf outside the support."""
        return self.prob(texts).log()

    def sample(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw texts: int64 (num_samples, L)."""
        return self.support[torch.multinomial(self.probs, num_samples, replacement=True, generator=generator)]

    def total_variation(self, other: Table) -> float:
        """Return ``1/2 sum_x |p(x) - q(x)|``: the largest difference of the probabilities of an event, 0 to 1."""
        covered = other.prob(self.support)
        return float(((self.probs - covered).abs().sum() + (1 - covered.sum()).clamp_min(0)) / 2)

    def kl(self, other: Table) -> float:
        """Return ``KL(self || other) = sum_x p(x) log(p(x) / q(x))``, in nats; inf where q misses a text of p."""
        return float((self.probs * (self.probs.log() - other.log_prob(self.support))).sum().clamp_min(0))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.probs)} texts of {self.length} tokens)"

    @cached_property
    def _rows(self) -> dict[tuple[int, ...], int]:
        return {tuple(text): row for row, text in enumerate(self.support.tolist())}

    def _indices(self, texts: Tensor) -> Tensor:
        """Return the row of each text, int64 (N,); -1 outside the support."""
        if texts.dim() < 1 or texts.shape[-1] != self.length:
            raise ArgumentError(f"texts: expected shape (..., {self.length}), got {tuple(texts.shape)}")
        rows = self._rows
        found = [rows.get(tuple(text), -1) for text in texts.reshape(-1, self.length).tolist()]
        return torch.tensor(found, dtype=torch.int64)


def total_variation(first: Table | Tensor, second: Table | Tensor) -> float:
    """Return the total variation distance of two distributions.

    Args:
        first: a table, or samples int64 (N, L), which stand for their empirical distribution. That of N samples of a
            table with n texts is about ``sqrt(n / (2 pi N))`` away from it, though nothing is wrong.
        second: the same.
    """
    tables = [item if isinstance(item, Table) else Table(item) for item in (first, second)]
    return tables[0].total_variation(tables[1])


def chi_square(
    samples: Tensor,  # shape: (N, L)
    table: Table,
) -> float:
    """Return the p-value of Pearson's test that samples follow a table: how often true samples fit as badly or worse.

    Texts that are expected fewer than five times are pooled.

    Args:
        samples: int64 (N, L).
        table: the law to test against.

    Returns:
        A probability; 0 if a sample is a text that the table rules out, 1 if fewer than two cells are left.
    """
    indices = table._indices(samples)
    if bool((indices < 0).any()):
        return 0.0
    counts = torch.bincount(indices, minlength=len(table.probs)).double()
    expected = table.probs * len(samples)
    rare = expected < _LEAST_EXPECTED
    pooled = [torch.cat([cells[~rare], cells[rare].sum().reshape(1)]) for cells in (counts, expected)]
    counts, expected = (cells[pooled[1] >= _LEAST_EXPECTED] for cells in pooled)
    if len(counts) < 2:
        return 1.0
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, statistic / 2))
