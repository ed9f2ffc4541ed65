"""Expected flows, and the expectation-maximisation steps that turn them into new weights.

The flow of a weight is ``d sum_b log Z_b / d log w``: the expected number of times that the weight is used when the
latent choices of every sample are drawn from their posterior (Darwiche 2003; Peharz et al. 2016). All weights' flows
are one backward pass. The flows of input units are their expected sufficient statistics: how often a unit has every
value, for finite families; the expected T(x), for other exponential families, summed over its uses. So a step is the
same for all of them: mix the statistics, then let the family fit its parameters to them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from circuits.engine.compile import CompiledCircuit
from circuits.engine.question import Question, class_needed, nodes_of
from circuits.engine.semirings import LogSemiring
from circuits.engine.weights import CircuitWeights, Weights
from circuits.errors import ArgumentError
from circuits.evidence import Evidence
from circuits.families import Direct, Distribution, Finite
from circuits.learning.checks import check_em_options
from circuits.learning.entropy import entropic_maximum
from circuits.learning.frozen import Frozen, frozen_parameters
from circuits.precision import own_precision
from circuits.queries.common import refuse_relative

BankFlows = dict[str, Tensor]
"""Flows by the names of ``pc.bank``: sums (P, O, I), input families (P, T, K) for T statistics (C if finite)."""


class ExpectedFlows(NamedTuple):
    """What one batch says about the weights."""

    flows: BankFlows
    """Expected number of uses of every weight, summed over samples and tied nodes."""
    log_likelihood: Tensor
    """log Z of every sample, (B,), in nats; -inf for impossible samples, whose flows count as zero."""


@own_precision
def expected_flows(
    pc: CompiledCircuit,
    evidence: Evidence | Tensor,
    sample_weights: Tensor | None = None,  # shape: (B,)
    *,
    weights: CircuitWeights | None = None,
) -> ExpectedFlows:
    """Return the expected flows ``F = d sum_b a_b log Z_b / d log w`` of a batch.

    A missing variable has no flow below it: its units are the constant 1, whatever their weights. So are sum units all
    of whose variables are missing. So padding counts for nothing: EM on padded sequences is EM on the sequences. A
    variable all of whose values have one factor counts as missing.

    Args:
        pc: the circuit.
        evidence: for B samples, or complete assignments, int64 (B, D).
        sample_weights: a_b >= 0, how often sample b counts, (B,); once when omitted.
        weights: of ``pc.weights(external=...)``; nodes with external weights have no flow of their own.

    Returns:
        ``(flows, log_likelihood)``: per bank (P, O, I) or (P, T, K), and (B,).

    Raises:
        ArgumentError: evidence or sample weights do not fit.
        PropertyError: the circuit has a distribution per class, and the evidence does not say which; or it is relative.
    """
    given = evidence if isinstance(evidence, Evidence) else Evidence.observe(evidence)
    refuse_relative(given, "counting flows")  # those of what it is relative to would be subtracted
    if pc.circuit.num_classes is not None and given.classes is None:
        raise class_needed(pc)
    if not given.batch_size:
        return flows_of_nothing(pc)
    with torch.inference_mode(False), torch.enable_grad():
        traced, sources = traced_weights(pc, weights)
        question, log_level = Question(pc, given, traced).levelled()
        log_z = question.log_z
        counts = (log_z != -torch.inf).to(log_z.dtype)
        if sample_weights is not None:
            counts = counts * checked_sample_weights(sample_weights, log_z)
        flows = torch.autograd.grad(log_z, list(sources.values()), counts, allow_unused=True, materialize_grads=True)
    return ExpectedFlows(dict(zip(sources, flows, strict=True)), log_z.detach() + log_level.to(log_z))


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
    _check_flows(pc, flows)
    held = frozen_parameters(pc, frozen, by_em=True)
    for name, weights in pc.own_weights().items():
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
    _check_flows(pc, flows)
    if not math.isfinite(mass):
        raise ArgumentError(f"mass: expected a finite number, got {mass!r}")
    state = state or AnemoneState({name: torch.zeros_like(flow) for name, flow in flows.items()}, 0.0)
    _check_state(state, flows)
    held = frozen_parameters(pc, frozen, by_em=True)
    if mass <= 0:
        return state
    state = AnemoneState(
        {name: torch.lerp(state.flows[name], flow, 1 - momentum) for name, flow in flows.items()},
        momentum * state.mass + (1 - momentum) * mass,
    )
    own_flows = top_down_flows(pc) if own_flows is None else own_flows
    for name, weights in pc.own_weights().items():
        rescaled = (1 - step_size) * own_flows[name] + (step_size / state.mass) * state.flows[name]
        _move(pc, name, weights, rescaled, (1.0, pseudocount, entropy), held.get(name))
    return state


@own_precision
def top_down_flows(
    pc: CompiledCircuit,
    evidence: Evidence | None = None,
    sample_weights: Tensor | None = None,  # shape: (B,)
) -> BankFlows:
    """Return how often the circuit's own samples use each weight, ``TD(n) w_nc``, per bank.

        TD(root) = 1        TD(c) = sum_n TD(n) w_nc

    These are the flows of a sample that says nothing, whose input units are reached TD(n) times: for their families
    that many times their mean statistics. Classes count as equally frequent.

    Args:
        pc: the circuit.
        evidence: whose missing variables are missing in the circuit's own samples too, on average over the B samples:
            as in :func:`expected_flows`, nothing is counted there. None: they are complete.
        sample_weights: how often each sample counts in that average, (B,).
    """
    observed, shares = _patterns(pc, evidence, sample_weights)
    nothing = Evidence.nothing(len(observed), pc.circuit.num_vars, pc.device)
    if pc.circuit.num_classes is not None:
        nothing = nothing.with_class_prior(torch.full((pc.circuit.num_classes,), -math.log(pc.circuit.num_classes)))
    is_silent = nodes_of(pc, ~observed)
    with torch.inference_mode(False), torch.enable_grad():
        with torch.no_grad():
            normalised = pc.weights()
            inputs = Question(pc, nothing, normalised).inputs(LogSemiring())
        sizes = zip(inputs, pc.layer_sizes, strict=False)
        units = [value.detach().expand(*size, len(observed)).clone().requires_grad_() for value, size in sizes]
        weights = normalised.detached(requires_grad=True)
        log_z = Question(pc, nothing, weights).with_inputs(units).silenced(is_silent).log_z
        sums = [weights.own[name].log for name in pc.sum_banks]
        grads = torch.autograd.grad(log_z, [*units, *sums], shares.to(log_z))
    flows = dict(zip(pc.sum_banks, grads[len(units) :], strict=True))
    for layer, grad, silent in zip(pc.input_layers, grads, is_silent, strict=False):
        name = layer.parameter_rows.bank
        statistics = _mean_statistics(pc.families[name], normalised.own[name])
        reached = statistics.new_zeros(len(statistics), 1, statistics.shape[2])
        uses = grad.masked_fill(silent, 0.0).sum(-1).unsqueeze(1)
        layer.parameter_rows.add(reached, uses.to(statistics.dtype))
        flows[name] = flows.get(name, 0) + reached * statistics
    return {name: flows[name] for name in pc.bank}


def _patterns(pc: CompiledCircuit, evidence: Evidence | None, sample_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the distinct sets of variables that samples observe, bool (n, D), and the samples' share in each, (n,)."""
    if evidence is None or not evidence.batch_size:
        everything = torch.ones(1, pc.circuit.num_vars, dtype=torch.bool, device=pc.device)
        return everything, torch.ones(1, dtype=torch.float64, device=pc.device)
    given, _ = evidence.levelled(pc.num_categories)
    observed, which = torch.unique(~given.says_nothing(pc.num_categories), dim=0, return_inverse=True)
    counts = torch.ones(len(which), dtype=torch.float64, device=pc.device)
    if sample_weights is not None:
        counts = sample_weights.to(counts)
    shares = counts.new_zeros(len(observed)).index_add_(0, which, counts)
    return observed, shares / shares.sum().clamp_min(torch.finfo(shares.dtype).tiny)


def flow_shapes(pc: CompiledCircuit) -> dict[str, tuple[int, ...]]:
    """Return the shape of the flows of every bank."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, raw in pc.bank.items():
        family = pc.families.get(name)
        shapes[name] = tuple(raw.shape) if family is None else (len(raw), family.num_statistics, raw.shape[-1])
    return shapes


def traced_weights(
    pc: CompiledCircuit, weights: CircuitWeights | None = None
) -> tuple[CircuitWeights, dict[str, Tensor]]:
    """Return weights for one pass, own or given ones, and per bank the tensor whose gradient are its flows."""
    with torch.no_grad():
        normalised = pc.weights() if weights is None else weights
    traced = normalised.detached(requires_grad=True)
    sources = {name: own.log for name, own in traced.own.items()}
    tilted = {}
    for name, family in pc.families.items():
        if isinstance(family, Direct):
            tilted[name], sources[name] = _tilted(family, normalised.own[name])
    return traced.with_own(tilted), sources


def flows_of_nothing(pc: CompiledCircuit) -> ExpectedFlows:
    """Return the flows of a batch without samples, such as a process's share of a small one: zeros."""
    flows = {
        name: torch.zeros(
            shape, dtype=torch.float64 if isinstance(pc.families.get(name), Direct) else pc.dtype, device=pc.device
        )
        for name, shape in flow_shapes(pc).items()
    }
    return ExpectedFlows(flows, torch.zeros(0, dtype=pc.dtype, device=pc.device))


def _tilted(family: Direct, weights: Weights) -> tuple[Weights, Tensor]:
    """Return weights for one pass, and the coefficients, all 0, whose gradients are the expected statistics.

    Statistics are gathered in float64: a variance is a small difference of large ones.
    """
    rows, _, num_units = weights.log.shape
    read = weights.log.detach().double()
    coefficients = read.new_zeros(rows, family.num_statistics, num_units).requires_grad_()
    return Weights(*family.tilt(read, coefficients)), coefficients


def _mean_statistics(family: Distribution, weights: Weights) -> Tensor:
    return family.mean_statistics(weights.log.double()) if isinstance(family, Direct) else weights.linear


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
        flows = torch.where(is_reached, flows, 1.0)
        maximised = (flows + pseudocount * family.prior_statistics(flows)) / (flows[:, :1] + pseudocount)
        mixed = torch.lerp(_mean_statistics(family, weights), maximised, step_size)
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


def _check_flows(pc: CompiledCircuit, flows: BankFlows) -> None:
    if not isinstance(flows, Mapping):
        raise ArgumentError(
            f"flows: expected tensors by bank, such as expected_flows(pc, ...).flows, got {type(flows).__name__}"
        )
    shapes = flow_shapes(pc)
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


def checked_sample_weights(sample_weights: Tensor, log_z: Tensor) -> Tensor:
    """Return the weights of a batch's samples like ``log_z``, (B,); raise ArgumentError unless they are such."""
    if not isinstance(sample_weights, Tensor) or sample_weights.shape != log_z.shape or sample_weights.is_complex():
        got = tuple(sample_weights.shape) if isinstance(sample_weights, Tensor) else type(sample_weights).__name__
        raise ArgumentError(f"sample_weights: expected one number per sample, a tensor {tuple(log_z.shape)}, got {got}")
    if not bool(((sample_weights >= 0) & (sample_weights < torch.inf)).all()):
        raise ArgumentError(f"sample_weights: expected finite numbers >= 0, the least is {float(sample_weights.min())}")
    return sample_weights.to(log_z.device, log_z.dtype)
