"""Which of the proposed tokens a step commits: a score per position, and a rule for how many.

A strategy is both. Scores of drawn tokens (LLaDA's "low-confidence remasking", Nie et al. 2025) change the law of what
is drawn: improbable draws wait, and are drawn again. Scores that do not look at the draw (Dream's entropy and margin,
Ye et al. 2025) keep it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits import RowGenerators
from diffusion.decoding.config import DecodingConfig, Strategy
from diffusion.prediction import Prediction

Score = Callable[[Prediction, Tensor, RowGenerators], Tensor]
"""From what is believed about positions, the tokens proposed, int64 (W, n), and random numbers, to (W, n): the higher
the sooner."""


def of_chosen(beliefs: Prediction, tokens: Tensor, generators: RowGenerators) -> Tensor:
    """Return the probability of the token that was chosen."""
    return beliefs.log_prob_of(tokens).exp()


def of_best(beliefs: Prediction, tokens: Tensor, generators: RowGenerators) -> Tensor:
    """Return the probability of the best token, whichever was chosen."""
    return beliefs.log_q.amax(-1).exp()


def of_margin(beliefs: Prediction, tokens: Tensor, generators: RowGenerators) -> Tensor:
    """Return the difference between the best and the second best probability."""
    best = beliefs.log_q.topk(min(2, beliefs.num_listed), -1).values.exp()
    return best[..., 0] - best[..., 1] if best.shape[-1] == 2 else best[..., 0]


def of_entropy(beliefs: Prediction, tokens: Tensor, generators: RowGenerators) -> Tensor:
    """Return the negative entropy, in nats."""
    return -entropies(beliefs)


def at_random(beliefs: Prediction, tokens: Tensor, generators: RowGenerators) -> Tensor:
    """Return uniform random numbers."""
    return generators.uniform(tokens.shape[1]).to(beliefs.log_q.dtype)


def entropies(beliefs: Prediction) -> Tensor:
    """Return the entropy of every position, (W, n), in nats."""
    log_p = beliefs.log_q
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)


SCORES: dict[Strategy, Score] = {
    "low_confidence": of_chosen,
    "threshold": of_chosen,
    "top_prob": of_best,
    "margin": of_margin,
    "entropy": of_entropy,
    "entropy_bound": of_entropy,
    "joint_entropy": of_entropy,
    "random": at_random,
}


@dataclass(frozen=True, eq=False)
class Ranking:
    """Positions of W windows with their scores, and what a rule may ask further.

    Attributes:
        scores: (W, n), the higher the sooner.
        candidates: bool (W, n), the positions that may be committed.
        counts: how many at least, int64 (W,).
        beliefs: what is believed about the positions; asked only by rules that need it.
        dependence: mutual information of pairs of positions, (W, n, n) in nats; asked only by rules that need it.
    """

    scores: Tensor
    candidates: Tensor
    counts: Tensor
    beliefs: Callable[[], Prediction]
    dependence: Callable[[], Tensor] | None = None

    @property
    def order(self) -> Tensor:
        """The positions, the best first; those that may not be committed come last: int64 (W, n)."""
        return self.scores.masked_fill(~self.candidates, -torch.inf).argsort(dim=-1, descending=True, stable=True)

    def best(self, counts: Tensor) -> Tensor:
        """Return the ``counts`` best candidates, int64 (W,), as bool (W, n)."""
        order = self.order
        rank = torch.empty_like(order)
        rank.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
        return (rank < counts.unsqueeze(-1)) & self.candidates


def commit(ranking: Ranking, config: DecodingConfig) -> Tensor:
    """Return which positions to commit, bool (W, n), by the rule of a strategy."""
    strategy = config.chosen_strategy
    if strategy == "threshold":
        return ranking.best(ranking.counts) | (ranking.candidates & (ranking.scores > config.threshold))
    if strategy == "entropy_bound":
        return ranking.best(_within_bound(ranking, config.entropy_bound))
    if strategy == "joint_entropy":
        return _jointly_certain(ranking, config.entropy_bound)
    return ranking.best(ranking.counts)


def _within_bound(ranking: Ranking, bound: float) -> Tensor:
    """Return how many of the most certain positions fit: their entropies but the largest sum to at most ``bound``.

    At least as many as are needed to end in time.

    That sum bounds what independent draws lose against joint ones (Ben-Hamu et al. 2025, arXiv 2505.24857).
    """
    ordered = entropies(ranking.beliefs()).gather(1, ranking.order)
    before = ordered.cumsum(1) - ordered  # ascending: the largest of the first k is the k-th
    fits = (before <= bound) & ranking.candidates.gather(1, ranking.order)
    return torch.maximum(fits.long().cumprod(1).sum(1), ranking.counts)


def _jointly_certain(ranking: Ranking, bound: float) -> Tensor:
    """Return positions whose joint entropy is at most ``bound``, greedily, and as many as are needed in any case.

    By the chain rule, each position adds its entropy given those before, which is at most ``H_i - max_j I(i; j)``. So
    a position that is coupled to a committed one costs little and goes with it.
    """
    beliefs = ranking.beliefs()
    own = entropies(beliefs)
    shared = torch.zeros(*own.shape, own.shape[1], dtype=own.dtype, device=own.device)
    if ranking.dependence is not None:
        shared = ranking.dependence().to(own.dtype)
    added, left = own.clone(), ranking.candidates.clone()
    chosen, total = torch.zeros_like(left), torch.zeros_like(own[:, 0])
    for number in range(own.shape[1]):
        cost, index = added.masked_fill(~left, torch.inf).min(1, keepdim=True)
        total = total + cost[:, 0]
        takes = left.any(1) & ((total <= bound) | (number < ranking.counts))
        if not bool(takes.any()):
            break
        here = torch.zeros_like(left).scatter(1, index, takes.unsqueeze(1))
        chosen |= here
        left &= ~here & takes.unsqueeze(1)
        informed = shared.gather(1, index.unsqueeze(2).expand(-1, -1, own.shape[1])).squeeze(1)
        added = torch.minimum(added, (own - informed).clamp_min(0.0))
    return chosen
