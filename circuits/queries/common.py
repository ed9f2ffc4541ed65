"""What the queries share: evidence that defaults to none, dense log-factors, the check for impossible evidence."""

from __future__ import annotations

import torch
from torch import Tensor

from circuits.engine import passes
from circuits.engine.compile import CompiledCircuit
from circuits.engine.passes import Banks
from circuits.errors import ArgumentError, ImpossibleEvidenceError, PropertyError
from circuits.evidence import Evidence
from circuits.randomness import RowGenerators, Source

MAX_NUMBERS = 1 << 24
"""How many numbers a chunk of a query may hold at once; bounds the memory of queries that ask many questions."""


def given_evidence(pc: CompiledCircuit, evidence: Evidence | None, weights: Banks | None = None) -> Evidence:
    """Return the evidence, checked; for None as many queries that say nothing as there are external weights for.

    Raises:
        ArgumentError: the evidence does not fit the circuit.
        PropertyError: the circuit has a distribution per class, and the evidence does not say which.
    """
    if evidence is None:
        batch_size = 1 if weights is None else weights.batch_size
        evidence = Evidence.nothing(batch_size, pc.circuit.num_vars, pc.device)
    evidence.check(pc.num_categories)
    if pc.circuit.num_classes is not None and evidence.classes is None:
        raise passes.class_needed(pc)
    return evidence


def check_generator(generator: Source, batch_size: int) -> None:
    """Raise ArgumentError if generators by row are not as many as there are queries."""
    if isinstance(generator, RowGenerators) and len(generator.seeds) != batch_size:
        raise ArgumentError(f"generator: expected {batch_size} seeds, one per query, got {len(generator.seeds)}")


def has_infinite_values(pc: CompiledCircuit) -> bool:
    """Return whether some variable has infinitely many values."""
    return 0 in pc.circuit.num_categories


def require_finite_values(pc: CompiledCircuit, query: str = "this query") -> None:
    """Raise PropertyError, which names the input node, unless all variables have finitely many values."""
    if has_infinite_values(pc):
        node = next(node for node in pc.circuit.inputs if not node.distribution.num_values)
        raise PropertyError(
            f"{query} needs variables with finitely many values; {node} is a {node.distribution}; give evidence on its "
            "variable and condition on it, or use families over 0 .. C - 1"
        )


def dense_evidence(
    pc: CompiledCircuit, evidence: Evidence | None, weights: Banks | None = None
) -> tuple[Evidence, Tensor]:
    """Return :func:`given_evidence` with log-factors of all values, and these, (B, D, C).

    They are -inf for values that a variable does not have.
    """
    require_finite_values(pc)
    given = given_evidence(pc, evidence, weights)
    num_values = int(pc.num_categories.max())
    factors = given.dense(num_values, pc.dtype)[..., :num_values].masked_fill(~existing_values(pc), -torch.inf)
    return given.with_factors(factors), factors


def dense_factors(pc: CompiledCircuit, evidence: Evidence | None, query: str) -> Tensor:
    """Return the log-factors of :func:`dense_evidence`, for a query that takes evidence on variables only.

    Raises:
        PropertyError: the circuit has classes or infinitely many values, or the evidence is on latents or relative.
    """
    require_finite_values(pc, query)
    if pc.circuit.num_classes is not None:
        raise passes.one_root_needed(query, pc.circuit)
    refuse_relative(evidence, query)
    if evidence is not None and evidence.latents:
        raise PropertyError(
            f"{query} takes evidence on variables only, and this one is on latents too; leave that out, or fold it "
            "into the circuit's weights"
        )
    return dense_evidence(pc, evidence)[1]


def refuse_relative(evidence: Evidence | None, query: str) -> None:
    """Raise PropertyError, for a query that has no use for it, if the evidence is relative to other evidence."""
    if evidence is not None and evidence.reference is not None:
        raise PropertyError(f"{query} takes evidence that is relative to no other; leave relative_to out")


def has_one_explanation(pc: CompiledCircuit, evidence: Evidence) -> bool:
    """Whether no assignment has two explanations; classes that are mixed are explanations of their own."""
    is_mixture = evidence.classes is not None and evidence.classes.dim() == 2
    return pc.circuit.is_deterministic and not is_mixture


def one_per_query(pc: CompiledCircuit, log_z: Tensor) -> Tensor:
    """Return log Z, (B,); raise PropertyError if there is one per class."""
    if log_z.dim() == 2:
        raise passes.class_needed(pc)
    return log_z


def existing_values(pc: CompiledCircuit) -> Tensor:
    """Return which of the C values each variable has: bool (D, C)."""
    values = torch.arange(int(pc.num_categories.max()), device=pc.device)
    return values < pc.num_categories.unsqueeze(1)


def queries_per_pass(pc: CompiledCircuit) -> int:
    """Return how many queries one pass takes so that the circuit's values stay within ``MAX_NUMBERS``."""
    per_query = pc.circuit.num_units + pc.circuit.num_vars * int(pc.num_categories.max())
    return max(1, MAX_NUMBERS // per_query)


def value_table(pc: CompiledCircuit, name: str, table: Tensor | None, *, extra_dim: bool = False) -> Tensor:
    """Return numbers per variable and value, (D, C), in the circuit's type; None: the value itself.

    Args:
        pc: the circuit.
        name: the argument's name, for messages.
        table: (D, C), with a further dimension allowed if ``extra_dim``.
        extra_dim: whether (D, C, M) is allowed too.

    Raises:
        ArgumentError: a wrong type or shape, or a number that is not finite.
    """
    num_vars, num_values = existing_values(pc).shape
    if table is None:
        return torch.arange(num_values, device=pc.device, dtype=pc.dtype).expand(num_vars, -1)
    shapes = f"({num_vars}, {num_values})" + (f" or ({num_vars}, {num_values}, M)" if extra_dim else "")
    if not isinstance(table, Tensor):
        raise ArgumentError(f"{name}: expected a tensor of shape {shapes}, got {type(table).__name__}")
    if tuple(table.shape[:2]) != (num_vars, num_values) or table.dim() > 2 + extra_dim or table.is_complex():
        raise ArgumentError(f"{name}: expected real numbers of shape {shapes}, got {table.dtype} {tuple(table.shape)}")
    if not bool(table.detach().isfinite().all()):
        raise ArgumentError(f"{name}: expected finite numbers, got NaN or infinity")
    return table.to(pc.device, pc.dtype)


def checked_possible(log_z: Tensor) -> Tensor:
    """Return ``log_z`` (B,) or (B, R); raise ImpossibleEvidenceError if some of it is -inf."""
    is_impossible = log_z == -torch.inf
    impossible = (is_impossible if log_z.dim() == 1 else is_impossible.any(1)).nonzero().flatten().tolist()
    if impossible:
        raise ImpossibleEvidenceError(
            f"the evidence of {len(impossible)} of {len(log_z)} queries has probability zero (the first is query "
            f"{impossible[0]}); log_marginal and log_partition return -inf for such evidence instead"
        )
    return log_z
