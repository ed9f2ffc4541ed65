"""Share parameters between nodes, or give every node its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from circuits.engine.compile import CompiledCircuit
from circuits.errors import ArgumentError, StructureError
from circuits.precision import own_precision
from circuits.symbolic import Input, Node, ParametricNode, Product, Sum, parameter_owner, product
from circuits.transforms.rebuild import TABLES, Rebuild, normalise


@own_precision
def share_parameters(pc: CompiledCircuit, groups: Sequence[Sequence[Node | str]]) -> CompiledCircuit:
    """Tie the parameters of nodes: each group of nodes, and all nodes tied to them, use one set of weights.

    The new weights are the mean of the group's (each distinct set of parameters counts once). The distribution stays
    the same where they were equal.

    Args:
        pc: the circuit.
        groups: of sum nodes with weights of equal shape, or input nodes of one family; nodes or their names.

    Raises:
        ArgumentError: a group has a node that does not belong to the circuit, or has no parameters.
        StructureError: parameters within a group differ in kind, shape or family.
    """
    rebuild = Rebuild(pc)
    owner_of: dict[ParametricNode, ParametricNode] = {}
    means: dict[ParametricNode, Tensor] = {}
    for group in groups:
        owners = list(dict.fromkeys(parameter_owner(_parametric(pc, node)) for node in group))
        for owner in owners:
            if owner in owner_of:
                raise ArgumentError(f"groups: the parameters of {owner} are in two groups; join these groups")
            if _kind(owner) != _kind(owners[0]):
                raise StructureError(
                    f"groups: expected one kind of node, one shape and one family in each, got {owners[0]} and "
                    f"{owner} of shapes {owners[0].parameter_shape} and {owner.parameter_shape}"
                )
            owner_of[owner] = owners[0]
        means[owners[0]] = _mean_parameters(rebuild, owners)
    return _retied(rebuild, owner_of, means)


@own_precision
def untie_parameters(pc: CompiledCircuit, nodes: Sequence[Node | str] | None = None) -> CompiledCircuit:
    """Give nodes their own copy of their parameters; the distribution stays the same.

    Args:
        pc: the circuit.
        nodes: which ones, nodes of ``pc.circuit`` or names; None: all.

    Raises:
        ArgumentError: a node does not belong to the circuit, or has no parameters.
    """
    rebuild = Rebuild(pc)
    chosen = [n for n in pc.circuit.nodes if isinstance(n, ParametricNode)] if nodes is None else nodes
    return _retied(rebuild, {}, {}, frozenset(_parametric(pc, node) for node in chosen))


def _retied(
    rebuild: Rebuild,
    owner_of: dict[ParametricNode, ParametricNode],
    changed: dict[ParametricNode, Tensor],
    untied: frozenset[ParametricNode] = frozenset(),
) -> CompiledCircuit:
    """Copy the circuit with other owners of parameters, changed parameters of owners, and nodes that own theirs."""
    built: dict[Node, Node] = {}
    heirs: dict[ParametricNode, ParametricNode] = {}
    for node in rebuild.pc.circuit.nodes:
        children = [built[child] for child in node.children]
        if isinstance(node, Product):
            built[node] = product(*children, mode=node.mode, name=node.name)
        elif isinstance(node, ParametricNode):
            owner = owner_of.get(parameter_owner(node), parameter_owner(node))
            parameters = changed[owner] if owner in changed else rebuild.raw(node)
            built[node] = new = rebuild.copy(node, children, parameters, None if node in untied else heirs.get(owner))
            if node not in untied:
                heirs.setdefault(owner, new)
    return rebuild.compile(built[rebuild.pc.circuit.root])


def _parametric(pc: CompiledCircuit, node: Node | str) -> ParametricNode:
    found = pc.circuit.node(node) if isinstance(node, str) else node
    if not isinstance(found, ParametricNode):
        raise ArgumentError(f"nodes: expected sum or input nodes, or their names, got {found!r}")
    pc.address(found)
    return found


def _kind(node: ParametricNode) -> tuple[object, ...]:
    return type(node), node.parameter_shape, node.distribution if isinstance(node, Input) else None


def _mean_parameters(rebuild: Rebuild, owners: Sequence[ParametricNode]) -> Tensor:
    if all(isinstance(owner, Sum) or isinstance(owner.distribution, TABLES) for owner in owners):
        stacked = torch.stack([rebuild.log_weights(owner, wide=False) for owner in owners])
        axis = 1 if isinstance(owners[0], Sum) else 0
        return normalise(torch.logsumexp(stacked, 0), axis)[0]
    return torch.stack([rebuild.raw(owner) for owner in owners]).mean(0)
