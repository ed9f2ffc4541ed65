"""Expectation-maximisation: the steps that turn expected flows into new weights.

The flows of input units are their expected sufficient statistics, see :mod:`circuits.queries.flows`. So a step is the
same for all of them: mix the statistics, then let the family fit its parameters to them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.arguments import checked_number, is_number
from circuits.engine.compile import CompiledCircuit
from circuits.engine.weights import Weights
from circuits.errors import ArgumentError
from circuits.families import Direct, Finite
from circuits.learning.entropy import entropic_maximum
from circuits.learning.frozen import Frozen, frozen_parameters
from circuits.precision import own_precision
from circuits.queries.flows import BankFlows, flow_shapes, mean_statistics, top_down_flows


@own_precision
@torch.no_grad()
def em_step(
    pc: CompiledCircuit,
    flows: BankFlows,
    *,
    step_size: float = 1.0,
    pseudocount: float = 0.0,
    entropy: float = 0.0,
    frozen: Frozen | None = None,
) -> None:
    """Move the weights of a circuit towards the maximum-likelihood weights of its expected flows, in place.

        w'_nc = (1 - s) w_nc + s (F_nc + a / |ch(n)|) / (F_n + a)

    With s = 1, a = 0 and the flows of all data this is the EM algorithm, which never lowers the likelihood. A unit
    without flow keeps its weights, and a zero weight stays zero: ``ch(n)`` are the children of positive weight. For
    input families the same is done with their mean statistics, and the parameters are fitted to the result: so an
    exponential family interpolates its mean parameters.

    Args:
        pc: the circuit.
        flows: of one batch, or summed over batches, see :func:`expected_flows`.
        step_size: s, 0 < s <= 1; below 1 for mini-batches.
        pseudocount: a >= 0, uses that every reached unit is given on top, spread evenly over its children or values;
            for other families see there.
        entropy: tau >= 0: the weights of sums and of finite input families maximise ``sum_c F_nc log w_nc + tau F_n
            H(w_n)``, with H the entropy and F with the pseudocounts; tau = 0 is the fraction above. So they stay spread
            out (Liu and Van den Broeck 2021).
        frozen: nodes or names whose parameters stay as they are; a dict says which of them, for instance
            ``{"emission0": "mean"}`` of Gaussians, and then the others are the likeliest ones given these.

    Raises:
        ArgumentError: an argument is out of range, or the flows are not this circuit's.
    """
    check_em_options(step_size, pseudocount, entropy)
    own = pc.own_weights()
    _check_flows(pc, flows, own)
    held = {} if frozen is None else frozen_parameters(pc, frozen, by_em=True)
    for name, weights in own.items():
        _move(pc, name, weights, flows[name], (step_size, pseudocount, entropy), held.get(name))


@dataclass(frozen=True, eq=False)
class AnemoneState:
    """Moving averages over the batches seen so far."""

    flows: BankFlows
    """``m_t = mu m_t-1 + (1 - mu) F_t`` of every weight."""
    mass: float
    """The same average of the batches' masses; both lack the factor 1 - mu^t, which cancels in ``flows / mass``."""


@own_precision
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
    entropy: float = 0.0,
    own_flows: BankFlows | None = None,
    frozen: Frozen | None = None,
) -> AnemoneState:
    """Do one step of Anemone, mini-batch EM with momentum and flow-rescaled steps (Liu et al. 2025), in place.

        F~_nc = s F^_nc / N^ + (1 - s) TD(n) w_nc        w'_nc = (F~_nc + a / |ch(n)|) / (F~_n + a)

    F^ / N^ is the moving average of flows over that of batch masses, and TD(n), the top-down mass, how often the
    circuit's own samples use unit n. So a unit that the batches reach less often than the circuit does moves less.

    Args:
        pc: the circuit.
        flows: of one batch, see :func:`expected_flows`.
        mass: N, how many samples of the batch were possible and observe something, or the sum of their weights.
        state: returned by the step before; None at the first one.
        step_size: s, 0 < s <= 1.
        momentum: mu, 0 <= mu < 1.
        pseudocount: a >= 0, relative to a batch of mass 1.
        entropy: tau >= 0, see :func:`em_step`.
        own_flows: TD(n) w_nc where the batch has missing values, ``top_down_flows(pc, evidence)``; by default those of
            complete samples.
        frozen: what stays as it is, see :func:`em_step`.

    Returns:
        The state for the next step. A batch of mass 0 changes neither the state nor the weights.

    Raises:
        ArgumentError: an argument is out of range, or the flows are not this circuit's.
    """
    check_em_options(step_size, pseudocount, entropy, momentum)
    own = pc.own_weights()
    _check_flows(pc, flows, own)
    if not math.isfinite(mass):
        raise ArgumentError(f"mass: expected a finite number, got {mass!r}")
    state = state or AnemoneState({name: torch.zeros_like(flow) for name, flow in flows.items()}, 0.0)
    _check_state(state, flows)
    held = {} if frozen is None else frozen_parameters(pc, frozen, by_em=True)
    if mass <= 0:
        return state
    state = AnemoneState(
        {name: torch.lerp(state.flows[name], flow, 1 - momentum) for name, flow in flows.items()},
        momentum * state.mass + (1 - momentum) * mass,
    )
    own_flows = top_down_flows(pc) if own_flows is None else own_flows
    for name, weights in own.items():
        rescaled = (1 - step_size) * own_flows[name] + (step_size / state.mass) * state.flows[name]
        _move(pc, name, weights, rescaled, (1.0, pseudocount, entropy), held.get(name))
    return state


def _move(
    pc: CompiledCircuit,
    name: str,
    weights: Weights,
    flows: Tensor,
    options: tuple[float, float, float],
    held: Tensor | None,
) -> None:
    """Replace the parameters of one bank by ``1 - s`` of the old ones and s of those that maximise the flows' score."""
    step_size, pseudocount, entropy = options
    raw, family = pc.bank[name], pc.families.get(name)
    if isinstance(family, Direct):
        mass = flows[:, :1]
        is_reached = mass > 0
        maximised = (flows + pseudocount * family.prior_statistics(flows)) / (mass + pseudocount)
        maximised = torch.where(is_reached, maximised, 1.0)
        mixed = torch.lerp(mean_statistics(family, weights), maximised, step_size)
        if held is not None:
            mixed = family.hold(mixed, weights.log.double(), held)
        moved = torch.where(is_reached, family.fit(mixed).to(raw.dtype), raw)
        raw.copy_(moved if held is None else torch.where(held, raw, moved))
        return
    log_maximised, is_reached = _maximise(flows, weights.log, _axis(name), pseudocount)
    if entropy > 0:
        log_maximised = entropic_maximum(log_maximised, weights.log > -torch.inf, entropy, _axis(name))
    log_mixed = log_maximised
    if step_size < 1:
        log_mixed = torch.logaddexp(weights.log + math.log1p(-step_size), log_maximised + math.log(step_size))
    if family is None:
        moved = torch.where(is_reached, log_mixed, raw)
    else:
        assert isinstance(family, Finite)
        target = torch.where(is_reached, log_mixed, weights.log)
        moved = family.fit(raw, target, flows.sum(-2, keepdim=True))
    raw.copy_(moved if held is None else torch.where(held, raw, moved))


def _maximise(flows: Tensor, log_weights: Tensor, axis: int, pseudocount: float) -> tuple[Tensor, Tensor]:
    """Return ``log (F_nc + a / |ch(n)|) / (F_n + a)`` and which units have flow."""
    is_possible = log_weights > -torch.inf
    prior = pseudocount / is_possible.sum(axis, keepdim=True, dtype=flows.dtype)
    total = flows.sum(axis, keepdim=True)
    return ((flows + prior * is_possible) / (total + pseudocount)).log_(), total > 0


def _axis(bank: str) -> int:
    """Return the axis along which the weights of a bank sum to 1."""
    return -1 if bank.startswith("sum") else -2


def _check_flows(pc: CompiledCircuit, flows: BankFlows, own: Mapping[str, Weights]) -> None:
    if not isinstance(flows, Mapping):
        raise ArgumentError(
            f"flows: expected tensors by bank, such as expected_flows(pc, ...).flows, got {type(flows).__name__}"
        )
    shapes = flow_shapes(pc, own)
    given = {name: tuple(flow.shape) for name, flow in flows.items()}
    if given != shapes:
        raise ArgumentError(
            f"flows: expected the banks {shapes} of {pc.circuit}, got {given}; use those of expected_flows(pc, ...)"
        )
    uses = [flow[:, :1] if isinstance(pc.families.get(name), Direct) else flow for name, flow in flows.items()]
    least = torch.stack([part.amin().double() for part in uses])
    total = torch.stack([flow.sum().double() for flow in flows.values()])
    if not bool(((least >= 0) & total.isfinite()).all()):
        raise ArgumentError(
            "flows: expected uses >= 0 with a finite sum, got others; were they too many for their dtype, use smaller "
            "sample_weights, or compile with dtype=torch.float64"
        )


def _check_state(state: AnemoneState, flows: BankFlows) -> None:
    is_state = isinstance(state, AnemoneState)
    if not is_state or {n: m.shape for n, m in state.flows.items()} != {n: f.shape for n, f in flows.items()}:
        raise ArgumentError(f"state: expected what the last step of this circuit returned, or None, got {state!r:.80}")


def check_em_options(
    step_size: float = 1.0, pseudocount: float = 0.0, entropy: float = 0.0, momentum: float = 0.0
) -> None:
    """Raise ArgumentError unless the options of the EM family are in range."""
    if not is_number(step_size) or not 0 < step_size <= 1:
        raise ArgumentError(f"step_size: expected 0 < step_size <= 1, got {step_size!r}")
    checked_number("pseudocount", pseudocount)
    checked_number("entropy", entropy)
    if not is_number(momentum) or not 0 <= momentum < 1:
        raise ArgumentError(f"momentum: expected 0 <= momentum < 1, got {momentum!r}")
