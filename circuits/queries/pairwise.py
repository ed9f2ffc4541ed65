"""Posterior marginals of pairs of variables, and what two variables tell about each other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from circuits.arguments import checked_possible, kind_of
from circuits.engine.compile import CompiledCircuit
from circuits.engine.question import Question
from circuits.errors import ArgumentError
from circuits.evidence import Evidence
from circuits.queries.common import dense_evidence, detached, factors_of, queries_per_pass, query


@query
@detached
def pairwise_marginals(
    pc: CompiledCircuit, evidence: Evidence | None = None, pairs: Tensor | None = None, *, differentiable: bool = False
) -> Tensor:
    """Return the posterior of pairs of variables, ``p(x_i = u, x_j = v | e)``.

    By the chain rule ``p(x_i = u | e) p(x_j = v | e, x_i = u)``: one upward and downward pass per conditioning value
    (i, u), many of them in one batch of bounded size. Needs a smooth and decomposable circuit, which all circuits here
    are.

    Args:
        pc: the circuit.
        evidence: for B queries; None: no evidence, B = 1.
        pairs: int64 (P, 2), the variables i and j of each pair; None: all of them.
        differentiable: whether the result is differentiable in evidence and weights; memory grows with the passes.

    Returns:
        (B, P, C, C), the value of i first; (B, D, D, C, C) for all pairs, where i = j is the diagonal matrix of
        ``p(x_i | e)``. Each (C, C) sums to 1; entries of values that a variable does not have are 0.

    Raises:
        ArgumentError: ``pairs`` are not pairs of variables of the circuit.
        ImpossibleEvidenceError: log Z = -inf for some query.
    """
    given = dense_evidence(pc, evidence)
    log_z = checked_possible(pc.log_partition(given))
    if pairs is None:
        return torch.stack([joint for _, joint in _joints(pc, given, log_z, range(given.num_vars))], 1)
    _check_pairs(pc, pairs)
    factors = factors_of(given)
    first = pairs[:, 0].unique().tolist()
    tables = factors.new_zeros(len(factors), len(pairs), *[factors.shape[2]] * 2)
    for variable, joint in _joints(pc, given, log_z, first):
        here = (pairs[:, 0] == variable).nonzero().flatten().to(factors.device)
        tables = tables.index_copy(1, here, joint[:, pairs[here.to(pairs.device), 1].to(factors.device)])
    return tables


@query
@detached
def mutual_information(
    pc: CompiledCircuit, evidence: Evidence | None = None, *, differentiable: bool = False
) -> Tensor:
    """Return the mutual information of every two variables given the evidence, ``I(X_i; X_j | e)`` in nats.

    Exact: every pair's posterior table is computed, as in :func:`pairwise_marginals`, and reduced at once, so that the
    tables of one variable i are in memory at a time (Cover and Thomas 2006, equation 2.28). Needs a smooth and
    decomposable circuit, which all circuits here are.

    Args:
        pc: the circuit.
        evidence: for B queries; None: no evidence, B = 1.
        differentiable: whether the result is differentiable in evidence and weights; then memory is not bounded.

    Returns:
        (B, D, D), symmetric, >= 0 up to rounding; the diagonal is the entropy ``H(X_i | e)``.

    Raises:
        ImpossibleEvidenceError: log Z = -inf for some query.
    """
    given = dense_evidence(pc, evidence)
    log_z = checked_possible(pc.log_partition(given))
    rows = []
    for _, joint in _joints(pc, given, log_z, range(given.num_vars)):  # (B, D, C, C)
        independent = joint.sum(3, keepdim=True) * joint.sum(2, keepdim=True)
        possible = (joint > 0) & (independent > 0)
        ratio = torch.where(possible, joint, 1.0).log() - torch.where(possible, independent, 1.0).log()
        rows.append((joint * ratio).sum((2, 3)))
    return torch.stack(rows, 1)


def _joints(
    pc: CompiledCircuit, given: Evidence, log_z: Tensor, variables: range | list[int]
) -> Iterator[tuple[int, Tensor]]:
    """Yield each variable i with the tables p(x_i = u, x_j = v | e) of all j: (B, D, C, C)."""
    factors, weights = factors_of(given), pc.weights()
    batch_size, num_vars, num_values = factors.shape

    for variable in variables:
        count = pc.circuit.num_categories[variable]
        other_values = ~torch.eye(num_values, dtype=torch.bool, device=factors.device)[:count]  # (C_i, C)
        at_variable = torch.arange(num_vars, device=factors.device) == variable
        ruled_out = other_values.unsqueeze(1) & at_variable.unsqueeze(1)  # (C_i, D, C)
        parts = []
        for values in torch.arange(count).split(max(1, queries_per_pass(pc) // max(1, batch_size))):
            conditioned = factors.unsqueeze(1).masked_fill(ruled_out[values], -torch.inf).flatten(0, 1)
            copies = torch.arange(batch_size, device=factors.device).repeat_interleave(len(values))
            question = Question(pc, given.rows(copies).with_factors(conditioned), weights)
            log_joint = question.log_z.unflatten(0, (batch_size, len(values))) - log_z.unsqueeze(1)
            posterior = question.gradients(allow_impossible=True).unflatten(0, (batch_size, len(values)))
            parts.append(log_joint.exp()[..., None, None] * posterior)  # (B, C_i, D, C)
        joint = torch.nn.functional.pad(torch.cat(parts, 1), (0, 0, 0, 0, 0, num_values - count))
        yield variable, joint.transpose(1, 2)


def _check_pairs(pc: CompiledCircuit, pairs: Tensor) -> None:
    if not isinstance(pairs, Tensor) or pairs.dtype != torch.int64 or pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ArgumentError(f"pairs: expected int64 of shape (P, 2), got {kind_of(pairs)}")
    num_vars = pc.circuit.num_vars
    if bool(((pairs < 0) | (pairs >= num_vars)).any()):
        raise ArgumentError(f"pairs: expected variables from 0 to {num_vars - 1}, got {pairs.tolist()}")
