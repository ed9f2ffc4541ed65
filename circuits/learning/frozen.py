"""Parameters that learning leaves as they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from circuits.engine.compile import CompiledCircuit
from circuits.errors import ArgumentError
from circuits.families import Direct
from circuits.symbolic import Input, ParametricNode

Frozen: TypeAlias = "Mapping[str | ParametricNode, str] | Collection[str | ParametricNode]"
ALL = "all"


def frozen_parameters(pc: CompiledCircuit, frozen: Frozen | None, *, by_em: bool = False) -> dict[str, Tensor]:
    """Return where the parameters of each bank stay as they are: bool (P, S, 1); banks that all move are left out.

    Nodes that share their parameters are frozen together. With ``by_em`` it is EM that moves the others, which for
    finite families can fix all parameters or none. Raises ArgumentError for what is no node with parameters, or none of
    these.
    """
    masks: dict[str, Tensor] = {}
    if frozen is None:
        return masks
    if isinstance(frozen, str) or not isinstance(frozen, Collection):
        raise ArgumentError(f"frozen: expected a set of nodes or names, or a dict by these, got {frozen!r:.60}")
    parts = dict(frozen) if isinstance(frozen, Mapping) else dict.fromkeys(frozen, ALL)
    for key, part in parts.items():
        node = pc.circuit.node(key) if isinstance(key, str) else key
        if not isinstance(node, ParametricNode):
            raise ArgumentError(f"frozen: expected sum or input nodes, or their names, got {key!r:.60}")
        bank, row = pc.bank_address(node)
        parameter = pc.bank[bank]
        shape = (*parameter.shape[:2], 1)
        fixed = _part(node, part, shape[1]).to(parameter.device)
        if by_em and part != ALL and shape[1] > 1 and not isinstance(pc.families.get(bank), Direct):
            raise ArgumentError(f"frozen: EM fits all parameters of {node} or none; use a torch optimizer for {part!r}")
        mask = masks.setdefault(bank, torch.zeros(shape, dtype=torch.bool, device=parameter.device))
        mask[row] |= fixed
    return masks


def _part(node: ParametricNode, part: str, num_parameters: int) -> Tensor:
    names = node.distribution.parameter_names if isinstance(node, Input) else ()
    if part == ALL:
        return torch.ones(num_parameters, 1, dtype=torch.bool)
    if part not in names:
        known = ", ".join(map(repr, (*names, ALL)))
        raise ArgumentError(f"frozen: expected one of {known} of {node}, got {part!r:.60}")
    return torch.tensor([[name == part] for name in names])
