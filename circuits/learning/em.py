"""Expected flows, and the expectation-maximisation steps that turn them into new weights.

The flow of a weight is ``d sum_b log Z_b / d log w``: the expected number of times that the weight is used when the
latent choices of every sample are drawn from their posterior (Darwiche 2003; Peharz et al. 2016). All weights' flows
are one backward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from circuits.compile import CompiledCircuit
from circuits.errors import ArgumentError
from circuits.evidence import Evidence
from circuits.passes import Banks

BankFlows = dict[str, Tensor]
"""Flows of every parameter bank, by the names and of the shapes of ``pc.bank``."""


class ExpectedFlows(NamedTuple):
    """What one batch says about the weights."""

    flows: BankFlows
    """Expected number of uses of every weight, summed over samples and tied nodes."""
    log_likelihood: Tensor
    """log Z of every sample, (B,), in nats; -inf for impossible samples, whose flows count as zero."""


def expected_flows(
    pc: CompiledCircuit,
    evidence: Evidence | Tensor,
    sample_weights: Tensor | None = None,  # shape: (B,)
    *,
    weights: Banks | None = None,
) -> ExpectedFlows:
    """Return the expected flows ``F = d sum_b a_b log Z_b / d log w`` of a batch.

    A missing variable has no flow below it: its units are the constant 1, whatever their weights.

    Args:
        pc: the circuit.
        evidence: for B samples, or complete assignments, int64 (B, D).
        sample_weights: a_b >= 0, how often sample b counts, (B,); once when omitted.
        weights: of ``pc.weights(external=...)``; nodes with external weights have no flow of their own.

    Returns:
        ``(flows, log_likelihood)``: per bank (P, O, I) or (P, C, K), and (B,).

    Raises:
        ArgumentError: evidence or sample weights do not fit.
    """
    given = evidence if isinstance(evidence, Evidence) else Evidence.observe(evidence)
    with torch.inference_mode(False), torch.enable_grad():
        with torch.no_grad():
            normalised = pc.weights() if weights is None else weights
        banks = normalised.detached(requires_grad=True)
        log_z = pc.log_partition(given, banks)
        counts = (log_z != -torch.inf).to(log_z.dtype)
        if sample_weights is not None:
            counts = counts * _checked_sample_weights(sample_weights, log_z)
        leaves = [bank.log for bank in banks.values()]
        flows = torch.autograd.grad(log_z, leaves, counts, allow_unused=True, materialize_grads=True)
    return ExpectedFlows(dict(zip(banks, flows, strict=True)), log_z.detach())


@torch.no_grad()
def em_step(pc: CompiledCircuit, flows: BankFlows, *, step_size: float = 1.0, pseudocount: float = 0.0) -> None:
    """Move the weights of a circuit towards the maximum-likelihood weights of its expected flows, in place.

        w'_nc = (1 - s) w_nc + s (F_nc + a / |ch(n)|) / (F_n + a)

    With s = 1, a = 0 and the flows of all data this is the EM algorithm, which never lowers the likelihood. A unit
    without flow keeps its weights, and a zero weight stays zero: ``ch(n)`` are the children of positive weight.

    Args:
        pc: the circuit.
        flows: of one batch, or summed over batches, see :func:`expected_flows`.
        step_size: s, 0 < s <= 1; below 1 for mini-batches.
        pseudocount: a >= 0, uses that every reached unit is given on top, spread evenly over its children.

    Raises:
        ArgumentError: an argument is out of range, or the flows are not this circuit's.
    """
    _check_step(pc, flows, step_size, pseudocount)
    log_kept = math.log1p(-step_size) if step_size < 1 else -math.inf
    for name, weights in pc.weights().items():
        log_maximised, is_reached = _maximise(flows[name], weights.log, _axis(name), pseudocount)
        log_mixed = torch.logaddexp(weights.log + log_kept, log_maximised + math.log(step_size))
        pc.bank[name].copy_(torch.where(is_reached, log_mixed, pc.bank[name]))


@dataclass(frozen=True, eq=False)
class AnemoneState:
    """Moving averages over the batches seen so far."""

    flows: BankFlows
    """``m_t = mu m_t-1 + (1 - mu) F_t`` of every weight."""
    mass: float
    """The same average of the batches' masses; both lack the factor 1 - mu^t, which cancels in ``flows / mass``."""


@torch.no_grad()
def anemone_step(
    pc: CompiledCircuit,
    flows: BankFlows,
    mass: float,
    state: AnemoneState | None = None,
    *,
    step_size: float = 0.4,
    momentum: float = 0.9,
    pseudocount: float = 1e-6,
) -> AnemoneState:
    """Do one step of Anemone, mini-batch EM with momentum and flow-rescaled steps (Liu et al. 2025), in place.

        F~_nc = s F^_nc / N^ + (1 - s) TD(n) w_nc        w'_nc = (F~_nc + a / |ch(n)|) / (F~_n + a)

    F^ / N^ is the moving average of flows over that of batch masses, and TD(n), the top-down mass, how often the
    circuit's own samples use unit n. So a unit that the batches reach less often than the circuit does moves less.

    Args:
        pc: the circuit.
        flows: of one batch, see :func:`expected_flows`.
        mass: N, how many samples of the batch were possible, or the sum of their weights.
        state: returned by the step before; None at the first one.
        step_size: s, 0 < s <= 1.
        momentum: mu, 0 <= mu < 1.
        pseudocount: a >= 0, relative to a batch of mass 1.

    Returns:
        The state for the next step. A batch of mass 0 changes neither the state nor the weights.

    Raises:
        ArgumentError: an argument is out of range, or the flows are not this circuit's.
    """
    _check_step(pc, flows, step_size, pseudocount)
    if not 0 <= momentum < 1:
        raise ArgumentError(f"momentum: expected 0 <= momentum < 1, got {momentum!r}")
    state = state or AnemoneState({name: torch.zeros_like(flow) for name, flow in flows.items()}, 0.0)
    if mass <= 0:
        return state
    state = AnemoneState(
        {name: torch.lerp(state.flows[name], flow, 1 - momentum) for name, flow in flows.items()},
        momentum * state.mass + (1 - momentum) * mass,
    )
    own_flows = top_down_flows(pc)
    for name, weights in pc.weights().items():
        rescaled = (1 - step_size) * own_flows[name] + (step_size / state.mass) * state.flows[name]
        log_maximised, is_reached = _maximise(rescaled, weights.log, _axis(name), pseudocount)
        pc.bank[name].copy_(torch.where(is_reached, log_maximised, pc.bank[name]))
    return state


def top_down_flows(pc: CompiledCircuit) -> BankFlows:
    """Return how often the circuit's own samples use each weight, ``TD(n) w_nc``, per bank.

        TD(root) = 1        TD(c) = sum_n TD(n) w_nc

    These are the flows of a sample that says nothing. Its variables have the factor 1 on every value, rather than being
    missing, so that the flow reaches the input units' weights. Classes count as equally frequent.
    """
    factors = torch.zeros(1, pc.circuit.num_vars, max(pc.circuit.num_categories), dtype=pc.dtype, device=pc.device)
    evidence = Evidence.soft(factors)
    if pc.circuit.num_classes is not None:
        evidence = evidence.with_class_prior(
            factors.new_full((pc.circuit.num_classes,), 1 / pc.circuit.num_classes).log()
        )
    return expected_flows(pc, evidence).flows


def _maximise(flows: Tensor, log_weights: Tensor, axis: int, pseudocount: float) -> tuple[Tensor, Tensor]:
    """Return ``log (F_nc + a / |ch(n)|) / (F_n + a)`` and which units have flow."""
    is_possible = log_weights > -torch.inf
    prior = pseudocount / is_possible.sum(axis, keepdim=True)
    total = flows.sum(axis, keepdim=True)
    return ((flows + prior * is_possible) / (total + pseudocount)).log_(), total > 0


def _axis(bank: str) -> int:
    """Return the axis along which the weights of a bank sum to 1."""
    return -1 if bank.startswith("sum") else -2


def _check_step(pc: CompiledCircuit, flows: BankFlows, step_size: float, pseudocount: float) -> None:
    if not 0 < step_size <= 1:
        raise ArgumentError(f"step_size: expected 0 < step_size <= 1, got {step_size!r}")
    if not 0 <= pseudocount < math.inf:
        raise ArgumentError(f"pseudocount: expected a number >= 0, got {pseudocount!r}")
    shapes = {name: tuple(parameter.shape) for name, parameter in pc.bank.items()}
    given = {name: tuple(flow.shape) for name, flow in flows.items()}
    if given != shapes:
        raise ArgumentError(
            f"flows: expected the banks {shapes} of {pc.circuit}, got {given}; use those of expected_flows(pc, ...)"
        )


def _checked_sample_weights(sample_weights: Tensor, log_z: Tensor) -> Tensor:
    if not isinstance(sample_weights, Tensor) or sample_weights.shape != log_z.shape or sample_weights.is_complex():
        got = tuple(sample_weights.shape) if isinstance(sample_weights, Tensor) else type(sample_weights).__name__
        raise ArgumentError(f"sample_weights: expected one number per sample, a tensor {tuple(log_z.shape)}, got {got}")
    if not bool(((sample_weights >= 0) & (sample_weights < torch.inf)).all()):
        raise ArgumentError(f"sample_weights: expected finite numbers >= 0, the least is {float(sample_weights.min())}")
    return sample_weights.to(log_z.device, log_z.dtype)
