"""Expectations of sums and products of univariate functions; moments of ordered variables."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

from circuits.algebra import logspace
from circuits.algebra.semirings import LogSemiring, Semiring
from circuits.arguments import checked_count, checked_possible
from circuits.engine.compile import CompiledCircuit
from circuits.engine.question import Question, gradient_of
from circuits.engine.weights import CircuitWeights
from circuits.errors import ArgumentError
from circuits.evidence import Evidence
from circuits.queries._direct_moments import direct_covariance, direct_moments
from circuits.queries.basic import marginals
from circuits.queries.common import (
    dense_evidence,
    detached,
    existing_values,
    factors_of,
    has_infinite_values,
    queries_per_pass,
    query,
    require_finite_values,
    value_table,
)


@query
@detached
def expectation(
    pc: CompiledCircuit,
    functions: Tensor,
    evidence: Evidence | None = None,
    *,
    of: Literal["sum", "product"] = "sum",
    differentiable: bool = False,
) -> Tensor:
    """Return the posterior expectation of a sum or of a product of univariate functions, exactly.

    ``E[sum_i f_i(x_i) | e]`` is linear in the posterior marginals, hence one upward and one downward pass for any
    number of functions: the first-order expectation semiring by way of its gradient (Eisner 2002; Li and Eisner 2009,
    section 4). ``E[prod_i f_i(x_i) | e]`` is one upward pass per function, in which positive and negative terms are
    added up apart. Needs a smooth and decomposable circuit, which all circuits here are.

    Args:
        pc: the circuit.
        functions: ``f_i(v)`` at [i, v], (D, C), or M of them at [i, v, m], (D, C, M); any finite numbers. Entries of
            values that a variable does not have are ignored.
        evidence: for B queries; None: no evidence, B = 1.
        of: "sum" or "product" over the variables.
        differentiable: whether the result is differentiable in functions, evidence and weights.

    Returns:
        (B,), or (B, M).

    Raises:
        ArgumentError: ``functions`` has a wrong shape or a number that is not finite, or ``of`` is neither.
        ImpossibleEvidenceError: log Z = -inf for some query.
    """
    require_finite_values(pc, "expectation")
    table = value_table(pc, "functions", functions, extra_dim=True)
    stacked = table if table.dim() == 3 else table.unsqueeze(2)
    if of == "sum":
        result = torch.einsum("bdc,dcm->bm", _posterior(pc, evidence, None, differentiable), stacked)
    elif of == "product":
        result = _expected_product(pc, stacked, dense_evidence(pc, evidence))
    else:
        raise ArgumentError(f"of: expected 'sum' or 'product', got {of!r}")
    return result if table.dim() == 3 else result.squeeze(1)


@query
@detached
def moments(
    pc: CompiledCircuit,
    order: int,
    evidence: Evidence | None = None,
    *,
    values: Tensor | None = None,
    about: Literal["zero", "mean"] = "zero",
    weights: CircuitWeights | None = None,
    differentiable: bool = False,
) -> Tensor:
    """Return a posterior moment of every variable: ``E[x_i^order | e]``, or ``E[(x_i - E[x_i | e])^order | e]``.

    Needs a smooth and decomposable circuit, which all circuits here are. Variables with infinitely many values have
    closed forms of every order, from their moment generating function.

    Args:
        pc: the circuit.
        order: an integer >= 1.
        evidence: for B queries; None: no evidence, B = 1.
        values: the number that each value stands for, (D, C); None: v stands for the number v. Variables with
            infinitely many values always stand for themselves.
        about: "zero" for raw moments, "mean" for central ones.
        weights: of ``pc.weights(external=...)``, in place of the circuit's own, where all values are finitely many.
        differentiable: whether the result is differentiable in values, evidence and weights, at more time and memory.

    Returns:
        (B, D).

    Raises:
        ArgumentError: an argument has a wrong type, shape or value.
        ImpossibleEvidenceError: log Z = -inf for some query.
        PropertyError: run-time weights where a variable has infinitely many values.
    """
    checked_count("order", order)
    if about not in ("zero", "mean"):
        raise ArgumentError(f"about: expected 'zero' or 'mean', got {about!r}")
    numbers = value_table(pc, "values", values)
    if has_infinite_values(pc):
        if weights is not None:
            require_finite_values(pc, "moments with weights at run time")
        centre = None if about == "zero" else direct_moments(pc, 1, evidence, numbers, None)
        return direct_moments(pc, order, evidence, numbers, centre)
    posterior = _posterior(pc, evidence, weights, differentiable)
    if about == "zero":
        return (posterior * numbers**order).sum(2)
    centred = numbers - (posterior * numbers).sum(2, keepdim=True)
    return (posterior * centred**order).sum(2)


@query
def mean(
    pc: CompiledCircuit,
    evidence: Evidence | None = None,
    *,
    values: Tensor | None = None,
    weights: CircuitWeights | None = None,
    differentiable: bool = False,
) -> Tensor:
    """Return the posterior mean of every variable, ``E[x_i | e]``, (B, D): the first of :func:`moments`."""
    return moments(pc, 1, evidence, values=values, weights=weights, differentiable=differentiable)


@query
def variance(
    pc: CompiledCircuit,
    evidence: Evidence | None = None,
    *,
    values: Tensor | None = None,
    weights: CircuitWeights | None = None,
    differentiable: bool = False,
) -> Tensor:
    """Return the posterior variance of every variable, (B, D): the second central one of :func:`moments`."""
    return moments(pc, 2, evidence, values=values, about="mean", weights=weights, differentiable=differentiable)


@query
@detached
def covariance(
    pc: CompiledCircuit, evidence: Evidence | None = None, *, values: Tensor | None = None, differentiable: bool = False
) -> Tensor:
    """Return the posterior covariance matrix of the variables, ``Cov[x_i, x_j | e]``.

    Row i is the derivative of ``E[x_i | e]`` with respect to log-factors ``t_j x_j``: a second derivative of log Z,
    D of them in batches of bounded size (Li and Eisner 2009, the second-order expectation semiring by way of its
    gradient). Needs a smooth and decomposable circuit, which all circuits here are.

    Args:
        pc: the circuit.
        evidence: for B queries; None: no evidence, B = 1.
        values: the number that each value stands for, (D, C); None: v stands for the number v. Variables with
            infinitely many values always stand for themselves.
        differentiable: whether the result is differentiable in values, evidence and weights, at more time and memory.

    Returns:
        (B, D, D), symmetric, the variances on the diagonal.

    Raises:
        ArgumentError: ``values`` has a wrong shape or a number that is not finite.
        ImpossibleEvidenceError: log Z = -inf for some query.
    """
    numbers = value_table(pc, "values", values)
    if has_infinite_values(pc):
        centre = direct_moments(pc, 1, evidence, numbers, None)
        return direct_covariance(pc, evidence, numbers, centre)
    given = dense_evidence(pc, evidence)
    checked_possible(pc.log_partition(given))
    factors, weights = factors_of(given), pc.weights()
    batch_size, num_vars = factors.shape[:2]

    def means_of(factors: Tensor, weights: CircuitWeights, variables: Tensor) -> Tensor:
        with torch.enable_grad():
            copies = given.rows(torch.arange(batch_size, device=factors.device).repeat(len(variables)))
            log_z = pc.log_partition(copies.with_factors(factors), weights)
            (posterior,) = torch.autograd.grad(log_z.sum(), factors, create_graph=True)
        chosen = variables.repeat_interleave(batch_size)
        query = torch.arange(len(factors), device=factors.device)
        return (posterior[query, chosen] * numbers[chosen]).sum(1)

    rows = []
    for variables in torch.arange(num_vars, device=pc.device).split(max(1, queries_per_pass(pc) // max(1, batch_size))):
        repeated = factors.repeat(len(variables), 1, 1)
        slopes = gradient_of(functools.partial(means_of, variables=variables), repeated, weights)
        row = (slopes * numbers).sum(2)
        rows.append(row.unflatten(0, (len(variables), batch_size)))
    return torch.cat(rows).transpose(0, 1)


def _posterior(
    pc: CompiledCircuit, evidence: Evidence | None, weights: CircuitWeights | None, differentiable: bool
) -> Tensor:
    """Return the posterior marginals, (B, D, C)."""
    given = dense_evidence(pc, evidence, weights)
    return marginals(pc, given, weights=weights, differentiable=differentiable)


def _expected_product(pc: CompiledCircuit, functions: Tensor, given: Evidence) -> Tensor:
    """Return E[prod_i f_im(x_i) | e], (B, M), for functions (D, C, M)."""
    log_z = checked_possible(pc.log_partition(given))
    factors, weights, batch_size = factors_of(given), pc.weights(), given.batch_size
    functions = functions.masked_fill(~existing_values(pc).unsqueeze(2), 0.0).permute(2, 0, 1)  # (M, D, C)
    columns = []
    for part in functions.split(max(1, queries_per_pass(pc) // (4 * batch_size))):
        copies = given.rows(torch.arange(batch_size, device=factors.device).repeat(len(part)))
        signed = []
        for sign in (1.0, -1.0):
            positive = sign * part > 0
            log_f = torch.where(positive, torch.where(positive, sign * part, 1.0).log(), -torch.inf)
            weighted = (log_f.unsqueeze(1) + factors).flatten(0, 1)  # (M * B, D, C)
            signed.append(Question(pc, copies.with_factors(weighted), weights))
        pairs = [torch.stack(pair, -1) for pair in zip(*(half.inputs(LogSemiring()) for half in signed), strict=True)]
        root = signed[0].with_inputs(pairs).root(SignedSemiring())
        shares = (root.unflatten(0, (-1, batch_size)) - log_z.unsqueeze(1)).exp()  # (M, B, 2)
        columns.append(shares[..., 0] - shares[..., 1])
    return torch.cat(columns).transpose(0, 1)


class SignedSemiring(Semiring):
    """Real numbers as (log of the positive terms, log of the negative terms), in two trailing entries.

    The two totals stay apart until the end, so an expectation is as accurate as the expectation of its magnitude.
    """

    is_linear = True

    def lift(self, log_values: Tensor) -> Tensor:
        """Read log-values as positive numbers."""
        return torch.stack([log_values, torch.full_like(log_values, -torch.inf)], -1)

    def times(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply: equal signs make positive terms, different ones negative terms."""
        positive = _log_add(left[..., 0] + right[..., 0], left[..., 1] + right[..., 1])
        negative = _log_add(left[..., 0] + right[..., 1], left[..., 1] + right[..., 0])
        return torch.stack([positive, negative], -1)

    def contract(self, log_weights: Tensor, x: Tensor, *, weights: Tensor | None = None) -> Tensor:
        """Log-sum-exp over i of both, as one batched GEMM."""
        return logspace.log_matmul(log_weights, x.flatten(2), weights=weights).unflatten(2, x.shape[2:])


def _log_add(left: Tensor, right: Tensor) -> Tensor:
    """Return log(exp(left) + exp(right)) with gradient 0, not NaN, where both are -inf."""
    possible = torch.maximum(left, right) > -torch.inf
    return torch.where(
        possible, torch.logaddexp(torch.where(possible, left, 0.0), torch.where(possible, right, 0.0)), -torch.inf
    )
