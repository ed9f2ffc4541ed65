"""The canvas: the text as it is filled in. Nothing else in decoding writes tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuits import RowGenerators
from diffusion.decoding.constraints import Constraint, Reach
from diffusion.denoisers.base import DenoiserSpec

if TYPE_CHECKING:
    from diffusion.decoding.controls import Control


@dataclass(eq=False)
class Teacher:
    """A text that decoding writes in place of its own, so that what it would have drawn it with can be added up.

    Attributes:
        tokens: int64 (B, T); those at positions that are not masked do not matter.
        log_prob: log-probability of what was written so far, float64 (B,), in nats.
    """

    tokens: Tensor

    def __post_init__(self) -> None:
        self.log_prob = torch.zeros(len(self.tokens), dtype=torch.float64, device=self.tokens.device)


@dataclass(eq=False)
class Canvas:
    """B rows of T positions, some of them still masked.

    Attributes:
        tokens: int64 (B, T), mask tokens at masked positions.
        valid: bool (B, T), False at padding and after the end of a text.
        masked: bool (B, T), positions that are still to be filled.
        writable: bool (B, T), positions that were masked at first.
        given: bool (B, T), positions that held a token at first.
        ended: bool (B,), rows whose text has ended.
        confidence: float (B, T), how certain each written token was when it was committed; 1 where nothing was written.
        first: int, where the part that may be written begins for all rows: the length of the prompts.
        seeds: one per row, int64 (B,).
        origin: int64 (B,), where each row begins: places are counted from there, so that padding moves nothing.
        num_calls: how many steps each row took part in, int64 (B,): a denoiser call each.
        num_extra_calls: how many further calls controls made for each row, int64 (B,).
        num_windows: how many windows of each row were decoded, int64 (B,).
        num_coupled: in how many of them the circuit was used, int64 (B,).
        constraint: what the finished text must satisfy, or None.
        teacher: the text to write, in place of what would be drawn; or None.
        reads: bool (B, T), the positions that the constraint is about.
        controls: what steers decoding beside the model.
    """

    tokens: Tensor
    valid: Tensor
    masked: Tensor
    first: int
    seeds: Tensor
    spec: DenoiserSpec
    constraint: Constraint | None = None
    teacher: Teacher | None = None

    def __post_init__(self) -> None:
        self.writable, self.given = self.masked.clone(), self.valid & ~self.masked
        self.controls: tuple[Control, ...] = ()
        is_first = self.valid.cumsum(1).eq(1) & self.valid
        self.origin = (is_first * torch.arange(self.length, device=self.tokens.device)).sum(1)
        self.ended = torch.zeros_like(self.masked[:, 0]) if self.length else self.masked.new_zeros(len(self.masked))
        self.confidence = torch.ones(self.masked.shape, device=self.masked.device)
        self.reads = self.valid.clone()
        self.reads[:, : self.first] = False
        if self.constraint is not None:
            self.constraint.check(self.tokens, self.masked, self.reads)
        counts = [torch.zeros_like(self.seeds) for _ in range(4)]
        self.num_calls, self.num_extra_calls, self.num_windows, self.num_coupled = counts

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.tokens)

    @property
    def length(self) -> int:
        """T."""
        return self.tokens.shape[1]

    @property
    def mask_ratio(self) -> Tensor:
        """Share of the writable positions of each row that are masked, (B,): its time in the forward process."""
        return self.masked.sum(1) / self.writable.sum(1).clamp_min(1)

    def generators(self, rows: Tensor, places: Tensor) -> RowGenerators:
        """Return random numbers for windows: of their rows' seeds and calls so far, and places in rows, (W,) each."""
        return RowGenerators(self.seeds[rows]).at(self.num_calls[rows], places)

    def write(self, rows: Tensor, positions: Tensor, tokens: Tensor, committed: Tensor, confidence: Tensor) -> None:
        """Commit tokens of W windows of n positions.

        Args:
            rows: int64 (W,).
            positions: int64 (W, n).
            tokens: int64 (W, n).
            committed: bool (W, n), which of them to write.
            confidence: (W, n), between 0 and 1.
        """
        row = rows.unsqueeze(1).expand_as(positions)[committed]
        position = positions[committed]
        self.tokens[row, position] = tokens[committed]
        self.confidence[row, position] = confidence[committed].to(self.confidence.dtype)
        self.masked[row, position] = False

    def count(self, rows: Tensor, log_prob: Tensor) -> None:
        """Add log-probabilities of what the teacher wrote, (W,), to rows (W,); end rows that cannot be written."""
        assert self.teacher is not None
        self.teacher.log_prob.index_add_(0, rows, log_prob.double())
        self.ended |= self.teacher.log_prob == -torch.inf

    def reach(self) -> Reach:
        """Return in which states the constraint's automaton can be at every place of the canvas as it is now."""
        assert self.constraint is not None
        return self.constraint.reach(self.tokens, self.masked, self.reads)

    def take_back(self, positions: Tensor) -> None:
        """Mask tokens again, where bool (B, T) ``positions`` is True."""
        self.tokens.masked_fill_(positions, self.spec.mask_id)
        self.masked |= positions

    def end_texts(self, stop: int) -> None:
        """End rows at their first end-of-text token before ``stop`` that nothing masked precedes; pad the rest."""
        if not self.spec.eos_ids:
            return
        eos_ids = torch.tensor(self.spec.eos_ids, device=self.tokens.device)
        written = self.writable & ~self.masked & self.valid
        is_end = torch.isin(self.tokens, eos_ids) & written
        is_end[:, stop:] = False
        is_sure = is_end & (self.masked.cumsum(1) == 0)
        after = is_sure.cumsum(1) - is_sure.long() > 0
        self.ended |= is_sure.any(1)
        self.cut(after)

    def cut(self, positions: Tensor) -> None:
        """End rows, and make padding of what was written, or was to be, where bool (B, T) ``positions`` is True."""
        self.ended |= positions.any(1)
        gone = positions & self.writable
        self.tokens.masked_fill_(gone, self.spec.pad_id)
        self.valid &= ~gone
        self.masked &= ~gone

    def close(self) -> None:
        """Make padding of what was never filled."""
        self.tokens.masked_fill_(self.masked, self.spec.pad_id)
        self.valid &= ~self.masked
