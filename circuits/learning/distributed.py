"""Data-parallel learning: several processes with a copy of the circuit each, started by torchrun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from circuits.errors import ArgumentError, ProcessLostError, UnfactorError

_T = TypeVar("_T")
_REASON, _SECONDS_FOR_A_REASON = "unfactor: why a process ended", 5
_store: torch.distributed.Store | None = None
"""What the processes have in common, also when one of them is gone."""
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextlib.contextmanager
def join_processes(backend: str | None = None) -> Iterator[torch.distributed.ProcessGroup]:
    """Join the processes that torchrun started, and leave them at the end of the block.

        with ct.learning.join_processes() as group:
            ct.learning.fit(pc, data, process_group=group)

    Args:
        backend: of ``torch.distributed``; None: gloo, and nccl for tensors on CUDA devices where there are any.

    When an error ends one process, the others end too, with a ProcessLostError that has its reason, as soon as they
    next wait for it. A fit goes on from its checkpoint, also in another number of processes.

    Yields:
        The group of all processes, for :func:`~circuits.learning.fit`.

    Raises:
        ArgumentError: the program was not started by torchrun, or is already in a group.
    """
    if not torch.distributed.is_available():
        raise ArgumentError("backend: this build of PyTorch has no torch.distributed; fit in one process")
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise ArgumentError(
            f"processes: the environment has no {', '.join(missing)}; start the program with "
            "`torchrun --standalone --nproc-per-node=2 program.py`"
        )
    if torch.distributed.is_initialized():
        raise ArgumentError(
            "processes: torch.distributed is already initialised; give fit process_group=torch.distributed.group.WORLD"
        )
    if backend is None:
        has_nccl = torch.cuda.is_available() and torch.distributed.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
    global _store
    _store, rank, size = next(iter(torch.distributed.rendezvous("env://")))
    torch.distributed.init_process_group(backend, store=_store, rank=rank, world_size=size)
    try:
        group = torch.distributed.group.WORLD
        assert group is not None
        yield group
    except BaseException as error:
        if not isinstance(error, ProcessLostError):
            with contextlib.suppress(RuntimeError):  # the process that keeps it may be gone
                _store.set(_REASON, f"process {rank}: {type(error).__name__}: {error!s:.500}")
        raise
    finally:
        torch.distributed.destroy_process_group()


@dataclass(frozen=True, eq=False)
class Processes:
    """The processes that learn together; one alone when ``group`` is None.

    All of them go through the same batches in the same order, and each takes its share of every batch. What they sum up
    is the same in all of them, and so are the decisions that depend on it.
    """

    group: torch.distributed.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        """Which process this is, from 0."""
        return 0 if self.group is None else torch.distributed.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many there are."""
        return 1 if self.group is None else torch.distributed.get_world_size(self.group)

    def share(self, index: Tensor) -> Tensor:
        """Return this process's part of a batch, which may be empty."""
        return index[self.rank :: self.size]

    def summed(self, tensor: Tensor) -> Tensor:
        """Return the sum of the processes' tensors of one shape."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        with _of_all():
            torch.distributed.all_reduce(total, group=self.group)
        return total

    def is_any(self, condition: bool) -> bool:
        """Return whether a condition holds in one of the processes."""
        return condition if self.size == 1 else bool(self.summed(torch.tensor([condition], dtype=torch.int64)))

    def wait(self) -> None:
        """Wait until all processes have come here."""
        self.is_any(False)

    def summed_all(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sums of the processes' tensors by name."""
        return {name: self.summed(tensor) for name, tensor in tensors.items()}

    @torch.no_grad()
    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors by those of the first process."""
        if self.size == 1:
            return
        for tensor in tensors:
            received = tensor.clone()
            with _of_all():
                torch.distributed.broadcast(received, group=self.group, group_src=0)
            tensor.copy_(received)

    def from_first(self, function: Callable[[], _T]) -> _T:
        """Call a function in the first process; return its result, or raise its error, in all of them."""
        if self.size == 1:
            return function()
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = function()
            except UnfactorError as error:
                answer[1] = error
        with _of_all():
            torch.distributed.broadcast_object_list(answer, group=self.group, group_src=0)
        if answer[1] is not None:
            raise answer[1]
        result: _T = answer[0]
        return result

    def check_same(self, arguments: Mapping[str, str]) -> None:
        """Raise ArgumentError in all processes unless all of them gave the same texts."""
        if self.size == 1:
            return
        given: list[Any] = [None] * self.size
        with _of_all():
            torch.distributed.all_gather_object(given, dict(arguments), group=self.group)
        differing = sorted({name for other in given for name in arguments if other.get(name) != given[0].get(name)})
        if differing:
            raise ArgumentError(
                f"process_group: the processes called fit with a different {' and '.join(differing)}; give all of them "
                "the same arguments and all data, of which each takes its share of every batch"
            )


@contextlib.contextmanager
def _of_all() -> Iterator[None]:
    """Raise ProcessLostError, with the reason that it left, where another process is no longer there."""
    try:
        yield
    except RuntimeError as error:
        reason = "without a word, as one that was killed"
        if _store is not None:
            with contextlib.suppress(RuntimeError):
                _store.wait([_REASON], timedelta(seconds=_SECONDS_FOR_A_REASON))
                reason = _store.get(_REASON).decode()
        raise ProcessLostError(
            f"process_group: another process ended: {reason}; start all again, a fit goes on from its checkpoint"
        ) from error


def checked_processes(group: Any) -> Processes:
    """Return the processes of a group; raise ArgumentError unless it is one that this process belongs to."""
    if group is None:
        return Processes()
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise ArgumentError(
            f"process_group: expected a group of torch.distributed, see ct.learning.join_processes, got {group!r:.60}"
        )
    return Processes(group)
