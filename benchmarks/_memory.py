"""The memory of a process: its peak, and what glibc does with what is freed."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed: without, every large tensor is mapped, and its pages zeroed, again."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_MMAP_MAX, 0)


def peak_resident_kb() -> int:
    """Return this process's peak resident memory; ``resource`` would count that of the process that started it."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
