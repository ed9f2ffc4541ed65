"""Denoisers of which the answer is known: the Bayes-optimal one of a world, and one that knows nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusion.denoisers.base import DenoiserSpec
from diffusion.denoisers.questions import check_question

if TYPE_CHECKING:
    from diffusion.testing.worlds.world import World

_IMPOSSIBLE = -1e4
"""In place of log 0, since logits have to be finite; its exponential is 0 in float64 too."""


class BayesDenoiser:
    """The exact posterior marginals ``p(x_i = v | visible tokens)`` of a world, as logits.

    A row's text begins at its first valid position, may be shorter than the world's L (the rest is then unseen), and
    positions that are not valid are unseen. The whole text is looked at, with or without a window. Each distinct
    question is answered once, on its own, and remembered: so a row's answer has the same bits in every batch.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.spec = world.spec
        self._answers: dict[tuple[int, ...], Tensor] = {}

    def logits(
        self,
        tokens: Tensor,  # shape: (B, L)
        *,
        valid: Tensor | None = None,  # shape: (B, L)
        t: Tensor | None = None,
        window: tuple[int, int] | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Return the log-probabilities of the clean tokens, float32 (B, L or stop - start, V); -1e4 for log 0.

        ``t`` and ``cache`` are not used: what is visible says everything.
        """
        start, stop = check_question(self.spec, tokens, valid, window)
        if not tokens.numel():
            return tokens.new_zeros(len(tokens), stop - start, self.spec.vocab_size, dtype=torch.float32)
        seen = tokens if valid is None else tokens.masked_fill(~valid, self.spec.mask_id)
        first = torch.zeros_like(tokens[:, 0]) if valid is None else valid.long().argmax(1)
        position = torch.arange(tokens.shape[1], device=tokens.device) - first.unsqueeze(1)  # of the text, (B, L)
        padded = torch.nn.functional.pad(seen, (0, self.world.length), value=self.spec.mask_id)
        columns = first.unsqueeze(1) + torch.arange(self.world.length, device=tokens.device)
        questions, row = torch.unique(padded.gather(1, columns), dim=0, return_inverse=True)
        answers = torch.stack([self._answer(tuple(question)) for question in questions.tolist()])
        window_of = position[:, start:stop].clamp_min(0)
        return answers.to(tokens.device)[row.unsqueeze(1), window_of]

    def _answer(self, question: tuple[int, ...]) -> Tensor:
        """Return log p(x_i = v | question), (L, V)."""
        if question not in self._answers:
            weights = self.world.posterior(torch.tensor(question))
            marginals = weights.new_zeros(self.world.length, self.spec.vocab_size)
            marginals.scatter_add_(1, self.world.support.t(), weights.expand(self.world.length, -1))
            self._answers[question] = marginals.log().clamp_min(_IMPOSSIBLE).float()
        return self._answers[question]


class UniformDenoiser:
    """A denoiser that knows nothing: all tokens are equally probable everywhere."""

    def __init__(self, spec: DenoiserSpec) -> None:
        self.spec = spec

    def logits(
        self,
        tokens: Tensor,  # shape: (B, L)
        *,
        valid: Tensor | None = None,  # shape: (B, L)
        t: Tensor | None = None,
        window: tuple[int, int] | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Return zeros, float32 (B, L or stop - start, V)."""
        start, stop = check_question(self.spec, tokens, valid, window)
        return torch.zeros(len(tokens), stop - start, self.spec.vocab_size, device=tokens.device)
