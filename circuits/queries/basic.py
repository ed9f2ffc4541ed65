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

from circuits.algebra.semirings import MaxSemiring, Semiring, choosing_semiring
from circuits.arguments import checked_count
from circuits.engine.compile import CompiledCircuit
from circuits.engine.question import Question, checked_possible
from circuits.engine.weights import CircuitWeights
from circuits.errors import ArgumentError
from circuits.evidence import Evidence
from circuits.precision import own_precision
from circuits.queries.common import detached, has_one_explanation, require_finite_values
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
def evaluate(
    pc: CompiledCircuit,
    semiring: Semiring,
    evidence: Evidence | None = None,
    *,
    weights: CircuitWeights | None = None,
) -> Tensor:
    """Return a circuit's value in any semiring: the sum over explanations of the products of what they use.

    An explanation is one choice of a child per reached sum unit and one value per reached input unit. In
    ``ct.semirings.LogSemiring()`` the value is log Z, in ``ct.semirings.MaxSemiring()`` the log-score of the best
    explanation; a semiring of your own is one subclass of ``ct.semirings.Semiring`` (Goodman 1999, "Semiring Parsing").

    Args:
        pc: the circuit.
        semiring: what plus and times mean.
        evidence: for B queries; None: no evidence, B = 1.
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.

    Returns:
        (B, *E), with the trailing dimensions E of the semiring's values.

    Raises:
        ArgumentError: ``semiring`` is none, or the evidence does not fit the circuit.
        PropertyError: the circuit has a distribution per class, and the evidence does not say which.
    """
    if not isinstance(semiring, Semiring):
        raise ArgumentError(f"semiring: expected a ct.semirings.Semiring, got {type(semiring).__name__}")
    return Question(pc, evidence, weights).root(semiring)


@own_precision
def log_likelihood(pc: CompiledCircuit, x: Tensor, *, weights: CircuitWeights | None = None) -> Tensor:
    """Return ``log p(x)`` of complete assignments, (B, D): shape (B,), in nats; -inf where impossible.

    With real variables it is a density. NaN in a floating-point ``x`` is a missing value, as everywhere.
    """
    return pc.log_partition(Evidence.observe(x), weights)


@own_precision
def log_marginal(pc: CompiledCircuit, x: Tensor, observed: Tensor, *, weights: CircuitWeights | None = None) -> Tensor:
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
def log_conditional(
    pc: CompiledCircuit, x: Tensor, observed: Tensor, *, weights: CircuitWeights | None = None
) -> Tensor:
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
def log_partition(pc: CompiledCircuit, evidence: Evidence, *, weights: CircuitWeights | None = None) -> Tensor:
    """Return ``log Z(e) = log sum_x p(x) prod_i e_i(x_i)``, shape (B,); -inf for impossible evidence."""
    return pc.log_partition(evidence, weights)


@own_precision
@detached
def marginals(
    pc: CompiledCircuit,
    evidence: Evidence,
    *,
    weights: CircuitWeights | None = None,
    differentiable: bool = False,
) -> Tensor:
    """Return all posterior marginals ``p(x_i = v | e) = d log Z / d log e_i(v)`` (Darwiche 2003), in one pass.

    Args:
        pc: the circuit.
        evidence: for B queries.
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.
        differentiable: whether the result is differentiable in evidence and weights, at more time and memory.

    Returns:
        (B, D, C) with C the largest number of categories; rows sum to 1, and values a variable does not have are 0.

    Raises:
        ImpossibleEvidenceError: log Z = -inf for some query.
        PropertyError: a variable has infinitely many values.
    """
    require_finite_values(pc, "marginals")
    evidence.check(pc.num_categories)
    factors = evidence.dense(max(pc.circuit.num_categories), pc.dtype)
    return Question(pc, evidence.with_factors(factors), weights).gradients()


@own_precision
@detached
def listed_marginals(
    pc: CompiledCircuit,
    evidence: Evidence,
    *,
    weights: CircuitWeights | None = None,
    differentiable: bool = False,
) -> Tensor:
    """Return ``p(x_i = v | e)`` of the values that the evidence lists, in one pass; nothing of size C is made.

    Args:
        pc: the circuit.
        evidence: for B queries, with listed values and factors of them (:meth:`Evidence.sparse`).
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.
        differentiable: whether the result is differentiable in evidence and weights, at more time and memory.

    Returns:
        (B, D, k), rows sum to 1, those of missing variables to 0.

    Raises:
        ArgumentError: the evidence lists no values.
        ImpossibleEvidenceError: log Z = -inf for some query.
    """
    if evidence.log_factors is None or evidence.values is None:
        raise ArgumentError("evidence: expected listed values with factors; see marginals for other kinds")
    return Question(pc, evidence, weights).gradients()


@own_precision
@torch.no_grad()
def sample(
    pc: CompiledCircuit,
    num_samples: int,
    evidence: Evidence | None = None,
    generator: Source = None,
    *,
    temperature: float = 1.0,
    weights: CircuitWeights | None = None,
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
    semiring = choosing_semiring(temperature)
    question = Question(pc, evidence, weights)
    if temperature != 1:
        require_finite_values(pc, "a temperature other than 1")
        question = question.silenced()
    values = question.possible_values(semiring)
    batch_size = question.evidence.batch_size
    num_nodes = sum(size for size, _ in pc.layer_sizes)
    per_pass = max(1, _MAX_REACHED // max(1, num_nodes * batch_size))
    draws = []
    for start in range(0, num_samples, per_pass):
        count = min(per_pass, num_samples - start)
        source = generator.at(start) if isinstance(generator, RowGenerators) else generator
        choice = question.choose(semiring, count, source, values=values)
        draws.append(question.values_of(semiring, choice, source).unflatten(0, (count, batch_size)))
    samples = torch.cat(draws)
    return samples.squeeze(1) if evidence is None and question.weights.batch_size == 1 else samples


@own_precision
@torch.no_grad()
def mpe(pc: CompiledCircuit, evidence: Evidence | None = None, *, weights: CircuitWeights | None = None) -> MPE:
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
    question, semiring = Question(pc, evidence, weights), MaxSemiring()
    values = question.upward(semiring)
    log_score = checked_possible(question.mixed(semiring, values[-1]))
    choice = question.choose(semiring, 1, None, values=values)
    assignment = question.values_of(semiring, choice, None)
    return (MAP if has_one_explanation(pc, question.evidence) else MPE)(assignment, log_score)
