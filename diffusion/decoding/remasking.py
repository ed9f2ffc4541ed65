"""Remasking strategies: how reliable each position's prediction is, and so which positions are committed in a step.

A strategy turns a step's predictions into one score per position; the positions with the highest scores are committed,
the others stay masked. (LLaDA's "low-confidence remasking", Nie et al. 2025; Dream's entropy and margin, Ye et al.
2025.)
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from diffusion.errors import ArgumentError
from diffusion.prediction import Prediction

Strategy = Literal["low_confidence", "margin", "entropy", "random", "top_prob", "threshold"]


def reliability(
    strategy: Strategy,
    prediction: Prediction | Tensor,  # shape: (B, L, V)
    tokens: Tensor,  # shape: (B, L)
    *,
    generator: torch.Generator | None = None,
) -> Tensor:  # shape: (B, L)
    """Return a score per position, higher where committing is safer.

    Args:
        strategy: ``low_confidence`` and ``threshold``: probability of the chosen token; ``top_prob``: probability of
            the best token, whichever was chosen; ``margin``: best minus second best probability; ``entropy``: negative
            entropy, in nats; ``random``: uniform.
        prediction: normalised log-probabilities per position: a prediction, or a tensor (B, L, V).
        tokens: the chosen tokens, int64 (B, L).
        generator: for ``random``.

    Returns:
        (B, L).

    Raises:
        ArgumentError: an unknown strategy.
    """
    check_strategy(strategy)
    if isinstance(prediction, Tensor):
        prediction = Prediction(log_q=prediction, vocab_size=prediction.shape[-1])
    log_probs = prediction.log_q
    if strategy in ("low_confidence", "threshold"):
        return prediction.log_prob_of(tokens).exp()
    if strategy == "top_prob":
        return log_probs.amax(-1).exp()
    if strategy == "margin":
        best = log_probs.topk(min(2, log_probs.shape[-1]), -1).values.exp()
        return best[..., 0] - best[..., 1] if best.shape[-1] == 2 else best[..., 0]
    if strategy == "entropy":
        return (log_probs.exp() * log_probs.clamp_min(torch.finfo(log_probs.dtype).min)).sum(-1)
    return torch.rand(tokens.shape, generator=generator, device=tokens.device)


def choose_positions(
    scores: Tensor,  # shape: (B, L)
    masked: Tensor,  # shape: (B, L)
    counts: Tensor,  # shape: (B,)
    *,
    threshold: float | None = None,
) -> Tensor:  # shape: (B, L)
    """Return which masked positions to commit: the ``counts`` best ones of each sequence, bool (B, L).

    Args:
        scores: reliability, (B, L).
        masked: candidates, bool (B, L).
        counts: how many to commit, int64 (B,); at most as many as are masked.
        threshold: commit also every position whose score exceeds this.
    """
    ranked = scores.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(ranked)
    rank.scatter_(-1, ranked, torch.arange(scores.shape[-1], device=scores.device).expand_as(ranked))
    chosen = rank < counts.unsqueeze(-1)
    if threshold is not None:
        chosen = chosen | (scores > threshold)
    return chosen & masked


def check_strategy(strategy: str) -> None:
    """Raise ArgumentError unless ``strategy`` is a known one."""
    if strategy not in get_args(Strategy):
        raise ArgumentError(f"strategy: expected one of {', '.join(get_args(Strategy))}, got {strategy!r}")
