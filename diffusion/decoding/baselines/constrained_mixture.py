"""A mixture of products under a constraint: every component is a chain, whose share is how probable it keeps it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuits import RowGenerators
from circuits.queries import DeterministicAutomaton
from diffusion.decoding.constraints import ConstrainedCoupledDistribution
from diffusion.errors import ImpossibleEvidenceError
from diffusion.prediction import Prediction

if TYPE_CHECKING:
    from diffusion.decoding.baselines.mixture import MixtureDistribution


@dataclass(frozen=True, eq=False)
class ConstrainedMixture:
    """``p(x | A) = sum_k w_k Z_k p_k(x | A) / sum_k w_k Z_k`` for W blocks, with ``Z_k = p_k(A)``: exact.

    Attributes:
        mixture: without the constraint.
        automaton: over the V tokens.
        start: in which of its states the blocks may begin, bool (W, S).
        accept: in which they may end, bool (W, S).
        reads: which positions it reads, bool (W, L).
    """

    mixture: MixtureDistribution
    automaton: DeterministicAutomaton
    start: Tensor
    accept: Tensor
    reads: Tensor

    @property
    def prediction(self) -> Prediction:
        """The denoiser's, sure of the tokens that are observed."""
        return self.mixture.prediction

    @property
    def masked(self) -> Tensor:
        """The positions that are not observed, bool (W, L)."""
        return self.mixture.masked

    def draw(self, temperature: float, generator: RowGenerators) -> Tensor:
        """Draw component and accepted tokens together to the power 1 / tau, int64 (W, L)."""
        index = self._component(temperature, generator)
        return self._of(index, temperature or 1.0).draw(1.0 if temperature else 0.0, generator.at(5))

    def given_latents(self, generator: RowGenerators | None = None, *, temperature: float = 1.0) -> Prediction:
        """Choose component and path; return ``log (p_k,i / q_i)``, -inf where the path forbids a token."""
        if generator is None:
            generator = RowGenerators(torch.randint(2**62, (len(self.masked),), device=self.masked.device))
        index = self._component(temperature, generator)
        chosen = self._of(index, temperature or 1.0)
        path = chosen.given_latents(generator.at(5), temperature=1.0 if temperature else 0.0)
        leaves, log_q = self._leaves[index], self.prediction.dense()
        allowed = (path.log_q > -torch.inf) & (log_q > -torch.inf)
        return replace(path, log_q=torch.where(allowed, leaves - log_q, -torch.inf))

    def posterior(self) -> Prediction:
        """Return the exact marginals."""
        log_shares = self._log_shares(1.0)
        width = log_shares.shape[1]
        index = (log_shares > -torch.inf).flatten().nonzero().flatten()
        probs = self._of(index, 1.0).marginal_probs.to(log_shares.dtype)
        weights = torch.softmax(log_shares, 1).flatten()[index]
        total = probs.new_zeros(len(log_shares), *probs.shape[1:])
        total.index_add_(0, index // width, probs * weights[:, None, None])
        return replace(self.prediction, log_q=total.log(), values=None)

    def given(self, tokens: Tensor, observed: Tensor) -> ConstrainedMixture:
        """Return the distribution given more tokens: components that foresaw them gain."""
        return replace(self, mixture=self.mixture.given(tokens, observed))

    @property
    def log_acceptance(self) -> Tensor:
        """Log-probability that the constraint holds without being imposed, (W,), in nats."""
        accepted = self._of(torch.arange(len(self._leaves), device=self.masked.device), 1.0).log_acceptance
        return torch.logsumexp(self.mixture.log_weights + accepted.reshape(self.mixture.log_weights.shape), 1)

    @cached_property
    def _leaves(self) -> Tensor:
        """The factors of all components of all blocks, (W K, L, V)."""
        return self.mixture.log_leaves.flatten(0, 1)

    def _of(self, index: Tensor, temperature: float) -> ConstrainedCoupledDistribution:
        """Return components, by their number among all W K of them, to the power 1 / tau, under the constraint."""
        rows, mixture = index // self.mixture.log_weights.shape[1], self.mixture
        masked = mixture.masked if mixture.absent is None else mixture.masked & ~mixture.absent
        prediction = Prediction(log_q=self._leaves[index] / temperature, vocab_size=self._leaves.shape[2])
        return ConstrainedCoupledDistribution.independent(
            prediction,
            mixture.tokens[rows],
            masked[rows],
            self.automaton,
            start=self.start[rows],
            accept=self.accept[rows],
            reads=self.reads[rows],
        )

    def _log_shares(self, temperature: float) -> Tensor:
        """Return the log-weights of components whose accepted texts are summed, up to a constant of a block, (W, K).

        At temperature 0 only the best of them counts.
        """
        log_weights = self.mixture.log_weights
        everything = torch.arange(log_weights.numel(), device=log_weights.device)
        components = self._of(everything, temperature or 1.0)
        log_z = components.log_partition.to(log_weights.dtype)
        if bool((log_z.reshape(log_weights.shape) == -torch.inf).all(1).any()):
            raise ImpossibleEvidenceError(
                "constraint: it and the denoiser rule out every text for some blocks; allow more tokens, or loosen the "
                "constraint"
            )
        if temperature == 0:
            possible = (log_z > -torch.inf).nonzero().flatten()
            best = self._of(possible, 1.0)
            scores = best.prediction.log_prob_of(best.mode).masked_fill(~best.masked, 0.0).sum(1)
            log_z = log_z.index_copy(0, possible, scores.to(log_z.dtype))
        return log_weights / (temperature or 1.0) + log_z.reshape(log_weights.shape)

    def _component(self, temperature: float, generator: RowGenerators) -> Tensor:
        """Choose a component for every block; return its number among all of them, int64 (W,)."""
        scores = self._log_shares(temperature)
        chosen = scores.argmax(1) if temperature == 0 else generator.at(4).choose(scores)
        return torch.arange(len(scores), device=scores.device) * scores.shape[1] + chosen
