"""Recurrences ``y_t = W (f_t y_t+1)`` in a semiring, in as few and as cheap calls as there are.

A small step costs what its calls cost: on a CPU these are NumPy's, which take a third of the time of PyTorch's, on the
same memory. With few states and columns even one call a step is too much: then blocks of steps are evaluated side by
side, first as matrices and, once the vectors between the blocks are known, as vectors (a parallel scan, Blelloch 1990).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from circuits.algebra.logspace import smallest_safe_sum
from circuits.algebra.semirings import MaxSemiring

_FEW_PRODUCTS, _MANY_STEPS = 1 << 10, 128
"""Blocks: with up to so many products in a step of the matrices of all columns, from so many steps on."""
_FEW_NUMBERS, _FEW_COLUMNS, _NUM_GUESSED, _CHUNK = 1 << 7, 1 << 13, 8, 16
"""Guesses: up to so many numbers, and so many products, in a step; so many blocks; compared every so many steps."""
_MANY_STATES = 16
_SMALL_STEP, _SMALL_MAXIMUM = 1 << 18, 1 << 14
"""NumPy: up to so many products in a step, which its libraries leave to one thread; else PyTorch and its threads."""


class Calls(NamedTuple):
    """What a recurrence is made of: functions that write into ``out=``."""

    view: Callable[[Tensor], Any]
    """A tensor as the functions take it; what is written into it is written into the tensor."""
    times: Callable[..., Any]
    plus: Callable[..., Any]
    total: Callable[..., Any]
    """Plus along an axis."""
    mix: Callable[..., Any]
    """What a matrix makes of vectors (K, C)."""
    mix_all: Callable[..., Any]
    """The same of vectors (n, K, C)."""
    peak: Callable[..., Any] = np.maximum.reduce
    """The maximum along an axis."""
    divide: Callable[..., Any] = np.divide
    zero: float = 0.0
    one: float = 1.0

    @property
    def are_sums(self) -> bool:
        """Whether plus adds; else it takes the maximum of logarithms."""
        return self.one == 1.0


def _best_of_small(columns: Any, x: Any, out: Any) -> None:
    """Maximise over what lies far apart in memory, which is faster than over neighbours: weights are (I, O, 1)."""
    np.maximum.reduce(np.add(columns, x[..., None, :]), axis=-3, out=out)


def _best_of_many(rows: Any, x: Any, out: Any) -> None:
    """The same of many states and few columns, (K, C): weights are (I, 1, O)."""
    out[...] = np.maximum.reduce(np.add(rows, x[:, :, None]), axis=0).T


def _best_of_large(log_weights: Any, x: Tensor, out: Tensor) -> None:
    columns = x.unsqueeze(0) if x.dim() == 2 else x
    out.copy_(MaxSemiring().contract(log_weights.unsqueeze(0), columns).view(out.shape))


def _array(tensor: Tensor) -> Any:
    return tensor.detach().numpy()


_SUM_SMALL = Calls(_array, np.multiply, np.add, np.add.reduce, np.dot, np.matmul)
_SUM_LARGE = Calls(torch.detach, torch.mul, torch.add, torch.sum, torch.mm, torch.matmul, torch.amax, torch.div)
_MAX_SMALL = Calls(
    *(_array, np.add, np.maximum, np.maximum.reduce, _best_of_small, _best_of_small),
    divide=np.subtract,
    zero=-math.inf,
    one=0.0,
)
_MAX_MANY = _MAX_SMALL._replace(mix=_best_of_many)
_MAX_LARGE = Calls(
    *(torch.detach, torch.add, torch.maximum, torch.amax, _best_of_large, _best_of_large, torch.amax, torch.sub),
    zero=-math.inf,
    one=0.0,
)


class Rise(NamedTuple):
    """All steps of a recurrence, from the last to the first."""

    states: Tensor
    """f_t y_t+1, (T, K, B), over the scales of this step and of all later ones."""
    results: Tensor
    """y_t, (T, K, B), over the same scales."""
    scales: Tensor
    """(T, 1, B)."""
    maps: Tensor | None
    """Makes the first result of a block of that of the next block: (blocks, K, K, B), by input and output."""


def are_few(states: Tensor, *, calls: int = 1) -> bool:
    """Whether the states (T, K, B) are so few that a step's matrices are cheaper than its calls, or so many of them."""
    products = states.shape[1] ** 3 * states.shape[2]
    return 0 < products <= calls * _FEW_PRODUCTS and len(states) >= _MANY_STEPS


def rise_of_sums(
    weights: Tensor,  # shape: (K, K)
    factors: Tensor,  # shape: (T, K, B)
    silent: Tensor | None,  # shape: (T, 1, B)
    *,
    every: int,
    in_blocks: bool,
) -> Rise | None:
    """Evaluate ``y_t = W (f_t y_t+1)`` from ``y_T = 1``; None where something that underflowed could count.

    Args:
        weights: W.
        factors: f_t; they are overwritten.
        silent: where y_t is 1, there and at all later steps.
        every: states are divided by their maximum every so many steps.
        in_blocks: whether blocks of steps are evaluated side by side.
    """
    if not factors.numel():
        return None
    calls, offsets = _SUM_SMALL if _is_small(factors, _SMALL_STEP) else _SUM_LARGE, None
    if silent is not None:
        factors.masked_fill_(silent, 0.0)
        offsets = silent.to(factors.dtype)
    with np.errstate(all="ignore"):
        found = _rise(calls, weights, factors, offsets, every=every, in_blocks=in_blocks)
    safe = smallest_safe_sum(weights.dtype, len(weights))
    if found is None or not bool(found.results.min() >= safe):
        return None
    if silent is not None:
        found.states.masked_fill_(silent, 1.0)
    return found


def rise_of_maxima(log_weights: Tensor, factors: Tensor, silent: Tensor | None, *, every: int = 0) -> Rise:
    """Evaluate ``y_t = max_i (log w_oi + f_t + y_t+1)`` from ``y_T = 0``; as :func:`rise_of_sums`, in log space.

    Where nothing is possible the result is -inf; NaN if ``every`` is not 0, as differences of maxima are computed then.
    """
    calls, matrix, offsets, in_blocks = _MAX_LARGE, log_weights, None, are_few(factors, calls=2)
    if _is_small(factors, _SMALL_MAXIMUM):
        is_many = factors.shape[1] >= _MANY_STATES and not in_blocks
        calls, matrix = (
            _MAX_MANY if is_many else _MAX_SMALL,
            log_weights.t().unsqueeze(1 if is_many else 2).contiguous(),
        )
    if silent is not None:  # logarithms of weights are at most 0
        offsets = torch.full_like(silent, -math.inf, dtype=factors.dtype).masked_fill_(silent, 0.0)
    with np.errstate(invalid="ignore"):
        found = _rise(calls, matrix, factors, offsets, every=every, in_blocks=in_blocks)
    assert found is not None
    return found


def fall(weights: Tensor, found: Rise, grad: Tensor, silent: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradients of all sums over these sums, and those of the logarithms of all states, (T, K, B) each.

    The first one is ``g_t = r_t (W^T g_t-1)`` with ``r_t = x_t-1 / y_t`` of the states x: the recurrence once more.

    Args:
        weights: of :func:`rise_of_sums`.
        found: what it returned.
        grad: of log y_0, (K, B).
        silent: of :func:`rise_of_sums`.
    """
    states, results, maps = found.states, found.results, found.maps
    length, end = (1, 0) if maps is None else _blocks(len(states))
    calls = _SUM_SMALL if _is_small(states, _SMALL_STEP) else _SUM_LARGE
    ratios, start = torch.empty_like(states), grad / results[0]
    torch.div(states[:-1], results[1:], out=ratios[1:])
    ratios[:end:length] = 1.0  # here it goes on from vectors g
    ratios[end : end + 1] = 1.0
    if silent is not None:
        ratios.masked_fill_(silent, 0.0)
    table, grads = calls.view(weights.t().contiguous()), torch.empty_like(states)
    with np.errstate(all="ignore"):
        if maps is not None:
            between, _ = _between(calls, maps.transpose(1, 2), start)
            beside = _beside(ratios[:end], length)
            made = torch.empty_like(beside)
            _run(calls, table, (beside, beside, made), _columns(between[:-1]))
            _apart(ratios[:end], beside)
            _apart(grads[:end], made)
            start = between[-1]
        _run(calls, table, (ratios[end:], ratios[end:], grads[end:]), start)
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
    table, scores, at = _array(log_weights), np.empty((num_columns, size), _array(states).dtype), first.numpy()
    for state, there in zip(_array(states.mT.contiguous()), chosen, strict=True):
        table.take(at, 0, scores, "clip")
        np.add(scores, state, out=scores)
        scores.argmax(1, there)
        at = there
    return torch.from_numpy(chosen)


def _is_small(states: Tensor, bound: int) -> bool:
    return states.device.type == "cpu" and states.shape[1] ** 2 * states.shape[2] <= bound


def _rise(
    calls: Calls, matrix: Tensor, factors: Tensor, offsets: Tensor | None, *, every: int, in_blocks: bool
) -> Rise | None:
    """Evaluate ``y_t = W (f_t y_t+1) plus o_t`` in place of the factors; None where the blocks' matrices lost terms."""
    is_thin = _is_small(factors, _FEW_COLUMNS) and factors[0].numel() <= _FEW_NUMBERS
    if not in_blocks and is_thin and len(factors) >= 4 * _NUM_GUESSED * _CHUNK:
        guessed = _guessed(calls, matrix, factors, offsets, every=every)
        if guessed is not None:
            return guessed
    table, results, scales = calls.view(matrix), torch.empty_like(factors), torch.full_like(factors[:, :1], calls.one)
    length, end = _blocks(len(factors)) if in_blocks else (1, 0)
    parts = (factors, factors, results, scales, *(() if offsets is None else (offsets,)))
    start = torch.full_like(factors[0], calls.one)
    _run(calls, table, [part[end:] for part in parts], start, every=every, backwards=True)
    if not end:
        return Rise(factors, results, scales, None)
    start = results[end] if end < len(factors) else start
    beside = [_beside(part[:end], length) for part in parts]
    maps = _maps(calls, table, beside, every=every if calls.are_sums else 0, batch_size=start.shape[1])
    if maps is None:
        return None
    between, is_exact = _between(calls, maps.flip(0), start, every=every)
    if calls.are_sums and not is_exact:
        return None
    between = between.flip(0)
    beside[1] = beside[0]
    _run(calls, table, beside, _columns(between[1:]), every=every, backwards=True)
    for whole, part in zip(parts[1:4], beside[1:4], strict=True):
        _apart(whole[:end], part)
    # the vectors between the blocks have other scales than what was computed from them
    firsts, ends = torch.cat([results[:end:length], start.unsqueeze(0)]), scales[length - 1 : end : length]
    if calls.are_sums:
        ends *= firsts[1:].sum(1, keepdim=True) / between[1:].sum(1, keepdim=True)
        mapped = (maps * firsts[1:].unsqueeze(2)).sum((1, 2))
        maps *= (firsts[:-1].sum(1) / mapped)[:, None, None]
    elif every:
        ends += firsts[1:].amax(1, keepdim=True) - between[1:].amax(1, keepdim=True)
    return Rise(factors, results, scales, maps)


def _guessed(calls: Calls, matrix: Tensor, factors: Tensor, offsets: Tensor | None, *, every: int) -> Rise | None:
    """Evaluate blocks of steps side by side from guessed vectors; None unless these are soon forgotten.

    Such recurrences forget where they came from, up to a factor (Maleki, Musuvathi and Mytkowicz 2014, "Parallelizing
    dynamic programming through rank convergence"). So each block begins once more, from what the guesses have made of
    the block before it, until nothing but a factor changes; that is exact, as no step makes differences greater.
    """
    table, results, scales = calls.view(matrix), torch.empty_like(factors), torch.full_like(factors[:, :1], calls.one)
    states, length = torch.empty_like(factors), len(factors) // _NUM_GUESSED
    end, batch_size = length * _NUM_GUESSED, factors.shape[2]
    parts = (factors, states, results, scales, *(() if offsets is None else (offsets,)))
    start = torch.full_like(factors[0], calls.one)
    _run(calls, table, [part[end:] for part in parts], start, every=every, backwards=True)
    start = results[end] if end < len(factors) else start
    beside = [_beside(part[:end], length) for part in parts]
    _run(calls, table, beside, start.repeat(1, _NUM_GUESSED), every=every, backwards=True)
    before = torch.cat([beside[2][0][:, batch_size:], start], 1)
    for first in range(length - _CHUNK, 0, -_CHUNK):
        guess = beside[2][first].clone()
        _run(calls, table, [part[first : first + _CHUNK] for part in beside], before, every=every, backwards=True)
        before = beside[2][first]
        change = before / guess if calls.are_sums else before - guess
        least, most = change.aminmax(dim=0)
        size = least if calls.are_sums else before.abs().amax(0) + 1
        if bool(((most - least <= 16 * torch.finfo(change.dtype).eps * size) & (least.abs() < math.inf)).all()):
            scale = beside[3][first - 1]
            torch.mul(scale, most, out=scale) if calls.are_sums else torch.add(scale, most, out=scale)
            for whole, part in zip(parts[1:4], beside[1:4], strict=True):
                _apart(whole[:end], part)
            return Rise(states, results, scales, None)
    return None


def _run(
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


def _maps(calls: Calls, table: Any, parts: Sequence[Tensor], *, every: int, batch_size: int) -> Tensor | None:
    """Return what blocks of steps side by side make of vectors, (blocks, K, K, B), by input and output.

    They have any scale. None where some column of a map became so small that terms that underflowed could count.
    """
    length, size, columns = parts[0].shape
    x, y = torch.empty(2, size, size, columns, dtype=parts[0].dtype, device=parts[0].device)
    scales = x.new_empty(length, size, 1, columns)
    offsets = [part / size if every else part for part in parts[4:]]  # so that a map makes 1 of 1
    start = torch.full_like(x[..., 0], calls.zero).fill_diagonal_(calls.one).unsqueeze(2)
    buffers = [part.expand(length, -1, -1, -1) for part in (x, y)]
    every_map = calls._replace(mix=calls.mix_all)
    _run(every_map, table, [parts[0], *buffers, scales, *offsets], start, every=every, backwards=True)
    if every:
        used, peak = scales[(length - 1) % every :: every], y.amax(1, keepdim=True)
        if not min(float(used.min()), float(peak.min())) >= smallest_safe_sum(y.dtype, size):
            return None
        logs = used.log().sum(0)
        y = y * (logs - logs.amax(0)).exp()
    return y.unflatten(2, (-1, batch_size)).permute(2, 0, 1, 3).contiguous()


def _between(calls: Calls, maps: Tensor, start: Tensor, *, every: int = 0) -> tuple[Tensor, bool]:
    """Return a vector, (K, B), and what maps, (n, K, K, B), make of it one after the other: (n + 1, K, B).

    The vectors are divided by their maximum every so many maps. The second value is whether no number was so small
    that terms that underflowed could count.
    """
    vectors = torch.cat([start.unsqueeze(0), torch.empty_like(maps[:, 0])])
    peaks = torch.ones_like(vectors[:, 0])
    products, divisors = calls.view(torch.empty_like(maps[0])), list(calls.view(peaks))
    columns, views = list(calls.view(vectors.unsqueeze(2))), list(calls.view(vectors))
    for step, table in enumerate(calls.view(maps)):
        after = views[step + 1]
        calls.times(table, columns[step], out=products)
        calls.total(products, axis=0, out=after)
        if every and not (step + 1) % every:
            calls.peak(after, axis=0, out=divisors[step])
            calls.divide(after, divisors[step], out=after)
    least = torch.minimum(peaks, torch.ones_like(peaks)) * vectors.amin(1)
    return vectors, bool(least.min() >= smallest_safe_sum(vectors.dtype, len(start)))


def _blocks(num_steps: int) -> tuple[int, int]:
    """Return how many steps a block has, and how many all blocks have."""
    count = num_steps // max(1, math.isqrt(num_steps // 2))
    return num_steps // count, num_steps // count * count


def _beside(whole: Tensor, length: int) -> Tensor:
    """Return the blocks of steps (T, K, B) as further columns, (length, K, T / length * B)."""
    blocks = whole.unflatten(0, (-1, length)).permute(1, 2, 0, 3)
    return blocks.clone(memory_format=torch.contiguous_format).flatten(2)


def _apart(whole: Tensor, beside: Tensor) -> None:
    """Write blocks that are further columns where they come from."""
    blocks = whole.unflatten(0, (-1, len(beside)))
    blocks.copy_(beside.unflatten(2, (len(blocks), -1)).permute(2, 0, 1, 3))


def _columns(vectors: Tensor) -> Tensor:
    return vectors.permute(1, 0, 2).flatten(1).contiguous()
