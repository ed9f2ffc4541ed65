"""Checks of the tensors that evidence is built from; each raises ArgumentError and names the argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from circuits.errors import ArgumentError


def check_integers(name: str, value: Tensor, shape: str, *, dim: int) -> None:
    """Check for integers with ``dim`` dimensions; ``shape`` describes them in the message."""
    _check_tensor(name, value, shape)
    if value.dim() != dim or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ArgumentError(f"{name}: expected {shape}, got {value.dtype} {tuple(value.shape)}")


def check_floats(name: str, value: Tensor, shape: str, *, dim: int) -> None:
    """Check for floating-point numbers with ``dim`` dimensions."""
    _check_tensor(name, value, shape)
    if value.dim() != dim or not value.is_floating_point():
        raise ArgumentError(f"{name}: expected {shape}, got {value.dtype} {tuple(value.shape)}")


def check_factors(name: str, log_factors: Tensor, shape: str, *, dim: int, batch_size: int | None = None) -> None:
    """Check for log-factors, numbers below +inf; of ``batch_size`` queries if that is given."""
    check_floats(name, log_factors, f"floating point {shape}", dim=dim)
    if batch_size is not None and len(log_factors) != batch_size:
        raise ArgumentError(f"{name}: expected floating point {shape}, got shape {tuple(log_factors.shape)}")
    if not bool((log_factors.detach() < torch.inf).all()):
        raise ArgumentError(f"{name}: expected numbers below +inf (-inf rules a value out), got NaN or +inf")


def check_mask(name: str, mask: Tensor, shape: Sequence[int]) -> None:
    """Check for a bool tensor of this shape."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != torch.Size(shape):
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ArgumentError(f"{name}: expected a bool tensor of shape {tuple(shape)}, got {got}")


def check_range(values: Tensor, upper: Tensor | int, name: str) -> None:
    """Check that values (B, ...) are integers from 0 to below ``upper``; where that is 0 any value is allowed."""
    outside = (values < 0) | (values >= upper)
    if values.is_floating_point():
        outside |= values != values.round()
    if isinstance(upper, Tensor):
        outside &= upper > 0
    if bool(outside.any()):
        first = outside.nonzero()[0].tolist()
        limit = upper if isinstance(upper, int) else int(upper.expand_as(values[0])[tuple(first[1:])])
        raise ArgumentError(
            f"{name}: expected values from 0 to {limit - 1}, got {values[tuple(first)].item()} at batch {first[0]}, "
            f"variable {first[1]}; use `observed` for unknown values"
        )


def check_distinct(values: Tensor, log_factors: Tensor) -> None:
    """Check that no possible value is listed twice in a row of (B, D, k)."""
    possible = torch.where(
        log_factors.detach() > -torch.inf, values, -1 - torch.arange(values.shape[-1], device=values.device)
    )
    ordered = possible.sort(-1).values
    repeated = (ordered[..., 1:] == ordered[..., :-1]).nonzero()
    if len(repeated):
        batch, var, position = repeated[0].tolist()
        raise ArgumentError(
            f"values: expected distinct values in a row, got {int(ordered[batch, var, position])} twice at batch "
            f"{batch}, variable {var}; add up its factors with torch.logaddexp first"
        )


def checked_pair(first_name: str, first: Tensor, second_name: str, second: Tensor) -> Tensor:
    """Return two floating-point tensors (B, D) as one, (B, D, 2)."""
    for name, tensor in ((first_name, first), (second_name, second)):
        check_floats(name, tensor, "floating point (B, D)", dim=2)
        if tensor.shape != first.shape:
            raise ArgumentError(
                f"{name}: expected the shape of {first_name}, {tuple(first.shape)}, got {tuple(tensor.shape)}"
            )
    return torch.stack([first, second], -1)


def _check_tensor(name: str, value: Tensor, expected: str) -> None:
    if not isinstance(value, Tensor):
        raise ArgumentError(
            f"{name}: expected a tensor {expected}, got {type(value).__name__}; wrap it in torch.as_tensor"
        )
