"""Chains whose weights are given at run time, as one recurrence in linear space, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuits.algebra.logspace import column_peak, smallest_safe_sum
from circuits.algebra.semirings import LogSemiring
from circuits.chains.maps import Map, Maps, Steps, Wanted, grouped
from circuits.chains.recurrence import calls_for, run
from circuits.precision import own_precision
from circuits.weights.forms import JoinedWeights

_EVERY = {torch.float32: 4, torch.float64: 16}
"""States are divided by their maximum every so many steps, and in each where that turns out to be too seldom."""


def mixed(weights: Sequence[JoinedWeights], leaves: Tensor, silent: Tensor | None) -> Tensor | None:
    """Return the first sum of a chain, (1, K, B), differentiable twice; None where it takes other ways.

    Args:
        weights: of every sum; their scales are left out.
        leaves: e_t, (T, K, B): the first factors of what the sums mix.
        silent: at which steps y_t is the constant 1, bool (T, 1, B); then it is at all later ones too.

    Returns:
        None where weights are of a kind that has no maps, or some sum is so small that terms that underflow could
        count.
    """
    groups = grouped(weights)
    if groups is None or not leaves.numel():
        return None
    with torch.no_grad():
        found = _Run(weights, groups, leaves.detach(), silent)
        if not found.is_safe:
            return None
        first = found.results[:1].log().add_(found.log_scale)
    unique = list({id(tensor): tensor for one in weights for tensor in one.tensors}.values())
    first = _Mixed.apply(found, unique, first, leaves, *unique)
    return first


class _Run:
    """All steps, from the last to the first."""

    def __init__(
        self,
        weights: Sequence[JoinedWeights],
        groups: Sequence[tuple[type[Maps], list[int]]],
        leaves: Tensor,
        silent: Tensor | None,
    ) -> None:
        calls, batch_size = calls_for(leaves), leaves.shape[2]
        self.weights, self.silent = weights, silent
        self.groups = [(kind([weights[step] for step in steps], calls, batch_size), steps) for kind, steps in groups]
        self.calls = calls._replace(mix=_next_map)
        ups = self._by_step(lambda maps, number, _: maps.up(number))
        peak, safe = column_peak(leaves), smallest_safe_sum(leaves.dtype, leaves.shape[1])
        offsets = None if silent is None else silent.to(leaves.dtype)
        for every in (_EVERY[leaves.dtype], 1):
            self.states = torch.sub(leaves, peak).exp_()
            if silent is not None:
                self.states.masked_fill_(silent, 0.0)
            self.results, scales = torch.empty_like(self.states), torch.ones_like(peak)
            parts = [self.states, self.states, self.results, scales, *([] if offsets is None else [offsets])]
            start = torch.ones_like(self.states[0])
            with np.errstate(all="ignore"):
                run(self.calls, iter(ups[::-1]), parts, start, every=every, backwards=True)
            self.is_safe = bool(self.results.min() >= safe)
            if self.is_safe:
                break
        if silent is not None:
            self.states.masked_fill_(silent, 1.0)
        self.log_scale = peak.add_(scales.log()).sum(0, keepdim=True)

    def gradients(self, grad: Tensor, wanted: Wanted) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return the gradient of the leaves, (T, K, B), and those of the weights' tensors, from log y_0's, (K, B)."""
        scales = torch.empty_like(self.states)
        torch.div(self.states[:-1], self.results[1:], out=scales[1:])
        scales[0] = 1.0
        if self.silent is not None:
            scales.masked_fill_(self.silent, 0.0)
        grads = torch.empty_like(scales)
        downs = self._by_step(lambda maps, number, step: maps.down(number, self.states[step], wanted))
        with np.errstate(all="ignore"):
            run(self.calls, iter(downs), (scales, scales, grads), grad / self.results[0])
        found: list[tuple[Tensor, Tensor]] = []
        for maps, steps in self.groups:
            every = (self.states, self.results, scales)
            here = every if len(steps) == len(scales) else (part[steps] for part in every)
            found += maps.gradients(Steps(*here), wanted)
        return grads.mul_(self.states), found

    def _by_step(self, make: Any) -> list[Map]:
        made: list[Any] = [None] * len(self.weights)
        for maps, steps in self.groups:
            for number, step in enumerate(steps):
                made[step] = make(maps, number, step)
        return made

    def replayed(self, leaves: Tensor, tensors: dict[int, Tensor]) -> Tensor:
        """Return the first sum of other tensors, by operations that autograd can follow; as the layers would."""
        first = None
        for step in reversed(range(len(leaves))):
            weights = self.weights[step].with_tensors([tensors[id(tensor)] for tensor in self.weights[step].tensors])
            state = leaves[step : step + 1]
            first = weights.unscaled().contract(LogSemiring(), state if first is None else state + first)
            if self.silent is not None:
                first = torch.where(self.silent[step], 0.0, first)
        assert first is not None
        return first


def _next_map(maps: Any, x: Any, out: Any) -> None:
    next(maps)(x, out)


class _Mixed(torch.autograd.Function):
    """The first sum's logarithm of a run, (1, K, B), as a function of the leaves and all tensors of the weights."""

    @staticmethod
    def forward(ctx: Any, found: _Run, unique: Sequence[Tensor], first: Tensor, *tensors: Tensor) -> Tensor:
        ctx.found, ctx.numbers = found, {id(tensor): number for number, tensor in enumerate(unique)}
        ctx.save_for_backward(*tensors)
        return first.clone()

    @staticmethod
    @own_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed, saved = ctx.needs_input_grad[3:], ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = [tensor.view_as(tensor) for tensor in saved]  # some are made of each other: gradients stop here
            first = ctx.found.replayed(inputs[0], {key: inputs[1 + number] for key, number in ctx.numbers.items()})
            wanted = [tensor for tensor, is_needed in zip(inputs, needed, strict=True) if is_needed]
            grads = iter(torch.autograd.grad(first, wanted, grad, create_graph=True, allow_unused=True))
            return None, None, None, *(next(grads) if is_needed else None for is_needed in needed)
        leaves, parts = ctx.found.gradients(grad[0], lambda tensor: needed[1 + ctx.numbers[id(tensor)]])
        out: list[Tensor | None] = [leaves if needed[0] else None, *[None] * (len(needed) - 1)]
        for tensor, part in parts:
            number = 1 + ctx.numbers[id(tensor)]
            before = out[number]
            out[number] = part if before is None else before + part
        return None, None, None, *out
