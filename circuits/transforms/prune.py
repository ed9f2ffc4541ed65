"""Prune the edges that the data hardly use, with a bound on the lost likelihood (Dang, Liu, Van den Broeck 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from circuits.arguments import checked_count, is_number
from circuits.engine.compile import CompiledCircuit, compile
from circuits.engine.question import Question
from circuits.engine.weights import Weights, check_compiled
from circuits.errors import ArgumentError, ImpossibleEvidenceError
from circuits.evidence import Evidence
from circuits.precision import own_precision
from circuits.queries.common import checked_labels
from circuits.queries.flows import BankFlows, expected_flows
from circuits.transforms.rebuild import normalise
from circuits.transforms.units import trim

Masks = dict[str, Tensor]
"""bool (P, O, I) per bank of sum weights: the edges to remove."""


class Pruned(NamedTuple):
    """A pruned circuit."""

    pc: CompiledCircuit
    max_loss: float
    """A bound on the drop of the data's mean log-likelihood, in nats per sample."""
    num_removed: int
    """How many sum weights of positive value became zero; tied ones are counted once."""


@own_precision
def prune(
    pc: CompiledCircuit,
    data: Tensor | Evidence,
    *,
    fraction: float | None = None,
    max_loss: float | None = None,
    batch_size: int = 256,
    labels: Tensor | None = None,
) -> Pruned:
    """Remove the sum weights with the smallest total flow, and then all units that cannot be reached any more.

    The flow of an edge is the expected number of samples that use it. Without the edges E, and before the remaining
    weights are normalised, which only raises them, a sample's likelihood falls to ``p_E(x) = p(x) P(no edge of E is
    used | x)``. So

        mean log p(x) - mean log p_pruned(x)  <=  mean [log p(x) - log p_E(x)]  <=  - mean log(1 - sum_E F_e(x))

    The middle is what ``max_loss`` bounds and what is returned; the right is the bound of the paper. The edge of the
    greatest flow of every unit always stays. Weights of pruned edges are zero and stay zero in learning.

    With classes p(x) is ``p(x | class of the sample)``, so classes count as often as the data have them. No sample's
    ``log p - log p_E`` is negative: the mean drop of a class of N_c samples is at most N / N_c times the bound. A class
    without samples has no flow, and may lose all but one edge of every unit that no other class uses.

    Args:
        pc: the circuit.
        data: complete assignments, int64 (N, D), or evidence for N samples.
        fraction: the share of the positive sum weights to remove, 0 <= fraction <= 1. Either it or ``max_loss``.
        max_loss: remove as many as this bound on the drop of the mean log-likelihood allows, nats per sample.
        batch_size: how many samples are evaluated at once.
        labels: the class of each sample, int64 (N,), for a circuit with ``num_classes``, unless the evidence names it.

    Returns:
        ``(pc, max_loss, num_removed)``; the bound is +inf if some sample has become impossible.

    Raises:
        ArgumentError: an argument is out of range, or labels and classes do not go together.
        ImpossibleEvidenceError: a sample has probability zero already.
    """
    check_compiled(pc)
    evidence = _labelled(pc, data if isinstance(data, Evidence) else Evidence.observe(data), labels)
    _check_options(fraction, max_loss, batch_size)
    if not evidence.batch_size:
        raise ArgumentError("data: expected at least one sample, got none")
    flows, log_likelihood = _total_flows(pc, evidence, batch_size)
    order = _removable(pc, flows)

    def loss_without(count: int) -> float:
        masks = _masks(pc, flows, order[:count])
        return max(0.0, log_likelihood - _mean_log_likelihood(pc, evidence, masks, batch_size))

    if fraction is not None:
        num_positive = sum(
            int((w.log > -torch.inf).sum()) for name, w in pc.weights().own.items() if name in pc.sum_banks
        )
        count = min(len(order), int(fraction * num_positive))
    else:
        assert max_loss is not None
        count = _largest_count(len(order), lambda count: loss_without(count) <= max_loss)
    masks = _masks(pc, flows, order[:count])
    return Pruned(trim(_without(pc, masks)), loss_without(count), count)


def _labelled(pc: CompiledCircuit, evidence: Evidence, labels: Tensor | None) -> Evidence:
    """Return the evidence with the class of every sample, if the circuit has classes."""
    if evidence.classes is not None:
        if labels is not None:
            raise ArgumentError("labels: the evidence names the classes already; leave one of them out")
        return evidence
    labels = checked_labels(pc, "labels", labels, evidence.batch_size)
    return evidence if labels is None else evidence.with_class(labels.to(evidence.device))


@torch.no_grad()
def _without(pc: CompiledCircuit, masks: Masks) -> CompiledCircuit:
    """Copy the circuit, with zero weights where the masks are True."""
    pruned = compile(pc.circuit, dtype=pc.dtype, device=pc.device, seed=0)
    pruned.load_state_dict(pc.state_dict())
    for name, mask in masks.items():
        log_weights = pc.weights().own[name].log.masked_fill(mask, -torch.inf)
        pruned.bank[name].copy_(normalise(log_weights, -1)[0])
    return pruned


def _removable(pc: CompiledCircuit, flows: BankFlows) -> Tensor:
    """Return the positions of all edges that may go, smallest flow first, counted through all banks: int64 (n,)."""
    all_flows, may_go = [], []
    for name in pc.sum_banks:
        log_weights, flow = pc.weights().own[name].log, flows[name]
        best = torch.where(log_weights > -torch.inf, flow, -1.0)
        best = torch.where(best == best.amax(-1, keepdim=True), log_weights, -torch.inf).argmax(-1, keepdim=True)
        all_flows.append(flow.flatten())
        may_go.append((log_weights > -torch.inf).scatter(-1, best, False).flatten())
    if not all_flows:
        return torch.zeros(0, dtype=torch.int64)
    positions = torch.cat(may_go).nonzero().flatten()
    return positions[torch.cat(all_flows)[positions].argsort(stable=True)]


def _masks(pc: CompiledCircuit, flows: BankFlows, positions: Tensor) -> Masks:
    sizes = [flows[name].numel() for name in pc.sum_banks]
    flat = torch.zeros(sum(sizes), dtype=torch.bool, device=pc.device)
    flat[positions] = True
    return {name: part.reshape(flows[name].shape) for name, part in zip(pc.sum_banks, flat.split(sizes), strict=True)}


def _total_flows(pc: CompiledCircuit, evidence: Evidence, batch_size: int) -> tuple[BankFlows, float]:
    """Return the flows of the sums' weights of all samples, in float64, and their mean log-likelihood."""
    total: BankFlows = {name: torch.zeros_like(pc.bank[name], dtype=torch.float64) for name in pc.sum_banks}
    log_likelihood = 0.0
    for part in _batches(evidence, batch_size, pc.device):
        batch = expected_flows(pc, part)
        if bool((batch.log_likelihood == -torch.inf).any()):
            raise ImpossibleEvidenceError(
                "data: a sample has probability zero, so no bound on its loss exists; drop it"
            )
        log_likelihood += float(batch.log_likelihood.double().sum())
        for name in total:
            total[name] += batch.flows[name]
    return total, log_likelihood / evidence.batch_size


@torch.no_grad()
def _mean_log_likelihood(pc: CompiledCircuit, evidence: Evidence, masks: Masks, batch_size: int) -> float:
    """Return the mean log-likelihood without the masked edges, the other weights as they are."""
    weights = pc.weights()
    pruned = {name: Weights(weights.own[name].log.masked_fill(mask, -torch.inf)) for name, mask in masks.items()}
    weights = weights.with_own(pruned)
    total = 0.0
    for part in _batches(evidence, batch_size, pc.device):
        # Sums on whose variables nothing is known are 1 in the pruned circuit too, once its weights are normalised.
        question, log_level = Question(pc, part, weights).levelled()
        total += float((question.log_z + log_level).double().sum())
    return total / evidence.batch_size


def _batches(evidence: Evidence, batch_size: int, device: torch.device) -> Iterator[Evidence]:
    for start in range(0, evidence.batch_size, batch_size):
        yield evidence.rows(slice(start, start + batch_size)).to(device)


def _largest_count(limit: int, is_allowed: Callable[[int], bool]) -> int:
    """Return the largest count that is allowed, by bisection: allowed counts come before all others."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if is_allowed(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _check_options(fraction: float | None, max_loss: float | None, batch_size: int) -> None:
    if (fraction is None) == (max_loss is None):
        raise ArgumentError(
            f"fraction: give either fraction or max_loss, got fraction={fraction!r} and max_loss={max_loss!r}"
        )
    if fraction is not None and not (is_number(fraction) and 0 <= fraction <= 1):
        raise ArgumentError(f"fraction: expected a share from 0 to 1, got {fraction!r}")
    if max_loss is not None and not (is_number(max_loss) and max_loss >= 0):
        raise ArgumentError(f"max_loss: expected nats per sample >= 0, got {max_loss!r}")
    checked_count("batch_size", batch_size)
