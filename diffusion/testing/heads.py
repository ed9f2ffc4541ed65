"""Step laws of joint output layers whose own log-probabilities are exact: what a decoder with one of them does."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from diffusion.decoding.baselines import AdaptiveHead
from diffusion.decoding.joint import JointHead
from diffusion.denoisers.base import Denoiser
from diffusion.prediction import Prediction
from diffusion.testing.law import Masked, StepLaw, Tokens
from diffusion.testing.reference import Draws, Rule, possible_texts, step_of


def with_head(denoiser: Denoiser, head: JointHead, rule: Rule) -> StepLaw:
    """Return the step of decoding jointly with a head, at temperature 1, by enumerating all texts of the window.

    Unlike :mod:`~diffusion.testing.reference` this asks the head itself, so it says what a head does, and not whether
    it does it right.

    Args:
        denoiser: gives q.
        head: over all positions; its distributions have ``log_prob``.
        rule: what is committed, judged by the distribution's ``posterior``.
    """

    @torch.no_grad()
    def draws(tokens: np.ndarray, masked: np.ndarray) -> Iterator[Draws]:
        row, is_open = torch.from_numpy(tokens).unsqueeze(0), torch.from_numpy(masked).unsqueeze(0)
        prediction = Prediction.ask(denoiser, row)
        dist = head.distribution(prediction, row, is_open)
        texts = possible_texts((prediction.dense()[0] > -torch.inf).numpy(), tokens, masked)
        probs = dist.log_prob(torch.from_numpy(texts).unsqueeze(1))[:, 0].double().exp().numpy()
        judge = dist.posterior().dense()[0].double().exp().numpy()
        yield Draws(1.0, texts, probs / probs.sum(), judge)

    return step_of(draws, rule)


def with_adaptive_head(denoiser: Denoiser, head: AdaptiveHead) -> StepLaw:
    """Return the step of adaptive parallel decoding at temperature 1.

    With the same Gumbel noise, the probability that two distributions p and q both choose v is ``1 / sum_u max(p_u /
    p_v, q_u / q_v)``: so draft and target agree on each token with a probability that has a closed form. It is exact
    where a step need not write more than it accepts: with ``num_steps=None``, one step per position.

    Args:
        denoiser: gives q.
        head: over all positions, which are filled from left to right.
    """

    @torch.no_grad()
    def step_law(tokens: Tokens, masked: Masked, step: int) -> Iterator[tuple[float, Tokens, Masked]]:
        row = torch.tensor([tokens])
        prediction = Prediction.ask(denoiser, row)
        dist = head.distribution(prediction, row, torch.tensor([masked]))
        q = prediction.dense()[0].double().exp().numpy()
        start = masked.index(True)

        def follow(position: int, text: Tokens, prob: float) -> Iterator[tuple[float, Tokens, Masked]]:
            if position == len(text):
                yield prob, text, (False,) * len(text)
                return
            still_open = tuple(i >= position for i in range(len(text)))
            draft = torch.tensor([[0 if is_open else id for id, is_open in zip(text, still_open, strict=True)]])
            target = dist.target(draft)[0, position].exp().numpy()
            both = np.array([_both(q[position], target, v) for v in range(len(target))])
            if position == start and not head.corrects:
                both = q[position]  # the first token is kept in any case
            for v in np.flatnonzero(both).tolist():
                yield from follow(position + 1, (*text[:position], v, *text[position + 1 :]), prob * both[v])
            if head.corrects:
                done = tuple(i > position for i in range(len(text)))
                for v in np.flatnonzero(target - both > 1e-15).tolist():
                    yield prob * (target[v] - both[v]), (*text[:position], v, *text[position + 1 :]), done
            elif both.sum() < 1 - 1e-15:
                yield prob * (1 - both.sum()), text, still_open

        yield from follow(start, tokens, 1.0)

    return step_law


def _both(p: np.ndarray, q: np.ndarray, v: int) -> float:
    """Return the probability that the argmax of log p + Gumbel and of log q + the same Gumbel are both v."""
    if p[v] == 0 or q[v] == 0:
        return 0.0
    return float(1 / np.maximum(p / p[v], q / q[v]).sum())
