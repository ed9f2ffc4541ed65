"""Semirings: what "plus" and "times" mean while a circuit is evaluated.

The same upward pass computes the partition function in the log semiring and the most probable explanation in the max
semiring (Goodman 1999, "Semiring Parsing"). A further semiring is one subclass of :class:`Semiring`, and
``ct.evaluate(pc, semiring, evidence)`` is a circuit's value in it. Values are tensors of shape (F, K, B, *E) for F
folded nodes of K units over a batch of B, with trailing dimensions E of the semiring's own.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from circuits.algebra import logspace
from circuits.randomness import RowGenerators, Source

_MAX_CHUNK, _CACHED_CHUNK = 1 << 24, 1 << 18
"""How many numbers an intermediate result may have: to bound the memory, and to fit a processor's cache."""
_FEW_COLUMNS = 16


def _chunk_of(like: Tensor) -> int:
    return _CACHED_CHUNK if like.device.type == "cpu" else _MAX_CHUNK


class Semiring(ABC):
    """The operations of one upward pass, on log-probabilities."""

    adds_up: ClassVar[bool] = True
    """Whether plus is addition, so that a normalised unit without evidence is the constant 1."""
    is_linear: bool = False
    """Whether values are logarithms, entry by entry of E, and :meth:`contract` multiplies their exponentials by the
    weights; so weights need not be written out that are a sum of simpler ones."""

    def lift(self, log_values: Tensor) -> Tensor:
        """Turn the log-values of input units, (F, K, B), into values (F, K, B, *E); the identity by default."""
        return log_values

    @abstractmethod
    def times(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply two broadcastable values."""

    def product(self, factors: Tensor) -> Tensor:
        """Multiply many values along dimension 1: (F, N, K, B, *E) to (F, K, B, *E)."""
        return functools.reduce(self.times, factors.unbind(1))

    @abstractmethod
    def contract(
        self,
        log_weights: Tensor,  # shape: (F, O, I)
        x: Tensor,  # shape: (F, I, B, *E)
        *,
        weights: Tensor | None = None,  # shape: (F, O, I), exp(log_weights)
    ) -> Tensor:  # shape: (F, O, B, *E)
        """Add up over i the products of weight (o, i) and value (i, b)."""

    def mix(
        self,
        log_table: Tensor,  # shape: (V, K)
        values: Tensor,  # shape: (n, k)
        log_factors: Tensor,  # shape: (n, k)
        *,
        table: Tensor | None = None,  # shape: (V, K), exp(log_table)
    ) -> Tensor:  # shape: (n, K, *E)
        """Add up over j the products of factor (n, j) and table row ``values[n, j]``."""
        chunk = max(1, _chunk_of(log_table) // max(1, values.shape[1] * log_table.shape[1]))
        pieces = []
        for listed, factors in zip(values.split(chunk), log_factors.split(chunk), strict=True):
            rows = log_table[listed].transpose(1, 2)  # (n, K, k)
            pieces.append(self.contract(rows, self.lift(factors.unsqueeze(-1))).squeeze(2))
        return torch.cat(pieces)


class ChoosingSemiring(Semiring):
    """Log-probabilities, whose upward pass can be followed by a choice of one child per reached sum unit."""

    times = staticmethod(torch.add)  # type: ignore[assignment]  # its names of arguments differ

    def product(self, factors: Tensor) -> Tensor:
        """Add the logarithms along dimension 1."""
        return factors.sum(1)

    @abstractmethod
    def choose(self, scores: Tensor, generator: Source) -> Tensor:
        """Choose one index per row of ``scores``, (n, I) to (n,)."""


class LogSemiring(ChoosingSemiring):
    """Log-probabilities with log-sum-exp as plus: partition functions."""

    is_linear = True

    def contract(self, log_weights: Tensor, x: Tensor, *, weights: Tensor | None = None) -> Tensor:
        """Log-sum-exp over i, as one batched GEMM."""
        return logspace.log_matmul(log_weights, x, weights=weights)

    def mix(self, log_table: Tensor, values: Tensor, log_factors: Tensor, *, table: Tensor | None = None) -> Tensor:
        """Log-sum-exp over the listed rows, reading those rows only."""
        return logspace.log_mix(log_table, values, log_factors, table=table)

    def choose(self, scores: Tensor, generator: Source) -> Tensor:
        """Draw one index per row of ``scores`` (n, I) with probability proportional to exp(score): shape (n,).

        A race of exponential clocks (the Gumbel-max trick): the first of I clocks with rates exp(score) to ring wins.
        """
        if isinstance(generator, RowGenerators):
            return generator.choose(scores)
        waiting = torch.empty_like(scores).exponential_(generator=generator)
        return (scores - waiting.clamp_min_(torch.finfo(scores.dtype).tiny).log_()).argmax(-1)


class MaxSemiring(ChoosingSemiring):
    """Log-probabilities with the maximum as plus: the most probable explanation of latents and leaves."""

    adds_up = False

    def contract(self, log_weights: Tensor, x: Tensor, *, weights: Tensor | None = None) -> Tensor:
        """Maximise over i, in chunks of output units that bound the memory."""
        chunk = max(1, _chunk_of(x) // max(1, x.numel()))
        parts = log_weights.split(chunk, 1)
        if x.shape[2] > _FEW_COLUMNS:
            return torch.cat([(part.unsqueeze(-1) + x.unsqueeze(1)).amax(2) for part in parts], 1)
        columns = x.mT.unsqueeze(2).contiguous()  # (F, B, 1, I): the maximum is over what lies together in memory
        return torch.cat([(part.unsqueeze(1) + columns).amax(3) for part in parts], 2).mT.contiguous()

    def choose(self, scores: Tensor, generator: Source) -> Tensor:
        """Return the index of the largest score of each row, (n, I) to (n,)."""
        return scores.argmax(-1)


def divided(semiring: Semiring, value: Tensor, log_divisor: Tensor) -> Tensor:
    """Divide values of input units, (F, K, B, *E), by exp(log_divisor), (F, K, B or less); by 1 where that is 0.

    Copies of a batch that follow each other share its divisors.
    """
    log_divisor = log_divisor.masked_fill(log_divisor == -torch.inf, 0.0)
    if log_divisor.shape[2] < value.shape[2]:
        log_divisor = log_divisor.repeat(1, 1, value.shape[2] // log_divisor.shape[2])
    return semiring.times(value, semiring.lift(-log_divisor))
