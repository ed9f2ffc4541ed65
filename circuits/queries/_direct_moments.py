"""Moments in circuits with variables of infinitely many values, by tilting.

With ``e_i(v) exp(t_i (v - c_i))`` in place of the evidence ``e_i(v)``, log Z is the cumulant generating function of the
posterior about c, up to a constant. Exponential families are closed under this tilt, so its derivatives at t = 0 are
exact for every kind of evidence that the family can be given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from circuits.algebra.semirings import LogSemiring
from circuits.arguments import checked_possible
from circuits.engine.compile import CompiledCircuit
from circuits.engine.input_layers import DirectLayer
from circuits.engine.question import Question
from circuits.engine.weights import CircuitWeights, Weights
from circuits.evidence import Evidence
from circuits.queries.common import queries_per_pass, refuse_relative


def direct_moments(
    pc: CompiledCircuit, order: int, evidence: Evidence | None, numbers: Tensor, centre: Tensor | None
) -> Tensor:
    """Return ``E[(x_i - c_i)^order | e]``, (B, D).

    A variable's moment is the average of those of its input units, which are derivatives of their own tilted values.
    The values of variables with finitely many of them stand for ``numbers``, (D, C); ``centre`` is c, (B, D), or None
    for 0.
    """
    refuse_relative(evidence, "moments of variables with infinitely many values")
    is_recorded = torch.is_grad_enabled()
    question = Question(pc, evidence)
    question.require_one_root()
    given, weights = question.evidence, question.weights.own
    with torch.inference_mode(False), torch.enable_grad():
        factors = _finite_factors(pc, given)
        factors = factors if factors.requires_grad else factors.detach().clone().requires_grad_()
        centre = factors.new_zeros(factors.shape[:2]) if centre is None else centre
        leaves, unit_moments = [], []
        joined = _joined(pc, given, factors)
        for layer in pc.input_layers:
            value = layer(LogSemiring(), joined, weights[layer.parameter_rows.bank])
            if isinstance(layer, DirectLayer):
                value = value.expand(*value.shape[:2], given.batch_size)
                value = value if value.requires_grad else value.detach().clone().requires_grad_()
                unit_moments.append(
                    _of_units(layer, given, weights[layer.parameter_rows.bank], order, centre, value.shape)
                )
            leaves.append(value)
        log_z = checked_possible(question.with_inputs(leaves).log_z)
        direct = [layer for layer in pc.input_layers if isinstance(layer, DirectLayer)]
        values = [value for layer, value in zip(pc.input_layers, leaves, strict=True) if isinstance(layer, DirectLayer)]
        posterior, *reached = torch.autograd.grad(
            log_z.sum(), [factors, *values], create_graph=is_recorded, materialize_grads=True
        )
        moments = (posterior * (numbers - centre.unsqueeze(2)) ** order).sum(2)
        for layer, units, average in zip(direct, reached, unit_moments, strict=True):
            moments = moments.index_add(1, layer.variables, (units * average).sum(1).t())
    return moments if is_recorded else moments.detach()


def direct_covariance(pc: CompiledCircuit, evidence: Evidence | None, numbers: Tensor, centre: Tensor) -> Tensor:
    """Return ``Cov[x_i, x_j | e]``, (B, D, D): the second derivatives of the tilted log Z.

    The centre is the means, (B, D): any numbers would do, but these leave small ones to subtract.
    """
    refuse_relative(evidence, "moments of variables with infinitely many values")
    is_recorded = torch.is_grad_enabled()
    question = Question(pc, evidence)
    question.require_one_root()
    given, weights = question.evidence, question.weights
    batch_size, num_vars = given.batch_size, given.num_vars
    rows = []
    with torch.inference_mode(False), torch.enable_grad():
        factors = _finite_factors(pc, given)
        for variables in torch.arange(num_vars, device=pc.device).split(
            max(1, queries_per_pass(pc) // max(1, batch_size))
        ):
            query = torch.arange(batch_size, device=pc.device).repeat(len(variables))
            chosen = variables.repeat_interleave(batch_size)
            slopes = factors.new_zeros(len(query), num_vars).requires_grad_()
            log_z = _tilted_log_z(
                pc, weights, given.rows(query), factors[query], numbers, slopes, centre.detach()[query]
            )
            (means,) = torch.autograd.grad(log_z.sum(), slopes, create_graph=True)
            picked = means[torch.arange(len(query), device=pc.device), chosen].sum()
            (row,) = torch.autograd.grad(picked, slopes, create_graph=is_recorded)
            rows.append((row if is_recorded else row.detach()).unflatten(0, (len(variables), batch_size)))
    return torch.cat(rows).transpose(0, 1)


def _tilted_log_z(
    pc: CompiledCircuit,
    weights: CircuitWeights,
    evidence: Evidence,
    factors: Tensor,
    numbers: Tensor,
    slopes: Tensor,
    centre: Tensor,
) -> Tensor:
    tilted = factors + slopes.unsqueeze(2) * (numbers - centre.unsqueeze(2))
    joined = _joined(pc, evidence, tilted)
    leaves = []
    for layer in pc.input_layers:
        own = weights.own[layer.parameter_rows.bank]
        if isinstance(layer, DirectLayer):
            leaves.append(_tilted(layer, evidence, own, layer.columns(slopes), layer.columns(centre)))
        else:
            leaves.append(layer(LogSemiring(), joined, own))
    return Question(pc, evidence, weights).with_inputs(leaves).log_z


def _tilted(layer: DirectLayer, evidence: Evidence, weights: Weights, slopes: Tensor, centre: Tensor) -> Tensor:
    """Return the log-values of all units of a layer with the further factor ``exp(slope (v - centre))``, (F, K, B)."""
    read = layer.parameter_rows.select(weights.log).double().transpose(1, 2).unsqueeze(2)  # (F, K, 1, S)
    slopes, centre = slopes.double().unsqueeze(-1), centre.double().unsqueeze(-1)
    coefficients = torch.cat([-slopes * centre, slopes], -1)
    coefficients = torch.nn.functional.pad(coefficients, (0, layer.distribution.num_statistics - 2))
    sizes = torch.broadcast_shapes(read.shape[:3], coefficients.shape[:3])
    moved, log_constant = layer.distribution.tilt(
        read.expand(*sizes, -1).unsqueeze(-1), coefficients.expand(*sizes, -1).unsqueeze(-1)
    )
    out = layer.of_units(evidence, moved.squeeze(-1).unbind(-1))
    return (out + log_constant[..., 0, 0]).to(layer.zero.dtype)


def _of_units(
    layer: DirectLayer, evidence: Evidence, weights: Weights, order: int, centre: Tensor, shape: torch.Size
) -> Tensor:
    """Return ``E[(x - c)^order | e]`` of every unit of a layer, (F, K, B); 0 where the evidence is impossible."""
    slopes = centre.new_zeros(shape).requires_grad_()
    at_zero = _tilted(layer, evidence, weights, torch.zeros_like(slopes), layer.columns(centre))
    log_ratio = _tilted(layer, evidence, weights, slopes, layer.columns(centre))
    possible = at_zero > -torch.inf
    derivative = (torch.where(possible, log_ratio, 0.0) - torch.where(possible, at_zero, 0.0)).exp()
    for _ in range(order):
        (derivative,) = torch.autograd.grad(derivative.sum(), slopes, create_graph=True)
    return derivative if torch.is_grad_enabled() else derivative.detach()


def _finite_factors(pc: CompiledCircuit, evidence: Evidence) -> Tensor:
    """Return the log-factors of the variables with finitely many values, (B, D, C); 0 for the other variables."""
    silent = Evidence.nothing(evidence.batch_size, evidence.num_vars, evidence.device)
    num_values = max(pc.circuit.num_categories)
    if not num_values:
        return torch.zeros(evidence.batch_size, evidence.num_vars, 0, dtype=pc.dtype, device=pc.device)
    return Evidence.where(pc.num_categories > 0, evidence, silent).dense(num_values, pc.dtype)[..., :num_values]


def _joined(pc: CompiledCircuit, evidence: Evidence, factors: Tensor) -> Evidence:
    """Return the evidence with these log-factors on the variables with finitely many values."""
    return Evidence.where(pc.num_categories > 0, Evidence.soft(factors), evidence) if factors.shape[2] else evidence
