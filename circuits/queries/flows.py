"""Flows: how often the samples use each weight, as gradients of one pass.

The flow of a weight is ``d sum_b log Z_b / d log w``: the expected number of times that the weight is used when the
latent choices of every sample are drawn from their posterior (Darwiche 2003; Peharz et al. 2016). All weights' flows
are one backward pass. The flows of input units are their expected sufficient statistics: how often a unit has every
value, for finite families; the expected T(x), for other exponential families, summed over its uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from circuits.algebra.semirings import LogSemiring, MaxSemiring
from circuits.arguments import shape_of
from circuits.engine.compile import CompiledCircuit
from circuits.engine.question import Question, nodes_of
from circuits.engine.weights import CircuitWeights, Weights
from circuits.errors import ArgumentError
from circuits.evidence import Evidence
from circuits.families import Direct, Distribution
from circuits.precision import own_precision
from circuits.queries.common import refuse_relative
from circuits.queries.segments import segmented_log_z
from circuits.weights.latents import class_needed

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
    checkpointed: bool = False,
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
        checkpointed: whether a long chain of equal steps, as of a homogeneous HMM, is evaluated in segments, and once
            more for their flows: memory of the square root of its length, in up to twice the time.

    Returns:
        ``(flows, log_likelihood)``: per bank (P, O, I) or (P, T, K), and (B,).

    Raises:
        ArgumentError: evidence or sample weights do not fit.
        PropertyError: the circuit has a distribution per class, and the evidence does not say which; or it is relative;
            or ``checkpointed`` is asked of what is no such chain.
    """
    given = evidence if isinstance(evidence, Evidence) else Evidence.observe(evidence)
    refuse_relative(given, "counting flows")  # those of what it is relative to would be subtracted
    if pc.circuit.num_classes is not None and given.classes is None:
        raise class_needed(pc.circuit.root)
    if not given.batch_size:
        return flows_of_nothing(pc)
    score_of = segmented_log_z if checkpointed else lambda question: question.log_z
    return _gradients(pc, given, sample_weights, weights, score_of)


@own_precision
def viterbi_flows(
    pc: CompiledCircuit,
    evidence: Evidence | Tensor,
    sample_weights: Tensor | None = None,  # shape: (B,)
) -> ExpectedFlows:
    """Return how often the samples' most probable latent choices use each weight, and the log-scores of these.

    An EM step from them is one of hard EM, or Viterbi training (Juang and Rabiner 1990), which never lowers the sum of
    the scores ``max_z log p(x, z)``. The flows are the gradient of the upward pass in the max semiring; equally good
    choices share a sample. The choices are those of sum units alone: missing and soft variables are summed out,
    and so are latents all of whose variables are missing.

    Args:
        pc: the circuit.
        evidence: for B samples, or complete assignments, int64 (B, D).
        sample_weights: how often sample b counts, (B,) >= 0; once when omitted.

    Returns:
        ``(flows, log_likelihood)``: per bank, and the scores, (B,), in the place of the log-likelihoods.

    Raises:
        ArgumentError: evidence or sample weights do not fit.
        PropertyError: the evidence is relative to other evidence.
    """
    given = evidence if isinstance(evidence, Evidence) else Evidence.observe(evidence)
    refuse_relative(given, "counting flows")
    if not given.batch_size:
        return flows_of_nothing(pc)
    return _gradients(
        pc,
        given,
        sample_weights,
        None,
        lambda question: question.with_inputs(question.inputs(LogSemiring())).root(MaxSemiring()),
    )


def _gradients(
    pc: CompiledCircuit,
    evidence: Evidence,
    sample_weights: Tensor | None,
    weights: CircuitWeights | None,
    score_of: Callable[[Question], Tensor],
) -> ExpectedFlows:
    """Return the gradients of the sum of scores, (B,), by the log-weights; impossible samples have none."""
    with torch.inference_mode(False), torch.enable_grad():
        traced, sources = traced_weights(pc, weights)
        question, log_level = Question(pc, evidence, traced).levelled()
        score = score_of(question)
        counts = (score != -torch.inf).to(score.dtype)
        if sample_weights is not None:
            counts = counts * checked_sample_weights(sample_weights, score)
        flows = torch.autograd.grad(score, list(sources.values()), counts, allow_unused=True, materialize_grads=True)
    return ExpectedFlows(dict(zip(sources, flows, strict=True)), score.detach() + log_level.to(score))


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
        statistics = mean_statistics(pc.families[name], normalised.own[name])
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


def flow_shapes(pc: CompiledCircuit, own: Mapping[str, Weights] | None = None) -> dict[str, tuple[int, ...]]:
    """Return the shape of the flows of every bank; ``own`` are the circuit's weights, where the caller has them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, weights in (pc.own_weights() if own is None else own).items():
        rows, second, third = weights.log.shape
        family = pc.families.get(name)
        shapes[name] = (rows, second if family is None else family.num_statistics, third)
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


def mean_statistics(family: Distribution, weights: Weights) -> Tensor:
    """Return the mean statistics of every unit of a bank of inputs, (P, T, K)."""
    return family.mean_statistics(weights.log.double()) if isinstance(family, Direct) else weights.linear


def checked_sample_weights(sample_weights: Tensor, log_z: Tensor) -> Tensor:
    """Return the weights of a batch's samples like ``log_z``, (B,); raise ArgumentError unless they are such."""
    if not isinstance(sample_weights, Tensor) or sample_weights.shape != log_z.shape or sample_weights.is_complex():
        expected, got = tuple(log_z.shape), shape_of(sample_weights)
        raise ArgumentError(f"sample_weights: expected one number per sample, a tensor {expected}, got {got}")
    if not bool(((sample_weights >= 0) & (sample_weights < torch.inf)).all()):
        raise ArgumentError(f"sample_weights: expected finite numbers >= 0, the least is {float(sample_weights.min())}")
    return sample_weights.to(log_z.device, log_z.dtype)
