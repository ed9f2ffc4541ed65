"""Checks of arguments that many public functions take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from circuits.errors import ArgumentError, ImpossibleEvidenceError


def checked_count(name: str, value: int, least: int = 1) -> int:
    """Return an argument that is an integer of at least ``least``; raise ArgumentError otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ArgumentError(f"{name}: expected an integer >= {least}, got {value!r}")
    return value


def is_number(value: object) -> bool:
    """Whether a value is a real number, Python's or NumPy's, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)


def checked_number(name: str, value: float, what: str = "a number") -> float:
    """Return an argument that is a finite number of at least 0; ``what`` says in the message what it counts."""
    if not is_number(value) or not 0 <= value < math.inf:
        raise ArgumentError(f"{name}: expected {what} >= 0, got {value!r}")
    return value


def checked_temperature(value: float) -> float:
    """Return a temperature that is 0, or a number whose inverse float32 holds; raise ArgumentError otherwise."""
    if not is_number(value) or not (value == 0 or 1e-37 <= value <= 1e38):
        raise ArgumentError(f"temperature: expected 0, or a number from 1e-37 to 1e38, got {value!r}")
    return value


def checked_dtype(name: str, value: torch.dtype) -> torch.dtype:
    """Return an argument that is a dtype of compiled circuits; raise ArgumentError otherwise."""
    if value not in (torch.float32, torch.float64):
        raise ArgumentError(f"{name}: expected torch.float32 or torch.float64, got {value}")
    return value


def checked_device(name: str, value: torch.device | str) -> torch.device:
    """Return an argument that names a device which is here; raise ArgumentError otherwise."""
    try:
        return torch.empty(0, device=value).device
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:  # torch raises each of them
        reason = str(error).split("\n")[0]
        raise ArgumentError(
            f"{name}: expected a device of this machine, for instance 'cpu', got {value!r}: {reason}"
        ) from error


def checked_seed(name: str, value: int | None) -> int | None:
    """Return an argument that is an integer that torch takes as a seed, or None; raise ArgumentError otherwise."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise ArgumentError(f"{name}: expected an integer or None, got {value!r}")
    if value is not None and not -(1 << 63) <= value < 1 << 64:
        raise ArgumentError(f"{name}: expected an integer of 64 bits, or None, got one of {value.bit_length()}")
    return value


def shape_of(value: object) -> str:
    """Say of what shape a tensor is, or of what type something else; for messages."""
    return f"{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def kind_of(value: object) -> str:
    """Say of what dtype and shape a tensor is, or of what type something else; for messages."""
    return f"{value.dtype} {shape_of(value)}" if isinstance(value, Tensor) else type(value).__name__


def check_stored(name: str, value: Tensor) -> None:
    """Check that a tensor has all of its numbers: none on the device "meta", none of a sparse layout."""
    if value.layout != torch.strided:
        raise ArgumentError(f"{name}: expected a dense tensor, got one of {value.layout}; give {name}.to_dense()")
    if value.is_meta and type(value) in (Tensor, torch.nn.Parameter):  # a subclass may have its numbers elsewhere
        raise ArgumentError(f"{name}: expected a tensor with numbers, got one on the device meta; make it elsewhere")


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
    if log_factors.numel() and not bool(log_factors.detach().amax() < torch.inf):  # a maximum hands NaN on
        raise ArgumentError(f"{name}: expected numbers below +inf (-inf rules a value out), got NaN or +inf")


def check_pair(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    """Check for two floating-point tensors (B, D)."""
    for name, tensor in ((first_name, first), (second_name, second)):
        check_floats(name, tensor, "floating point (B, D)", dim=2)
        if tensor.shape != first.shape:
            raise ArgumentError(
                f"{name}: expected the shape of {first_name}, {tuple(first.shape)}, got {tuple(tensor.shape)}"
            )


def check_mask(name: str, mask: Tensor, shape: Sequence[int]) -> None:
    """Check for a bool tensor of this shape."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != torch.Size(shape):
        got = f"{type(mask).__name__}; wrap it in torch.as_tensor"
        if isinstance(mask, Tensor):
            got = f"{mask.dtype} {tuple(mask.shape)}"
        raise ArgumentError(f"{name}: expected a bool tensor of shape {tuple(shape)}, got {got}")
    check_stored(name, mask)


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


def _check_tensor(name: str, value: Tensor, expected: str) -> None:
    if not isinstance(value, Tensor):
        raise ArgumentError(
            f"{name}: expected a tensor {expected}, got {type(value).__name__}; wrap it in torch.as_tensor"
        )
    check_stored(name, value)


def checked_possible(log_z: Tensor) -> Tensor:
    """Return ``log_z`` (B,) or (B, R); raise ImpossibleEvidenceError if some of it is -inf."""
    is_impossible = log_z == -torch.inf
    impossible = (is_impossible if log_z.dim() == 1 else is_impossible.any(1)).nonzero().flatten().tolist()
    if impossible:
        raise ImpossibleEvidenceError(
            f"evidence: that of {len(impossible)} of {len(log_z)} queries has probability zero (the first is query "
            f"{impossible[0]}); log_marginal and log_partition return -inf for such evidence instead"
        )
    return log_z
