"""The coupled output layer: a circuit, and when and how it is used."""

from __future__ import annotations

from typing import get_args

from torch import Tensor, nn

from circuits import CompiledCircuit
from diffusion.coupling import CoupledDistribution, Normalization
from diffusion.errors import ArgumentError


class CoupledHead(nn.Module):
    """A compiled circuit as the output layer of a masked-token predictor.

    Args:
        pc: a circuit over the L positions of a block, V categories each; its parameters are this module's.
        activation_threshold: gamma; the circuit is used for sequences whose share of masked positions in the block is
            below it (at very high noise a static circuit can hurt), for all sequences when it is 1 or more.
        temperature: tau >= 0 of the tokens' distribution in decoding: log q / tau; 0 takes the best token.
        normalization: "global" or "local", see :mod:`diffusion.coupling`; training and decoding share it.
        top_k: evidence on the k best tokens only; None: on all.

    Raises:
        ArgumentError: an argument has a wrong type or value.
    """

    def __init__(
        self,
        pc: CompiledCircuit,
        activation_threshold: float = 0.7,
        temperature: float = 1.0,
        *,
        normalization: Normalization = "global",
        top_k: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(pc, CompiledCircuit):
            raise ArgumentError(f"pc: expected a compiled circuit, ct.compile(circuit), got {type(pc).__name__}")
        if not activation_threshold >= 0:
            raise ArgumentError(f"activation_threshold: expected a number >= 0, got {activation_threshold!r}")
        if normalization not in get_args(Normalization):
            raise ArgumentError(f"normalization: expected one of {get_args(Normalization)}, got {normalization!r}")
        check_temperature(temperature)
        self.pc = pc
        self.activation_threshold = activation_threshold
        self.temperature = temperature
        self.normalization = normalization
        self.top_k = top_k

    @property
    def block_length(self) -> int:
        """L, the number of positions the circuit is over."""
        return self.pc.circuit.num_vars

    def forward(self, logits: Tensor, tokens: Tensor, masked: Tensor) -> CoupledDistribution:
        """Return the joint distribution of a block; see :class:`~diffusion.coupling.CoupledDistribution`."""
        return self.distribution(logits, tokens, masked)

    def distribution(
        self, logits: Tensor, tokens: Tensor, masked: Tensor, *, include: Tensor | None = None
    ) -> CoupledDistribution:
        """Return the joint distribution of a block: logits (B, L, V), tokens (B, L), masked (B, L)."""
        return CoupledDistribution(
            self.pc, logits, tokens, masked, normalization=self.normalization, top_k=self.top_k, include=include
        )

    def conditional_log_likelihood(self, logits: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
        """Return ``CLL = log p_hat(x_M | x_O)`` of the true tokens ``targets``, int64 (B, L): (B,), in nats."""
        return self.distribution(logits, targets, masked, include=targets).log_prob(targets)

    def is_active(self, masked: Tensor) -> Tensor:
        """Return which sequences the circuit is used for, by their own mask ratio: bool (B, L) to bool (B,)."""
        ratio = masked.float().mean(-1)
        return (ratio < self.activation_threshold) | (self.activation_threshold >= 1)


def check_temperature(temperature: float) -> None:
    """Raise ArgumentError unless ``temperature`` is a finite number >= 0."""
    if not 0 <= temperature < float("inf"):
        raise ArgumentError(f"temperature: expected a finite number >= 0, got {temperature!r}")
