"""Recurrences ``y_t = W (f_t y_t+1)`` in a semiring, in as few and as cheap calls as there are.

A small step costs what its calls cost: on a CPU these are NumPy's, which take a third of the time of PyTorch's, on the
same memory. With few states and columns even one call a step is too much: then blocks of steps are evaluated side by
side, first as matrices and, once the vectors between the blocks are known, as vectors (a parallel scan, Blelloch 1990).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from circuits.algebra.logspace import column_peak, smallest_safe_sum
from circuits.chains.blocks import beside, maps_of, vectors_between, write_apart
from circuits.chains.calls import MAX_LARGE, MAX_MANY, MAX_SMALL, SUM_LARGE, SUM_SMALL, Calls, Map, as_array
from circuits.chains.steps import run, sums_of_logs

_FEW_PRODUCTS, _MANY_STEPS = 1 << 10, 128
"""Blocks: with up to so many products in a step of the matrices of all columns, from so many steps on."""
_LEAST_LENGTH, _STEP = 8, 2000
"""Such blocks have a multiple of so many steps; the calls of a step cost about as much as so many products."""
_FEW_NUMBERS, _FEW_COLUMNS, _NUM_GUESSED, _CHUNK = 1 << 7, 1 << 13, 8, 16
"""Guesses: up to so many numbers, and so many products, in a step; so many blocks; compared every so many steps."""
_ROUNDING = 16
"""What the vectors between blocks may change by, in multiples of the machine's precision."""
_MANY_STATES = 16
_MANY_NUMBERS, _CACHED = 1 << 11, 1 << 16
"""A step of so many numbers is worth calls of its own; so many of some steps stay in a processor's cache."""
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
    rise: Rise | None
    """All steps; None where nobody asked for them."""


def scan(
    weights: Tensor | Sequence[Map],  # shape: (K, K)
    leaves: Tensor,  # shape: (T, K, B)
    silent: Tensor | None,  # shape: (T, 1, B)
    *,
    keep: bool,
) -> Scan | None:
    """Evaluate all steps; None where some sum is so small that terms that underflow could count.

    Args:
        weights: linear ones; or what mixes in every step.
        leaves: e_t.
        silent: at which steps y_t is the constant 1; then it is at all later ones too.
        keep: whether all steps are wanted, or the first sum alone.
    """
    peak, seldom = column_peak(leaves), EVERY[leaves.dtype]
    for every, in_blocks in ((seldom, True), (seldom, False), (1, False)):
        if in_blocks and not (isinstance(weights, Tensor) and are_few(leaves)):
            continue
        found = rise_of_sums(weights, leaves, peak, silent, every=every, in_blocks=in_blocks, keep=keep)
        if found is not None:
            return Scan(found.results[:1].log().add_(peak.add_(found.scales.log()).sum(0)), found if keep else None)
    return None


def without(peak: Tensor, states: Tensor) -> Tensor:
    """Subtract their maxima from states, (T, K, B), which may lie in memory in any order; the result does not."""
    return torch.sub(states, peak, out=torch.empty(states.shape, dtype=states.dtype, device=states.device))


def rise_of_sums(
    weights: Tensor | Sequence[Map],  # shape: (K, K)
    leaves: Tensor,  # shape: (T, K, B)
    peak: Tensor,  # shape: (T, 1, B)
    silent: Tensor | None,  # shape: (T, 1, B)
    *,
    every: int,
    in_blocks: bool,
    keep: bool = True,
) -> Rise | None:
    """Evaluate ``y_t = W (f_t y_t+1)`` from ``y_T = 1``; None where something that underflowed could count.

    Args:
        weights: W; or what mixes in every step.
        leaves: log f_t, in any order in memory.
        peak: what is taken out of them.
        silent: where y_t is 1, there and at all later steps.
        every: states are divided by their maximum every so many steps.
        in_blocks: whether blocks of steps are evaluated side by side.
        keep: whether all steps are wanted; else large ones are in one place, where the first result is in the end.
    """
    if not leaves.numel():
        return None
    calls, offsets = calls_for(leaves), None if silent is None else silent.to(leaves.dtype)
    table: Any = None
    rise: Callable[..., Rise | None] = _step_by_step
    if isinstance(weights, Tensor):
        table, rise = calls.view(weights), functools.partial(_rise, in_blocks=in_blocks)
    else:
        calls, table = calls.by_step, reversed(weights)
    safe = smallest_safe_sum(leaves.dtype, leaves.shape[1])
    with np.errstate(all="ignore"):
        if not in_blocks and leaves[0].numel() >= _MANY_NUMBERS:
            states, results, scales, least = sums_of_logs(calls, table, (leaves, peak, offsets), every=every, keep=keep)
            found = Rise(states, results, scales, None) if bool(least >= safe) else None
        else:
            factors = without(peak, leaves).exp_()
            factors = factors if silent is None else factors.masked_fill_(silent, 0.0)
            found = rise(calls, table, factors, offsets, every=every)
    if found is not None and silent is not None and keep:
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
        found = _rise(calls, calls.view(matrix), factors, offsets, every=every, in_blocks=in_blocks)
    assert found is not None
    return found


def fall(
    transposed: Tensor | Sequence[Map],
    found: Rise,
    grad: Tensor,
    silent: Tensor | None,
    flow: Callable[[slice, Tensor], None] | None,
) -> Tensor:
    """Return the gradients of the logarithms of all states, (T, K, B).

    Those of all sums over the sums are ``g_t = r_t (W^T g_t-1)`` with ``r_t = x_t-1 / y_t`` of the states x: the
    recurrence once more.

    Args:
        transposed: W^T, or what multiplies by it in every step.
        found: what :func:`rise_of_sums` returned.
        grad: of log y_0, (K, B).
        silent: of :func:`rise_of_sums`.
        flow: takes some steps and their g_t, (n, K, B), which are overwritten afterwards; None: nobody wants them.
    """
    states, start, done = found.states, grad / found.results[0], 0
    num_steps, grads, calls = states.shape[0], torch.empty_like(states), calls_for(states)
    table: Any = iter(transposed)
    if isinstance(transposed, Tensor):
        table = calls.view(transposed.contiguous())
    else:
        calls = calls.by_step

    def finish(at: slice, scales: Tensor) -> None:
        if flow is not None:
            flow(at, scales)
        grads[at].mul_(states[at])

    with np.errstate(all="ignore"):
        if found.maps is not None:
            length = _block_length(states)
            done = num_steps // length * length
            scales = _ratios(found, slice(0, done), silent, length)
            start = _fall_in_blocks(calls, table, found, scales, start, grads[:done])
            finish(slice(0, done), scales)
        size = max(1, _CACHED // max(1, states[0].numel()))
        for first in range(done, num_steps, size):
            at = slice(first, min(first + size, num_steps))
            scales = _ratios(found, at, silent, 0 if first > done else num_steps)
            run(calls, table, (scales, scales, grads[at]), start)
            start = grads[at.stop - 1].clone()
            finish(at, scales)
    return grads


def _ratios(found: Rise, at: slice, silent: Tensor | None, length: int) -> Tensor:
    """Return r_t of some steps; 1 in each of so many, where the recurrence goes on from vectors g, unless it is 0."""
    first, ratios = max(1, at.start), torch.empty_like(found.states[at])
    torch.div(found.states[first - 1 : at.stop - 1], found.results[first : at.stop], out=ratios[first - at.start :])
    if length:
        ratios[::length] = 1.0
    return ratios if silent is None else ratios.masked_fill_(silent[at], 0.0)


def _fall_in_blocks(calls: Calls, table: Any, found: Rise, ratios: Tensor, start: Tensor, grads: Tensor) -> Tensor:
    """Write what ``W^T`` makes of g_t, and g_t over the ratios; return what is after the blocks, (K, B)."""
    assert found.maps is not None
    results, end = found.results, len(ratios)
    length = end // found.maps.shape[3]
    firsts = torch.cat(
        [results[:end:length], results[end : end + 1] if end < len(results) else torch.ones_like(results[:1])]
    )
    mapped = (found.maps * firsts[1:].permute(1, 2, 0)).sum((0, 1))
    maps = found.maps.transpose(0, 1) * (firsts[:-1].sum(1).t() / mapped)
    between = vectors_between(calls, maps, start, is_scaled=False)
    columns = beside(ratios, length)
    made = torch.empty_like(columns)
    run(calls, table, (columns, columns, made), between[:, :, :-1].transpose(1, 2).flatten(1))
    write_apart(ratios, columns)
    write_apart(grads, made)
    return between[:, :, -1]


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
    calls: Calls, table: Any, factors: Tensor, offsets: Tensor | None, *, every: int, in_blocks: bool
) -> Rise | None:
    """Evaluate ``y_t = W (f_t y_t+1) plus o_t``, perhaps in place of the factors; None where blocks do not fit."""
    is_thin = _is_small(factors, _FEW_COLUMNS) and factors[0].numel() <= _FEW_NUMBERS
    if in_blocks or (is_thin and len(factors) >= 4 * _NUM_GUESSED * _CHUNK):
        found = _side_by_side(calls, table, factors, offsets, every=every, by_maps=in_blocks)
        if found is not None or in_blocks:
            return found
    return _step_by_step(calls, table, factors, offsets, every=every)


def _step_by_step(calls: Calls, table: Any, factors: Tensor, offsets: Tensor | None, *, every: int) -> Rise | None:
    results, scales = torch.empty_like(factors), torch.full_like(factors[:, :1], calls.one)
    parts = (factors, factors, results, scales, *(() if offsets is None else (offsets,)))
    run(calls, table, parts, torch.full_like(factors[0], calls.one), every=every, backwards=True)
    return Rise(factors, results, scales, None) if _are_safe(calls, results, scales) else None


def _are_safe(calls: Calls, results: Tensor, scales: Tensor) -> bool:
    """Whether what underflowed, before it was scaled, is too little to count."""
    if not calls.are_sums:
        return True
    least = (results.amin(1, keepdim=True) * scales).min()
    return bool(least >= smallest_safe_sum(results.dtype, results.shape[1]))


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
    end, num_steps, batch_size = count * length, factors.shape[0], factors.shape[2]
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
        between = vectors_between(calls, maps.flip(3), start, is_scaled=every > 0).flip(2)
        guess = between[:, :, 1:].transpose(1, 2).flatten(1)
    else:
        guess = start.repeat(1, count)
    run(calls, table, columns, guess, every=every, backwards=True)
    before, later = torch.cat([columns[2][0][:, batch_size:], start], 1), length
    is_exact = by_maps and not calls.are_sums  # no logarithm underflows
    if is_exact and every:
        columns[3][length - 1] += before.amax(0) - guess.amax(0)
    while not is_exact and (change := _change(calls, before, guess)) is None:
        later -= _CHUNK
        if by_maps or later <= 0:
            return None
        guess = columns[2][later].clone()
        run(calls, table, [part[later : later + _CHUNK] for part in columns], before, every=every, backwards=True)
        before = columns[2][later]
    for whole, part in zip(parts[1:4], columns[1:4], strict=True):
        write_apart(whole[:end], part)
    if not _are_safe(calls, results, scales):
        return None
    if not is_exact:
        last = calls.view(scales[later - 1 : end : length, 0])
        calls.times(last, change.reshape(last.shape), out=last)
    return Rise(states, results, scales, maps)


def _change(calls: Calls, vectors: Tensor, guess: Tensor) -> Any:
    """Return the factors, (C,), by which vectors (K, C) differ from a guess; None where they differ by more."""
    found, guessed = map(calls.view, (vectors, guess))
    change = calls.divide(found, guessed)
    most, least = calls.peak(change, axis=0), -calls.peak(-change, axis=0)
    size = least if calls.are_sums else calls.peak(abs(found), axis=0) + 1
    rounding = _ROUNDING * torch.finfo(vectors.dtype).eps
    fits = ((most - least <= rounding * size) & (abs(least) < math.inf)).all()
    return most if bool(fits) else None
