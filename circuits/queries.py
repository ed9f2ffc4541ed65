"""Exact queries on compiled circuits: each is one upward pass, its gradient, or a change of semiring.

Every function takes a :class:`~circuits.compile.CompiledCircuit` and works on a batch of B queries at once. Circuits
here are smooth and decomposable by construction, which is all that these queries need.

On a circuit with R classes (``num_classes``) the likelihoods have shape (B, R), one per class. The other queries need
one distribution, and so raise ``PropertyError`` unless the evidence names the class: ``evidence.with_class(labels)``
for p(x | class), ``evidence.with_class_prior(log_prior)`` for their mixture. Then likelihoods have shape (B,) again.
"""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from circuits import passes
from circuits.compile import CompiledCircuit
from circuits.errors import ArgumentError, ImpossibleEvidenceError, PropertyError
from circuits.evidence import Evidence
from circuits.graph import Sum
from circuits.passes import Banks
from circuits.semiring import LogSemiring, MaxSemiring

_MAX_REACHED = 1 << 25


class MPE(NamedTuple):
    """The most probable explanation: the best *joint* configuration of latents (sum choices) and leaves.

    Its assignment maximises p(x) itself only in deterministic circuits; then the query returns a :class:`MAP`.
    """

    assignment: Tensor
    """int64 (B, D): argmax over x of max over z of p(x, z | circuit) prod_i e_i(x_i)."""
    log_score: Tensor
    """(B,): log of that maximum, including the evidence's factors; -inf for impossible evidence."""


class MAP(MPE):
    """The most probable assignment: an :class:`MPE` of a deterministic circuit, where it also maximises p(x | e)."""


def log_likelihood(pc: CompiledCircuit, x: Tensor, *, weights: Banks | None = None) -> Tensor:
    """Return ``log p(x)`` of complete assignments, int64 (B, D): shape (B,), in nats; -inf where impossible."""
    return pc.log_partition(Evidence.observe(x), weights)


def log_marginal(pc: CompiledCircuit, x: Tensor, observed: Tensor, *, weights: Banks | None = None) -> Tensor:
    """Return ``log p(x_O)``, summing out what is not observed.

    Args:
        pc: the circuit.
        x: int64 (B, D); entries that are not observed are ignored.
        observed: bool (B, D).
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.

    Returns:
        (B,), in nats.
    """
    return pc.log_partition(Evidence.observe(x, observed), weights)


def log_conditional(pc: CompiledCircuit, x: Tensor, observed: Tensor, *, weights: Banks | None = None) -> Tensor:
    """Return ``log p(x_rest | x_O) = log p(x) - log p(x_O)``.

    Args:
        pc: the circuit.
        x: complete assignments, int64 (B, D).
        observed: bool (B, D), which variables are conditioned on.
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.

    Returns:
        (B,), in nats; -inf where the rest is impossible given what is observed.

    Raises:
        ImpossibleEvidenceError: p(x_O) = 0 for some query.
    """
    log_evidence = _checked_possible(log_marginal(pc, x, observed, weights=weights))
    return log_likelihood(pc, x, weights=weights) - log_evidence


def log_partition(pc: CompiledCircuit, evidence: Evidence, *, weights: Banks | None = None) -> Tensor:
    """Return ``log Z(e) = log sum_x p(x) prod_i e_i(x_i)``, shape (B,); -inf for impossible evidence."""
    return pc.log_partition(evidence, weights)


def marginals(pc: CompiledCircuit, evidence: Evidence, *, weights: Banks | None = None) -> Tensor:
    """Return all posterior marginals ``p(x_i = v | e) = d log Z / d log e_i(v)`` (Darwiche 2003), in one pass.

    Args:
        pc: the circuit.
        evidence: for B queries.
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.

    Returns:
        (B, D, C) with C the largest number of categories; rows sum to 1, and values a variable does not have are 0.
        Differentiable when gradients are enabled and evidence or weights require them.

    Raises:
        ImpossibleEvidenceError: log Z = -inf for some query.
    """
    evidence.check(pc.num_categories)
    factors = evidence.dense(int(pc.num_categories.max()), pc.dtype)

    def log_z_of(factors: Tensor, banks: passes.Banks) -> Tensor:
        return _checked_possible(_one_per_query(pc, pc.log_partition(evidence.with_factors(factors), banks)))

    return passes.factor_gradients(log_z_of, factors, pc.weights() if weights is None else weights)


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
        return _checked_possible(_one_per_query(pc, pc.log_partition(conditioned, banks)))

    zeros = torch.zeros(evidence.batch_size, builtins.sum(sizes), dtype=pc.dtype, device=pc.device)
    inputs = [tensor for tensor in (evidence.log_factors, *given.values()) if tensor is not None]
    posterior = passes.factor_gradients(log_z_of, zeros, banks, also=inputs)
    return dict(zip(wanted, posterior.split(sizes, 1), strict=True))


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
    _checked_possible(joint.detach().amax(1))
    return torch.softmax(joint, 1)


@torch.no_grad()
def sample(
    pc: CompiledCircuit,
    num_samples: int,
    evidence: Evidence | None = None,
    generator: torch.Generator | None = None,
    *,
    weights: Banks | None = None,
) -> Tensor:
    """Draw exact, independent samples ``x ~ p(x | e)``.

    Args:
        pc: the circuit.
        num_samples: S >= 1, samples per query.
        evidence: for B queries; None: the circuit's own distribution.
        generator: on the circuit's device; the same state gives the same samples on one machine.
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.

    Returns:
        int64 (S, D) without evidence, (S, B, D) with it, or with external weights for a batch of B.

    Raises:
        ImpossibleEvidenceError: log Z = -inf for some query.
    """
    if not isinstance(num_samples, int) or num_samples < 1:
        raise ArgumentError(f"num_samples: expected an integer >= 1, got {num_samples!r}")
    banks = pc.weights() if weights is None else weights
    given = _evidence_or_nothing(pc, evidence, banks)
    given.check(pc.num_categories)
    semiring = LogSemiring()
    outputs = passes.upward(pc, semiring, passes.leaves(pc, semiring, given, banks), banks, keep=True)
    _checked_possible(_root(outputs))
    num_nodes = sum(size for size, _ in pc.layer_sizes)
    per_pass = max(1, _MAX_REACHED // (num_nodes * given.batch_size))
    draws = []
    for start in range(0, num_samples, per_pass):
        count = min(per_pass, num_samples - start)
        units, query = passes.downward_choice(pc, semiring, outputs, banks, count, generator)
        values = passes.draw_values(pc, semiring, given, banks, units, query, generator)
        draws.append(values.unflatten(0, (count, given.batch_size)))
    samples = torch.cat(draws)
    return samples.squeeze(1) if evidence is None and banks.batch_size == 1 else samples


@torch.no_grad()
def mpe(pc: CompiledCircuit, evidence: Evidence | None = None, *, weights: Banks | None = None) -> MPE:
    """Return the most probable explanation: max-product upward, then the best child of every reached sum downward.

    The maximum is over latents and leaves together and is exact. The most probable assignment alone (MAP, latents
    summed out) is NP-hard in general; where the circuit is deterministic both are the same and a :class:`MAP` is
    returned.

    Args:
        pc: the circuit.
        evidence: for B queries; None: no evidence, B = 1.
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.

    Returns:
        ``(assignment, log_score)``: int64 (B, D) and (B,).

    Raises:
        ImpossibleEvidenceError: no explanation is possible for some query.
    """
    banks = pc.weights() if weights is None else weights
    given = _evidence_or_nothing(pc, evidence, banks)
    given.check(pc.num_categories)
    semiring = MaxSemiring()
    if given.missing is not None:  # the maximum over a missing variable is not 1: its values must be compared
        given = given.with_factors(given.dense(int(pc.num_categories.max()), pc.dtype))
    outputs = passes.upward(pc, semiring, passes.leaves(pc, semiring, given, banks), banks, keep=True)
    log_score = _checked_possible(_root(outputs))
    units, query = passes.downward_choice(pc, semiring, outputs, banks, 1, None)
    assignment = passes.draw_values(pc, semiring, given, banks, units, query, None)
    return (MAP if pc.circuit.is_deterministic else MPE)(assignment, log_score)


def _evidence_or_nothing(pc: CompiledCircuit, evidence: Evidence | None, banks: Banks) -> Evidence:
    return Evidence.nothing(banks.batch_size, pc.circuit.num_vars, pc.device) if evidence is None else evidence


def _one_per_query(pc: CompiledCircuit, log_z: Tensor) -> Tensor:
    """Return log Z, (B,); raise PropertyError if there is one per class."""
    if log_z.dim() == 2:
        raise passes.class_needed(pc)
    return log_z


def _root(outputs: list[Tensor | None]) -> Tensor:
    root = outputs[-1]
    assert root is not None
    return root[0, 0]


def _checked_possible(log_z: Tensor) -> Tensor:
    impossible = (log_z == -torch.inf).reshape(len(log_z), -1).any(1).nonzero().flatten().tolist()
    if impossible:
        raise ImpossibleEvidenceError(
            f"the evidence of {len(impossible)} of {len(log_z)} queries has probability zero (the first is query "
            f"{impossible[0]}); log_marginal and log_partition return -inf for such evidence instead"
        )
    return log_z
