"""Blocks of steps side by side: what each makes of any vector, and so the vectors between them (Blelloch 1990)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from circuits.chains.calls import Calls


def maps_of(
    calls: Calls, table: Any, factors: Tensor, offsets: Tensor | None = None, *, every: int, batch_size: int
) -> Tensor:
    """Return what blocks of steps make of vectors, last step first: (K, K, B, blocks), by output and input.

    Args:
        calls: what is done.
        table: W, as they take it.
        factors: f of the steps of all blocks, (length, K, blocks * B).
        offsets: o, (length, 1, blocks * B).
        every: the maps are scaled every so many steps; 0: never.
        batch_size: B.
    """
    length, size, columns = factors.shape
    maps = torch.full((size, size, columns), calls.zero, dtype=factors.dtype, device=factors.device)
    maps.diagonal().fill_(calls.one)
    products = torch.empty_like(maps)
    after, before = calls.view(maps), calls.view(products)
    flat_after, flat_before = calls.view(maps.view(size, -1)), calls.view(products.view(size, -1))
    of_steps, plus = calls.view(factors.unsqueeze(2)), None
    if offsets is not None:  # so that a map makes 1 of 1
        plus = calls.view((offsets / size if calls.are_sums else offsets).unsqueeze(2))
    for step in reversed(range(length)):
        calls.times(of_steps[step], after, out=before)
        calls.mix(table, flat_before, out=flat_after)
        if plus is not None:
            calls.plus(after, plus[step], out=after)
        if every and not step % every:
            _scale(calls, after)
    return maps.view(size, size, columns // batch_size, batch_size).transpose(2, 3).contiguous()


def vectors_between(calls: Calls, maps: Tensor, start: Tensor, *, is_scaled: bool) -> Tensor:
    """Return a vector, (K, B), and what maps, (K, K, B, n), make of it one after the other: (K, B, n + 1).

    Products of two maps that follow each other make every other vector, and so on.

    Args:
        calls: what is done.
        maps: by output and input.
        start: the first vector.
        is_scaled: whether products are scaled, so that the vectors have any scale; those after vectors of 1 that maps
            leave as they are have theirs.
    """
    vectors = start.new_empty(*maps.shape[1:3], maps.shape[3] + 1)
    _fill(calls, calls.view(maps), calls.view(start), calls.view(vectors), is_scaled)
    return vectors


def _fill(calls: Calls, maps: Any, start: Any, vectors: Any, is_scaled: bool) -> None:
    count = maps.shape[3]
    firsts = maps[..., ::2]
    if count < 2:
        vectors[..., 0] = start
    else:
        pairs = calls.total(calls.times(maps[:, :, None, :, 1::2], firsts[None, ..., : count // 2]), axis=1)
        if is_scaled:
            _scale(calls, pairs)
        _fill(calls, pairs, start, vectors[..., ::2], is_scaled)
    calls.total(calls.times(firsts, vectors[None, ..., :count:2]), axis=1, out=vectors[..., 1::2])


def _scale(calls: Calls, maps: Any) -> None:
    """Divide maps such that the greatest number that each makes of 1 is 1."""
    calls.divide(maps, calls.peak(calls.total(maps, axis=1), axis=0), out=maps)


def beside(whole: Tensor, length: int) -> Tensor:
    """Return blocks of steps, (T, K, B), as further columns: (length, K, T / length * B)."""
    num_steps, size, batch_size = whole.shape
    blocks = whole.view(num_steps // length, length, size, batch_size).permute(1, 2, 0, 3)
    return blocks.clone(memory_format=torch.contiguous_format).view(length, size, num_steps // length * batch_size)


def write_apart(whole: Tensor, columns: Tensor) -> None:
    """Write blocks that are further columns where they come from."""
    (num_steps, size, batch_size), length = whole.shape, columns.shape[0]
    count = num_steps // length
    whole.view(count, length, size, batch_size).copy_(columns.view(length, size, count, batch_size).permute(2, 0, 1, 3))
