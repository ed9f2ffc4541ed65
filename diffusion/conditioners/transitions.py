"""What makes transitions depend on the context: nodes, the positions whose hidden states they read, and a network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

import circuits as ct
from circuits import CompiledCircuit
from diffusion.conditioners.base import Conditioned, Conditioner
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

T = TypeVar("T", bound="ContextualTransitions")


class ContextualTransitions(Conditioner):
    """Weights of named sum nodes that a network of the denoiser's hidden states moves; all of these nodes share it.

    While nothing is moved, as before training, no weights are given but where gradients are asked for: such a head is
    the static one to the last bit.

    Args:
        positions: by the name of each sum node: the positions whose features its weights are read from, from 0.
        shape: (K, I) of the table of each of these nodes.
        num_features: H.
        hidden: units of a hidden layer of the network; None: there is none.
        seed: of what is random at first.
        **size: the subclass's own size, by the name of its argument.

    Attributes:
        network: from features, mask ratio and position, (S H + 2), to what :meth:`forms` reads; the subclass's.
    """

    needs_features = True
    needs_observed = False
    said: ClassVar[str]
    """What it is called in messages."""
    network: nn.Module

    def __init__(
        self,
        positions: Mapping[str, Sequence[int]],
        shape: Sequence[int],
        num_features: int,
        *,
        hidden: int | None,
        seed: int,
        **size: int,
    ) -> None:
        super().__init__()
        self.positions = checked_places(positions)
        check_sizes(num_features=num_features, **size, hidden=hidden, seed=seed)
        self.shape = list(checked_shape(shape))
        self.num_features, self.hidden, self.seed, self.size = num_features, hidden, seed, size

    @classmethod
    def for_hmm(cls: type[T], pc: CompiledCircuit, num_features: int, *, prefix: str = "", **options: Any) -> T:
        """Build it for all transitions of a circuit of :func:`circuits.structures.hmm`.

        Args:
            pc: the circuit; its node ``transition{t}`` lies between the positions t and t + 1.
            num_features: H.
            prefix: of the names of its nodes, where it is a component of another.
            **options: the constructor's options.

        Raises:
            ArgumentError: the circuit has no nodes of these names.
        """
        places = transitions_of(pc, prefix)
        made = cls(places, pc.sum_node(f"{prefix}transition0").parameter_shape, num_features, **options)
        made.check(pc)
        return made

    @property
    @abstractmethod
    def is_static(self) -> bool:
        """Whether nothing is moved, whatever the network reads."""

    @abstractmethod
    def forms(self, read: Tensor) -> Sequence[ct.weights.Form]:
        """Return the weights of every node from what the network makes of its context, (B, n, outputs)."""

    def condition(self, prediction: Prediction, masked: Tensor) -> Conditioned:
        """Return the prediction as it is, with weights for every node, unless nothing is moved.

        Raises:
            ArgumentError: the prediction has no features, or of another number.
        """
        like = next(self.network.parameters())
        context = read_context(self.positions, self.num_features, prediction, masked, like)
        if not torch.is_grad_enabled() and self.is_static:
            return Conditioned(prediction)
        forms = self.forms(self.network(context))
        return Conditioned(prediction, weights=dict(zip(self.positions, forms, strict=True)))

    def feature_parameters(self) -> list[nn.Parameter]:
        """Return the network's; the others are tables like the circuit's."""
        return list(self.network.parameters())

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        own = {"positions": self.positions, "shape": self.shape, "num_features": self.num_features}
        return {**own, **self.size, "hidden": self.hidden, "seed": self.seed}

    def check(self, pc: CompiledCircuit) -> None:
        """Raise ArgumentError unless the circuit has these nodes, with tables of this shape, and these positions."""
        check_nodes(pc, self.positions, self.shape, self.said)

    def _network(self, num_outputs: int, *, is_zero: bool) -> nn.Module:
        num_inputs = len(next(iter(self.positions.values()))) * self.num_features + 2
        return network(num_inputs, num_outputs, self.hidden, seed=self.seed, is_zero=is_zero)
