"""Timing that the benchmarks share."""

from __future__ import annotations

import time
from collections.abc import Callable

Timed = Callable[[], object]


def measure(candidates: dict[str, Timed], rounds: int) -> dict[str, list[float]]:
    """Run all candidates in turn; return seconds per round for each."""
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds
