"""Chains whose weights are given at run time, as one recurrence in linear space, and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from circuits.algebra.semirings import LogSemiring
from circuits.chains.calls import Map
from circuits.chains.maps import Groups, Maps, Steps, Wanted, grouped
from circuits.chains.recurrence import Rise, Scan, calls_for, fall, scan
from circuits.precision import own_precision
from circuits.weights.forms import JoinedWeights


def mixed(weights: Sequence[JoinedWeights], leaves: Tensor, silent: Tensor | None, *, keep: bool) -> Scan | None:
    """Evaluate all steps of a chain; the first sum, (1, K, B), is differentiable twice.

    Args:
        weights: of every sum; their scales are left out.
        leaves: e_t, (T, K, B): the first factors of what the sums mix.
        silent: at which steps y_t is the constant 1, bool (T, 1, B); then it is at all later ones too.
        keep: whether all steps are wanted, beside those for the gradient.

    Returns:
        None where weights are of a kind that has no maps, or some sum is so small that terms that underflow could
        count.
    """
    groups = grouped(weights)
    if groups is None or not leaves.numel():
        return None
    keep = keep or torch.is_grad_enabled()
    with torch.no_grad():
        run = _Run(weights, groups, leaves.detach(), silent)
        found = scan(run.by_step(lambda maps, number, _: maps.up(number)), leaves.detach(), silent, keep=keep)
    if found is None:
        return None
    run.rise = found.rise
    unique = list({id(tensor): tensor for one in weights for tensor in one.tensors}.values())
    return found._replace(first=_Mixed.apply(run, unique, found.first, leaves, *unique))


class _Run:
    """All steps of a chain."""

    def __init__(self, weights: Sequence[JoinedWeights], groups: Groups, leaves: Tensor, silent: Tensor | None) -> None:
        calls, batch_size = calls_for(leaves), leaves.shape[2]
        self.weights, self.silent = weights, silent
        self.groups = [(kind([weights[step] for step in steps], calls, batch_size), steps) for kind, steps in groups]
        self.rise: Rise | None = None

    def gradients(self, grad: Tensor, wanted: Wanted) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return the gradient of the leaves, (T, K, B), and those of the weights' tensors, from log y_0's, (K, B)."""
        assert self.rise is not None
        states, results = self.rise.states, self.rise.results
        downs = self.by_step(lambda maps, number, step: maps.down(number, states[step], wanted))
        scales = torch.empty_like(states)
        grads = fall(downs, self.rise, grad, self.silent, scales.__setitem__)
        found: list[tuple[Tensor, Tensor]] = []
        for maps, steps in self.groups:
            every = (states, results, scales)
            here = every if len(steps) == len(scales) else (torch.stack([part[n] for n in steps]) for part in every)
            found += maps.gradients(Steps(*here), wanted)
        return grads, found

    def by_step(self, make: Callable[[Maps, int, int], Map]) -> list[Map]:
        """Return what mixes in every step, made of its maps, its number among theirs, and its number."""
        made = {step: make(maps, number, step) for maps, steps in self.groups for number, step in enumerate(steps)}
        return [made[step] for step in range(len(made))]

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


class _Mixed(torch.autograd.Function):
    """The first sum's logarithm of a run, (1, K, B), as a function of the leaves and all tensors of the weights."""

    @staticmethod
    def forward(ctx: Any, run: _Run, unique: Sequence[Tensor], first: Tensor, *tensors: Tensor) -> Tensor:
        ctx.run, ctx.numbers = run, {id(tensor): number for number, tensor in enumerate(unique)}
        ctx.save_for_backward(*tensors)
        return first.clone()

    @staticmethod
    @own_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed, saved = ctx.needs_input_grad[3:], ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = [tensor.view_as(tensor) for tensor in saved]  # some are made of each other: gradients stop here
            first = ctx.run.replayed(inputs[0], {key: inputs[1 + number] for key, number in ctx.numbers.items()})
            wanted = [tensor for tensor, is_needed in zip(inputs, needed, strict=True) if is_needed]
            grads = iter(torch.autograd.grad(first, wanted, grad, create_graph=True, allow_unused=True))
            return None, None, None, *(next(grads) if is_needed else None for is_needed in needed)
        leaves, parts = ctx.run.gradients(grad[0], lambda tensor: needed[1 + ctx.numbers[id(tensor)]])
        out: list[Tensor | None] = [leaves if needed[0] else None, *[None] * (len(needed) - 1)]
        for tensor, part in parts:
            number = 1 + ctx.numbers[id(tensor)]
            before = out[number]
            out[number] = part if before is None else before + part
        return None, None, None, *out
