"""What the queries share: evidence that defaults to none, dense log-factors, the check for impossible evidence."""

from __future__ import annotations

import torch
from torch import Tensor

from circuits.compile import CompiledCircuit
from circuits.errors import ArgumentError, ImpossibleEvidenceError, PropertyError
from circuits.evidence import Evidence

MAX_NUMBERS = 1 << 24
"""How many numbers a chunk of a query may hold at once; bounds the memory of queries that ask many questions."""


def given_evidence(pc: CompiledCircuit, evidence: Evidence | None) -> Evidence:
    """Return the evidence, checked; for None a batch of one that says nothing."""
    given = Evidence.nothing(1, pc.circuit.num_vars, pc.device) if evidence is None else evidence
    given.check(pc.num_categories)
    return given


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


def dense_factors(pc: CompiledCircuit, evidence: Evidence | None) -> Tensor:
    """Return the log-factors of all values, (B, D, C); -inf for values that a variable does not have."""
    require_finite_values(pc)
    num_values = int(pc.num_categories.max())
    factors = given_evidence(pc, evidence).dense(num_values, pc.dtype)[..., :num_values]
    return factors.masked_fill(~existing_values(pc), -torch.inf)


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
    """Return ``log_z`` (B,); raise ImpossibleEvidenceError if some of it is -inf."""
    impossible = (log_z == -torch.inf).nonzero().flatten().tolist()
    if impossible:
        raise ImpossibleEvidenceError(
            f"the evidence of {len(impossible)} of {len(log_z)} queries has probability zero (the first is query "
            f"{impossible[0]}); log_marginal and log_partition return -inf for such evidence instead"
        )
    return log_z
