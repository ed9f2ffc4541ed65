"""Posteriors of latent variables: which child a sum node uses, and which class a query belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from circuits import passes
from circuits._precision import own_precision
from circuits.compile import CompiledCircuit
from circuits.errors import ArgumentError, PropertyError
from circuits.evidence import Evidence
from circuits.graph import Sum
from circuits.passes import Banks
from circuits.queries._common import checked_possible, one_per_query


@own_precision
def latent_marginals(
    pc: CompiledCircuit,
    evidence: Evidence,
    nodes: Sequence[Sum | str] | None = None,
    *,
    weights: Banks | None = None,
) -> dict[Sum | str, Tensor]:
    """Return the posterior of latent variables: how probably each child unit of a sum node is used, given evidence.

    That is ``d log Z / d log f_i`` at f = 1, for a factor f_i on child unit i wherever the node uses it (Darwiche
    2003), all nodes in one pass. In an HMM, the posterior of node ``"transition3"`` is that of the state of step 4.

    Args:
        pc: the circuit.
        evidence: for B queries.
        nodes: sum nodes, or their names; None: all sum nodes.
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.

    Returns:
        By node, or name where that was given: (B, I). Rows sum to the probability that the node is used at all: 1 in
        chains and trees of latents, less where a sum above chooses among several nodes. Differentiable when gradients
        are enabled and evidence or weights require them.

    Raises:
        ArgumentError: a node that is no sum node of the circuit.
        ImpossibleEvidenceError: log Z = -inf for some query.
    """
    banks = pc.weights() if weights is None else weights
    wanted = list(pc.circuit.sums if nodes is None else nodes)
    given = {pc.sum_node(key): factors for key, factors in (evidence.latents or {}).items()}
    targets = [pc.sum_node(key) for key in wanted]
    sizes = [node.parameter_shape[1] for node in targets]

    def log_z_of(factors: Tensor, banks: Banks) -> Tensor:
        latents: dict[Sum | str, Tensor] = dict(given.items())
        for node, part in zip(targets, factors.split(sizes, 1), strict=True):
            latents[node] = given[node].to(part) + part if node in given else part
        conditioned = replace(evidence, latents=latents)
        return checked_possible(one_per_query(pc, pc.log_partition(conditioned, banks)))

    zeros = torch.zeros(evidence.batch_size, sum(sizes), dtype=pc.dtype, device=pc.device)
    inputs = [tensor for tensor in (evidence.log_factors, *given.values()) if tensor is not None]
    posterior = passes.factor_gradients(log_z_of, zeros, banks, also=inputs)
    return dict(zip(wanted, posterior.split(sizes, 1), strict=True))


@own_precision
def class_posterior(
    pc: CompiledCircuit, evidence: Evidence, log_prior: Tensor | None = None, *, weights: Banks | None = None
) -> Tensor:
    """Return ``p(class | e) = p(e | class) p(class) / p(e)`` of a circuit with ``num_classes``.

    Args:
        pc: the circuit, with R classes.
        evidence: for B queries, without a class.
        log_prior: log p(class), up to a constant, (R,) or (B, R); None: all classes are equally probable.
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.

    Returns:
        (B, R), rows sum to 1; differentiable.

    Raises:
        PropertyError: the circuit has no classes.
        ImpossibleEvidenceError: the evidence is impossible under every class of the prior.
    """
    if pc.circuit.num_classes is None:
        raise PropertyError(f"class_posterior: {pc.circuit} has one root unit; build it with num_classes=")
    if evidence.classes is not None:
        raise ArgumentError("evidence: it names the class already; leave that out, a prior goes into log_prior")
    joint = pc.log_partition(evidence, weights)
    if log_prior is not None:
        joint = joint + log_prior.to(joint)
    checked_possible(joint.detach().amax(1))
    return torch.softmax(joint, 1)
