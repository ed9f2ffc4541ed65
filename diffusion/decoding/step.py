"""One step: from a denoiser's prediction to tokens on the canvas."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from circuits import RowGenerators
from diffusion.coupling import CoupledDistribution
from diffusion.decoding.canvas import Canvas
from diffusion.decoding.commit import SCORES, Ranking, commit
from diffusion.decoding.config import DecodingConfig
from diffusion.decoding.plans import Look, Plan, Windows
from diffusion.decoding.proposers import PROPOSERS, Proposal, dependence_of, independent
from diffusion.head import CoupledHead
from diffusion.prediction import Prediction

_OF_WINDOWS = ("positions", "absent", "tokens", "masked", "candidates", "counts")


@dataclass(frozen=True, eq=False)
class Part:
    """Windows of one step, with what the denoiser says about them and what may be committed.

    Attributes:
        windows: W windows of up to n positions.
        positions: where they are on the canvas, int64 (W, n).
        absent: bool (W, n), what is beyond the end of a shorter window, or padding.
        tokens: int64 (W, n).
        masked: bool (W, n), what is to be predicted.
        candidates: bool (W, n), what may be committed.
        counts: how many of these at least, int64 (W,).
        prediction: of the windows' positions, (W, n).
    """

    windows: Windows
    positions: Tensor
    absent: Tensor
    tokens: Tensor
    masked: Tensor
    candidates: Tensor
    counts: Tensor
    prediction: Prediction

    def select(self, index: Tensor) -> Part:
        """Return some of the windows."""
        parts = {name: getattr(self, name)[index] for name in _OF_WINDOWS}
        return Part(windows=self.windows.select(index), prediction=self.prediction.rows(index), **parts)


def decode_step(
    canvas: Canvas, look: Look, prediction: Prediction, plan: Plan, head: CoupledHead | None, config: DecodingConfig
) -> None:
    """Commit tokens of one look to the canvas.

    The circuit is asked for the windows whose own mask ratio is below the activation threshold; the others are decoded
    independently.

    Args:
        canvas: written to.
        look: what the denoiser was asked about, and how many tokens each row should commit.
        prediction: of the span's positions, (B, stop - start).
        plan: lays the windows.
        head: the circuit; None: the factorized baseline.
        config: how to choose.
    """
    canvas.num_calls += (look.counts > 0).long()
    part = _windows_of(canvas, look, prediction, plan, head, config)
    if not len(part.windows.rows):
        return
    uses = _uses_circuit(part, head, config)
    canvas.num_windows.index_add_(0, part.windows.rows, torch.ones_like(part.windows.rows))
    canvas.num_coupled.index_add_(0, part.windows.rows, uses.long())
    for index, coupled_head in ((uses.nonzero().flatten(), head), ((~uses).nonzero().flatten(), None)):
        if len(index):
            _decode_part(canvas, part if len(index) == len(uses) else part.select(index), coupled_head, config)
    if config.remask and not look.is_last:
        _take_back(canvas, look, config.remask)


def _windows_of(
    canvas: Canvas, look: Look, prediction: Prediction, plan: Plan, head: CoupledHead | None, config: DecodingConfig
) -> Part:
    longest = None if head is None or config.decode == "independent" else head.block_length
    start = look.span[0]
    wanted, counts = look.open, look.counts
    if plan.chooses_first:
        wanted = torch.zeros_like(look.open)
        wanted[:, slice(*look.span)] = _chosen_by_prediction(canvas, look, prediction, config)
    windows = plan.cover(look, wanted, longest)
    width = longest or (int(windows.lengths.max()) if len(windows.rows) else 0)
    rows, positions = windows.rows.unsqueeze(1), windows.positions(width)
    absent = windows.absent(width) | ~canvas.valid[rows, positions]
    candidates = (wanted[rows, positions]) & ~absent
    counts = candidates.sum(1) if plan.chooses_first else counts[windows.rows]
    asked = prediction.rows(windows.rows).at(positions - start)
    masked = canvas.masked[rows, positions] & ~absent
    return Part(windows, positions, absent, canvas.tokens[rows, positions], masked, candidates, counts, asked)


def _chosen_by_prediction(canvas: Canvas, look: Look, prediction: Prediction, config: DecodingConfig) -> Tensor:
    """Choose positions by the denoiser's own prediction, before the circuit is asked: bool (B, stop - start)."""
    rows = torch.arange(canvas.batch_size, device=canvas.tokens.device)
    generators = canvas.generators(rows, torch.full_like(rows, -1))
    tokens = prediction.best()
    scores = SCORES[config.chosen_strategy](prediction, tokens, generators)
    candidates = look.open[:, slice(*look.span)]
    ranking = Ranking(scores, candidates, look.counts, lambda: prediction)
    return commit(ranking, config) & (look.counts > 0).unsqueeze(1)


def _uses_circuit(part: Part, head: CoupledHead | None, config: DecodingConfig) -> Tensor:
    if head is None or config.decode == "independent":
        return torch.zeros_like(part.windows.rows, dtype=torch.bool)
    threshold = head.activation_threshold if config.activation_threshold is None else config.activation_threshold
    present = (~part.absent).sum(1)
    is_below = part.masked.sum(1) < threshold * present.double()
    return is_below if threshold < 1 else torch.ones_like(is_below)


def _decode_part(canvas: Canvas, part: Part, head: CoupledHead | None, config: DecodingConfig) -> None:
    generators = canvas.generators(part.windows.rows, part.windows.starts)
    if head is None:
        _write(canvas, part, independent(part.prediction, config, generators), None, config, generators)
        return
    dist = head.distribution(
        part.prediction, part.tokens, part.masked, absent=part.absent if bool(part.absent.any()) else None
    )
    if config.decode == "any_order":
        _any_order(canvas, part, dist, config, generators)
        return
    proposal = PROPOSERS[config.decode](dist, config, generators)
    _write(canvas, part, proposal, dist, config, generators)


def _write(
    canvas: Canvas,
    part: Part,
    proposal: Proposal,
    dist: CoupledDistribution | None,
    config: DecodingConfig,
    generators: RowGenerators,
) -> Tensor:
    """Commit the most reliable proposals; return where, bool (W, n)."""
    committed, scores = _committed(part, proposal, dist, config, generators)
    canvas.write(part.windows.rows, part.positions, proposal.tokens, committed, scores)
    return committed


def _committed(
    part: Part,
    proposal: Proposal,
    dist: CoupledDistribution | None,
    config: DecodingConfig,
    generators: RowGenerators,
) -> tuple[Tensor, Tensor]:
    nothing_to_rank = bool((part.counts >= part.candidates.sum(1)).all()) and config.decode != "any_order"
    if nothing_to_rank and not config.remask:
        return part.candidates, torch.ones_like(part.candidates, dtype=torch.float32)
    beliefs = proposal.beliefs()
    scores = SCORES[config.chosen_strategy](beliefs, proposal.tokens, generators.at(2))
    dependence = None if dist is None else partial(dependence_of, dist)
    committed = commit(Ranking(scores, part.candidates, part.counts, lambda: beliefs, dependence), config)
    confidence = SCORES["low_confidence"](beliefs, proposal.tokens, generators) if config.remask else scores
    return committed, confidence


def _any_order(
    canvas: Canvas, part: Part, dist: CoupledDistribution, config: DecodingConfig, generators: RowGenerators
) -> None:
    """Commit one position after the other; each is given those before, without asking the denoiser again.

    With a threshold or a bound, all positions that these allow go together. A window is done when its own count is.
    """
    left, rounds = part.counts, 0
    while True:
        waits = (left <= 0).unsqueeze(1)
        one = replace(part, candidates=part.candidates & ~waits, counts=left.clamp(max=1))
        source = generators.at(3, rounds)
        proposal = PROPOSERS["any_order"](dist, config, source)
        committed = _write(canvas, one, proposal, dist, config, source)
        left = left - committed.sum(1)
        if not bool((left > 0).any()):
            return
        dist = dist.given(proposal.tokens, committed)
        part = replace(part, masked=part.masked & ~committed, candidates=part.candidates & ~committed)
        rounds += 1


def _take_back(canvas: Canvas, look: Look, share: float) -> None:
    """Mask the least certain tokens of the span again, a share of those written (ReMDM, Wang et al. 2025)."""
    inside = torch.zeros_like(canvas.masked)
    inside[:, slice(*look.span)] = True
    written = canvas.writable & ~canvas.masked & canvas.valid & inside & (look.counts > 0).unsqueeze(1)
    counts = (written.sum(1).double() * share).floor().long()
    scores = -canvas.confidence
    nothing = Prediction(log_q=canvas.confidence.unsqueeze(-1), vocab_size=1)
    ranking = Ranking(scores, written, counts, lambda: nothing)
    canvas.take_back(ranking.best(counts))
