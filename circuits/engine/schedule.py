"""The order in which layers are evaluated: one by one, or many at once where they are a chain."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from circuits.chains import Chain, chains_of
from circuits.engine.folding import Folding
from circuits.engine.gathering import Gather
from circuits.engine.layers import ProductLayer, SumLayer
from circuits.symbolic import Sum, parameter_owner

MakeLayer = Callable[[int], ProductLayer | SumLayer]
"""Makes the layer at a position."""


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
    chains = {chain.positions[0]: chain for chain in (_chain(folding, sums) for sums in chains_of(folding.layers))}
    inside = {position for chain in chains.values() for position in chain.inside}
    last_uses, schedule = folding.last_uses, []
    for position in range(num_inputs, len(last_uses)):
        if position not in inside:
            chain = chains.get(position)
            layers = (position,) if chain is None else (position, *chain.inside)
            spent = [at for layer in layers for at in last_uses[layer] if at not in inside]
            schedule.append(Step(position, chain, spent, make))
    return schedule


def _chain(folding: Folding, sums: Sequence[Sum]) -> Chain:
    addresses = folding.addresses
    leaves = [[child for child in a.children[0].children if child is not b] for a, b in itertools.pairwise(sums)]
    end = [sums[-1].children[0]]
    if len(leaves[0]) == 1:
        leaves, end = [*leaves, end], []
    places = [folding.bank_addresses[parameter_owner(node)] for node in sums]
    inner = [*sums[1:], *(node.children[0] for node in sums[:-1])]
    return Chain(
        [addresses[node][0] for node in sums],
        sorted(addresses[node][0] for node in inner),
        [Gather([addresses[child] for child in column]) for column in zip(*leaves, strict=True)],
        [Gather([addresses[child]]) for child in end],
        places[0][0],
        [row for _, row in places],
    )
