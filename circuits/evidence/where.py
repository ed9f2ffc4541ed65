"""Joining two kinds of evidence, variable by variable."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuits.errors import ArgumentError
from circuits.evidence.checks import check_mask

if TYPE_CHECKING:
    from circuits.evidence import Evidence


def joined(condition: Tensor, one: Evidence, other: Evidence) -> Evidence:
    """Return evidence ``one`` where ``condition``, bool (B, D), is True, and ``other`` elsewhere.

    Of a latent that both have factors on, those of ``one`` count. See :meth:`~circuits.evidence.Evidence.where`.
    """
    shape = torch.Size((one.batch_size, one.num_vars))
    if (other.batch_size, other.num_vars) != shape:
        raise ArgumentError(
            f"other: expected evidence for {tuple(shape)} queries and variables like `one`, got "
            f"{(other.batch_size, other.num_vars)}"
        )
    if isinstance(condition, Tensor) and condition.dim() == 1:
        condition = condition.expand(*shape) if condition.shape[0] == shape[1] else condition
    check_mask("condition", condition, shape)
    if one.classes is not None and other.classes is not None:
        raise ArgumentError("other: it names the class, as `one` does; give it once")
    latents = {**(other.latents or {}), **(one.latents or {})} or None
    classes = other.classes if one.classes is None else one.classes
    reference = _joined_references(condition, one, other)
    on_variables = _on_variables(condition, replace(one, reference=None), replace(other, reference=None))
    return replace(on_variables, latents=latents, classes=classes, reference=reference)


def _on_variables(condition: Tensor, one: Evidence, other: Evidence) -> Evidence:
    other = replace(other, latents=None, classes=None)
    if one.otherwise is not None:
        other = _on_variables(condition, one.otherwise, other)
    elif one.missing is not None:
        other = other.without(condition)
    missing = ~condition if one.missing is None else one.missing | ~condition
    return replace(one, missing=missing, otherwise=other)


def _joined_references(condition: Tensor, one: Evidence, other: Evidence) -> Evidence | None:
    """Return what the joined evidence is relative to; where nothing is known an input unit has the value 1."""
    if one.reference is None and other.reference is None:
        return None
    nothing = one.nothing(one.batch_size, one.num_vars, one.device)
    return joined(condition, one.reference or nothing, other.reference or nothing)
