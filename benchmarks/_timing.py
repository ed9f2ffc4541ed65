"""Timing that the benchmarks share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

Timed = Callable[[], object]
Clock = Callable[[Timed], float]

_LEAST_ROUNDS = 3


def wall_seconds(run: Timed) -> float:
    """Run once; return how long it took."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cpu_seconds(run: Timed) -> float:
    """Run once; return how much of the processors' time it took, of all threads together."""
    start = time.process_time()
    run()
    return time.process_time() - start


def cuda_seconds(run: Timed) -> float:
    """Run once; return how long the current CUDA device and its queue took, from events."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(
    candidates: dict[str, Timed], rounds: int, *, clock: Clock = wall_seconds, limit: float = math.inf
) -> dict[str, list[float]]:
    """Run all candidates in turn; return seconds per round for each. After ``limit`` seconds no round begins."""
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    stop = time.perf_counter() + limit
    for done in range(rounds):
        if done >= _LEAST_ROUNDS and time.perf_counter() > stop:
            break
        for name, run in candidates.items():
            seconds[name].append(clock(run))
    return seconds
