"""Cumulative distribution of ordered variables."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from circuits.arguments import checked_possible, kind_of
from circuits.engine.compile import CompiledCircuit
from circuits.engine.question import Question
from circuits.engine.weights import CircuitWeights
from circuits.errors import ArgumentError, PropertyError
from circuits.evidence import Dense, Evidence, Factors, Interval, Listed, Nothing, Where
from circuits.queries.common import dense_evidence, has_infinite_values, query


@query
def log_cdf(
    pc: CompiledCircuit, x: Tensor, evidence: Evidence | None = None, *, weights: CircuitWeights | None = None
) -> Tensor:
    """Return ``log P(X_0 <= x_0, ..., X_D-1 <= x_D-1 | e)``, the joint cumulative distribution of ordered values.

    The step functions are soft evidence or intervals, so this is one upward pass (and one for the evidence). Needs a
    smooth and decomposable circuit, which all circuits here are. Differentiable in the weights and the evidence.

    Args:
        pc: the circuit; the order of a variable's values is that of numbers.
        x: integers (B, D), or floating point if a variable has infinitely many values. Of 0 .. C - 1, a bound below 0
            is impossible, C - 1 or more does not bound the variable; +inf bounds none.
        evidence: what is known besides, for B queries or for one; None: nothing.
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.

    Returns:
        (B,), in nats, at most 0; -inf where the probability is 0.

    Raises:
        ArgumentError: ``x`` has a wrong shape or type, or does not fit the evidence.
        PropertyError: Gaussian evidence on a variable with infinitely many values.
        ImpossibleEvidenceError: the evidence alone has probability zero.
    """
    num_vars = pc.circuit.num_vars
    is_finite = not has_infinite_values(pc)
    expected = "integers" if is_finite else "integers or floating point without NaN"
    is_tensor = isinstance(x, Tensor) and x.dtype != torch.bool and not x.is_complex()
    if not is_tensor or (is_finite and x.is_floating_point()) or x.dim() != 2 or x.shape[1] != num_vars:
        raise ArgumentError(f"x: expected {expected} of shape (B, {num_vars}), got {kind_of(x)}")
    if x.is_floating_point() and bool(x.isnan().any()):
        raise ArgumentError(f"x: expected {expected}, got NaN; use +inf where there is no bound")
    given = dense_evidence(pc, evidence, weights) if is_finite else _with_dense_factors(pc, evidence, weights)
    if given.batch_size not in (1, len(x)):
        raise ArgumentError(f"evidence: expected {len(x)} queries, as many as bounds in x, got {given.batch_size}")
    repeated = (
        given if given.batch_size == len(x) else given.rows(torch.zeros(len(x), dtype=torch.int64, device=given.device))
    )
    bounded = replace(repeated, factors=_bounded(repeated.factors, x.to(pc.device), pc.dtype))
    log_p = pc.log_partition(bounded, weights)
    return log_p if evidence is None else log_p - checked_possible(pc.log_partition(given, weights))


def _with_dense_factors(pc: CompiledCircuit, evidence: Evidence | None, weights: CircuitWeights | None) -> Evidence:
    """Return the evidence, with log-factors of all values where there are finitely many."""
    question, num_values = Question(pc, evidence, weights), max(pc.circuit.num_categories)
    question.require_one_root()
    given = question.evidence
    if not num_values:
        return given
    is_finite = pc.num_categories > 0
    silent = Evidence.nothing(given.batch_size, given.num_vars, given.device)
    listed = Evidence.where(is_finite, given, silent).dense(num_values, pc.dtype)
    return Evidence.where(is_finite, Evidence.soft(listed), given)


def _bounded(factors: Factors, upper: Tensor, dtype: torch.dtype) -> Factors:
    """Return the factors with all values above ``upper``, (B, D), ruled out."""
    match factors:
        case Where(condition, one, other):
            return Where(condition, _bounded(one, upper, dtype), _bounded(other, upper, dtype))
        case Nothing():
            return Interval(torch.full_like(upper, -torch.inf, dtype=dtype), upper.to(dtype))
        case Interval(lower, old_upper):
            return Interval(lower, torch.minimum(old_upper, upper.to(old_upper.dtype)))
        case Listed(values, log_factors):
            log_factors = torch.zeros_like(values, dtype=dtype) if log_factors is None else log_factors
            return Listed(values, log_factors.masked_fill(values > upper.unsqueeze(2), -torch.inf))
        case Dense(log_factors):
            is_above = torch.arange(log_factors.shape[2], device=upper.device) > upper.unsqueeze(2)
            return Dense(log_factors.masked_fill(is_above, -torch.inf))
    raise PropertyError(
        "log_cdf: expected hard or interval evidence on variables with infinitely many values, got a normal density; "
        "no family has a closed form of its product with an interval and a normal density"
    )
