"""Transitions that depend on the context: a convex combination of tables, mixed by the denoiser's hidden states.

A static circuit goes from one latent state to the next in one way, whatever the text around the block is about. With
T tables it has T ways, and the denoiser's hidden states on both sides say which: the node n between the positions i
and j uses the weights

    W_b = sum_t g_bt W_t,      g_b = softmax(A [h_i, h_j, r, i] + c),      log W_t = log W + D_t (normalised),

with W the circuit's own weights, r the share of the block that is masked, and D_0 = 0. At first all D_t are 0, and so
W_b is W; the gates are random, so that the tables part as soon as they are trained. Until then, and but where gradients
are asked for, no weights are given: the head is the static one to the last bit. (Parameter-space conditioning of Li et
al. 2026, arXiv 2603.00045, appendix E.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

import circuits as ct
from diffusion.conditioners.base import register
from diffusion.conditioners.transitions import ContextualTransitions


@register("transition_gates")
class TransitionGates(ContextualTransitions):
    """Weights of named sum nodes as convex combinations of T tables that all of these nodes share.

    Args:
        positions: by the name of each sum node: the positions whose features its gates are read from, from 0.
        shape: (K, I) of the table of each of these nodes.
        num_features: H.
        num_tables: T, with the circuit's own.
        hidden: units of a hidden layer between features and gates; None: the gates are a softmax of linear functions.
        seed: of the first gates.

    Attributes:
        offsets: D_1 .. D_T-1, (T - 1, K, I); 0 at first.
        network: from features, mask ratio and position, (S H + 2), to T log-gates.
    """

    said: ClassVar[str] = "transition gates"

    def __init__(
        self,
        positions: Mapping[str, Sequence[int]],
        shape: Sequence[int],
        num_features: int,
        *,
        num_tables: int = 4,
        hidden: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(positions, shape, num_features, num_tables=num_tables, hidden=hidden, seed=seed)
        self.network = self._network(num_tables, is_zero=False)
        self.offsets = nn.Parameter(torch.zeros(num_tables - 1, *self.shape))

    @property
    def is_static(self) -> bool:
        """Whether all tables are the circuit's own."""
        return not bool(self.offsets.any())

    def forms(self, read: Tensor) -> Sequence[ct.weights.Form]:
        """Return the gates of every node, over the same tables."""
        tables = torch.cat([self.offsets.new_zeros(1, *self.shape), self.offsets])
        return [ct.weights.Gates(one, tables, relative=True) for one in read.unbind(1)]
