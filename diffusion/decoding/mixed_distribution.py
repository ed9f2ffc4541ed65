"""The distributions of a mixture of heads: the plain prediction as a joint distribution, and the mixture of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from circuits import RowGenerators
from circuits.queries import DeterministicAutomaton
from diffusion.decoding.constraints.coupled import ConstrainedCoupledDistribution, under
from diffusion.errors import ImpossibleEvidenceError
from diffusion.prediction import Prediction
from diffusion.vocabulary import MappedDistribution


@dataclass(frozen=True, eq=False)
class PlainDistribution:
    """A denoiser's prediction as a joint distribution: tokens are independent.

    Attributes:
        prediction: of all tokens, sure of those that are observed.
        tokens: int64 (B, L).
        masked: bool (B, L).
        absent: bool (B, L), positions that a block does not have, or None.
    """

    prediction: Prediction
    tokens: Tensor
    masked: Tensor
    absent: Tensor | None = None

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probabilities of blocks, int64 (*sample_shape, B, L): (*sample_shape, B), in nats."""
        each = [self.prediction.log_prob_of(one) for one in value.reshape(-1, *self.tokens.shape)]
        terms = torch.stack(each).unflatten(0, value.shape[:-2] or (1,))
        total = (terms if self.absent is None else terms.masked_fill(self.absent, 0.0)).sum(-1)
        return total.reshape(value.shape[:-1])

    def log_prob_at(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return that of tokens at some positions, (B,)."""
        here = positions & self.masked
        return self.prediction.log_prob_of(tokens.masked_fill(~here, 0)).masked_fill(~here, 0.0).sum(1)

    def given(self, tokens: Tensor, observed: Tensor) -> PlainDistribution:
        """Return the distribution given more tokens."""
        here = observed & self.masked
        sure = self.prediction.with_observed(tokens, here)
        return replace(self, prediction=sure, tokens=torch.where(here, tokens, self.tokens), masked=self.masked & ~here)

    def posterior(self) -> Prediction:
        """Return the prediction."""
        return self.prediction

    def given_latents(self, generator: RowGenerators | None = None, *, temperature: float = 1.0) -> Prediction:
        """Return 0 for every token: there are no latents, and the prediction is all."""
        return replace(self.prediction, log_q=torch.zeros_like(self.prediction.log_q))

    def under(self, automaton: DeterministicAutomaton, **options: Any) -> ConstrainedCoupledDistribution:
        """Return the distribution given that an automaton accepts; see :meth:`ConstrainedCoupledDistribution.under`."""
        tokens = self.tokens if self.absent is None else self.tokens.masked_fill(self.absent, 0)
        return ConstrainedCoupledDistribution.independent(self.prediction, tokens, self.masked, automaton, **options)

    def draw(self, temperature: float, generator: RowGenerators) -> Tensor:
        """Draw every token on its own, int64 (B, L)."""
        log_q = self.prediction.log_q
        return log_q.argmax(-1) if temperature == 0 else generator.choose(log_q / temperature)


@dataclass(frozen=True, eq=False)
class MixedDistribution:
    """The mixture for each of B blocks; see :class:`~diffusion.decoding.head_mixture.HeadMixture`.

    Attributes:
        parts: the components: the prediction, and the heads' distributions.
        log_weights: (B, 1 + K), normalised.
        prediction: the denoiser's, of all tokens, sure of those that are observed.
        tokens: int64 (B, L).
        masked: bool (B, L).
    """

    parts: Sequence[Any]
    log_weights: Tensor
    prediction: Prediction
    tokens: Tensor
    masked: Tensor

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probabilities of blocks, int64 (*sample_shape, B, L): (*sample_shape, B), in nats."""
        return torch.logsumexp(torch.stack([part.log_prob(value) for part in self.parts], -1) + self.log_weights, -1)

    def posterior(self) -> Prediction:
        """Return the exact marginals."""
        each = torch.stack([part.posterior().dense() for part in self.parts], 1)
        return replace(self.prediction, log_q=(each + self.log_weights[:, :, None, None]).logsumexp(1), values=None)

    def given(self, tokens: Tensor, observed: Tensor) -> MixedDistribution:
        """Return the mixture given more tokens: components that foresaw them gain."""
        here = observed & self.masked
        foreseen = torch.stack([part.log_prob_at(tokens, here) for part in self.parts], 1)
        ruled_out = (foreseen == -torch.inf).all(1, keepdim=True)  # by all: they weigh what they did, as heads go on
        foreseen = foreseen.masked_fill(ruled_out, 0.0)
        agrees = here.unsqueeze(2) & (foreseen > -torch.inf).unsqueeze(1)  # what ruled them out has no weight any more
        return replace(
            self,
            parts=tuple(part.given(tokens, agrees[..., k]) for k, part in enumerate(self.parts)),
            log_weights=torch.log_softmax(self.log_weights + foreseen, 1),
            prediction=self.prediction.with_observed(tokens, here),
            tokens=torch.where(here, tokens, self.tokens),
            masked=self.masked & ~here,
        )

    def under(
        self,
        automaton: DeterministicAutomaton,
        *,
        start: Tensor,  # shape: (B, S)
        accept: Tensor,  # shape: (B, S)
        reads: Tensor,  # shape: (B, L)
    ) -> MixedDistribution:
        """Return the mixture given that an automaton accepts: components that foresaw it gain.

        Arguments are those of :meth:`ConstrainedCoupledDistribution.under`.

        Raises:
            ImpossibleEvidenceError: no component holds an accepted text possible, for some block.
        """
        options: dict[str, Any] = {"start": start, "accept": accept, "reads": reads}
        parts, log_acceptance = zip(*(self._part_under(part, automaton, options) for part in self.parts), strict=True)
        foreseen = self.log_weights + torch.stack(log_acceptance, 1).to(self.log_weights)
        if bool((foreseen == -torch.inf).all(1).any()):
            raise ImpossibleEvidenceError(
                "constraint: prediction and heads rule out every accepted text for some blocks; allow more texts or "
                "more tokens, or give the circuits no zero weights"
            )
        return replace(self, parts=parts, log_weights=torch.log_softmax(foreseen, 1))

    @staticmethod
    def _part_under(part: Any, automaton: DeterministicAutomaton, options: dict[str, Any]) -> tuple[Any, Tensor]:
        """Return a component given acceptance, with the log-probability of that; where that is -inf, it is as it was.

        Such a component has no weight, but all of them are drawn from.
        """
        constrained = under(part, automaton, **options)
        of_categories: Any = constrained.of_categories if isinstance(constrained, MappedDistribution) else constrained
        log_acceptance: Tensor = of_categories.log_acceptance
        never = (log_acceptance == -torch.inf).unsqueeze(1)
        if bool(never.any()):
            free = {"reads": options["reads"] & ~never, "accept": options["accept"] | never}
            constrained = under(part, automaton, **{**options, **free})
        return constrained, log_acceptance

    def draw(self, temperature: float, generator: RowGenerators) -> Tensor:
        """Draw a component, and all tokens together as it does, int64 (B, L)."""
        drawn = torch.stack([part.draw(temperature, generator.at(1 + k)) for k, part in enumerate(self.parts)])
        if temperature == 0:
            component = self.log_prob(drawn).argmax(0)
        else:
            component = generator.at(0).choose(self.log_weights / temperature)
        return drawn.take_along_dim(component.view(1, -1, 1), 0).squeeze(0)

    def given_latents(self, generator: RowGenerators | None = None, *, temperature: float = 1.0) -> Prediction:
        """Choose component and latents; return what the tokens' factors are beside the prediction."""
        if generator is None:
            generator = RowGenerators(torch.randint(2**62, (len(self.tokens),), device=self.tokens.device))
        scores = self.log_weights if temperature == 0 else self.log_weights / temperature
        component = scores.argmax(1) if temperature == 0 else generator.at(0).choose(scores)
        each = []
        for k, part in enumerate(self.parts):
            latents = part.given_latents(generator.at(1 + k), temperature=temperature)
            each.append(latents.dense() + part.prediction.dense())
        chosen = torch.stack(each).take_along_dim(component.view(1, -1, 1, 1), 0).squeeze(0)
        own = self.prediction.dense()
        factors = torch.where(own > -torch.inf, chosen - own.masked_fill(own == -torch.inf, 0.0), -torch.inf)
        return Prediction(log_q=factors, vocab_size=self.prediction.vocab_size)
