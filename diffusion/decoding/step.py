"""One step: from a denoiser's prediction to tokens on the canvas."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuits import RowGenerators
from diffusion.coupling import CoupledDistribution
from diffusion.decoding.canvas import Canvas
from diffusion.decoding.commit import SCORES, Ranking, commit
from diffusion.decoding.config import MODES, DecodeMode, DecodingConfig
from diffusion.decoding.constraints import ConstrainedCoupledDistribution
from diffusion.decoding.constraints.coupled import under
from diffusion.decoding.controls import Control
from diffusion.decoding.joint import ConstrainableHead, JointDistribution, JointHead
from diffusion.decoding.plans import Look, Plan, Windows
from diffusion.decoding.proposers import Proposal, dependence_of, given
from diffusion.decoding.rounds import Outlook
from diffusion.head import CoupledHead
from diffusion.prediction import Prediction

if TYPE_CHECKING:
    from circuits import CircuitWeights

_BEFORE_WINDOWS = 1 << 40
"""A place for random numbers that no window begins at."""
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
    canvas: Canvas,
    look: Look,
    prediction: Prediction,
    plan: Plan,
    head: JointHead | None,
    config: DecodingConfig,
    *,
    weights: CircuitWeights | None = None,
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
        weights: of a :class:`~diffusion.head.CoupledHead`'s circuit, where they were read before.
    """
    canvas.num_calls += (look.counts > 0).long()
    part = _windows_of(canvas, look, prediction, plan, head, config)
    if not len(part.windows.rows):
        return
    uses = _uses_circuit(part, head, config)
    canvas.num_windows.index_add_(0, part.windows.rows, torch.ones_like(part.windows.rows))
    canvas.num_coupled.index_add_(0, part.windows.rows, uses.long())
    for turn in _turns(part.windows.rows, is_free=canvas.constraint is None):
        for chosen, coupled_head in ((turn & uses, head), (turn & ~uses, None)):
            if bool(chosen.any()):
                one = part if bool(chosen.all()) else part.select(chosen.nonzero().flatten())
                _decode_part(canvas, one, coupled_head, config, weights)
    if config.remask:
        _take_back(canvas, look, config.remask)


def _turns(rows: Tensor, *, is_free: bool) -> list[Tensor]:
    """Return which windows are decoded together: all of them, or, under a constraint, one of each row at a time."""
    if is_free:
        return [torch.ones_like(rows, dtype=torch.bool)]
    earlier = (rows.unsqueeze(1) == rows).tril(-1).sum(1)
    return [earlier == turn for turn in range(int(earlier.max()) + 1)]


def _windows_of(
    canvas: Canvas, look: Look, prediction: Prediction, plan: Plan, head: JointHead | None, config: DecodingConfig
) -> Part:
    longest = None if head is None or config.decode == "independent" else head.block_length
    start = look.span[0]
    wanted, counts = look.open, look.counts
    if plan.chooses_first:
        wanted = torch.zeros_like(look.open)
        wanted[:, slice(*look.span)] = _chosen_by_prediction(canvas, look, prediction, config)
    windows = plan.cover(look, wanted, canvas.valid, longest)
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
    seeds = canvas.generators(rows, torch.full_like(rows, _BEFORE_WINDOWS)).seeds
    generators = RowGenerators(seeds, offset=look.span[0] - canvas.origin)  # a position's number is its own
    tokens = prediction.best()
    scores = _scores(canvas, prediction, tokens, config, generators)
    candidates = look.open[:, slice(*look.span)]
    ranking = Ranking(scores, candidates, look.counts, lambda: prediction)
    return commit(ranking, config) & (look.counts > 0).unsqueeze(1)


def _uses_circuit(part: Part, head: JointHead | None, config: DecodingConfig) -> Tensor:
    if head is None or config.decode == "independent":
        return torch.zeros_like(part.windows.rows, dtype=torch.bool)
    threshold = head.activation_threshold if config.activation_threshold is None else config.activation_threshold
    present = (~part.absent).sum(1)
    share = part.masked.sum(1).double() / present  # of whole numbers: a ratio at the threshold is not below
    if config.reverse_activation:
        return share > threshold
    is_below = share < threshold
    return is_below if threshold < 1 else torch.ones_like(is_below)


def _decode_part(
    canvas: Canvas, part: Part, head: JointHead | None, config: DecodingConfig, weights: CircuitWeights | None
) -> None:
    rows, starts = part.windows.rows, part.windows.starts
    generators = canvas.generators(rows, starts - canvas.origin[rows])
    if head is None and canvas.constraint is None:
        turn = _Turn(canvas, part, config, generators)
        turn.write(turn.proposal("independent"))
        return
    dist = _distribution(canvas, part, head, weights)
    turn = _Turn(canvas, part, config, generators, dist)
    name = config.decode if head is not None else "joint"  # of independent tokens that the constraint ties together
    mode = MODES[name]
    if mode.one_by_one and isinstance(dist, CoupledDistribution) and turn.is_free and Outlook.serves(config):
        turn.write_one_by_one(dist)
    elif mode.one_by_one or (mode.each_alone and canvas.constraint is not None):
        turn.write_in_rounds(dist)
    else:
        turn.write(turn.proposal(name))


def _distribution(
    canvas: Canvas, part: Part, head: JointHead | None, weights: CircuitWeights | None
) -> JointDistribution:
    """Return the joint distribution of windows: the circuit, if there is one, under the constraint, if there is one."""
    absent = part.absent if bool(part.absent.any()) else None
    constraint = canvas.constraint
    told: dict[str, Any] = {"weights": weights} if isinstance(head, CoupledHead) else {}
    if constraint is None:
        assert head is not None
        return head.distribution(part.prediction, part.tokens, part.masked, absent=absent, **told)
    rows, windows = part.windows.rows, part.windows
    start, accept = canvas.reach().ends(rows, windows.starts, windows.starts + windows.lengths)
    reads = canvas.reads[rows.unsqueeze(1), part.positions] & ~part.absent
    options: dict[str, Any] = {"start": start, "accept": accept, "reads": reads}
    if head is None:
        asked = part.prediction, part.tokens.masked_fill(part.absent, 0), part.masked
        return ConstrainedCoupledDistribution.independent(*asked, constraint.automaton, **options)
    prediction = part.prediction if head.top_k is None else constraint.listed(part.prediction, head.top_k)
    assert isinstance(head, CoupledHead | ConstrainableHead)  # checked before the first call
    dist = head.distribution(prediction, part.tokens, part.masked, absent=absent, keeps_list=True, **told)
    constrained: JointDistribution = under(dist, constraint.automaton, **options)
    return constrained


@dataclass(frozen=True, eq=False)
class _Turn:
    """Windows of one step that are decoded together, on their own or by their joint distribution."""

    canvas: Canvas
    part: Part
    config: DecodingConfig
    generators: RowGenerators
    dist: JointDistribution | None = None

    @property
    def is_free(self) -> bool:
        """Whether nothing but the distribution has a say in what is drawn and in its scores."""
        has_scores = any(type(control).scores is not Control.scores for control in self.canvas.controls)
        return self.canvas.constraint is None and self.canvas.teacher is None and not has_scores

    def proposal(self, mode: DecodeMode) -> Proposal:
        """Return where tokens come from: the teacher, if there is one, or a draw."""
        part, source = self.part, self.part.prediction if self.dist is None else self.dist
        if self.canvas.teacher is not None:
            return given(self.canvas.teacher.tokens[part.windows.rows.unsqueeze(1), part.positions], source, mode)
        proposal: Proposal = MODES[mode].propose(source, self.config, self.generators)
        return proposal

    def write(self, proposal: Proposal) -> Tensor:
        """Commit the most reliable proposals; return where, bool (W, n)."""
        canvas, part = self.canvas, self.part
        is_filtered = canvas.constraint is not None and MODES[self.config.decode].each_alone
        committed, scores = self._committed(proposal, needs_scores=is_filtered or self.config.remask > 0)
        if is_filtered:
            committed = self._compatible(proposal, committed, scores)
        canvas.write(part.windows.rows, part.positions, proposal.tokens, committed, scores)
        if proposal.log_prob is not None:
            canvas.count(part.windows.rows, proposal.log_prob(committed))
        return committed

    def _compatible(self, proposal: Proposal, committed: Tensor, scores: Tensor) -> Tensor:
        """Leave out what was drawn on its own and cannot be written together with the more reliable ones."""
        canvas, part = self.canvas, self.part
        assert canvas.constraint is not None
        rows, windows = part.windows.rows, part.windows
        start, accept = canvas.reach().ends(rows, windows.starts, windows.starts + windows.lengths)
        order = scores.masked_fill(~committed, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        ranked = torch.where(committed.gather(1, order), order, -1)
        reads = canvas.reads[rows.unsqueeze(1), part.positions] & ~part.absent
        return canvas.constraint.commit(
            proposal.tokens, part.tokens, part.masked, ranked, reads=reads, start=start, accept=accept
        )

    def _committed(self, proposal: Proposal, *, needs_scores: bool) -> tuple[Tensor, Tensor]:
        part, config, generators = self.part, self.config, self.generators
        nothing_to_rank = bool((part.counts >= part.candidates.sum(1)).all())
        if nothing_to_rank and not needs_scores:
            return part.candidates, torch.ones_like(part.candidates, dtype=torch.float32)
        beliefs = proposal.beliefs()
        if proposal.accepted is None:
            scores = _scores(self.canvas, beliefs, proposal.tokens, config, generators.at(2))
            dependence = None if self.dist is None else partial(dependence_of, self.dist)
            committed = commit(Ranking(scores, part.candidates, part.counts, lambda: beliefs, dependence), config)
        else:
            scores = SCORES["low_confidence"](beliefs, proposal.tokens, generators)
            from_left = part.candidates.cumsum(1) <= part.counts.unsqueeze(1)
            committed = part.candidates & (proposal.accepted | from_left)
        confidence = SCORES["low_confidence"](beliefs, proposal.tokens, generators) if config.remask else scores
        return committed, confidence

    def write_one_by_one(self, dist: CoupledDistribution) -> None:
        """Commit positions one after the other, as :meth:`write_in_rounds`, looking at few of them each time."""
        part, outlook = self.part, Outlook(dist, self.config)
        left, candidates = part.counts, part.candidates
        for number in itertools.count():
            turn = outlook.turn(dist, candidates & (left > 0).unsqueeze(1), self.generators.at(3, number))
            ranking = Ranking(turn.scores, turn.scores > -torch.inf, left, dist.posterior)
            committed = ranking.best(left.clamp(0, 1))
            self.canvas.write(part.windows.rows, part.positions, turn.tokens, committed, turn.scores)
            left, candidates = left - committed.sum(1), candidates & ~committed
            if not bool(((left > 0) & candidates.any(1)).any()):
                return
            previous, dist = dist, dist.given(turn.tokens, committed)
            outlook.after(dist, previous)

    def write_in_rounds(self, dist: JointDistribution) -> None:
        """Commit positions in rounds; each is given those before, without asking the denoiser again.

        In ``any_order`` one position a round; with a threshold or a bound, all positions that these allow go together.
        In ``marginal`` all of them, and in the next round those that the constraint refused. A window is done when its
        own count is.
        """
        part, left = self.part, self.part.counts
        most = 1 if MODES[self.config.decode].one_by_one else None
        for number in itertools.count():
            waits = (left <= 0).unsqueeze(1)
            now = replace(part, candidates=part.candidates & ~waits, counts=left.clamp(0, most))
            one = replace(self, part=now, generators=self.generators.at(3, number), dist=dist)
            proposal = one.proposal(self.config.decode)
            committed = one.write(proposal)
            is_over = self.canvas.ended[part.windows.rows]  # a teacher's text that cannot be written: nothing follows
            left = (left - committed.sum(1)).masked_fill(is_over, 0)
            committed = committed & ~is_over.unsqueeze(1)
            if not bool((left > 0).any()):
                return
            dist = dist.given(proposal.tokens, committed)
            tokens = torch.where(committed, proposal.tokens, part.tokens)
            masked, candidates = part.masked & ~committed, part.candidates & ~committed
            part = replace(part, tokens=tokens, masked=masked, candidates=candidates)


def _scores(
    canvas: Canvas, beliefs: Prediction, tokens: Tensor, config: DecodingConfig, generators: RowGenerators
) -> Tensor:
    """Score positions by the strategy, and by the controls that have a say in it, (W, n)."""
    scores = SCORES[config.chosen_strategy](beliefs, tokens, generators)
    for control in canvas.controls:
        scores = control.scores(scores, tokens, canvas.spec)
    return scores


def _take_back(canvas: Canvas, look: Look, share: float) -> None:
    """Mask the least certain tokens of the span again, a share of those written (ReMDM, Wang et al. 2025)."""
    inside = torch.zeros_like(canvas.masked)
    inside[:, slice(*look.span)] = True
    goes_on = (look.counts > 0) & ~look.is_last
    written = canvas.writable & ~canvas.masked & canvas.valid & inside & goes_on.unsqueeze(1)
    counts = (written.sum(1).double() * share).floor().long()
    scores = -canvas.confidence
    nothing = Prediction(log_q=canvas.confidence.unsqueeze(-1), vocab_size=1)
    ranking = Ranking(scores, written, counts, lambda: nothing)
    canvas.take_back(ranking.best(counts))
