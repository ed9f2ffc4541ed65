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
    network,
    read_context,
    transitions_of,
)
from diffusion.prediction import Prediction


@register("transition_gates")
class TransitionGates(Conditioner):
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

    needs_features = True

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
        super().__init__()
        self.positions = checked_places(positions)
        check_sizes(num_features=num_features, num_tables=num_tables, hidden=hidden, seed=seed)
        shape = checked_shape(shape)
        self.num_features, self.hidden, self.seed = num_features, hidden, seed
        num_inputs = len(next(iter(self.positions.values()))) * num_features + 2
        self.network = network(num_inputs, num_tables, hidden, seed=seed, is_zero=False)
        self.offsets = nn.Parameter(torch.zeros(num_tables - 1, *shape))

    @classmethod
    def for_hmm(cls, pc: CompiledCircuit, num_features: int, **options: Any) -> TransitionGates:
        """Build the gates of all transitions of a circuit of :func:`circuits.structures.hmm`.

        Args:
            pc: the circuit; its node ``transition{t}`` lies between the positions t and t + 1.
            num_features: H.
            **options: ``num_tables``, ``hidden`` and ``seed``.

        Raises:
            ArgumentError: the circuit has no nodes of these names.
        """
        made = cls(transitions_of(pc), pc.sum_node("transition0").parameter_shape, num_features, **options)
        made.check(pc)
        return made

    def condition(self, prediction: Prediction, masked: Tensor) -> Conditioned:
        """Return the prediction as it is, with gates over the same tables for every node, unless all are the same.

        Raises:
            ArgumentError: the prediction has no features, or of another number.
        """
        context = read_context(self.positions, self.num_features, prediction, masked, self.offsets)
        if not torch.is_grad_enabled() and not bool(self.offsets.any()):
            return Conditioned(prediction)
        tables = torch.cat([self.offsets.new_zeros(1, *self.offsets.shape[1:]), self.offsets])
        gates = self.network(context).unbind(1)
        forms = [ct.weights.Gates(one, tables, relative=True) for one in gates]
        return Conditioned(prediction, weights=dict(zip(self.positions, forms, strict=True)))

    def feature_parameters(self) -> list[nn.Parameter]:
        """Return the network's; the tables are log-weights like the circuit's."""
        return list(self.network.parameters())

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "positions": self.positions,
            "shape": list(self.offsets.shape[1:]),
            "num_features": self.num_features,
            "num_tables": len(self.offsets) + 1,
            "hidden": self.hidden,
            "seed": self.seed,
        }

    def check(self, pc: CompiledCircuit) -> None:
        """Raise ArgumentError unless the circuit has these nodes, with tables of this shape, and these positions."""
        check_nodes(pc, self.positions, self.offsets.shape[1:], "transition gates")
