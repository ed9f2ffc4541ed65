"""The values of input units with their variable restricted to one class of values after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from circuits.algebra.semirings import Semiring
from circuits.engine.compile import CompiledCircuit
from circuits.engine.question import Question
from circuits.engine.weights import CircuitWeights, Weights
from circuits.evidence import Dense, Evidence, Factors, Listed, Nothing, Where


def explicit(evidence: Evidence, num_values: int, dtype: torch.dtype, reads: Tensor | None) -> Evidence:
    """Return the same evidence with every factor written down, dense or listed, where a variable is read, (B, D).

    Lists stay lists where they can, so that nothing of the size of all values is made.
    """
    listed, missing = _as_list(evidence.factors, dtype), evidence.missing
    is_lacking = missing is not None and bool((missing if reads is None else missing & reads).any())
    if listed is not None and not is_lacking:
        return replace(evidence, factors=listed if missing is None else listed.without(missing))
    if isinstance(evidence.factors, Dense):
        return evidence
    return evidence.with_factors(evidence.dense(num_values, dtype))


def _as_list(factors: Factors, dtype: torch.dtype) -> Listed | None:
    """Return listed values with their factors as one list, where nothing is known any; None if not all are listed."""
    match factors:
        case Listed(values):
            return Listed(values.long(), factors.factors(dtype))
        case Where(_, one, Nothing()):
            return _as_list(one, dtype)
        case Where(condition, one, other):
            first, second = _as_list(one, dtype), _as_list(other, dtype)
            if first is None or second is None:
                return None
            length = max(first.values.shape[2], second.values.shape[2])
            (values, log_factors), (others, other_factors) = (
                _padded(first, length, dtype),
                _padded(second, length, dtype),
            )
            is_first = condition.unsqueeze(-1)
            return Listed(torch.where(is_first, values, others), torch.where(is_first, log_factors, other_factors))
    return None


def _padded(listed: Listed, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the values and factors of lists of this length, with impossible values at the end."""
    padding = 0, length - listed.values.shape[2]
    pad, factors = torch.nn.functional.pad, listed.factors(dtype)
    return pad(listed.values, padding), pad(factors, padding, value=-torch.inf)


def class_leaves(
    pc: CompiledCircuit,
    semiring: Semiring,
    evidence: Evidence,
    classes: Tensor,  # shape: (V,)
    num_classes: int,
    weights: CircuitWeights,
) -> list[Tensor]:  # shape: (F, K, B, num_classes)
    """Return the log-values of all input units under the evidence on the values of each class alone.

    Args:
        pc: the circuit.
        semiring: of log-values.
        evidence: :func:`explicit`.
        classes: int64 (V,), the class of every value.
        num_classes: how many classes there are.
        weights: the circuit's weights.
    """
    parts: list[Sequence[Tensor]]
    if evidence.values is None:
        parts = [_dense(pc, semiring, evidence, classes == c, weights) for c in range(num_classes)]
    else:
        lists = _sorted_lists(evidence, classes, num_classes)
        sizes = lists.counts.amax((0, 1)).tolist()
        parts = [_listed(pc, semiring, evidence, lists, c, sizes[c], weights) for c in range(num_classes)]
    return [torch.stack(layer, -1) for layer in zip(*parts, strict=True)]


def _dense(
    pc: CompiledCircuit, semiring: Semiring, evidence: Evidence, chosen: Tensor, weights: CircuitWeights
) -> list[Tensor]:
    """Read those rows of the tables only that belong to the chosen values, bool (V,)."""
    assert evidence.log_factors is not None
    values = []
    for position, layer in enumerate(pc.input_layers):
        own = weights.own[layer.parameter_rows.bank]
        members = chosen[: own.log.shape[1]].nonzero().flatten()
        if not len(members):
            shape = (*pc.layer_sizes[position], evidence.batch_size)
            values.append(torch.full(shape, -torch.inf, dtype=pc.dtype, device=pc.device))
            continue
        rows = own if len(members) == own.log.shape[1] else Weights(own.log[:, members], own.linear[:, members])
        part = layer(semiring, Evidence(Dense(evidence.log_factors[..., members].to(pc.dtype))), rows)
        external = weights.given.get(position)
        if external is not None:
            restricted = evidence.log_factors.masked_fill(~chosen[: evidence.log_factors.shape[-1]], -torch.inf)
            part = external.values(semiring, Evidence(Dense(restricted)), layer.variables, part)
        values.append(part)
    return values


class _Lists(NamedTuple):
    """Listed values in the order of their classes."""

    values: Tensor
    """int64 (B, D, k)."""
    log_factors: Tensor
    """(B, D, k)."""
    starts: Tensor
    """Where in the list a class begins, int64 (B, D, K)."""
    counts: Tensor
    """How many values of a class are listed, int64 (B, D, K)."""


def _sorted_lists(evidence: Evidence, classes: Tensor, num_classes: int) -> _Lists:
    assert evidence.values is not None
    assert evidence.log_factors is not None
    own = classes[evidence.values].masked_fill(evidence.log_factors == -torch.inf, num_classes)
    order = own.argsort(dim=-1, stable=True)
    counts = own.new_zeros(*own.shape[:2], num_classes + 1).scatter_add_(2, own, torch.ones_like(own))[..., :-1]
    values, log_factors = evidence.values.gather(2, order), evidence.log_factors.gather(2, order)
    return _Lists(values, log_factors, counts.cumsum(-1) - counts, counts)


def _listed(
    pc: CompiledCircuit,
    semiring: Semiring,
    evidence: Evidence,
    lists: _Lists,
    c: int,
    size: int,
    weights: CircuitWeights,
) -> Sequence[Tensor]:
    """Read the listed values of class c, of which a variable has at most ``size``."""
    if size == 0:
        shapes = [(*sizes, evidence.batch_size) for sizes in pc.layer_sizes[: len(pc.input_layers)]]
        return [torch.full(shape, -torch.inf, dtype=pc.dtype, device=pc.device) for shape in shapes]
    offset = torch.arange(size, device=lists.values.device)
    index = (lists.starts[..., c : c + 1] + offset).clamp_max(lists.values.shape[2] - 1)
    is_listed = offset < lists.counts[..., c : c + 1]
    factors = lists.log_factors.gather(2, index).masked_fill(~is_listed, -torch.inf)
    restricted = Evidence(Listed(lists.values.gather(2, index), factors.to(pc.dtype)))
    return Question(pc, restricted, weights).inputs(semiring)
