"""The order in which layers are evaluated: one by one, or many at once where they are a chain of equal steps."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from circuits.chains import Chain
from circuits.engine.folding import Folding
from circuits.engine.layers import Gather, ProductLayer, SumLayer
from circuits.symbolic import Node, Product, Sum, parameter_owner

MakeLayer = Callable[[int], ProductLayer | SumLayer]
"""Makes the layer at a position."""

_SHORTEST = 4


class Step:
    """What is evaluated next: a layer, or the chain whose first sum is in this layer."""

    def __init__(self, position: int, chain: Chain | None, spent: Sequence[int], make: MakeLayer) -> None:
        self.position = position
        self.chain = chain
        self.spent = spent
        """The layers whose outputs nobody needs after it."""
        self._make = make
        self._device = torch.device("cpu")

    @functools.cached_property
    def layers(self) -> list[tuple[int, ProductLayer | SumLayer]]:
        """The layers, in order, by position; those of a long chain are seldom asked for."""
        made = [(at, self._make(at)) for at in (*(self.chain.inside if self.chain else ()), self.position)]
        for _, layer in made:
            layer.move(lambda tensor: tensor.to(self._device))
        return made

    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply what ``nn.Module.to`` applies to the tensors of a module."""
        self._device = function(torch.empty(0, dtype=torch.int64, device=self._device)).device
        for _, layer in vars(self).get("layers", ()):
            layer.move(function)
        if self.chain is not None:
            self.chain.move(function)


def schedule_of(folding: Folding, num_inputs: int, make: MakeLayer) -> list[Step]:
    """Return the steps that evaluate a folded circuit; the layers inside of a chain are none of their own."""
    chains = {chain.positions[0]: chain for chain in _chains_of(folding)}
    inside = {position for chain in chains.values() for position in chain.inside}
    last_uses, schedule = folding.last_uses, []
    for position in range(num_inputs, len(last_uses)):
        if position not in inside:
            chain = chains.get(position)
            layers = (position,) if chain is None else (position, *chain.inside)
            spent = [at for layer in layers for at in last_uses[layer] if at not in inside]
            schedule.append(Step(position, chain, spent, make))
    return schedule


def _chains_of(folding: Folding) -> list[Chain]:
    """Return the chains of a folded circuit that are long enough to be worth a scan."""
    num_parents = Counter(child for nodes in folding.layers for node in nodes for child in node.children)
    alone = {nodes[0] for nodes in folding.layers if len(nodes) == 1}
    follower: dict[Node, Sum] = {}
    for node in alone:
        found = _next_sum(node)
        links = () if found is None else (found, node.children[0])
        if found is not None and all(link in alone and num_parents[link] == 1 for link in links):
            follower[node] = found
    chains = []
    for start in follower.keys() - set(follower.values()):
        sums: list[Any] = [start]
        while sums[-1] in follower:
            sums.append(follower[sums[-1]])
        if len(sums) >= _SHORTEST:
            chains.append(_chain(folding, sums))
    return chains


def _next_sum(node: Node) -> Sum | None:
    """Return the one sum with the same weights that a sum mixes the product of, with leaves of as many units."""
    if not isinstance(node, Sum) or len(node.children) > 1 or not isinstance(node.children[0], Product):
        return None
    product = node.children[0]
    owner = parameter_owner(node)
    same = [child for child in product.children if isinstance(child, Sum) and parameter_owner(child) is owner]
    is_chain = product.mode == "elementwise" and len(same) == 1 < len(product.children)
    return same[0] if is_chain and node.num_units == product.num_units else None


def _chain(folding: Folding, sums: Sequence[Sum]) -> Chain:
    addresses = folding.addresses
    leaves = [[child for child in a.children[0].children if child is not b] for a, b in itertools.pairwise(sums)]
    end = [sums[-1].children[0]]
    if len(leaves[0]) == 1:
        leaves, end = [*leaves, end], []
    bank, row = folding.bank_addresses[parameter_owner(sums[0])]
    inner = [*sums[1:], *(node.children[0] for node in sums[:-1])]
    return Chain(
        [addresses[node][0] for node in sums],
        sorted(addresses[node][0] for node in inner),
        [Gather([addresses[child] for child in column]) for column in zip(*leaves, strict=True)],
        [Gather([addresses[child]]) for child in end],
        bank,
        row,
    )
