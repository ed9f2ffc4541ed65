"""A mixture of the plain prediction and of heads, weighed by the mask ratio.

    p_hat(x) = g_0(r) prod_i q_i(x_i) + sum_k g_k(r) p_hat_k(x),      g = softmax of log-weights, piecewise linear in r

Every head has a circuit, a calibration and conditioners of its own, so it says more than the components of one circuit
(:class:`~diffusion.conditioners.mixture_weights.MixtureWeights`), which share what they are multiplied with; it costs
as much as its heads together. With weights that were fitted well it is no worse than the best of them at any ratio.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from circuits import RowGenerators
from circuits.arguments import checked_count, checked_number
from circuits.precision import own_precision
from diffusion.conditioners.context import at_mask_ratio
from diffusion.errors import ArgumentError
from diffusion.head import CoupledHead
from diffusion.prediction import Prediction


class Examples(Protocol):
    """Blocks whose tokens are known: a batch of a :class:`~diffusion.training.logit_cache.LogitCache`."""

    @property
    def prediction(self) -> Prediction: ...  # noqa: D102
    @property
    def tokens(self) -> Tensor: ...  # noqa: D102
    @property
    def masked(self) -> Tensor: ...  # noqa: D102


class HeadMixture(nn.Module):
    """A mixture of the plain prediction and of fitted heads; a joint output layer like each of them.

    Draws, marginals and conditionals are exact at temperature 1. At another, the component is drawn from the weights to
    the power 1 / tau, and its tokens as it draws them at tau; at 0 it is the likeliest of the components' best texts.
    Under a constraint decode with one of the heads.

    Args:
        heads: K of them, over as many positions.
        vocab_size: V of the denoiser; None: that of the heads' circuits.
        num_knots: M >= 2; log-weights are given at M evenly spaced mask ratios from 0 to 1, and linear in between.

    Attributes:
        log_weights: (M, 1 + K), first those of the plain prediction; 0 at first.

    Raises:
        ArgumentError: there are no heads, or they do not fit together.
    """

    activation_threshold: ClassVar[float] = 1.0
    temperature: ClassVar[float] = 1.0
    top_k: ClassVar[int | None] = None

    def __init__(self, heads: Sequence[CoupledHead], *, vocab_size: int | None = None, num_knots: int = 9) -> None:
        super().__init__()
        if not isinstance(heads, Sequence) or not heads or not all(isinstance(one, CoupledHead) for one in heads):
            raise ArgumentError(f"heads: expected one or more df.CoupledHead, got {heads!r:.60}")
        if vocab_size is not None:
            checked_count("vocab_size", vocab_size)
        sizes = {(one.block_length, one.vocab_size if vocab_size is None else vocab_size) for one in heads}
        if len(sizes) > 1:
            raise ArgumentError(f"heads: expected as many positions and tokens in all of them, got {sorted(sizes)}")
        ((self.block_length, self.vocab_size),) = sizes
        self.heads = cast(Sequence[CoupledHead], nn.ModuleList(heads))
        knots = torch.zeros(checked_count("num_knots", num_knots, 2), 1 + len(heads), dtype=heads[0].pc.dtype)
        self.log_weights = nn.Parameter(knots.to(heads[0].pc.device))

    @property
    def needs_features(self) -> bool:
        """Whether one of the heads looks at the denoiser's hidden states."""
        return any(head.needs_features for head in self.heads)

    @own_precision
    def distribution(
        self,
        prediction: Prediction,
        tokens: Tensor,  # shape: (B, L)
        masked: Tensor,  # shape: (B, L)
        *,
        absent: Tensor | None = None,  # shape: (B, L)
    ) -> MixedDistribution:
        """Return the joint distribution of B blocks, see :meth:`diffusion.CoupledHead.distribution`."""
        masked = masked if absent is None else masked & ~absent
        parts = [head.distribution(prediction, tokens, masked, absent=absent) for head in self.heads]
        log_weights = at_mask_ratio(masked, self.log_weights)[0].log_softmax(1)
        known = ~masked if absent is None else ~masked & ~absent
        sure = replace(prediction, log_q=prediction.dense().to(log_weights), values=None).with_observed(tokens, known)
        plain = PlainDistribution(sure, tokens, masked, absent)
        return MixedDistribution((plain, *parts), log_weights, sure, tokens, masked)

    def fit(self, batches: Iterable[Examples], *, decay: float = 1e-3) -> HeadMixture:
        """Set the weights to those that are best in nats per masked token of some blocks; return the mixture.

        Args:
            batches: of blocks that the heads were not fitted on, such as ``[cache.batch(slice(None))]`` of a cache for
                validation.
            decay: of the squares of log-weights, which keeps those that no block speaks of equal.

        Raises:
            ArgumentError: a block is impossible under prediction and heads alike, none has masked tokens, or the decay
                is no number >= 0.
        """
        checked_number("decay", decay)
        scores, ratios = [], []
        with torch.no_grad():
            for batch in batches:
                parts = self.distribution(batch.prediction, batch.tokens, batch.masked).parts
                some = batch.masked.any(1)
                scores.append(torch.stack([part.log_prob(batch.tokens) for part in parts], 1)[some])
                ratios.append(batch.masked[some])
        if not any(map(len, ratios)):
            raise ArgumentError(
                "batches: expected blocks with masked tokens, got none; take those of a validation cache"
            )
        masked, given = torch.cat(ratios), torch.cat(scores)
        if not bool((given > -torch.inf).any(1).all()):
            raise ArgumentError(
                "batches: expected blocks that the prediction or a head holds possible, got some with probability 0 "
                "under all; leave them out"
            )
        fit_weights(self.log_weights, given, masked, decay=decay)
        return self


def mixed(
    log_weights: Tensor,  # shape: (M, K)
    given: Tensor,  # shape: (B, K)
    masked: Tensor,  # shape: (B, L)
) -> Tensor:
    """Return the log-probability of blocks under a mixture, (B,), in nats, from that under its K components.

    Args:
        log_weights: unnormalised, at M evenly spaced mask ratios from 0 to 1 and linear in between.
        given: log-probabilities under each component.
        masked: bool, whose mean is the mask ratio.
    """
    return (at_mask_ratio(masked, log_weights)[0].log_softmax(1) + given).logsumexp(1)


@torch.enable_grad()
def fit_weights(log_weights: Tensor, given: Tensor, masked: Tensor, *, decay: float) -> None:
    """Overwrite the log-weights of :func:`mixed` by those that are best in nats per masked token, by L-BFGS.

    Args:
        log_weights: a leaf that requires a gradient.
        given: of :func:`mixed`.
        masked: of :func:`mixed`; every block has masked tokens.
        decay: of the squares of log-weights.
    """
    optimizer = torch.optim.LBFGS([log_weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -(mixed(log_weights, given, masked) / masked.sum(1)).mean() + decay * log_weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)


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

    def draw(self, temperature: float, generator: RowGenerators) -> Tensor:
        """Draw every token on its own, int64 (B, L)."""
        log_q = self.prediction.log_q
        return log_q.argmax(-1) if temperature == 0 else generator.choose(log_q / temperature)


@dataclass(frozen=True, eq=False)
class MixedDistribution:
    """The mixture for each of B blocks; see :class:`HeadMixture`.

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
