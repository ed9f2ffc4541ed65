"""Plans: which positions of which rows are looked at next, how many a step should commit, and in which windows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.arguments import checked_count
from diffusion.decoding.canvas import Canvas
from diffusion.errors import ArgumentError


@dataclass(frozen=True, eq=False)
class Look:
    """What one denoiser call is about.

    Attributes:
        span: ``(start, stop)``, the positions that the denoiser is asked about.
        open: bool (B, T), the positions that may be committed.
        counts: how many of them each row should commit, int64 (B,); 0: the row waits.
        is_last: whether no later step of this plan comes to these positions.
    """

    span: tuple[int, int]
    open: Tensor
    counts: Tensor
    is_last: bool = False


@dataclass(frozen=True, eq=False)
class Windows:
    """W windows of up to n positions, of any rows, several a row where they do not overlap: one flat batch.

    Attributes:
        rows: int64 (W,).
        starts: first position of each, int64 (W,).
        lengths: how many positions each has, int64 (W,).
    """

    rows: Tensor
    starts: Tensor
    lengths: Tensor

    def positions(self, width: int) -> Tensor:
        """Return where they are on the canvas, int64 (W, width); beyond the end of a window, its last position."""
        offsets = torch.arange(width, device=self.rows.device).minimum(self.lengths.unsqueeze(1) - 1)
        return self.starts.unsqueeze(1) + offsets

    def absent(self, width: int) -> Tensor:
        """Return what is beyond the end of a window, bool (W, width)."""
        return torch.arange(width, device=self.rows.device) >= self.lengths.unsqueeze(1)

    def select(self, index: Tensor) -> Windows:
        """Return some of the windows."""
        return Windows(self.rows[index], self.starts[index], self.lengths[index])


class Plan(ABC):
    """An order in which a canvas is filled."""

    chooses_first = False
    """Whether positions are chosen by the denoiser's own prediction, before windows are laid over them."""

    @abstractmethod
    def looks(self, canvas: Canvas) -> Iterator[Look]:
        """Yield what each denoiser call is about, as the canvas fills; ends when nothing is left to do."""

    def cover(self, look: Look, wanted: Tensor, longest: int | None) -> Windows:
        """Return the windows of a look: for every row that does not wait, all of the span.

        Args:
            look: what was asked.
            wanted: bool (B, T), the positions that are to be committed, where ``chooses_first``.
            longest: the greatest length of a window, the circuit's; None: there is no circuit.
        """
        rows = (look.counts > 0).nonzero().flatten()
        start, stop = look.span
        if longest is not None and stop - start > longest:
            raise ArgumentError(
                f"window_length: expected windows of at most the circuit's {longest} positions, got {stop - start}; "
                "use a shorter block or window, or plan=df.DynamicWindows()"
            )
        return Windows(rows, torch.full_like(rows, start), torch.full_like(rows, stop - start))


@dataclass(frozen=True)
class Blocks(Plan):
    """Semi-autoregressive: one block after the other, from left to right, each in some steps; the last may be shorter.

    Positions before the canvas's ``first`` that are masked, holes in prompts, belong to blocks of their own before it.

    Args:
        length: positions of a block.
        num_steps: denoiser calls in all; each block gets its share, at least one. None: one per position.
    """

    length: int
    num_steps: int | None = None

    def __post_init__(self) -> None:
        checked_count("block_length", self.length)
        if self.num_steps is not None:
            checked_count("num_steps", self.num_steps)

    def looks(self, canvas: Canvas) -> Iterator[Look]:
        """Yield block by block; within one, as many positions a step as are needed for it to end in time."""
        starts = [*_holes_before(canvas, self.length), *range(canvas.first, canvas.length, self.length)]
        blocks = [(start, min(start + self.length, canvas.length)) for start in starts]
        blocks = [block for block in blocks if bool(canvas.masked[:, slice(*block)].any())]
        if self.num_steps is not None and self.num_steps < len(blocks):
            raise ArgumentError(
                f"num_steps: expected at least one for each of the {len(blocks)} blocks, got {self.num_steps}; take "
                "more steps or longer blocks"
            )
        for number, block in enumerate(blocks):
            num_steps = block[1] - block[0]
            if self.num_steps is not None:
                num_steps = (number + 1) * self.num_steps // len(blocks) - number * self.num_steps // len(blocks)
            inside = torch.zeros_like(canvas.masked)
            inside[:, slice(*block)] = True
            yield from _steps(canvas, block, inside, num_steps)


@dataclass(frozen=True)
class Anywhere(Plan):
    """The whole canvas at once, without blocks.

    Args:
        num_steps: denoiser calls in all; None: one per position.
    """

    num_steps: int | None = None

    def __post_init__(self) -> None:
        if self.num_steps is not None:
            checked_count("num_steps", self.num_steps)

    def looks(self, canvas: Canvas) -> Iterator[Look]:
        """Yield all masked positions, until none is left."""
        most = int(canvas.masked.sum(1).max()) if canvas.batch_size else 0
        num_steps = min(self.num_steps or most, most)
        yield from _steps(canvas, _span(canvas), torch.ones_like(canvas.masked), num_steps)


@dataclass(frozen=True)
class DynamicWindows(Plan):
    """The whole canvas at once; windows of the circuit are laid over the positions that are decoded next.

    The strategy chooses positions by the denoiser's own prediction; the fewest disjoint windows that cover them,
    several a row, others in every row, are decoded jointly (Li et al. 2026, "dynamic windowing").

    Args:
        num_steps: denoiser calls in all; None: one per position.
        length: the greatest length of a window; None: the circuit's.
    """

    num_steps: int | None = None
    length: int | None = None
    chooses_first = True

    def __post_init__(self) -> None:
        for name, value in (("num_steps", self.num_steps), ("window_length", self.length)):
            if value is not None:
                checked_count(name, value)

    def looks(self, canvas: Canvas) -> Iterator[Look]:
        """Yield all masked positions, until none is left."""
        yield from Anywhere(self.num_steps).looks(canvas)

    def cover(self, look: Look, wanted: Tensor, longest: int | None) -> Windows:
        """Return the fewest windows that cover the wanted positions: each begins at the first that is not covered.

        A window is as long as it can be, for what is visible in it tells the circuit more: at the end of the canvas it
        begins earlier instead, but not within the window before it.
        """
        num_positions = wanted.shape[1]
        most = min(length for length in (self.length, longest, num_positions) if length is not None)
        place = torch.arange(num_positions, device=wanted.device)
        left, found = wanted.clone(), []
        taken = torch.zeros(len(wanted), dtype=torch.int64, device=wanted.device)  # up to where each row has windows
        while bool(left.any()):
            rows = left.any(1).nonzero().flatten()
            starts = left[rows].long().argmax(1).clamp(max=num_positions - most).maximum(taken[rows])
            stops = (starts + most).clamp(max=num_positions)
            found.append(Windows(rows, starts, stops - starts))
            left[rows] &= place >= stops.unsqueeze(1)
            taken[rows] = stops
        if not found:
            empty = torch.zeros(0, dtype=torch.int64, device=wanted.device)
            return Windows(empty, empty, empty)
        parts = [torch.cat([getattr(w, name) for w in found]) for name in ("rows", "starts", "lengths")]
        order = (parts[0] * num_positions + parts[1]).argsort()
        return Windows(*(part[order] for part in parts))


def _holes_before(canvas: Canvas, length: int) -> list[int]:
    """Return where the blocks begin that cover the masks before ``canvas.first``; they end there, as all blocks do."""
    head = canvas.masked[:, : canvas.first]
    if not bool(head.any()):
        return []
    first = int(head.any(0).long().argmax())
    count = -(-(canvas.first - first) // length)
    return [start for number in range(count, 0, -1) if (start := canvas.first - number * length) >= 0] or [0]


def _span(canvas: Canvas) -> tuple[int, int]:
    return (0, canvas.length)


def _steps(canvas: Canvas, span: tuple[int, int], inside: Tensor, num_steps: int) -> Iterator[Look]:
    for steps_left in range(num_steps, 0, -1):
        open_positions = canvas.masked & inside & ~canvas.ended.unsqueeze(1)
        num_open = open_positions.sum(1)
        if not bool((num_open > 0).any()):
            return
        yield Look(span, open_positions, -(-num_open // steps_left), is_last=steps_left == 1)
