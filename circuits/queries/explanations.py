"""Explanations of evidence: exact samples, and the most probable latents and values together.

Both climb the circuit in a semiring, and choose one child of every reached sum unit on the way down.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from circuits.algebra.semirings import LogSemiring, MaxSemiring
from circuits.arguments import checked_count
from circuits.engine.compile import CompiledCircuit
from circuits.engine.question import Question
from circuits.engine.weights import CircuitWeights
from circuits.evidence import Evidence
from circuits.queries.common import has_one_explanation, query, require_finite_values
from circuits.queries.temperature import choosing_semiring
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


@query
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
    semiring = LogSemiring() if temperature == 1.0 else choosing_semiring(temperature)
    question = Question(pc, evidence, weights)
    if temperature != 1:
        require_finite_values(pc, "a temperature other than 1")
        question = question.silenced()
    found = question.climb(semiring)
    batch_size = question.evidence.batch_size
    num_nodes = sum(size for size, _ in pc.layer_sizes)
    per_pass = max(1, _MAX_REACHED // max(1, num_nodes * batch_size))
    draws = []
    for start in range(0, num_samples, per_pass):
        count = min(per_pass, num_samples - start)
        source = generator.at(start) if isinstance(generator, RowGenerators) else generator
        choice = question.choose(semiring, count, source, found=found)
        draws.append(question.values_of(semiring, choice, source).unflatten(0, (count, batch_size)))
    samples = torch.cat(draws)
    return samples.squeeze(1) if evidence is None and question.weights.batch_size == 1 else samples


@query
@torch.no_grad()
def mpe(pc: CompiledCircuit, evidence: Evidence | None = None, *, weights: CircuitWeights | None = None) -> MPE:
    """Return the most probable explanation: max-product upward, then the best child of every reached sum downward.

    The maximum is over latents and leaves together and is exact. The most probable assignment alone (MAP, latents
    summed out) is NP-hard in general; where the circuit is deterministic both are the same and a :class:`MAP` is
    returned. Missing values are maximised too, with their probabilities in the score: :func:`viterbi` sums them out.

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
    found = question.climb(semiring)
    log_score = question.mixed(semiring, found.root)
    choice = question.choose(semiring, 1, None, found=found)
    assignment = question.values_of(semiring, choice, None)
    return (MAP if has_one_explanation(pc, question.evidence) else MPE)(assignment, log_score)
