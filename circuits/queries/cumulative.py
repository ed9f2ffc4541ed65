"""Cumulative distribution of ordered variables."""

from __future__ import annotations

import torch
from torch import Tensor

from circuits.compile import CompiledCircuit
from circuits.errors import ArgumentError
from circuits.evidence import Evidence
from circuits.passes import Banks
from circuits.queries._common import checked_possible, dense_evidence


def log_cdf(
    pc: CompiledCircuit, x: Tensor, evidence: Evidence | None = None, *, weights: Banks | None = None
) -> Tensor:
    """Return ``log P(X_0 <= x_0, ..., X_D-1 <= x_D-1 | e)``, the joint cumulative distribution of ordered values.

    The step functions are soft evidence, so this is one upward pass (and one for the evidence). Needs a smooth and
    decomposable circuit, which all circuits here are. Differentiable in the weights and the evidence.

    Args:
        pc: the circuit; the order of a variable's values is 0 < 1 < ... < C - 1.
        x: integers (B, D); a bound below 0 is impossible, C - 1 or more does not bound the variable.
        evidence: what is known besides, for B queries or for one; None: nothing.
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.

    Returns:
        (B,), in nats, at most 0; -inf where the probability is 0.

    Raises:
        ArgumentError: ``x`` has a wrong shape or type, or does not fit the evidence.
        ImpossibleEvidenceError: the evidence alone has probability zero.
    """
    num_vars = pc.circuit.num_vars
    if not isinstance(x, Tensor) or x.is_floating_point() or x.dim() != 2 or x.shape[1] != num_vars:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ArgumentError(f"x: expected integers of shape (B, {num_vars}), got {got}")
    given, factors = dense_evidence(pc, evidence)
    if len(factors) not in (1, len(x)):
        raise ArgumentError(f"evidence: expected {len(x)} queries, as many as bounds in x, got {len(factors)}")
    values = torch.arange(factors.shape[2], device=pc.device)
    bounded = factors.masked_fill(values > x.to(pc.device).unsqueeze(2), -torch.inf)
    if len(factors) < len(x):
        given = given.rows(torch.zeros(len(x), dtype=torch.int64, device=given.device))
    banks = pc.weights() if weights is None else weights
    log_p = pc.log_partition(given.with_factors(bounded), banks)
    return log_p if evidence is None else log_p - checked_possible(pc.log_partition(given, banks))
