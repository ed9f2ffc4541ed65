"""Two hidden Markov models, joined to one over the pairs of their states."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from circuits.arguments import checked_number
from circuits.engine.compile import CompiledCircuit
from circuits.errors import ArgumentError, PropertyError
from circuits.precision import own_precision
from circuits.structures import monarch_hmm
from circuits.symbolic import Circuit, ParametricNode
from circuits.transforms.chain import to_chain
from circuits.transforms.rebuild import Rebuild


@own_precision
@torch.no_grad()
def product_chain(first: CompiledCircuit, second: CompiledCircuit, *, power: float = 1.0) -> Circuit:
    """Return a chain over the pairs of two hidden Markov models' states, to learn from there: a Monarch chain.

    Both halves of a pair (a, b) start and move as they did, independently, ``T[(a, b), (a', b')] = T_1[a, a']
    T_2[b, b']``; a pair emits v with probability ``(E_1[a, v] E_2[b, v])^power / c_ab``. That is a start of
    :func:`~circuits.structures.monarch_hmm`, whose tables learning then parts, state by state.

    With power 1 it is the product of both distributions, see :func:`multiply`, but for c: ``p_1(x) p_2(x)`` is the sum
    over the paths z of ``p(z, x) prod_t c_z_t``. So it has the same distribution where c, how probably the halves of a
    pair emit the same value, is equal for all pairs. A homogeneous chain has no place for c, which ``multiply`` puts
    into transitions of every step's own.

    Args:
        first: of A states, as :func:`~circuits.structures.hmm` builds them, with one variable of finitely many values
            a step.
        second: of B states, over the same variables.
        power: >= 0, of the product of emissions; 1/2 lets a pair of equal states emit what they do, and was the worse
            start on text.

    Returns:
        The circuit, its tables as weights to start with: ``ct.compile(circuit)`` has them. It is homogeneous where both
        models are. A pair of states without a common value emits the mean of theirs.

    Raises:
        ArgumentError: the models differ in their variables, or a wrong power.
        PropertyError: one of them is no such model, or has classes.
    """
    checked_number("power", power, "an exponent")
    one, two = _tables_of(first, "first"), _tables_of(second, "second")
    if first.circuit.num_categories != second.circuit.num_categories:
        raise ArgumentError(
            f"second: expected variables with the categories of first, {first.circuit.num_categories}, got "
            f"{second.circuit.num_categories}"
        )
    is_homogeneous = one.is_homogeneous and two.is_homogeneous
    if is_homogeneous:
        one, two = (tables._replace(move=tables.move[:1], emission=tables.emission[:1]) for tables in (one, two))
    num_a, num_b = len(one.initial), len(two.initial)
    left = one.move.unsqueeze(1).expand(-1, num_b, -1, -1)
    right = two.move.unsqueeze(1).expand(-1, num_a, -1, -1)
    emission = _emission_of_pairs(one.emission.unsqueeze(2), two.emission.unsqueeze(1), power)
    right, left, emission = (table[0] if is_homogeneous else table for table in (right, left, emission))
    return monarch_hmm(
        first.circuit.num_vars,
        (num_a, num_b),
        emission.shape[-1],
        is_homogeneous,
        initial=torch.kron(one.initial, two.initial),
        transition=(right, left),
        emission=emission,
    )


class _Tables(NamedTuple):
    """Those of a hidden Markov model of N states, float64, on the CPU."""

    initial: Tensor
    """(N,)."""
    move: Tensor
    """(L - 1, N, N)."""
    emission: Tensor
    """(L, N, C)."""
    is_homogeneous: bool


def _tables_of(pc: CompiledCircuit, argument: str) -> _Tables:
    chain, rebuild, length = to_chain(pc), Rebuild(pc), pc.circuit.num_vars
    sums = {node.name: node for node in pc.circuit.sums}
    leaves = {node.name: node for node in pc.circuit.inputs}
    moves = [f"transition{step}" for step in range(length - 1)]
    emissions = [f"emission{step}" for step in range(length)]
    if (
        pc.circuit.num_classes is not None
        or chain.order != tuple(range(length))
        or length < 2
        or (set(sums), set(leaves)) != ({"initial", *moves}, set(emissions))
        or {node.num_units for node in pc.circuit.nodes} - {len(chain.initial)} - {1}
    ):
        raise PropertyError(
            f"{argument}: expected a hidden Markov model of two steps or more, as ct.structures.hmm builds it, without "
            f"classes and with one variable a step, got {pc.circuit}"
        )
    nodes: list[list[ParametricNode]] = [[sums[name] for name in moves], [leaves[name] for name in emissions]]
    move, emission = (torch.stack([rebuild.log_weights(node).exp().cpu() for node in of_kind]) for of_kind in nodes)
    is_homogeneous = all(len(set(map(pc.bank_address, of_kind))) == 1 for of_kind in nodes)
    return _Tables(chain.initial.cpu(), move, emission.mT, is_homogeneous)


def _emission_of_pairs(first: Tensor, second: Tensor, power: float) -> Tensor:
    """Return what pairs of states emit, (L, A B, C), of tables (L, A, 1, C) and (L, 1, B, C)."""
    common = first * second
    weights = torch.where(common > 0, common**power, 0.0)
    totals = weights.sum(-1, keepdim=True)
    return torch.where(totals > 0, weights / totals, (first + second) / 2).flatten(1, 2)
