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
        is_last: which rows have no later step at these positions, bool (B,).
    """

    span: tuple[int, int]
    open: Tensor
    counts: Tensor
    is_last: Tensor


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

    def cover(self, look: Look, wanted: Tensor, valid: Tensor, longest: int | None) -> Windows:
        """Return the windows of a look: for every row that does not wait, what it has of the span.

        Args:
            look: what was asked.
            wanted: bool (B, T), the positions that are to be committed, where ``chooses_first``.
            valid: bool (B, T), False at padding, which no window begins or ends with.
            longest: the greatest length of a window, the circuit's; None: there is no circuit.
        """
        rows = (look.counts > 0).nonzero().flatten()
        first, last = _extents(valid)
        starts, stops = first[rows].clamp(min=look.span[0]), last[rows].clamp(max=look.span[1])
        most = int((stops - starts).max()) if len(rows) else 0
        if longest is not None and most > longest:
            raise ArgumentError(
                f"window_length: expected windows of at most the circuit's {longest} positions, got {most}; use a "
                "shorter block or window, or plan=df.DynamicWindows()"
            )
        return Windows(rows, starts, stops - starts)


@dataclass(frozen=True)
class Blocks(Plan):
    """Semi-autoregressive: one block after the other, from left to right, each in some steps; the last may be shorter.

    Positions before the canvas's ``first`` that are masked, holes in prompts, belong to blocks of their own before it;
    a row with such holes shares its steps among these blocks too.

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
        """Yield block by block; within one, as many positions a step as are needed for each row to end in time."""
        before = -(-canvas.first // self.length)
        starts = range(canvas.first - before * self.length, canvas.length, self.length)
        blocks = [(max(0, start), min(start + self.length, canvas.length)) for start in starts]
        is_masked = torch.stack([canvas.masked[:, slice(*block)].any(1) for block in blocks], 1)  # (B, blocks)
        num_blocks, done = is_masked.sum(1), is_masked.cumsum(1) - is_masked.long()
        if self.num_steps is not None and self.num_steps < int(num_blocks.max()):
            raise ArgumentError(
                f"num_steps: expected at least one for each of the {int(num_blocks.max())} blocks, got "
                f"{self.num_steps}; take more steps or longer blocks"
            )
        for number, block in enumerate(blocks):
            steps = torch.full_like(num_blocks, self.length)
            if self.num_steps is not None:  # each row shares its steps among its own blocks
                share = done[:, number] * self.num_steps, (done[:, number] + 1) * self.num_steps
                of_row = num_blocks.clamp_min(1)
                steps = share[1] // of_row - share[0] // of_row
            inside = torch.zeros_like(canvas.masked)
            inside[:, slice(*block)] = True
            yield from _steps(canvas, block, inside, steps)


@dataclass(frozen=True)
class Anywhere(Plan):
    """The whole canvas at once, without blocks, in ``num_steps`` denoiser calls; None: one per position."""

    num_steps: int | None = None

    def __post_init__(self) -> None:
        if self.num_steps is not None:
            checked_count("num_steps", self.num_steps)

    def looks(self, canvas: Canvas) -> Iterator[Look]:
        """Yield all masked positions, until none is left."""
        most = canvas.masked.sum(1)
        steps = most if self.num_steps is None else most.clamp(max=self.num_steps)
        yield from _steps(canvas, (0, canvas.length), torch.ones_like(canvas.masked), steps)


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

    def cover(self, look: Look, wanted: Tensor, valid: Tensor, longest: int | None) -> Windows:
        """Return the fewest windows that cover the wanted positions: each begins at the first that is not covered.

        A window is as long as it can be, for what is visible in it tells the circuit more: at the end of a row it
        begins earlier instead, but not within the window before it, nor in padding.
        """
        first, last = _extents(valid)
        limits = [length for length in (self.length, longest) if length is not None]
        most = (last - first).clamp(max=min(limits)) if limits else last - first
        place = torch.arange(wanted.shape[1], device=wanted.device)
        left, found, taken = wanted.clone(), [], first
        while bool(left.any()):
            rows = left.any(1).nonzero().flatten()
            starts = left[rows].long().argmax(1).minimum((last - most)[rows]).maximum(taken[rows])
            stops = (starts + most[rows]).minimum(last[rows])
            found.append(Windows(rows, starts, stops - starts))
            left[rows] &= place >= stops.unsqueeze(1)
            taken = taken.index_put((rows,), stops)
        if not found:
            empty = torch.zeros(0, dtype=torch.int64, device=wanted.device)
            return Windows(empty, empty, empty)
        parts = [torch.cat([getattr(w, name) for w in found]) for name in ("rows", "starts", "lengths")]
        order = (parts[0] * wanted.shape[1] + parts[1]).argsort()
        return Windows(*(part[order] for part in parts))


def _extents(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first position of every row that is no padding, and the one after its last, int64 (B,) each."""
    length = valid.shape[1]
    first = valid.long().argmax(1)
    last = length - valid.flip(1).long().argmax(1)
    return first, torch.where(valid.any(1), last, first)


def _steps(canvas: Canvas, span: tuple[int, int], inside: Tensor, steps: Tensor) -> Iterator[Look]:
    """Yield looks at the same positions until every row has done its steps, int64 (B,), or has nothing left to do."""
    most = int(steps.max()) if len(steps) else 0
    for number in range(most):
        open_positions = canvas.masked & inside & ~canvas.ended.unsqueeze(1)
        num_open = open_positions.sum(1)
        if not bool((num_open > 0).any()):
            return
        steps_left = (steps - number).clamp(min=1)
        yield Look(span, open_positions, -(-num_open // steps_left), is_last=steps_left == 1)
