"""Recurrences ``y_t = W (f_t y_t+1)`` in a semiring, in as few and as cheap calls as there are.

A small step costs what its calls cost: on a CPU these are NumPy's, which take a third of the time of PyTorch's, on the
same memory. With few states and columns even one call a step is too much: then blocks of steps are evaluated side by
side, first as matrices and, once the vectors between the blocks are known, as vectors (a parallel scan, Blelloch 1990).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from circuits.algebra.logspace import column_peak, smallest_safe_sum
from circuits.chains.blocks import beside, maps_of, vectors_between, write_apart
from circuits.chains.calls import MAX_LARGE, MAX_MANY, MAX_SMALL, SUM_LARGE, SUM_SMALL, Calls, Map, as_array

_FEW_PRODUCTS, _MANY_STEPS = 1 << 10, 128
"""Blocks: with up to so many products in a step of the matrices of all columns, from so many steps on."""
_LEAST_LENGTH, _STEP = 8, 2000
"""Such blocks have a multiple of so many steps; the calls of a step cost about as much as so many products."""
_FEW_NUMBERS, _FEW_COLUMNS, _NUM_GUESSED, _CHUNK = 1 << 7, 1 << 13, 8, 16
"""Guesses: up to so many numbers, and so many products, in a step; so many blocks; compared every so many steps."""
_ROUNDING = 16
"""What the vectors between blocks may change by, in multiples of the machine's precision."""
_MANY_STATES = 16
_SMALL_STEP, _SMALL_MAXIMUM = 1 << 18, 1 << 14
"""NumPy: up to so many products in a step, which its libraries leave to one thread; else PyTorch and its threads."""


EVERY = {torch.float32: 4, torch.float64: 16}
"""States are divided by their maximum every so many steps, and in each where that turns out to be too seldom."""


class Rise(NamedTuple):
    """All steps of a recurrence, from the last to the first."""

    states: Tensor
    """f_t y_t+1, (T, K, B), over the scales of this step and of all later ones."""
    results: Tensor
    """y_t, (T, K, B), over the same scales."""
    scales: Tensor
    """(T, 1, B)."""
    maps: Tensor | None
    """Makes the first result of a block of that of the next block, but for a factor: (K, K, B, blocks), by output and
    input."""


def are_few(states: Tensor, *, calls: int = 1) -> bool:
    """Whether the states (T, K, B) are so few that a step's matrices are cheaper than its calls, or so many of them."""
    products = states.shape[1] ** 3 * states.shape[2]
    return 0 < products <= calls * _FEW_PRODUCTS and len(states) >= _MANY_STEPS


def _block_length(states: Tensor) -> int:
    """Return how long blocks are for which both their steps and the products of their matrices are cheap."""
    num_products = states.shape[0] * states.shape[1] ** 3 * states.shape[2]
    return max(1, math.isqrt(num_products // _STEP) // _LEAST_LENGTH) * _LEAST_LENGTH


class Scan(NamedTuple):
    """A chain of T steps, evaluated in linear space."""

    first: Tensor
    """The logarithm of the first sum, (1, K, B)."""
    rise: Rise
    """All steps."""


def scan(
    weights: Tensor | Sequence[Map],  # shape: (K, K)
    leaves: Tensor,  # shape: (T, K, B)
    silent: Tensor | None,  # shape: (T, 1, B)
) -> Scan | None:
    """Evaluate all steps; None where some sum is so small that terms that underflow could count.

    Args:
        weights: linear ones; or what mixes in every step.
        leaves: e_t.
        silent: at which steps y_t is the constant 1; then it is at all later ones too.
    """
    peak, seldom = column_peak(leaves), EVERY[leaves.dtype]
    for every, in_blocks in ((seldom, True), (seldom, False), (1, False)):
        if in_blocks and not (isinstance(weights, Tensor) and are_few(leaves)):
            continue
        factors = without(peak, leaves).exp_()
        found = rise_of_sums(weights, factors, silent, every=every, in_blocks=in_blocks)
        if found is not None:
            log_scale = peak.add_(found.scales.log()).sum(0, keepdim=True)
            return Scan(found.results[:1].log().add_(log_scale), found)
    return None


def without(peak: Tensor, states: Tensor) -> Tensor:
    """Subtract their maxima from states, (T, K, B), which may lie in memory in any order; the result does not."""
    return torch.sub(states, peak, out=torch.empty(states.shape, dtype=states.dtype, device=states.device))


def rise_of_sums(
    weights: Tensor | Sequence[Map],  # shape: (K, K)
    factors: Tensor,  # shape: (T, K, B)
    silent: Tensor | None,  # shape: (T, 1, B)
    *,
    every: int,
    in_blocks: bool,
) -> Rise | None:
    """Evaluate ``y_t = W (f_t y_t+1)`` from ``y_T = 1``; None where something that underflowed could count.

    Args:
        weights: W; or what mixes in every step.
        factors: f_t; they are overwritten.
        silent: where y_t is 1, there and at all later steps.
        every: states are divided by their maximum every so many steps.
        in_blocks: whether blocks of steps are evaluated side by side.
    """
    if not factors.numel():
        return None
    calls, offsets = calls_for(factors), None
    if silent is not None:
        factors.masked_fill_(silent, 0.0)
        offsets = silent.to(factors.dtype)
    with np.errstate(all="ignore"):
        if isinstance(weights, Tensor):
            found = _rise(calls, weights, factors, offsets, every=every, in_blocks=in_blocks)
        else:
            found = _step_by_step(calls.by_step, reversed(weights), factors, offsets, every=every)
    safe = smallest_safe_sum(factors.dtype, factors.shape[1])
    if found is None or not bool(found.results.min() >= safe):
        return None
    if silent is not None:
        found.states.masked_fill_(silent, 1.0)
    return found


def rise_of_maxima(log_weights: Tensor, factors: Tensor, silent: Tensor | None, *, every: int = 0) -> Rise:
    """Evaluate ``y_t = max_i (log w_oi + f_t + y_t+1)`` from ``y_T = 0``; as :func:`rise_of_sums`, in log space.

    Where nothing is possible the result is -inf; NaN if ``every`` is not 0, as differences of maxima are computed then.
    """
    calls, matrix, offsets, in_blocks = MAX_LARGE, log_weights, None, are_few(factors, calls=2)
    if _is_small(factors, _SMALL_MAXIMUM):
        is_many = factors.shape[1] >= _MANY_STATES and not in_blocks
        calls, matrix = (
            MAX_MANY if is_many else MAX_SMALL,
            log_weights.t().unsqueeze(1 if is_many else 2).contiguous(),
        )
    if silent is not None:  # logarithms of weights are at most 0
        offsets = torch.full_like(silent, -math.inf, dtype=factors.dtype).masked_fill_(silent, 0.0)
    with np.errstate(invalid="ignore"):
        found = _rise(calls, matrix, factors, offsets, every=every, in_blocks=in_blocks)
    assert found is not None
    return found


def fall(transposed: Tensor | Sequence[Map], found: Rise, grad: Tensor, silent: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradients of all sums over these sums, and those of the logarithms of all states, (T, K, B) each.

    The first one is ``g_t = r_t (W^T g_t-1)`` with ``r_t = x_t-1 / y_t`` of the states x: the recurrence once more.

    Args:
        transposed: W^T, or what multiplies by it in every step.
        found: what :func:`rise_of_sums` returned.
        grad: of log y_0, (K, B).
        silent: of :func:`rise_of_sums`.
    """
    states, results, maps = found.states, found.results, found.maps
    length = _block_length(states)
    end = 0 if maps is None else len(states) // length * length
    calls = calls_for(states)
    table: Any = iter(transposed)
    if isinstance(transposed, Tensor):
        table = calls.view(transposed.contiguous())
    else:
        calls = calls.by_step
    ratios, start = torch.empty_like(states), grad / results[0]
    torch.div(states[:-1], results[1:], out=ratios[1:])
    ratios[:end:length] = 1.0  # here it goes on from vectors g
    ratios[end : end + 1] = 1.0
    if silent is not None:
        ratios.masked_fill_(silent, 0.0)
    grads = torch.empty_like(states)
    with np.errstate(all="ignore"):
        if maps is not None:
            firsts = torch.cat(
                [results[:end:length], results[end : end + 1] if end < len(states) else torch.ones_like(results[:1])]
            )
            mapped = (maps * firsts[1:].permute(1, 2, 0)).sum((0, 1))
            maps = maps.transpose(0, 1) * (firsts[:-1].sum(1).t() / mapped)
            between = vectors_between(calls, maps, start, is_scaled=False)
            columns = beside(ratios[:end], length)
            made = torch.empty_like(columns)
            run(calls, table, (columns, columns, made), between[:, :, :-1].flatten(1))
            write_apart(ratios[:end], columns)
            write_apart(grads[:end], made)
            start = between[:, :, -1]
        run(calls, table, (ratios[end:], ratios[end:], grads[end:]), start)
    return ratios, grads.mul_(states)


def best_path(log_weights: Tensor, states: Tensor, first: Tensor) -> Tensor:
    """Return the best of what all sums mix, int64 (T, n), where the first one is at ``first``, (n,); on a CPU.

    Args:
        log_weights: log w, (K, K).
        states: what the sums mix, of :func:`rise_of_maxima`, (T, K, n).
        first: which unit of the first sum is used.
    """
    num_steps, size, num_columns = states.shape
    chosen = np.empty((num_steps, num_columns), np.int64)
    if are_few(states):  # all units' choices at once, as flat indices, so that following them is one call a step
        columns = torch.arange(num_columns)
        followers = (log_weights.unsqueeze(2) + states.unsqueeze(1)).max(2).indices * num_columns + columns
        if num_columns == 1:  # lists are faster than arrays of one number
            states_of, state = followers[..., 0].tolist(), int(first)
            return torch.tensor([[state := follower[state]] for follower in states_of])
        at = (first * num_columns + columns).numpy()
        for follower, there in zip(followers.numpy(), chosen, strict=True):
            follower.take(at, None, there, "clip")
            at = there
        return torch.from_numpy(chosen).div_(num_columns, rounding_mode="floor")
    table, scores, at = as_array(log_weights), np.empty((num_columns, size), as_array(states).dtype), first.numpy()
    for state, there in zip(as_array(states.mT.contiguous()), chosen, strict=True):
        table.take(at, 0, scores, "clip")
        np.add(scores, state, out=scores)
        scores.argmax(1, there)
        at = there
    return torch.from_numpy(chosen)


def calls_for(states: Tensor) -> Calls:
    """Return the calls that make sums of states (T, K, B)."""
    return SUM_SMALL if _is_small(states, _SMALL_STEP) else SUM_LARGE


def _is_small(states: Tensor, bound: int) -> bool:
    return states.device.type == "cpu" and states.shape[1] ** 2 * states.shape[2] <= bound


def _rise(
    calls: Calls, matrix: Tensor, factors: Tensor, offsets: Tensor | None, *, every: int, in_blocks: bool
) -> Rise | None:
    """Evaluate ``y_t = W (f_t y_t+1) plus o_t``, perhaps in place of the factors; None where blocks do not fit."""
    table = calls.view(matrix)
    is_thin = _is_small(factors, _FEW_COLUMNS) and factors[0].numel() <= _FEW_NUMBERS
    if in_blocks or (is_thin and len(factors) >= 4 * _NUM_GUESSED * _CHUNK):
        found = _side_by_side(calls, table, factors, offsets, every=every, by_maps=in_blocks)
        if found is not None or in_blocks:
            return found
    return _step_by_step(calls, table, factors, offsets, every=every)


def _step_by_step(calls: Calls, table: Any, factors: Tensor, offsets: Tensor | None, *, every: int) -> Rise:
    results, scales = torch.empty_like(factors), torch.full_like(factors[:, :1], calls.one)
    parts = (factors, factors, results, scales, *(() if offsets is None else (offsets,)))
    run(calls, table, parts, torch.full_like(factors[0], calls.one), every=every, backwards=True)
    return Rise(factors, results, scales, None)


def _side_by_side(
    calls: Calls, table: Any, factors: Tensor, offsets: Tensor | None, *, every: int, by_maps: bool
) -> Rise | None:
    """Evaluate blocks of steps side by side, from what their maps or guesses say is between them; None: that is wrong.

    Such recurrences forget where they came from, up to a factor (Maleki, Musuvathi and Mytkowicz 2014, "Parallelizing
    dynamic programming through rank convergence"). So blocks begin once more, from what guesses have made of the block
    before, until nothing but a factor changes; that is exact, as no step makes differences greater.
    """
    length = _block_length(factors) if by_maps else factors.shape[0] // _NUM_GUESSED
    count, maps = factors.shape[0] // length, None
    end, (num_steps, size, batch_size) = count * length, factors.shape
    states, results = torch.empty_like(factors), torch.empty_like(factors)
    scales, start = torch.full_like(factors[:, :1], calls.one), torch.full_like(factors[0], calls.one)
    parts = (factors, states, results, scales, *(() if offsets is None else (offsets,)))
    if end < num_steps:
        run(calls, table, [part[end:] for part in parts], start, every=every, backwards=True)
        start = results[end]
    of_blocks = beside(factors[:end], length)
    columns = [of_blocks, torch.empty_like(of_blocks), torch.empty_like(of_blocks), beside(scales[:end], length)]
    columns += [beside(part[:end], length) for part in parts[4:]]
    if by_maps:
        maps = maps_of(calls, table, of_blocks, *columns[4:], every=every, batch_size=batch_size)
        guess = vectors_between(calls, maps.flip(3), start, is_scaled=every > 0).flip(2)[:, :, 1:].reshape(size, -1)
    else:
        guess = start.repeat_interleave(count, 1)
    run(calls, table, columns, guess, every=every, backwards=True)
    firsts = columns[2][0].view(size, batch_size, count)
    before, later = torch.cat([firsts[:, :, 1:], start.unsqueeze(2)], 2).view(size, -1), length
    is_exact = by_maps and not calls.are_sums  # no logarithm underflows
    if is_exact and every:
        columns[3][length - 1] += before.amax(0) - guess.amax(0)
    while not (is_exact or _fits(calls, before, guess, columns[3][later - 1])):
        later -= _CHUNK
        if by_maps or later <= 0:
            return None
        guess = columns[2][later].clone()
        run(calls, table, [part[later : later + _CHUNK] for part in columns], before, every=every, backwards=True)
        before = columns[2][later]
    for whole, part in zip(parts[1:4], columns[1:4], strict=True):
        write_apart(whole[:end], part)
    return Rise(states, results, scales, maps)


def _fits(calls: Calls, vectors: Tensor, guess: Tensor, scale: Tensor) -> bool:
    """Whether vectors (K, C) are a guess but for factors; scale what was computed from it, over ``scale``, by these."""
    found, guessed, scales = map(calls.view, (vectors, guess, scale))
    change = calls.divide(found, guessed)
    most, least = calls.peak(change, axis=0), -calls.peak(-change, axis=0)
    size = least if calls.are_sums else calls.peak(abs(found), axis=0) + 1
    rounding = _ROUNDING * torch.finfo(vectors.dtype).eps
    if not bool(((most - least <= rounding * size) & (abs(least) < math.inf)).all()):
        return False
    calls.times(scales, most, out=scales)
    return True


def run(
    calls: Calls, table: Any, parts: Sequence[Tensor], start: Tensor, *, every: int = 0, backwards: bool = False
) -> None:
    """Evaluate ``x_n = f_n y_n-1`` and ``y_n = W x_n plus o_n`` from ``start``, y before the first step.

    Args:
        calls: what is done.
        table: W, as they take it.
        parts: f_n; where x_n and y_n are put, and, where there are some, the scales of x_n; o_n, if there are any.
        start: (..., K, C).
        every: x_n are divided by their maximum every so many steps; 0: never.
        backwards: whether the last step comes first.
    """
    ordered = [list(calls.view(part))[:: -1 if backwards else 1] for part in parts]
    scales, offsets = ordered[3] if every else [], ordered[4] if len(ordered) > 4 else None
    times, mix, peak, divide = calls.times, calls.mix, calls.peak, calls.divide
    before = calls.view(start)
    for step, (factor, x, y) in enumerate(zip(*ordered[:3], strict=True)):
        times(factor, before, out=x)
        if every and not step % every:
            scale = scales[step]
            peak(x, axis=-2, keepdims=True, out=scale)
            if offsets is not None:  # where these are all of y, x is 0
                calls.plus(scale, offsets[step], out=scale)
            divide(x, scale, out=x)
        mix(table, x, out=y)
        if offsets is not None:
            calls.plus(y, offsets[step], out=y)
        before = y
