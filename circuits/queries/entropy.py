"""Entropies: of latents and leaves together, exactly; of the variables alone, exactly or between bounds."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from circuits import passes
from circuits.compile import CompiledCircuit
from circuits.evidence import Evidence
from circuits.properties import require_deterministic
from circuits.queries._common import checked_possible, dense_factors
from circuits.semirings import EntropySemiring


class EntropyBounds(NamedTuple):
    """Numbers that the entropy ``H(X | e)`` provably lies between, up to rounding."""

    lower: Tensor
    """(B,), in nats."""
    upper: Tensor
    """(B,), in nats."""


def latent_entropy(pc: CompiledCircuit, evidence: Evidence | None = None) -> Tensor:
    """Return the entropy ``H(X, Z | e)`` of the joint posterior over leaves X and latent choices Z.

    One upward pass in the entropy semiring (Hernando, Crespi, Cybenko 2005). Needs a smooth and decomposable circuit,
    which all circuits here are. Differentiable in evidence and weights.

    Args:
        pc: the circuit.
        evidence: for B queries; None: no evidence, B = 1.

    Returns:
        (B,), in nats: the entropy of one child choice per reached sum unit and one value per reached input unit.

    Raises:
        ImpossibleEvidenceError: log Z = -inf for some query.
    """
    semiring, banks = EntropySemiring(), pc.weights()
    leaf_values = passes.leaves(pc, semiring, Evidence.soft(dense_factors(pc, evidence)), banks)
    root = passes.upward(pc, semiring, leaf_values, banks)[-1]
    assert root is not None
    checked_possible(root[0, 0, :, 0])
    return root[0, 0, :, 1]


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
        PropertyError: the circuit is not deterministic; names the sum.
        ImpossibleEvidenceError: log Z = -inf for some query.
    """
    require_deterministic(pc, "entropy")
    return latent_entropy(pc, evidence)
