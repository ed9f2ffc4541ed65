"""Transitions that depend on the context: the circuit's own, moved by a low rank from the denoiser's hidden states.

The node n between the positions i and j uses the weights

    W_b = (W + v u_b^T) / (1 + v u_b^T 1),      u_b = max(0, A [h_i, h_j, r, i] + c),      v = K softmax(V),

with W (K, I) the circuit's own weights, r the share of the block that is masked, and u_b (I, R), v (K, R). Column by
column, u adds probability to the states that the context asks for, and v says where from. At A = c = 0, as at first,
W_b is W. Until then, and but where gradients are asked for, no weights are given: a new head is the static one to the
last bit. (Parameter-space conditioning of Li et al. 2026, arXiv 2603.00045, appendix E; the form is
that of PyJuice's low-rank external weights.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

import circuits as ct
from diffusion.conditioners.base import register
from diffusion.conditioners.context import is_zero
from diffusion.conditioners.transitions import ContextualTransitions


@register("low_rank_transitions")
class LowRankTransitions(ContextualTransitions):
    """Weights of named sum nodes as their own, moved by a rank R; all of these nodes share the maps.

    Args:
        positions: by the name of each sum node: the positions whose features its update is read from, from 0.
        shape: (K, I) of the table of each of these nodes.
        num_features: H.
        rank: R.
        hidden: units of a hidden layer between features and u; None: u is linear where it is not 0.
        seed: of the first V.

    Attributes:
        network: from features, mask ratio and position, (S H + 2), to u, (I R); its last layer is 0 at first.
        log_v: V, (K, R); standard normal at first.
    """

    said: ClassVar[str] = "low-rank transitions"

    def __init__(
        self,
        positions: Mapping[str, Sequence[int]],
        shape: Sequence[int],
        num_features: int,
        *,
        rank: int = 4,
        hidden: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(positions, shape, num_features, rank=rank, hidden=hidden, seed=seed)
        self.network = self._network(self.shape[1] * rank, is_zero=True)
        self.log_v = nn.Parameter(torch.randn(self.shape[0], rank, generator=torch.Generator().manual_seed(seed)))

    @property
    def is_static(self) -> bool:
        """Whether u is 0 whatever the network reads."""
        return is_zero(self.network)

    def forms(self, read: Tensor) -> Sequence[ct.weights.Form]:
        """Return the low-rank update of every node."""
        u = read.clamp_min(0.0).unflatten(2, (self.shape[1], -1))  # (B, n, I, R)
        v = self.shape[0] * self.log_v.softmax(0)
        return [ct.weights.LowRank(one, v) for one in u.unbind(1)]
