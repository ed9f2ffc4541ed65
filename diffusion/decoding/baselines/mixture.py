"""A mixture of products that depends on the context (the family of Di4C, Hayakawa et al. 2024, arXiv 2410.08709)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from circuits import RowGenerators
from circuits.queries import DeterministicAutomaton
from diffusion.decoding.baselines.base import NetworkHead
from diffusion.decoding.baselines.constrained_mixture import ConstrainedMixture
from diffusion.decoding.baselines.encoder import BlockEncoder
from diffusion.prediction import Prediction


class MixtureHead(NetworkHead["MixtureDistribution"]):
    """``sum_k w_k prod_i p_k,i(x_i)``, whose weights and factors a small network makes of prediction and block.

    The factors correct ``log q_i``; a latent shared by all positions ties them together. Everything about it is exact:
    log-probabilities, marginals, conditionals. Train it with :func:`~.fit.fit_conditional`. What is tempered is the
    explanation, component and tokens together, as for a circuit.

    Args:
        vocab_size: V.
        block_length: L.
        num_components: K.
        width: of the network.
        seed: of its first weights.

    Raises:
        ArgumentError: an argument is no positive integer.
    """

    kind: ClassVar[str] = "mixture"
    modes: ClassVar[frozenset[str]] = frozenset({"latent", "marginal", "any_order", "joint"})
    from_left: ClassVar[bool] = False

    def __init__(
        self, vocab_size: int, block_length: int, num_components: int, *, width: int = 64, seed: int = 0
    ) -> None:
        sizes = {"vocab_size": vocab_size, "block_length": block_length, "width": width}
        super().__init__(**sizes, num_components=num_components)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = BlockEncoder(vocab_size, block_length, width)
            self.components = nn.Parameter(torch.randn(num_components, block_length, width))
            self.output = nn.Linear(width, vocab_size)
            self.weights = nn.Linear(width, num_components)

    def _of_blocks(
        self, prediction: Prediction, tokens: Tensor, masked: Tensor, absent: Tensor | None
    ) -> MixtureDistribution:
        features = self.encoder(prediction, tokens, masked, absent)
        hidden = torch.tanh(features.unsqueeze(1) + self.components)  # (W, K, L, width)
        log_leaves = torch.log_softmax(prediction.dense().unsqueeze(1) + self.output(hidden), -1)
        log_weights = torch.log_softmax(self.weights(features.mean(1)), -1)
        unknown = masked if absent is None else masked | absent
        return MixtureDistribution(log_weights, log_leaves, prediction, tokens, unknown, absent)._made_sure()


@dataclass(frozen=True, eq=False)
class MixtureDistribution:
    """A mixture of products for each of W blocks; see :class:`MixtureHead`.

    Attributes:
        log_weights: (W, K).
        log_leaves: (W, K, L, V).
        prediction: the denoiser's.
        tokens: int64 (W, L).
        masked: bool (W, L), the positions that are not observed.
        absent: bool (W, L), positions that a block does not have, or None.
    """

    log_weights: Tensor
    log_leaves: Tensor
    prediction: Prediction
    tokens: Tensor
    masked: Tensor
    absent: Tensor | None = None

    def under(self, automaton: DeterministicAutomaton, **ends: Tensor) -> ConstrainedMixture:
        """Return the mixture given that an automaton accepts the blocks, exact; see :class:`ConstrainedMixture`."""
        return ConstrainedMixture(self, automaton, **ends)

    def _made_sure(self) -> MixtureDistribution:
        """Return it with factors that are sure of the observed tokens."""
        sure = torch.full_like(self.log_leaves, -torch.inf)
        sure = sure.scatter(3, self.tokens[:, None, :, None].expand(*sure.shape[:3], 1), 0.0)
        return replace(
            self,
            log_leaves=torch.where(self.masked[:, None, :, None], self.log_leaves, sure),
            prediction=self.prediction.with_observed(self.tokens, ~self.masked),
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probabilities of blocks, int64 (*sample_shape, W, L): (*sample_shape, W), in nats."""
        index = value.unsqueeze(-2).unsqueeze(-1)
        leaves = self.log_leaves.expand(*value.shape[:-2], *self.log_leaves.shape)
        terms = leaves.gather(-1, index.expand(*leaves.shape[:-1], 1)).squeeze(-1)
        if self.absent is not None:
            terms = terms.masked_fill(self.absent.unsqueeze(1), 0.0)
        return torch.logsumexp(self.log_weights + terms.sum(-1), -1)

    def draw(self, temperature: float, generator: RowGenerators) -> Tensor:
        """Draw component and tokens together to the power 1 / tau, int64 (W, L)."""
        return self._explanation(temperature, generator)[1]

    def given_latents(self, generator: RowGenerators | None = None, *, temperature: float = 1.0) -> Prediction:
        """Choose the components; return ``log (p_k,i / q_i)``, which times the prediction are the factors."""
        if generator is None:
            generator = RowGenerators(torch.randint(2**62, (len(self.tokens),), device=self.tokens.device))
        leaves = self._explanation(temperature, generator)[0]
        log_q = self.prediction.dense()
        return Prediction(
            log_q=torch.where(log_q > -torch.inf, leaves - log_q, -torch.inf), vocab_size=leaves.shape[-1]
        )

    def _explanation(self, temperature: float, generator: RowGenerators) -> tuple[Tensor, Tensor]:
        """Return the factors of the chosen component, (W, L, V), and the tokens drawn from them."""
        if temperature == 0:
            best = self.log_weights + self._summed(self.log_leaves.amax(-1))
            leaves = self._of(best.argmax(1))
            return leaves, leaves.argmax(-1)
        sharpened = self.log_leaves / temperature
        scores = self.log_weights / temperature + self._summed(sharpened.logsumexp(-1))
        leaves = self._of(generator.at(4).choose(scores))
        return leaves, generator.at(5).choose(leaves / temperature)

    def _of(self, component: Tensor) -> Tensor:
        return self.log_leaves.take_along_dim(component[:, None, None, None], 1).squeeze(1)

    def _summed(self, terms: Tensor) -> Tensor:
        return (terms if self.absent is None else terms.masked_fill(self.absent.unsqueeze(1), 0.0)).sum(-1)

    @cached_property
    def _marginals(self) -> Tensor:
        return torch.logsumexp(self.log_weights[:, :, None, None] + self.log_leaves, 1)

    def posterior(self) -> Prediction:
        """Return the exact marginals."""
        return replace(self.prediction, log_q=self._marginals, values=None)

    def given(self, tokens: Tensor, observed: Tensor) -> MixtureDistribution:
        """Return the mixture given more tokens: components that foresaw them gain."""
        observed = observed & self.masked
        here = self.log_leaves.gather(3, tokens[:, None, :, None].expand(*self.log_leaves.shape[:3], 1)).squeeze(3)
        evidence = here.masked_fill(~observed.unsqueeze(1), 0.0).sum(-1)
        return replace(
            self,
            log_weights=torch.log_softmax(self.log_weights + evidence, -1),
            tokens=torch.where(observed, tokens, self.tokens),
            masked=self.masked & ~observed,
        )._made_sure()
