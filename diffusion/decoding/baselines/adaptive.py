"""Adaptive parallel decoding (Israel et al. 2025, arXiv 2506.00413): the beginning that two models agree on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from circuits import RowGenerators
from diffusion.decoding.baselines.base import DrawnDistribution, ModelHead
from diffusion.decoding.baselines.models import BlockModel
from diffusion.errors import ArgumentError
from diffusion.prediction import Prediction


class AdaptiveHead(ModelHead["AdaptiveDistribution"]):
    """Tokens of the prediction, from left to right, as far as a target drawn with the same random numbers agrees.

    The target of position i is ``q_i(v)^R p(v | x_0 .. x_i-1)^(1 - R)``, normalised, with a small autoregressive model
    p. Draft and target are the argmax of log-probabilities plus the *same* Gumbel noise. As published, the draft's
    tokens before the first disagreement are kept, and the first token in any case. With ``corrects``, the target's
    token at the first disagreement is kept too: then what is written has the target's law, which for R = 0 is p, while
    the published rule favours what both models like. How many tokens a step writes is decided here, not by a
    strategy; a step that has to write more takes the leftmost drafts.

    Args:
        model: p, see :class:`~.models.BlockModel`.
        mixture_weight: R, from 0 to 1; the greater, the more tokens are kept.
        corrects: whether the target's token at the first disagreement is kept.

    Raises:
        ArgumentError: an argument has a wrong type or value.
    """

    kind: ClassVar[str] = "adaptive"
    no_constraint: ClassVar[str | None] = "which cannot tell which beginnings can still be completed under its model"

    def __init__(self, model: BlockModel, *, mixture_weight: float = 0.5, corrects: bool = False) -> None:
        super().__init__(model)
        if not 0 <= mixture_weight <= 1:
            raise ArgumentError(f"mixture_weight: expected a number from 0 to 1, got {mixture_weight!r}")
        self.mixture_weight = mixture_weight
        self.corrects = corrects

    def _settings(self) -> dict[str, Any]:
        return {"mixture_weight": self.mixture_weight, "corrects": self.corrects}

    def _of_blocks(
        self, prediction: Prediction, tokens: Tensor, masked: Tensor, absent: Tensor | None
    ) -> AdaptiveDistribution:
        return AdaptiveDistribution(self, prediction, tokens, masked, absent)


@dataclass(frozen=True, eq=False)
class AdaptiveDistribution(DrawnDistribution):
    """Draws a draft and the target that judges it; see :class:`AdaptiveHead`."""

    head: AdaptiveHead

    def draw(self, temperature: float, generator: RowGenerators) -> Tensor:
        """Draw all tokens, int64 (W, L); :meth:`draw_accepted` also says which of them count."""
        return self.draw_accepted(temperature, generator)[0]

    def draw_accepted(self, temperature: float, generator: RowGenerators) -> tuple[Tensor, Tensor]:
        """Return the draft, corrected at the first disagreement or not, and which of its tokens are kept."""
        log_q = self.prediction.dense().double()
        noise = torch.zeros_like(log_q)
        if temperature > 0:
            uniform = generator.uniform(log_q.shape[1] * log_q.shape[2]).reshape(log_q.shape)
            noise = -(-uniform.clamp_min(2.0**-60).log()).clamp_min(2.0**-60).log() * temperature
        draft = torch.where(self.masked, (log_q + noise).argmax(-1), self.tokens)
        target = torch.where(self.masked, (self.target(draft) + noise).argmax(-1), self.tokens)
        agrees = (draft == target) | ~self.masked
        number = self.masked.cumsum(1)
        leading = agrees | (number == 1) if not self.head.corrects else agrees
        kept = leading.long().cumprod(1).bool()
        if not self.head.corrects:
            return draft, kept & self.masked
        first = ~agrees & (agrees.logical_not().cumsum(1) == 1)
        return torch.where(first, target, draft), (kept | first) & self.masked

    def target(self, draft: Tensor) -> Tensor:
        """Return the target's log-probabilities given a draft, (W, L, V)."""
        log_q = self.prediction.dense().double()
        log_p = self.head.model.log_conditionals(draft).detach().double()
        weight = self.head.mixture_weight
        mixed = weight * log_q.clamp_min(-1e9) + (1 - weight) * log_p.clamp_min(-1e9)
        ruled_out = log_q == -torch.inf if weight == 1 else (log_q == -torch.inf) | (log_p == -torch.inf)
        possible = ~ruled_out.all(-1, keepdim=True)
        mixed = torch.where(possible, mixed.masked_fill(ruled_out, -torch.inf), log_q)
        return torch.log_softmax(mixed, -1)
