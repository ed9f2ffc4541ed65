"""Chains whose units are vectors in place of numbers: what a product of chain circuits and automata needs to know."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from circuits.algebra.semirings import ChoosingSemiring
from circuits.randomness import Source
from circuits.symbolic import Node


class VectorSemiring(ChoosingSemiring):
    """Vectors along a last dimension, whose products depend on what the children are, and in which order.

    Vectors of nodes over other variables may be longer or shorter. A choice is of a unit and an entry.
    """

    num_entries: int
    """The most entries that any vector has."""

    @abstractmethod
    def multiply(self, nodes: Sequence[Node], factors: Sequence[Tensor]) -> Tensor:
        """Return the values of F products, from those of their first children, of their second ones, and so on."""

    def split(
        self, nodes: Sequence[Node], factors: Sequence[Tensor], node: Tensor, entry: Tensor, generator: Source
    ) -> Sequence[Tensor]:
        """Choose the factors' entries, (n,) each, that make up entries (n,) of n reached products, of vectors (n, E).

        Args:
            nodes: the products of a layer.
            factors: the vectors of their children.
            node: which of the products they are.
            entry: of their vectors.
            generator: for draws.
        """
        raise NotImplementedError


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate values; vectors shorter than others end in impossible entries."""
    length = max(part.shape[-1] for part in parts)
    return torch.cat([part if part.shape[-1] == length else padded(part, length) for part in parts], dim)


def padded(vectors: Tensor, length: int) -> Tensor:
    """Put impossible entries at the end of vectors, (..., E) to (..., length)."""
    return torch.nn.functional.pad(vectors, (0, length - vectors.shape[-1]), value=-torch.inf)
