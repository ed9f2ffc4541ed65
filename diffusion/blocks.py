"""Checks of blocks: what is known about L positions of B texts, and what a denoiser says about them."""

from __future__ import annotations

import torch
from torch import Tensor

from circuits import CompiledCircuit
from circuits.arguments import kind_of
from diffusion.errors import ArgumentError


def check_circuit(pc: CompiledCircuit) -> None:
    """Raise ArgumentError unless ``pc`` is a compiled circuit."""
    if not isinstance(pc, CompiledCircuit):
        raise ArgumentError(f"pc: expected a compiled circuit, ct.compile(circuit), got {type(pc).__name__}")


def check_logits(pc: CompiledCircuit, logits: Tensor) -> None:
    """Raise ArgumentError unless logits are (B, L, V) of the circuit's L variables with V categories."""
    check_circuit(pc)
    num_vars, categories = pc.circuit.num_vars, set(pc.circuit.num_categories)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or not logits.is_floating_point():
        raise ArgumentError(f"logits: expected floating point (B, L, V), got {kind_of(logits)}")
    if logits.shape[1] != num_vars or categories != {logits.shape[2]}:
        raise ArgumentError(
            f"logits: the circuit has {num_vars} variables of {sorted(categories)} categories, so expected (B, "
            f"{num_vars}, {max(categories)}), got {tuple(logits.shape)}"
        )


def check_blocks(tokens: Tensor, masked: Tensor, shape: torch.Size, name: str = "masked") -> None:
    """Raise ArgumentError unless tokens are int64 and masks bool, both of the shape (B, L)."""
    for argument, value, dtype in (("tokens", tokens, torch.int64), (name, masked, torch.bool)):
        if not isinstance(value, Tensor) or value.shape != shape or value.dtype != dtype:
            kind = str(dtype).removeprefix("torch.")
            raise ArgumentError(f"{argument}: expected {kind} of shape {tuple(shape)}, got {kind_of(value)}")


def check_tokens(name: str, tokens: Tensor, num_tokens: int) -> None:
    """Raise ArgumentError unless tokens lie in 0..num_tokens - 1."""
    outside = (tokens < 0) | (tokens >= num_tokens)
    if bool(outside.any()):
        raise ArgumentError(f"{name}: expected tokens from 0 to {num_tokens - 1}, got {int(tokens[outside][0])}")
