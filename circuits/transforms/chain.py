"""Read a circuit as a hidden Markov chain with its own tables at every step, where its structure is one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from circuits.engine.compile import CompiledCircuit
from circuits.errors import PropertyError
from circuits.precision import own_precision
from circuits.symbolic import Input, Node, Product, Sum
from circuits.transforms.rebuild import Rebuild


class Chain(NamedTuple):
    """A non-homogeneous hidden Markov model: ``p(x) = sum_z p(z_0) prod_t p(z_t | z_t-1) p(x_t | z_t)``.

    With classes only ``p(z_0 | class)`` depends on the class.
    """

    order: tuple[int, ...]
    """The variable of every step t."""
    initial: Tensor
    """p(z_0 = i), (N_0,), float64; of a circuit with R classes p(z_0 = i | class r) at [r, i], (R, N_0)."""
    transition: tuple[Tensor, ...]
    """p(z_t = j | z_t-1 = i) at [i, j], (N_t-1, N_t), for t = 1 .. D - 1."""
    emission: tuple[Tensor, ...]
    """p(x_t = v | z_t = i) at [i, v], (N_t, C)."""


@own_precision
@torch.no_grad()
def to_chain(pc: CompiledCircuit) -> Chain:
    """Return the tables of the hidden Markov chain that a circuit is.

    A chain is a sum over states; every vector of states multiplies, unit by unit, nodes over single variables with at
    most one node over the variables that follow, which is a sum over the next states. Several variables that hang on
    one state become steps with an identity transition; sums of sums are multiplied out. Hidden Markov models, naive
    Bayes models and their like are chains.

    Args:
        pc: the circuit; it may have classes.

    Raises:
        PropertyError: the circuit is not a chain; the message names the node where it branches.
    """
    rebuild = Rebuild(pc)
    order: list[int] = []
    transition: list[Tensor] = []
    emission: list[Tensor] = []
    root = pc.circuit.root
    node: Node | None = root
    to_states = torch.eye(root.num_units, dtype=torch.float64, device=pc.device)
    while node is not None:
        while isinstance(node, Sum) and len(node.scope) > 1:
            if len(node.children) > 1:
                raise PropertyError(f"not a chain: {node} mixes {len(node.children)} nodes; a chain has one to mix")
            to_states = to_states @ rebuild.log_weights(node).exp()
            node = node.children[0]
        leaves, rest = _leaves_and_rest(node)
        num_states = to_states.shape[1]
        for leaf in leaves:
            order.append(next(iter(leaf.scope)))
            transition.append(to_states)
            emission.append(_emission(rebuild, leaf))
            to_states = torch.eye(num_states, dtype=torch.float64, device=pc.device)
        node = rest
    initial = transition[0][0] if pc.circuit.num_classes is None else transition[0]
    return Chain(tuple(order), initial, tuple(transition[1:]), tuple(emission))


def _leaves_and_rest(node: Node) -> tuple[list[Node], Node | None]:
    """Split a vector of states into its nodes over one variable and the node over all that follow."""
    if len(node.scope) == 1:
        return [node], None
    assert isinstance(node, Product)
    if node.mode == "outer" and node.num_units > 1:
        raise PropertyError(f"not a chain: {node} is an outer product, its units are no states of one vector")
    rest = [child for child in node.children if len(child.scope) > 1]
    if len(rest) > 1:
        raise PropertyError(f"not a chain: {node} branches into {rest[0]} and {rest[1]}")
    leaves = [child for child in node.children if len(child.scope) == 1]
    return leaves, rest[0] if rest else None


def _emission(rebuild: Rebuild, node: Node) -> Tensor:
    """Return the distribution of every unit of a node over one variable, (K, C)."""
    if isinstance(node, Input):
        return rebuild.log_weights(node).exp().t()
    tables = [_emission(rebuild, child) for child in node.children]
    if isinstance(node, Sum):
        return rebuild.log_weights(node).exp() @ torch.cat(tables)
    return tables[0]
