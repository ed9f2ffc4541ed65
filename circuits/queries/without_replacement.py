"""Exact sampling of distinct assignments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from circuits.arguments import checked_count, checked_possible
from circuits.engine.compile import CompiledCircuit
from circuits.evidence import Evidence
from circuits.queries.common import dense_evidence, factors_of, queries_per_pass, query


class DistinctSamples(NamedTuple):
    """k distinct assignments drawn without replacement, in the order of drawing."""

    assignment: Tensor
    """int64 (B, k, D); -1 where a query has fewer than k possible assignments."""
    log_prob: Tensor
    """(B, k): log p(x | e) of each; -inf where there is none."""
    perturbed: Tensor
    """(B, k): log p(x | e) plus Gumbel noise, descending; the last one is the threshold of Kool et al.'s estimators."""


@query
@torch.no_grad()
def sample_without_replacement(
    pc: CompiledCircuit, num_samples: int, evidence: Evidence | None = None, generator: torch.Generator | None = None
) -> DistinctSamples:
    """Draw k distinct assignments from ``p(x | e)`` without replacement, exactly.

    The first is distributed as ``p(x | e)``, each further one as ``p(x | e)`` renormalised over what was not yet drawn.
    This is ancestral Gumbel-top-k sampling (Kool, van Hoof, Welling 2019 and 2020): a stochastic beam over the
    variables one at a time, whose prefixes carry the maximum of the Gumbel-perturbed log-probabilities below them. The
    beam needs the exact log-marginals of prefixes, which a smooth and decomposable circuit gives: so it is exact for
    every circuit here, deterministic or not. It takes D + 1 passes over up to B * k queries; conditionals below the
    smallest positive number of the circuit's type count as 0.

    Args:
        pc: the circuit.
        num_samples: k >= 1.
        evidence: for B queries; None: no evidence, B = 1.
        generator: on the circuit's device; the same state gives the same samples on one machine.

    Returns:
        ``(assignment, log_prob, perturbed)``: int64 (B, k, D), (B, k) and (B, k).

    Raises:
        ArgumentError: ``num_samples`` is not a positive integer.
        ImpossibleEvidenceError: log Z = -inf for some query.
    """
    checked_count("num_samples", num_samples)
    given = dense_evidence(pc, evidence)
    factors = factors_of(given)
    checked_possible(pc.log_partition(given))
    batch_size, num_vars, num_values = factors.shape
    prefix = torch.zeros(batch_size, 1, num_vars, dtype=torch.int64, device=pc.device)
    log_prob = factors.new_zeros(batch_size, 1)
    perturbed = _gumbel(log_prob, generator)
    for variable in range(num_vars):
        log_next = _log_conditional(pc, given, factors, prefix, log_prob, variable)  # (B, beams, C)
        log_child = log_prob.unsqueeze(2) + log_next
        child = _gumbel_below(log_child, perturbed, generator).flatten(1)
        width = min(num_samples, child.shape[1])
        perturbed, index = child.topk(width, 1)
        log_prob = log_child.flatten(1).gather(1, index)
        prefix = prefix.gather(1, (index // num_values).unsqueeze(2).expand(-1, -1, num_vars))
        prefix[:, :, variable] = index % num_values
    missing = num_samples - log_prob.shape[1]
    log_prob, perturbed = (torch.nn.functional.pad(t, (0, missing), value=-torch.inf) for t in (log_prob, perturbed))
    prefix = torch.nn.functional.pad(prefix, (0, 0, 0, missing))
    return DistinctSamples(prefix.masked_fill((log_prob == -torch.inf).unsqueeze(2), -1), log_prob, perturbed)


def _log_conditional(
    pc: CompiledCircuit, evidence: Evidence, factors: Tensor, prefix: Tensor, log_prob: Tensor, variable: int
) -> Tensor:
    """Return log p(x_i = v | prefix, e) of every possible prefix, -inf elsewhere: (B, beams, C)."""
    num_values = factors.shape[2]
    out = torch.full((*log_prob.shape, num_values), -torch.inf, dtype=factors.dtype, device=factors.device)
    query, beam = (log_prob > -torch.inf).nonzero(as_tuple=True)
    values = torch.arange(num_values, device=factors.device)
    per_pass = queries_per_pass(pc)
    for start in range(0, len(query), per_pass):
        q, b = query[start : start + per_pass], beam[start : start + per_pass]
        given = factors[q]
        known = prefix[q, b, :variable].unsqueeze(2)
        given[:, :variable] = given[:, :variable].masked_fill(values != known, -torch.inf)
        out[q, b] = _marginal_of(pc, evidence.rows(q), given, variable).log()
    return out


def _marginal_of(pc: CompiledCircuit, evidence: Evidence, factors: Tensor, variable: int) -> Tensor:
    """Return p(x_i = v | e) of one variable, (n, C)."""
    with torch.inference_mode(False), torch.enable_grad():
        own = factors[:, variable].clone().requires_grad_()
        others = torch.arange(factors.shape[1], device=factors.device) != variable
        joined = torch.where(others.unsqueeze(1), factors, own.unsqueeze(1))
        (gradient,) = torch.autograd.grad(pc.log_partition(evidence.with_factors(joined)).sum(), own)
    return gradient / gradient.sum(1, keepdim=True)


def _gumbel(location: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw Gumbel variables with the given locations; -inf stays -inf."""
    waiting = torch.empty_like(location).exponential_(generator=generator)
    return location - waiting.clamp_min_(torch.finfo(location.dtype).tiny).log_()


def _gumbel_below(log_child: Tensor, parent: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw Gumbel variables at ``log_child`` (B, n, C) given that their maximum over C is ``parent`` (B, n).

    Truncated by inversion in the numerically stable form of Kool et al. 2019, appendix B.3.
    """
    free = _gumbel(log_child, generator)
    largest = free.amax(2, keepdim=True)
    gap = torch.where(free > -torch.inf, free - largest, -torch.inf)
    v = parent.unsqueeze(2) - free + torch.log(-torch.expm1(gap))
    bounded = parent.unsqueeze(2) - v.clamp_min(0.0) - torch.log1p(torch.exp(-v.abs()))
    bounded = torch.where(gap == 0, parent.unsqueeze(2), bounded)
    return torch.where(log_child > -torch.inf, bounded, -torch.inf)
