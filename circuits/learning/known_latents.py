"""Latent states that are known: evidence on the sum nodes that choose them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from circuits.engine.compile import CompiledCircuit
from circuits.errors import ArgumentError
from circuits.symbolic import Circuit, Input, Node, Product, Sum


@dataclass(frozen=True, eq=False)
class KnownState:
    """Which of some consecutive child units a sum node uses."""

    chooser: Sum
    first: int
    """The first of these child units."""
    num_states: int
    state: Tensor
    """Int64 (B,), 0 for the first of them; -1 where it is unknown."""

    def rows(self, index: Tensor) -> KnownState:
        """Return what is known about some of the samples."""
        return replace(self, state=self.state[index.to(self.state.device)])


def known_states(circuit: Circuit, states: Mapping[Input | Sum, Tensor]) -> tuple[KnownState, ...]:
    """Return the states, int64 (B,), of sum nodes (their child units) and input nodes (their units), sum by sum.

    Raises ArgumentError if the units of an input node are no child units of sums.
    """
    parents: dict[Node, list[Node]] = defaultdict(list)
    for node in circuit.nodes:
        for child in dict.fromkeys(node.children):
            parents[child].append(node)
    found = []
    for node, state in states.items():
        if isinstance(node, Sum):
            found.append(KnownState(node, 0, node.parameter_shape[1], state))
            continue
        places = list(_choosers(parents, node))
        if not places:
            raise ArgumentError(
                f"latents: the units of {node} are no states that a sum chooses among; name the sum node itself"
            )
        found += [KnownState(chooser, first, node.num_units, state) for chooser, first in places]
    return tuple(found)


def latent_factors(pc: CompiledCircuit, known: Sequence[KnownState]) -> dict[Sum | str, Tensor]:
    """Return log-factors, (B, I) by sum node, that rule out all child units but those of known states."""
    factors: dict[Sum | str, Tensor] = {}
    for one in known:
        state = one.state.to(pc.device).unsqueeze(1)
        is_other = (torch.arange(one.num_states, device=pc.device) != state) & (state >= 0)
        width = one.chooser.parameter_shape[1]
        log = factors.setdefault(one.chooser, torch.zeros(len(state), width, dtype=pc.dtype, device=pc.device))
        log[:, one.first : one.first + one.num_states].masked_fill_(is_other, -torch.inf)
    return factors


def _choosers(parents: Mapping[Node, Sequence[Node]], leaf: Input) -> Iterator[tuple[Sum, int]]:
    """Yield the sums that choose a unit of an input node, and which of their child units is its first.

    Unit k of an elementwise product of input nodes is the choice of their units k.
    """
    same_units: list[Node] = [leaf]
    for below in same_units:
        for node in parents[below]:
            if isinstance(node, Sum):
                first = 0
                if node.unit is not None:
                    raise ArgumentError(
                        f"latents: {node} mixes one unit of each child, so the units of {leaf} are no states that it "
                        "chooses among; name the sum node itself"
                    )
                for child in node.children:
                    if child is below:
                        yield node, first
                    first += child.num_units
            elif isinstance(node, Product) and node.mode == "elementwise" and node not in same_units:
                same_units.append(node)
