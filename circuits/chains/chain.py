"""Chains of equal steps, as in a homogeneous HMM: many sum layers evaluated as one recurrence.

Sum t mixes the product of leaves e_t and sum t + 1, by weights that all share. Layer by layer that is a few dozen calls
a step. Here the states are kept in linear space, over one scale per step and column (Rabiner 1989, section V.A), so
that a step is a GEMM, a maximum, a product and a division. With few states and columns even one call a step is too
much: then neighbouring steps' matrices are multiplied, all pairs at once, and the vectors between them follow (a
parallel scan, Blelloch 1990). Where sums are too small for linear space the chain is evaluated layer by layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from circuits.algebra.logspace import column_peak, smallest_safe_sum
from circuits.algebra.semirings import ChoosingSemiring, LogSemiring
from circuits.randomness import RowGenerators, Source
from circuits.weights.latents import LatentFactors

_FEW_PRODUCTS = 1 << 12
_MAX_SCORES = 1 << 24

Values = Mapping[int, Tensor] | Sequence[Tensor]
"""Values (F, K, B) of layers, by layer."""


class Children(Protocol):
    """What finds one child of every step among the values of the layers below."""

    def __call__(self, values: Values, /) -> Tensor:
        """Return the children's values, (T, K, B)."""

    def adjoint(self, grad: Tensor, gradients: Any, /) -> None:
        """Send their gradient back to where they came from."""

    def reach(self, units: list[Tensor], columns: Tensor, chosen: Tensor, /) -> None:
        """Enter which of their units are chosen in some columns, (T, n)."""

    def move(self, function: Callable[[Tensor], Tensor], /) -> None:
        """Apply what ``nn.Module.to`` applies to the tensors of a module."""


class Tables(Protocol):
    """The weights of a bank, (P, K, K)."""

    @property
    def log(self) -> Tensor:
        """Their logarithms."""

    @property
    def linear(self) -> Tensor:
        """Themselves."""


class Scan(NamedTuple):
    """The recurrence of a chain of T steps: ``sums[t] = W states[t]``, in linear space."""

    states: Tensor
    """exp(e_t + log y_t+1) over a scale, at most 1: (T, K, B)."""
    sums: Tensor
    """(T, K, B)."""
    log_scale: Tensor
    """What ``log sums`` lacks to be log y_t: (T, 1, B)."""


@dataclass(frozen=True, eq=False)
class Chain:
    """T sums, one in each of their layers, that share their weights, and the products between them."""

    positions: Sequence[int]
    """The layers of the sums, the first sum's first."""
    inside: Sequence[int]
    """The layers that nothing but the chain reads, in the order in which they are evaluated."""
    leaves: Sequence[Children]
    """What gathers the leaves of all steps but the last, (T - 1, K, B), by their position in the products."""
    last: Children
    """What gathers the child of the last sum, (1, K, B)."""
    bank: str
    row: int
    """Where the weights are."""

    def scan(
        self,
        values: Values,
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
        return scan(weights, self._factors(values, latents), self._silent(silent))

    def climb(
        self,
        semiring: ChoosingSemiring,
        values: Values,
        weights: Tables,
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
        size, by_column = max(1, _MAX_SCORES // len(log_weights)), states.mT.contiguous()
        for number, (at, of) in enumerate(zip(column.split(size), query.split(size), strict=True)):
            part = slice(number * size, number * size + len(at))
            state = reached[at]
            for step, position in enumerate(self.positions):
                source = source_of(position)
                scores = log_weights[state].add_(by_column[step][of])
                state = semiring.choose(scores, source.rows(part) if isinstance(source, RowGenerators) else source)
                chosen[step, at] = state
        for gather, states in (*((gather, chosen[:-1]) for gather in self.leaves), (self.last, chosen[-1:])):
            gather.reach(units, column, states[:, column])
        for position, states in zip(self.positions, chosen.split(1), strict=True):
            units[position] = states

    def silent_sums(
        self, silent: Values, unless_heard: Callable[[int, Tensor], Tensor], touched: Collection[int]
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
        self, grad: Tensor, found: Scan, weights: Tensor, silent: Mapping[int, Tensor], flows: Tensor | None
    ) -> Tensor:
        """Return the gradient of all steps' ``e_t + log y_t+1``, (T, K, B), and add that of the weights to ``flows``.

        Args:
            grad: of the first sum's logarithm, (K, B).
            found: of :meth:`scan`.
            weights: linear ones, (K, K).
            silent: of :meth:`scan`.
            flows: the gradient of the linear weights of the bank, (P, K, K); None: not wanted.
        """
        scales, grads = scan_adjoint(weights, found, grad, self._silent(silent))
        if flows is not None:
            scales, states = (part.transpose(0, 1).flatten(1) for part in (scales, found.states))
            flows[self.row].addmm_(scales, states.t())
        return grads

    def _gathered(self, values: Values, times: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        every = functools.reduce(times, [gather(values) for gather in self.leaves])
        return torch.cat([every, self.last(values)])

    def _factors(self, values: Values, latents: Mapping[int, LatentFactors]) -> Tensor:
        """Return the products of every step's leaves, (T, K, B), with the factors on what the sums mix."""
        leaves = self._gathered(values, torch.add)
        for step, position in enumerate(self.positions if latents else ()):
            if position in latents:
                leaves[step] += latents[position].log[0]
        return leaves

    def _silent(self, silent: Mapping[int, Tensor]) -> Tensor | None:
        return torch.cat([silent[position] for position in self.positions]) if silent else None

    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply what ``nn.Module.to`` applies to the tensors of a module."""
        for part in (*self.leaves, self.last):
            part.move(function)

    def send(self, grads: Tensor, gradients: Any) -> None:
        """Send the gradient of the steps' states, (T, K, B), to the leaves."""
        for gather in self.leaves:
            gather.adjoint(grads[:-1], gradients)
        self.last.adjoint(grads[-1:], gradients)


def scan(
    weights: Tensor,  # shape: (K, K)
    leaves: Tensor,  # shape: (T, K, B)
    silent: Tensor | None,  # shape: (T, 1, B)
) -> Scan | None:
    """Evaluate all steps; None where some sum is so small that terms that underflow could count.

    Args:
        weights: linear ones.
        leaves: e_t.
        silent: at which steps y_t is the constant 1; then it is at all later ones too.
    """
    evaluate = _by_halves if _is_small(weights, leaves) else _by_steps
    safe, peak = smallest_safe_sum(weights.dtype, len(weights)), column_peak(leaves)
    found = evaluate(weights, torch.sub(leaves, peak).exp_(), peak, silent)
    return found if found.sums.numel() and bool(found.sums.min() >= safe) else None


def scan_adjoint(weights: Tensor, found: Scan, grad: Tensor, silent: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradients of all sums over these sums, and of the logarithms of all states, (T, K, B) each.

    Args:
        weights: of :func:`scan`.
        found: what it returned.
        grad: of log y_0, (K, B).
        silent: of :func:`scan`.
    """
    descend = _adjoint_by_halves if _is_small(weights, found.states) else _adjoint_by_steps
    return descend(weights, found, grad, silent)


def _is_small(weights: Tensor, states: Tensor) -> bool:
    return weights.numel() * len(weights) * states.shape[2] <= _FEW_PRODUCTS


def _by_steps(weights: Tensor, states: Tensor, peak: Tensor, silent: Tensor | None) -> Scan:
    """Evaluate one step after the other, from the last to the first, in place of the leaves over their peaks."""
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


def _by_halves(weights: Tensor, leaves: Tensor, peak: Tensor, silent: Tensor | None) -> Scan:
    """Evaluate all steps by products of neighbouring ones, from the leaves over their peaks."""
    factors = leaves.permute(0, 2, 1)  # (T, B, K)
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
