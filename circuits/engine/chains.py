"""Chains of equal steps, as in a homogeneous HMM: many sum layers evaluated as one recurrence.

Sum t mixes the product of leaves e_t and sum t + 1, by weights that all share: ``y_t = W exp(e_t + log y_t+1)``. Layer
by layer that is a few dozen calls a step. Here the states are kept in linear space, over one scale per step and column
(Rabiner 1989, section V.A), so that a step is a GEMM, a maximum, a product and a division. Terms that underflow change
nothing while every sum stays above the safe one of :mod:`circuits.algebra.logspace`; where one does not, the chain is
evaluated layer by layer. With few states and columns even one call a step is too much: then neighbouring steps'
matrices are multiplied, all pairs at once, and the vectors between them follow (a parallel scan, Blelloch 1990).
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from circuits.algebra.logspace import column_peak, smallest_safe_sum
from circuits.algebra.semirings import ChoosingSemiring, LogSemiring
from circuits.engine.folding import Folding
from circuits.engine.layers import Gather, Gradients, LayerValues, Part, ProductLayer, SumLayer, chunks
from circuits.engine.weights import Weights
from circuits.randomness import RowGenerators, Source
from circuits.symbolic import Node, Product, Sum, parameter_owner
from circuits.weights.latents import LatentFactors

MakeLayer = Callable[[int], ProductLayer | SumLayer]
"""Makes the layer at a position."""

_SHORTEST = 4
_FEW_PRODUCTS = 1 << 12


class Scan(NamedTuple):
    """The recurrence of a chain of T steps: ``sums[t] = W states[t]``, in linear space."""

    states: Tensor
    """exp(e_t + log y_t+1) over a scale, at most 1: (T, K, B)."""
    sums: Tensor
    """(T, K, B)."""
    log_scale: Tensor
    """What ``log sums`` lacks to be log y_t: (T, 1, B)."""


@dataclass(frozen=True, eq=False)
class Chain(Part):
    """T sums, one in each of their layers, that share their weights, and the products between them."""

    positions: Sequence[int]
    """The layers of the sums, the first sum's first."""
    inside: Sequence[int]
    """The layers that nothing but the chain reads, in the order in which they are evaluated."""
    leaves: Sequence[Gather]
    """What gathers the leaves of all steps but the last, (T - 1, K, B), by their position in the products."""
    last: Gather
    """What gathers the child of the last sum, (1, K, B)."""
    bank: str
    row: int
    """Where the weights are."""

    def scan(
        self,
        values: LayerValues,
        weights: Tensor,  # shape: (K, K)
        latents: Mapping[int, LatentFactors],
        silent: Mapping[int, Tensor],
    ) -> Scan | None:
        """Evaluate all steps; None where sums are too small for linear space.

        Args:
            values: of the layers below.
            weights: linear ones.
            latents: factors on the children of sums, by layer.
            silent: which sums are the constant 1, bool (1, 1, B), by layer; below a silent one all are.
        """
        leaves = self._factors(values, latents)
        evaluate = _by_halves if _is_small(weights, leaves) else _by_steps
        found = evaluate(weights, leaves, self._silent(silent))
        safe = smallest_safe_sum(weights.dtype, len(weights))
        return found if found.sums.numel() and bool(found.sums.min() >= safe) else None

    def climb(
        self,
        semiring: ChoosingSemiring,
        values: LayerValues,
        weights: Weights,
        latents: Mapping[int, LatentFactors],
        silent: Mapping[int, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return the first sum, (1, K, B), and what all sums mix, (T, K, B), up to a constant per step and column."""
        log, linear = weights.log[self.row : self.row + 1], weights.linear[self.row : self.row + 1]
        found = self.scan(values, linear[0], latents, silent) if isinstance(semiring, LogSemiring) else None
        if found is not None:
            return found.sums[:1].log().add_(found.log_scale[:1]), found.states.log()
        states = self._factors(values, latents)
        for step in reversed(range(len(states))):
            sums = semiring.contract(log, states[step : step + 1], weights=linear)
            if silent:
                sums = sums.masked_fill(silent[self.positions[step]], 0.0)
            if step:
                states[step - 1] += sums[0]
        return sums, states

    def choose(
        self,
        semiring: ChoosingSemiring,
        log_weights: Tensor,  # shape: (K, K)
        states: Tensor,  # shape: (T, K, B)
        units: list[Tensor],
        column: Tensor,  # shape: (n,)
        query: Tensor,  # shape: (n,)
        source_of: Callable[[int], Source],
    ) -> None:
        """Choose what every sum mixes in the columns where the first is reached; enter it and the leaves' units."""
        reached = units[self.positions[0]][0]
        chosen = reached.new_full((len(states), len(reached)), -1)
        for part in chunks(len(column), len(log_weights)):
            at, of = column[part], query[part]
            state = reached[at]
            for step, position in enumerate(self.positions):
                source = source_of(position)
                scores = log_weights[state].add_(states[step].t()[of])
                state = semiring.choose(scores, source.rows(part) if isinstance(source, RowGenerators) else source)
                chosen[step, at] = state
        for gather, states in (*((gather, chosen[:-1]) for gather in self.leaves), (self.last, chosen[-1:])):
            gather.reach(units, column, states[:, column])
        for position, states in zip(self.positions, chosen.split(1), strict=True):
            units[position] = states

    def silent_sums(
        self, silent: LayerValues, unless_heard: Callable[[int, Tensor], Tensor], touched: Collection[int]
    ) -> dict[int, Tensor]:
        """Return which sums are the constant 1, bool (1, 1, B), by layer; below a silent one all are.

        Args:
            silent: of which nodes of the layers below nothing is known, bool (F, 1, B).
            unless_heard: takes those nodes of a layer out that are not silent for another reason.
            touched: the layers for which it does something.
        """
        found = self._gathered(silent, torch.logical_and)
        for step, position in enumerate(self.positions if touched else ()):
            if position in touched:
                found[step] = unless_heard(position, found[step : step + 1])[0]
        found = found.flip(0).cumprod(0).flip(0).bool()
        return dict(zip(self.positions, found.split(1), strict=True))

    def adjoint(
        self, grad: Tensor, scan: Scan, weights: Tensor, silent: Mapping[int, Tensor], flows: Tensor | None
    ) -> Tensor:
        """Return the gradient of all steps' ``e_t + log y_t+1``, (T, K, B), and add that of the weights to ``flows``.

        Args:
            grad: of the first sum's logarithm, (K, B).
            scan: of :meth:`scan`.
            weights: linear ones, (K, K).
            silent: of :meth:`scan`.
            flows: the gradient of the linear weights of the bank, (P, K, K); None: not wanted.
        """
        descend = _adjoint_by_halves if _is_small(weights, scan.states) else _adjoint_by_steps
        scales, grads = descend(weights, scan, grad, self._silent(silent))
        if flows is not None:
            scales, states = (part.transpose(0, 1).flatten(1) for part in (scales, scan.states))
            flows[self.row].addmm_(scales, states.t())
        return grads

    def _gathered(self, values: LayerValues, times: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        every = functools.reduce(times, [gather(values) for gather in self.leaves])
        return torch.cat([every, self.last(values)])

    def _factors(self, values: LayerValues, latents: Mapping[int, LatentFactors]) -> Tensor:
        """Return the products of every step's leaves, (T, K, B), with the factors on what the sums mix."""
        leaves = self._gathered(values, torch.add)
        for step, position in enumerate(self.positions if latents else ()):
            if position in latents:
                leaves[step] += latents[position].log[0]
        return leaves

    def _silent(self, silent: Mapping[int, Tensor]) -> Tensor | None:
        return torch.cat([silent[position] for position in self.positions]) if silent else None

    def send(self, grads: Tensor, gradients: Gradients) -> None:
        """Send the gradient of the steps' states, (T, K, B), to the leaves."""
        for gather in self.leaves:
            gather.adjoint(grads[:-1], gradients)
        self.last.adjoint(grads[-1:], gradients)


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
        parts: list[Part] = [layer for _, layer in vars(self).get("layers", ())]
        for part in [*parts, self.chain] if self.chain else parts:
            part.move(function)


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
    bank, row = folding.bank_addresses[parameter_owner(sums[0])]
    inner = [*sums[1:], *(node.children[0] for node in sums[:-1])]
    return Chain(
        [addresses[node][0] for node in sums],
        sorted(addresses[node][0] for node in inner),
        [Gather([addresses[child] for child in column]) for column in zip(*leaves, strict=True)],
        Gather([addresses[sums[-1].children[0]]]),
        bank,
        row,
    )


def _is_small(weights: Tensor, states: Tensor) -> bool:
    return weights.numel() * len(weights) * states.shape[2] <= _FEW_PRODUCTS


def _by_steps(weights: Tensor, leaves: Tensor, silent: Tensor | None) -> Scan:
    """Evaluate one step after the other, from the last to the first."""
    peak = column_peak(leaves)
    states = torch.sub(leaves, peak).exp_()
    sums, scale = torch.empty_like(states), torch.empty_like(peak)
    for step in reversed(range(len(states))):
        torch.mm(weights, states[step], out=sums[step])
        if silent is not None:
            sums[step].masked_fill_(silent[step], 1.0)
        torch.amax(sums[step], 0, keepdim=True, out=scale[step])
        if step:
            states[step - 1].mul_(sums[step]).div_(scale[step])
    peak[:-1] += scale[1:].log()
    return Scan(states, sums, peak.flip(0).cumsum(0).flip(0))


def _adjoint_by_steps(weights: Tensor, scan: Scan, grad: Tensor, silent: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradients of all sums over these sums, and of the logarithms of all states, (T, K, B) each."""
    scales, grads = torch.empty_like(scan.sums), torch.empty_like(scan.sums)
    table = weights.t()
    for step in range(len(grads)):
        torch.div(grad, scan.sums[step], out=scales[step])
        if silent is not None:
            scales[step].masked_fill_(silent[step], 0.0)
        grad = torch.mm(table, scales[step], out=grads[step]).mul_(scan.states[step])
    return scales, grads


def _by_halves(weights: Tensor, leaves: Tensor, silent: Tensor | None) -> Scan:
    """Evaluate all steps by products of neighbouring ones."""
    peak = column_peak(leaves)
    factors = torch.sub(leaves, peak).exp_().permute(0, 2, 1)  # (T, B, K)
    start = factors.new_ones(factors.shape[1:])
    steps = weights * factors.unsqueeze(2)  # (T, B, K, K)
    if silent is not None:
        steps = torch.where(silent.permute(0, 2, 1).unsqueeze(3), torch.eye(len(weights)).to(weights), steps)
    before, after, log_scale = recurrence(steps.flip(0), start, rescale=True)
    lost = peak.flip(0).cumsum(0) + log_scale.unsqueeze(1)
    states = factors * before.flip(0)
    return Scan(states.permute(0, 2, 1), after.flip(0).permute(0, 2, 1), lost.flip(0))


def _adjoint_by_halves(weights: Tensor, scan: Scan, grad: Tensor, silent: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what :func:`_adjoint_by_steps` does; a step's matrix is how probable a state is given the one before."""
    states, sums = scan.states.permute(0, 2, 1), scan.sums.permute(0, 2, 1)
    steps = states.unsqueeze(3) * weights.t() / sums.unsqueeze(2)  # (T, B, K, K)
    if silent is not None:
        steps = steps.masked_fill(silent.permute(0, 2, 1).unsqueeze(3), 0.0)
    before, after, _ = recurrence(steps, grad.t(), rescale=False)
    scales = (before / sums).permute(0, 2, 1)
    return scales if silent is None else scales.masked_fill(silent, 0.0), after.permute(0, 2, 1)


def recurrence(
    steps: Tensor,  # shape: (T, B, K, K)
    start: Tensor,  # shape: (B, K)
    *,
    rescale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what goes into and comes out of every step of ``v_t+1 = M_t v_t``, with about log2 T batched products.

    Returns:
        Vectors before and after the steps, (T, B, K) each, over the exponential of a log-scale, (T, B), which is 0
        unless ``rescale`` keeps the vectors before a step at a maximum of 1.
    """
    matrices, logs = steps, start.new_zeros(steps.shape[:2])
    levels = []
    while len(matrices) > 1:
        if len(matrices) % 2:
            identity = torch.eye(steps.shape[-1], dtype=steps.dtype, device=steps.device)
            matrices = torch.cat([matrices, identity.expand_as(matrices[:1])])
            logs = torch.cat([logs, torch.zeros_like(logs[:1])])
        levels.append((matrices[0::2], logs[0::2]))
        matrices, logs = matrices[1::2] @ matrices[0::2], logs[0::2] + logs[1::2]
        if rescale:
            peak = matrices.amax((2, 3), keepdim=True)
            matrices, logs = matrices / peak, logs + peak[..., 0, 0].log()
    vectors, scale = start.unsqueeze(0), torch.zeros_like(logs[:1])
    for left, left_log in reversed(levels):
        vectors, scale = vectors[: len(left)], scale[: len(left)]
        middle, log = (left @ vectors.unsqueeze(-1)).squeeze(-1), scale + left_log
        if rescale:
            peak = middle.amax(-1, keepdim=True)
            middle, log = middle / peak, log + peak.squeeze(-1).log()
        vectors = torch.stack([vectors, middle], 1).flatten(0, 1)
        scale = torch.stack([scale, log], 1).flatten(0, 1)
    vectors, scale = vectors[: len(steps)], scale[: len(steps)]
    return vectors, (steps @ vectors.unsqueeze(-1)).squeeze(-1), scale
