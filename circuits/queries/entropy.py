"""Entropies: of latents and leaves together, exactly; of the variables alone, exactly or between bounds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from circuits.arguments import checked_possible
from circuits.engine.compile import CompiledCircuit
from circuits.engine.question import Question
from circuits.engine.weights import CircuitWeights
from circuits.errors import PropertyError
from circuits.evidence import Evidence
from circuits.queries._mixture_bounds import mixture_bounds, xlogx
from circuits.queries.averages import EntropySemiring
from circuits.queries.basic import marginals
from circuits.queries.common import dense_evidence, dense_factors, query
from circuits.queries.determinism import require_deterministic


class EntropyBounds(NamedTuple):
    """Numbers that the entropy ``H(X | e)`` provably lies between, up to rounding."""

    lower: Tensor
    """(B,), in nats."""
    upper: Tensor
    """(B,), in nats."""


@query
def latent_entropy(
    pc: CompiledCircuit, evidence: Evidence | None = None, *, weights: CircuitWeights | None = None
) -> Tensor:
    """Return the entropy ``H(X, Z | e)`` of the joint posterior over leaves X and latent choices Z.

    One upward pass in the entropy semiring (Hernando, Crespi, Cybenko 2005). Needs a smooth and decomposable circuit,
    which all circuits here are. Differentiable in evidence and weights.

    Args:
        pc: the circuit.
        evidence: for B queries; None: no evidence, B = 1.
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.

    Returns:
        (B,), in nats: the entropy of one child choice per reached sum unit and one value per reached input unit.

    Raises:
        ImpossibleEvidenceError: log Z = -inf for some query.
    """
    root = Question(pc, dense_evidence(pc, evidence, weights), weights).root(EntropySemiring())
    checked_possible(root[:, 0])
    return root[:, 1]


@query
def entropy(pc: CompiledCircuit, evidence: Evidence | None = None) -> Tensor:
    """Return the entropy ``H(X | e)`` of the posterior over assignments.

    Needs a deterministic circuit: an assignment then has one explanation, so this is :func:`latent_entropy`. For other
    circuits it is #P-hard; see :func:`entropy_bounds`. Differentiable in evidence and weights.

    Args:
        pc: a deterministic circuit, by structure or by the supports that its weights leave.
        evidence: for B queries; None: no evidence, B = 1.

    Returns:
        (B,), in nats.

    Raises:
        PropertyError: the circuit is not deterministic; names the sum. Or the evidence mixes classes.
        ImpossibleEvidenceError: log Z = -inf for some query.
    """
    require_deterministic(pc, "entropy")
    if evidence is not None and evidence.classes is not None and evidence.classes.dim() == 2:
        raise PropertyError(
            "entropy: expected one class, got a mixture of classes, which is not deterministic; see latent_entropy"
        )
    return latent_entropy(pc, evidence)


@query
def entropy_bounds(pc: CompiledCircuit, evidence: Evidence | None = None) -> EntropyBounds:
    """Return numbers that ``H(X | e)`` lies between, for circuits in which it is intractable.

    The bounds go up the circuit. Product units add them up. A sum unit mixes components with weights c_i; for bounds
    ``L_i <= H_i <= U_i`` of theirs it has (Kolchinsky and Tracey 2017, "Estimating Mixture Entropy with Pairwise
    Distances")

        sum_i c_i L_i - sum_i c_i log sum_j c_j B_ij  <=  H  <=  sum_i c_i U_i - sum_i c_i log sum_j c_j exp(-D_ij)

    with ``B_ij`` at least their Bhattacharyya coefficient and ``D_ij`` at least their Kullback-Leibler divergence. B is
    bounded by ``sum_ab sqrt(w_ia w_jb) B_ab`` for sums with children a and b, and by 1 where nodes are not compatible;
    D by that of the mixture weights for units of one sum, which have the same children, and by infinity for units of
    different nodes. So the lower bound is at least ``H(X | Z) = H(X, Z) - H(Z)``, the upper one at most ``H(X, Z)``;
    the sum of the variables' own entropies is an upper bound too, and the smaller one is returned.

    Needs a smooth and decomposable circuit, which all circuits here are. Time and memory grow with the square of
    the units of a node. Differentiable in evidence and weights.

    Args:
        pc: the circuit.
        evidence: for B queries; None: no evidence, B = 1.

    Returns:
        ``(lower, upper)``, each (B,), in nats.

    Raises:
        ImpossibleEvidenceError: log Z = -inf for some query.
    """
    factors = dense_factors(pc, evidence, "entropy_bounds")
    posterior = marginals(pc, Evidence.soft(factors), differentiable=True)
    root = mixture_bounds(pc, factors)
    independent = -xlogx(posterior).sum((1, 2))
    return EntropyBounds(root.lower[0], torch.minimum(root.upper[0], independent))
