"""Convex combinations of circuits: an ensemble is a circuit again, a sum node over the members' roots."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from circuits.arguments import checked_count, checked_number
from circuits.engine.compile import CompiledCircuit, compile
from circuits.errors import ArgumentError, StructureError
from circuits.precision import own_precision
from circuits.queries.flows import checked_sample_weights
from circuits.structures import mixture_of
from circuits.symbolic import ParametricNode
from circuits.symbolic.flat import below_first


@own_precision
def convex_combination(members: Sequence[CompiledCircuit], weights: Tensor | None = None) -> CompiledCircuit:
    """Return the circuit ``p(x) = sum_m w_m p_m(x)`` over copies of the members, with their weights.

    It can be queried, saved and learnt further like any other. If the members have classes, so has the result: then
    the p(x | class) of the members are mixed. The named nodes of member m are called ``member{m}.{name}`` in it; its
    root is called ``members``.

    Args:
        members: circuits over the same variables, on one device and of one dtype.
        weights: w, (M,) >= 0, not all zero; equal when omitted. They are normalised.

    Raises:
        ArgumentError: an argument has a wrong type, shape or value.
        StructureError: the members are not over the same variables with the same numbers of categories, or have
            different numbers of classes.
    """
    is_list = isinstance(members, Sequence) and len(members) > 0
    if not is_list or not all(isinstance(member, CompiledCircuit) for member in members):
        raise ArgumentError(f"members: expected one or more compiled circuits, got {members!r}")
    if len({(member.device, member.dtype) for member in members}) > 1:
        raise ArgumentError("members: expected circuits on one device and of one dtype; move them with .to(...)")
    num_classes = {member.circuit.num_classes for member in members}
    if len(num_classes) > 1:
        raise StructureError(f"members: expected equally many classes in all of them, got {num_classes}")
    if weights is not None and not isinstance(weights, Tensor):
        raise ArgumentError(f"weights: expected a tensor ({len(members)},) or None, got {type(weights).__name__}")
    shares = torch.ones(len(members)) if weights is None else weights.detach().cpu()
    if shares.shape != (len(members),) or not bool((shares >= 0).all()) or not 0 < float(shares.sum()) < torch.inf:
        raise ArgumentError(f"weights: expected {len(members)} finite numbers >= 0, not all zero, got {weights!r}")
    circuit = mixture_of([member.circuit for member in members], weights=shares.double() / shares.sum())
    pc = compile(circuit, device=members[0].device, dtype=members[0].dtype, seed=0)
    with torch.no_grad():
        for member, root in zip(members, circuit.root.children, strict=True):
            for node, twin in zip(member.circuit.nodes, below_first(root, attrgetter("children")), strict=True):
                if isinstance(node, ParametricNode) and isinstance(twin, ParametricNode):
                    (bank, row), (new_bank, new_row) = member.bank_address(node), pc.bank_address(twin)
                    pc.bank[new_bank][new_row] = member.bank[bank][row]
    return pc


@own_precision
@torch.no_grad()
def convex_weights(
    log_likelihoods: Tensor,  # shape: (N, M)
    sample_weights: Tensor | None = None,  # shape: (N,)
    *,
    max_steps: int = 1000,
    tolerance: float = 1e-7,
) -> Tensor:  # shape: (M,)
    """Return the weights of the convex combination of M members that is likeliest for N samples.

    The problem is concave; expectation-maximisation from equal weights, ``w_m <- mean_n w_m p_m(x_n) / p(x_n)``, finds
    its maximum (Dempster, Laird, Rubin 1977; as "stacking" of densities: Smyth and Wolpert 1999). Take samples that the
    members did not learn from.

    Args:
        log_likelihoods: log p_m(x_n), (N, M), below +inf; samples that no member allows count for nothing.
        sample_weights: how often each sample counts, (N,) >= 0; once when omitted.
        max_steps: of EM at most.
        tolerance: stop when a step gains less than this, in nats per sample.

    Returns:
        float64 (M,), >= 0, sums to 1.

    Raises:
        ArgumentError: an argument has a wrong shape or value, or no sample is possible.
    """
    checked_count("max_steps", max_steps)
    checked_number("tolerance", tolerance)
    if not isinstance(log_likelihoods, Tensor):
        raise ArgumentError(f"log_likelihoods: expected a tensor (N, M), got {type(log_likelihoods).__name__}")
    scores = log_likelihoods.detach().double()
    if scores.dim() != 2 or not scores.numel() or not bool((scores < torch.inf).all()):
        raise ArgumentError(f"log_likelihoods: expected numbers below +inf, (N, M), got {tuple(scores.shape)}")
    is_possible = (scores > -torch.inf).any(1)
    counts = is_possible.double()
    if sample_weights is not None:
        counts = counts * checked_sample_weights(sample_weights, scores[:, 0])
    if not float(counts.sum()) > 0:
        raise ArgumentError("log_likelihoods: expected at least one sample that a member allows, got none")
    scores = scores.masked_fill(~is_possible.unsqueeze(1), 0.0)
    tells_apart = (scores != scores[:, :1]).any(1)  # others, such as rows that observe nothing, would slow EM down
    counts = counts * tells_apart if bool((counts * tells_apart > 0).any()) else counts
    shares = counts / counts.sum()
    weights = scores.new_full((scores.shape[1],), 1 / scores.shape[1])
    before = -torch.inf
    for _ in range(max_steps):
        joint = scores + weights.log()
        log_mixture = torch.logsumexp(joint, 1)
        now = float(shares @ log_mixture)
        weights = shares @ (joint - log_mixture.unsqueeze(1)).exp()
        if now - before < tolerance:
            break
        before = now
    return weights / weights.sum()
