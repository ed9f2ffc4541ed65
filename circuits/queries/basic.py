"""Exact queries on compiled circuits: each is one upward pass, its gradient, or a change of semiring.

Every function takes a :class:`~circuits.engine.compile.CompiledCircuit` and works on a batch of B queries at once.
Circuits here are smooth and decomposable by construction, which is all that these queries need.

On a circuit with R classes (``num_classes``) the likelihoods have shape (B, R), one per class. The other queries need
one distribution, and so raise ``PropertyError`` unless the evidence names the class: ``evidence.with_class(labels)``
for p(x | class), ``evidence.with_class_prior(log_prior)`` for their mixture. Then likelihoods have shape (B,) again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from circuits.arguments import checked_count, checked_temperature
from circuits.engine import choices, passes
from circuits.engine.compile import CompiledCircuit
from circuits.engine.passes import Banks
from circuits.engine.semirings import MaxSemiring, choosing_semiring
from circuits.errors import ArgumentError
from circuits.evidence import Evidence
from circuits.precision import own_precision
from circuits.queries.common import (
    check_generator,
    checked_possible,
    given_evidence,
    has_one_explanation,
    one_per_query,
    require_finite_values,
)
from circuits.randomness import RowGenerators, Source

_MAX_REACHED = 1 << 25


class MPE(NamedTuple):
    """The most probable explanation: the best *joint* configuration of latents (sum choices) and leaves.

    Its assignment maximises p(x) itself only in deterministic circuits; then the query returns a :class:`MAP`.
    """

    assignment: Tensor
    """(B, D), int64 if all families are discrete: argmax over x of max over z of p(x, z | circuit) prod_i e_i(x_i)."""
    log_score: Tensor
    """(B,): log of that maximum, including the evidence's factors; -inf for impossible evidence."""


class MAP(MPE):
    """The most probable assignment: an :class:`MPE` of a deterministic circuit, where it also maximises p(x | e)."""


@own_precision
def log_likelihood(pc: CompiledCircuit, x: Tensor, *, weights: Banks | None = None) -> Tensor:
    """Return ``log p(x)`` of complete assignments, (B, D): shape (B,), in nats; -inf where impossible.

    With real variables it is a density. NaN in a floating-point ``x`` is a missing value, as everywhere.
    """
    return pc.log_partition(Evidence.observe(x), weights)


@own_precision
def log_marginal(pc: CompiledCircuit, x: Tensor, observed: Tensor, *, weights: Banks | None = None) -> Tensor:
    """Return ``log p(x_O)``, summing out what is not observed.

    Args:
        pc: the circuit.
        x: (B, D); entries that are not observed are ignored.
        observed: bool (B, D).
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.

    Returns:
        (B,), in nats.
    """
    return pc.log_partition(Evidence.observe(x, observed), weights)


@own_precision
def log_conditional(pc: CompiledCircuit, x: Tensor, observed: Tensor, *, weights: Banks | None = None) -> Tensor:
    """Return ``log p(x_rest | x_O) = log p(x) - log p(x_O)``.

    Args:
        pc: the circuit.
        x: complete assignments, (B, D).
        observed: bool (B, D), which variables are conditioned on.
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.

    Returns:
        (B,), in nats; -inf where the rest is impossible given what is observed.

    Raises:
        ImpossibleEvidenceError: p(x_O) = 0 for some query.
    """
    log_evidence = checked_possible(log_marginal(pc, x, observed, weights=weights))
    return log_likelihood(pc, x, weights=weights) - log_evidence


@own_precision
def log_partition(pc: CompiledCircuit, evidence: Evidence, *, weights: Banks | None = None) -> Tensor:
    """Return ``log Z(e) = log sum_x p(x) prod_i e_i(x_i)``, shape (B,); -inf for impossible evidence."""
    return pc.log_partition(evidence, weights)


@own_precision
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
        PropertyError: a variable has infinitely many values.
    """
    require_finite_values(pc, "marginals")
    evidence.check(pc.num_categories)
    factors = evidence.dense(int(pc.num_categories.max()), pc.dtype)

    def log_z_of(factors: Tensor, banks: passes.Banks) -> Tensor:
        return checked_possible(one_per_query(pc, pc.log_partition(evidence.with_factors(factors), banks)))

    return passes.factor_gradients(log_z_of, factors, pc.weights() if weights is None else weights)


@own_precision
def listed_marginals(pc: CompiledCircuit, evidence: Evidence, *, weights: Banks | None = None) -> Tensor:
    """Return ``p(x_i = v | e)`` of the values that the evidence lists, in one pass; nothing of size C is made.

    Args:
        pc: the circuit.
        evidence: for B queries, with listed values and factors of them (:meth:`Evidence.sparse`).
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.

    Returns:
        (B, D, k), rows sum to 1, those of missing variables to 0. Differentiable like :func:`marginals`.

    Raises:
        ArgumentError: the evidence lists no values.
        ImpossibleEvidenceError: log Z = -inf for some query.
    """
    factors, values = evidence.log_factors, evidence.values
    if factors is None or values is None:
        raise ArgumentError("evidence: expected listed values with factors; see marginals for other kinds")

    def log_z_of(factors: Tensor, banks: passes.Banks) -> Tensor:
        listed = evidence.with_factors(factors, values, evidence.missing)
        return checked_possible(one_per_query(pc, pc.log_partition(listed, banks)))

    return passes.factor_gradients(log_z_of, factors, pc.weights() if weights is None else weights)


@own_precision
@torch.no_grad()
def sample(
    pc: CompiledCircuit,
    num_samples: int,
    evidence: Evidence | None = None,
    generator: Source = None,
    *,
    temperature: float = 1.0,
    weights: Banks | None = None,
) -> Tensor:
    """Draw exact, independent samples ``x ~ p(x | e)``, or of explanations at a temperature.

    Args:
        pc: the circuit.
        num_samples: S >= 1, samples per query.
        evidence: for B queries; None: the circuit's own distribution.
        generator: on the circuit's device; the same state gives the same samples on one machine. Or
            :class:`~circuits.randomness.RowGenerators`, one per query: then no query's samples depend on the others.
        temperature: tau >= 0: draw explanations, latents and values together, from ``p(x, z | e)^(1 / tau)``,
            normalised, and return their values; 0 takes the best. (The power of p(x | e) itself is #P-hard to sample.)
            Variables and latents of which nothing is known are not tempered. Other than 1 for finitely many values.
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.

    Returns:
        (S, D) without evidence, (S, B, D) with it, or with external weights for a batch of B; int64 if all families are
        discrete, else of the circuit's dtype.

    Raises:
        ImpossibleEvidenceError: log Z = -inf for some query.
    """
    checked_count("num_samples", num_samples)
    banks = pc.weights() if weights is None else weights
    given = given_evidence(pc, evidence, banks)
    checked_temperature(temperature)
    check_generator(generator, given.batch_size)
    semiring = choosing_semiring(temperature)
    if temperature != 1:
        require_finite_values(pc, "a temperature other than 1")
    evaluate = passes.leaves if temperature == 1 else passes.heard_leaves
    outputs = passes.upward(pc, semiring, evaluate(pc, semiring, given, banks), banks, keep=True)
    checked_possible(_root(outputs))
    num_nodes = sum(size for size, _ in pc.layer_sizes)
    per_pass = max(1, _MAX_REACHED // max(1, num_nodes * given.batch_size))
    draws = []
    for start in range(0, num_samples, per_pass):
        count = min(per_pass, num_samples - start)
        source = generator.at(start) if isinstance(generator, RowGenerators) else generator
        units, query = choices.downward_choice(pc, semiring, outputs, banks, count, source)
        values = choices.draw_values(pc, semiring, given, banks, units, query, source)
        draws.append(values.unflatten(0, (count, given.batch_size)))
    samples = torch.cat(draws)
    return samples.squeeze(1) if evidence is None and banks.batch_size == 1 else samples


@own_precision
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
        ``(assignment, log_score)``: (B, D), int64 if all families are discrete, and (B,).

    Raises:
        ImpossibleEvidenceError: no explanation is possible for some query.
    """
    banks = pc.weights() if weights is None else weights
    given = given_evidence(pc, evidence, banks)
    semiring = MaxSemiring()
    outputs = passes.upward(pc, semiring, passes.leaves(pc, semiring, given, banks), banks, keep=True)
    log_score = checked_possible(_root(outputs))
    units, query = choices.downward_choice(pc, semiring, outputs, banks, 1, None)
    assignment = choices.draw_values(pc, semiring, given, banks, units, query, None)
    return (MAP if has_one_explanation(pc, given) else MPE)(assignment, log_score)


def _root(outputs: list[Tensor | None]) -> Tensor:
    root = outputs[-1]
    assert root is not None
    return root[0, 0]
