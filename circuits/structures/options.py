"""Checks of arguments that many structures take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from circuits.arguments import checked_count
from circuits.errors import ArgumentError, StructureError
from circuits.families import Categorical, Distribution


def checked_table(
    argument: str, table: Tensor | None, shape: tuple[int, ...], num_steps: int, homogeneous: bool
) -> Tensor | None:
    """Return a given table once per step, shape (num_steps, *shape)."""
    if table is None:
        return None
    if not isinstance(table, Tensor) or not table.is_floating_point():
        raise ArgumentError(f"{argument}: expected a floating-point tensor of probabilities, got {_kind(table)}")
    per_step = (num_steps, *shape)
    if tuple(table.shape) != shape and (homogeneous or tuple(table.shape) != per_step):
        expected = f"{shape}" if homogeneous else f"{shape} or, one a step, {per_step}"
        raise StructureError(f"{argument}: expected a table of shape {expected}, got {tuple(table.shape)}")
    return table.expand(per_step)


def family_of(argument: str, value: int | Distribution) -> Distribution:
    """Return the input family that a number of categories, or the family itself, stands for."""
    if isinstance(value, (int, bool)):
        return Categorical(checked_count(argument, value))
    if not isinstance(value, Distribution):
        raise ArgumentError(
            f"{argument}: expected a number of categories or an input family such as ct.Categorical(3), got {value!r}"
        )
    return value


def families_of(
    argument: str,
    value: int | Distribution | Sequence[int | Distribution] | Mapping[int, int | Distribution],
    num_vars: int,
) -> list[Distribution]:
    """Return one input family per variable, given one for all, a sequence, or a mapping from variables."""
    if isinstance(value, Mapping):
        missing = [var for var in range(num_vars) if var not in value]
        if missing:
            raise ArgumentError(f"{argument}: expected a family for every variable, got none for variable {missing[0]}")
        value = [value[var] for var in range(num_vars)]
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [family_of(argument, value)] * num_vars
    if len(value) != num_vars:
        raise ArgumentError(f"{argument}: expected one number or num_vars={num_vars} of them, got {len(value)}")
    return [family_of(argument, each) for each in value]


def _kind(value: object) -> str:
    return f"{value.dtype}" if isinstance(value, Tensor) else f"{type(value).__name__}; wrap it in torch.as_tensor"
