"""Mode ``any_order``, one position after the other: which goes next, found without looking at all of them.

A token that is committed moves the marginals of the others, far ones hardly at all. How far is known before a marginal
is computed: at most as far, in total variation, as the shares of the circuit's input units at that position moved. So a
position's score is at most what it was plus what that distance allows. Positions are looked at from the highest of
these bounds down until none that is left can win (Minoux 1978, "Accelerated greedy algorithms"). The choice is the same
as if all had been looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits import RowGenerators
from diffusion.coupling import CoupledDistribution
from diffusion.decoding.commit import SCORES, at_random, of_best
from diffusion.decoding.config import DecodingConfig, Strategy
from diffusion.decoding.proposers import drawn

_ROUNDING = 1e-5
"""What float32 may add to a distance, with room to spare."""
_CHEAP = 1 << 22
"""So many weights are read in one go in less time than it takes to find out which are needed."""


def _of_top(score: Tensor, distance: Tensor, num_tokens: int) -> Tensor:
    return score + distance


def _of_difference(score: Tensor, distance: Tensor, num_tokens: int) -> Tensor:
    return score + 2 * distance


def _of_entropy(score: Tensor, distance: Tensor, num_tokens: int) -> Tensor:
    """An entropy changes by at most ``d log(k - 1) - d log d - (1 - d) log(1 - d)`` (Fannes 1973, Audenaert 2007)."""
    d = distance.clamp_max(1 - 1 / num_tokens)  # there the bound is log k, and stays it
    change = d * torch.tensor(max(1, num_tokens - 1)).log() + torch.special.entr(d) + torch.special.entr(1 - d)
    return (score + change).clamp_max(0.0)


_BOUNDS: dict[Strategy, Callable[[Tensor, Tensor, int], Tensor]] = {
    "low_confidence": _of_top,
    "top_prob": _of_top,
    "margin": _of_difference,
    "entropy": _of_entropy,
    "random": _of_top,  # is known without a look
}
"""The greatest score that a strategy can give, from an earlier score, how far beliefs moved, and the number of tokens.

Of ``low_confidence`` the earlier score is the best token's: the token that is drawn may be another each time."""


@dataclass(frozen=True, eq=False)
class Turn:
    """One round: what was drawn where somebody looked, int64 (W, n), 0 elsewhere, and its scores, -inf elsewhere."""

    tokens: Tensor
    scores: Tensor


class Outlook:
    """What is known of the scores of W windows' positions without another look, where :meth:`serves` is True."""

    def __init__(self, dist: CoupledDistribution, config: DecodingConfig) -> None:
        self.config = config
        self.strategy = config.chosen_strategy
        self.score = torch.full(dist.masked.shape, torch.inf, dtype=dist.pc.dtype, device=dist.masked.device)
        self.moved = torch.zeros_like(self.score)
        num_units = max(node.num_units for node in dist.pc.circuit.inputs)
        self.looks_everywhere = self.score.numel() * dist.prediction.num_listed * num_units <= _CHEAP

    @staticmethod
    def serves(config: DecodingConfig) -> bool:
        """Whether a strategy commits the one position of the highest score, and that score can be bounded."""
        return config.chosen_strategy in _BOUNDS and not config.remask

    def after(self, dist: CoupledDistribution, previous: CoupledDistribution) -> None:
        """Take notice of what became known: ``dist`` is ``previous`` given more tokens."""
        if not self.looks_everywhere:
            self.moved += dist.distance(previous) + _ROUNDING

    def turn(self, dist: CoupledDistribution, candidates: Tensor, generators: RowGenerators) -> Turn:
        """Look at candidates, bool (W, n), until the best one of every window is among those looked at."""
        turn = Turn(torch.zeros_like(dist.tokens), torch.full_like(self.score, -torch.inf))
        if self.looks_everywhere:
            self._look(dist, candidates, generators, turn)
            return turn
        bound = _BOUNDS[self.strategy](self.score, self.moved, dist.prediction.num_listed)
        if self.strategy == "random":
            bound = at_random(dist.prediction, dist.tokens, generators.at(2))
        bound = bound.masked_fill(~candidates, -torch.inf)
        where = candidates & (bound == bound.amax(1, keepdim=True))
        while bool(where.any()):
            self._look(dist, where, generators, turn)
            bound = bound.masked_fill(where, -torch.inf)
            where = (bound > -torch.inf) & (bound >= turn.scores.amax(1, keepdim=True))
        return turn

    def _look(self, dist: CoupledDistribution, where: Tensor, generators: RowGenerators, turn: Turn) -> None:
        row, position = where.nonzero(as_tuple=True)
        beliefs = dist.posterior_at(row, position)
        of_draws, of_scores = (  # a position's numbers are its own, whichever others are looked at
            RowGenerators(source.seeds[row], offset=position) for source in (generators, generators.at(2))
        )
        tokens = drawn(beliefs, self.config.temperature, of_draws)
        score = SCORES[self.strategy](beliefs, tokens, of_scores)
        turn.tokens[where], turn.scores[where] = tokens.squeeze(1), score.squeeze(1)
        best = of_best(beliefs, tokens, of_scores) if self.strategy == "low_confidence" else score
        self.score[where], self.moved[where] = best.squeeze(1), 0.0
