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
from typing import Any

import torch
from torch import Tensor, nn

import circuits as ct
from circuits import CompiledCircuit
from diffusion.conditioners.base import Conditioned, Conditioner, register
from diffusion.conditioners.context import (
    check_nodes,
    check_sizes,
    checked_places,
    checked_shape,
    is_zero,
    network,
    read_context,
    transitions_of,
)
from diffusion.prediction import Prediction


@register("low_rank_transitions")
class LowRankTransitions(Conditioner):
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

    needs_features = True

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
        super().__init__()
        self.positions = checked_places(positions)
        check_sizes(num_features=num_features, rank=rank, hidden=hidden, seed=seed)
        shape = checked_shape(shape)
        self.shape, self.num_features, self.hidden, self.seed = list(shape), num_features, hidden, seed
        num_inputs = len(next(iter(self.positions.values()))) * num_features + 2
        self.network = network(num_inputs, shape[1] * rank, hidden, seed=seed, is_zero=True)
        self.log_v = nn.Parameter(torch.randn(shape[0], rank, generator=torch.Generator().manual_seed(seed)))

    @classmethod
    def for_hmm(cls, pc: CompiledCircuit, num_features: int, **options: Any) -> LowRankTransitions:
        """Build the updates of all transitions of a circuit of :func:`circuits.structures.hmm`.

        Args:
            pc: the circuit; its node ``transition{t}`` lies between the positions t and t + 1.
            num_features: H.
            **options: ``rank``, ``hidden`` and ``seed``.

        Raises:
            ArgumentError: the circuit has no nodes of these names.
        """
        made = cls(transitions_of(pc), pc.sum_node("transition0").parameter_shape, num_features, **options)
        made.check(pc)
        return made

    def condition(self, prediction: Prediction, masked: Tensor) -> Conditioned:
        """Return the prediction as it is, with a low-rank update of every node, unless all are 0.

        Raises:
            ArgumentError: the prediction has no features, or of another number.
        """
        context = read_context(self.positions, self.num_features, prediction, masked, self.log_v)
        if not torch.is_grad_enabled() and is_zero(self.network):
            return Conditioned(prediction)
        u = self.network(context).clamp_min(0.0).unflatten(2, (self.shape[1], -1))  # (B, n, I, R)
        v = self.shape[0] * self.log_v.softmax(0)
        forms = [ct.weights.LowRank(one, v) for one in u.unbind(1)]
        return Conditioned(prediction, weights=dict(zip(self.positions, forms, strict=True)))

    def feature_parameters(self) -> list[nn.Parameter]:
        """Return the network's; V is a table like the circuit's."""
        return list(self.network.parameters())

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "positions": self.positions,
            "shape": self.shape,
            "num_features": self.num_features,
            "rank": self.log_v.shape[1],
            "hidden": self.hidden,
            "seed": self.seed,
        }

    def check(self, pc: CompiledCircuit) -> None:
        """Raise ArgumentError unless the circuit has these nodes, with tables of this shape, and these positions."""
        check_nodes(pc, self.positions, self.shape, "low-rank transitions")
