"""How the sections of ``gpu.py`` measure: in turns, with the peak of the device's memory; what fails is a row too."""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from _timing import Timed, cuda_seconds, measure, wall_seconds

import circuits as ct

_MEGABYTE = 1 << 20
_MOST_SECONDS = 12.0
"""After which a case begins no further round."""
Built = Callable[[], Timed]
"""Prepares a candidate, and returns what is timed."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One candidate of one case."""

    case: str
    name: str
    milliseconds: float | None = None
    """Median of the rounds."""
    least: float | None = None
    greatest: float | None = None
    times_floor: float | None = None
    """Median of the rounds' ratios to the floor."""
    peak_megabytes: float | None = None
    """By how much one run raised the allocated memory of the device at most."""
    problem: str | None = None
    """Why there is no time."""


@dataclass
class Section:
    """What one section measures, written to a file after every case: so what was measured survives what comes after.

    Attributes:
        name: the section's.
        device: to measure on.
        is_quick: tiny sizes.
        rounds: of every case.
        stop: when no further case begins, of ``time.monotonic``.
        path: of the JSON file; None: none is written.
    """

    name: str
    device: torch.device
    is_quick: bool = False
    rounds: int = 15
    stop: float = float("inf")
    path: Path | None = None
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def size(self, full: int, quick: int) -> int:
        """Return one of two sizes."""
        return quick if self.is_quick else full

    def compare(self, case: str, candidates: dict[str, Built], *, floor: str | None = None) -> None:
        """Time candidates in turn; one that cannot be prepared or run is a row that says why, and the rest goes on."""
        if time.monotonic() > self.stop:
            self.add(Row(case=case, name="all", problem="no time was left"))
            return
        ready: dict[str, Timed] = {}
        peaks: dict[str, float | None] = {}
        problems: dict[str, str] = {}
        for name, build in candidates.items():
            try:
                run = build()
                run()
                peaks[name] = self._peak_megabytes(run)
                ready[name] = run
            except Exception as error:
                problems[name] = described(error)
                self._free()
        seconds: dict[str, list[float]] = {}
        try:
            clock = cuda_seconds if self.device.type == "cuda" else wall_seconds
            limit = min(_MOST_SECONDS, max(0.0, self.stop - time.monotonic()))
            seconds = measure(ready, self.rounds, clock=clock, limit=limit)
        except Exception as error:
            problems |= dict.fromkeys(ready, described(error))
        base = seconds.get(floor or "")
        for name in candidates:
            if name in seconds:
                self.add(_row(case, name, seconds[name], base, peaks[name]))
            else:
                self.add(Row(case=case, name=name, problem=problems[name]))
        ready.clear()
        self._free()

    def note(self, text: str) -> None:
        """Keep a sentence for below the table."""
        self.notes.append(text)
        self._write()

    def add(self, row: Row) -> None:
        """Keep a row."""
        took = "" if row.milliseconds is None else f"{row.milliseconds:10.3f} ms"
        ratio = "" if row.times_floor is None else f"{row.times_floor:8.2f} x"
        print(f"  {row.case:<44} {row.name:<44} {took}{ratio}  {row.problem or ''}".rstrip(), flush=True)
        self.rows.append(row)
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            self.path.write_text(json.dumps(self.content()))

    def content(self) -> dict[str, object]:
        """Return rows and notes for JSON."""
        return {"rows": [asdict(row) for row in self.rows], "notes": self.notes}

    def _peak_megabytes(self, run: Timed) -> float | None:
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / _MEGABYTE

    def _free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def described(error: BaseException) -> str:
    """Return an error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _row(case: str, name: str, seconds: list[float], base: list[float] | None, peak: float | None) -> Row:
    milliseconds = [value * 1e3 for value in seconds]
    ratio = None if base is None else statistics.median(one / other for one, other in zip(seconds, base, strict=True))
    return Row(
        case=case,
        name=name,
        milliseconds=statistics.median(milliseconds),
        least=min(milliseconds),
        greatest=max(milliseconds),
        times_floor=ratio,
        peak_megabytes=peak,
    )


def gemm_shapes(pc: ct.CompiledCircuit) -> list[tuple[int, int, int]]:
    """Return (stacks, outputs, inputs) of the matrix product that every sum layer needs at least."""
    layers: dict[int, list[ct.Sum]] = defaultdict(list)
    for node in pc.circuit.nodes:
        if isinstance(node, ct.Sum):
            layers[pc.address(node)[0]].append(node)
    shapes = []
    for nodes in layers.values():
        num_stacks = len({node.children for node in nodes})
        outputs, inputs = nodes[0].parameter_shape
        shapes.append((num_stacks, outputs * len(nodes) // num_stacks, inputs))
    return shapes


def bare_gemms(
    pc: ct.CompiledCircuit, batch_size: int, *, backward: bool = False, dtype: torch.dtype = torch.float32
) -> Timed:
    """Return the matrix products of a circuit's sum layers and nothing else; with ``backward`` the two more of each."""
    buffers = {}
    shapes = gemm_shapes(pc)
    for stacks, outputs, inputs in set(shapes):
        weights, x, grad = (
            torch.rand(stacks, *sizes, device=pc.device, dtype=dtype)
            for sizes in ((outputs, inputs), (inputs, batch_size), (outputs, batch_size))
        )
        buffers[stacks, outputs, inputs] = weights, x, grad, torch.empty_like(weights)

    def run() -> None:
        for shape in shapes:
            weights, x, grad, flows = buffers[shape]
            torch.bmm(weights, x, out=grad)
            if backward:
                torch.bmm(weights.transpose(1, 2), grad, out=x)
                torch.bmm(grad, x.transpose(1, 2), out=flows)

    return run
