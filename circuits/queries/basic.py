"""Exact queries on compiled circuits: each is one upward pass, its gradient, or a change of semiring.

Every function takes a :class:`~circuits.engine.compile.CompiledCircuit` and works on a batch of B queries at once.
Circuits here are smooth and decomposable by construction, which is all that these queries need.

On a circuit with R classes (``num_classes``) the likelihoods have shape (B, R), one per class. The other queries need
one distribution, and so raise ``PropertyError`` unless the evidence names the class: ``evidence.with_class(labels)``
for p(x | class), ``evidence.with_class_prior(log_prior)`` for their mixture. Then likelihoods have shape (B,) again.
"""

from __future__ import annotations

from torch import Tensor

from circuits.arguments import checked_possible
from circuits.engine.compile import CompiledCircuit
from circuits.engine.question import Question
from circuits.engine.weights import CircuitWeights
from circuits.evidence import Evidence
from circuits.queries.common import detached, query, require_finite_values
from circuits.queries.segments import segmented_log_z


@query
def log_likelihood(pc: CompiledCircuit, x: Tensor, *, weights: CircuitWeights | None = None) -> Tensor:
    """Return ``log p(x)`` of complete assignments, (B, D): shape (B,), in nats; -inf where impossible.

    With real variables it is a density. NaN in a floating-point ``x`` is a missing value, as everywhere.
    """
    return Question(pc, Evidence.observe(x), weights).log_z


@query
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
    return Question(pc, Evidence.observe(x, observed), weights).log_z


@query
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


@query
def log_partition(
    pc: CompiledCircuit, evidence: Evidence, *, weights: CircuitWeights | None = None, checkpointed: bool = False
) -> Tensor:
    """Return ``log Z(e) = log sum_x p(x) prod_i e_i(x_i)``, shape (B,); -inf for impossible evidence.

    With ``checkpointed`` a long chain and its gradient take little memory: :func:`~circuits.learning.expected_flows`.
    """
    question = Question(pc, evidence, weights)
    return segmented_log_z(question) if checkpointed else question.log_z


@query
@detached
def marginals(
    pc: CompiledCircuit, evidence: Evidence, *, weights: CircuitWeights | None = None, differentiable: bool = False
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
