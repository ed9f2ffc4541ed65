"""Energy-based diffusion (Xu et al. 2024, arXiv 2410.21357): candidates from the prediction, then one of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from circuits import RowGenerators
from circuits.arguments import checked_count
from circuits.queries import DeterministicAutomaton
from diffusion.decoding.baselines.base import DrawnDistribution, ModelHead
from diffusion.decoding.baselines.models import BlockModel
from diffusion.decoding.constraints import ConstrainedCoupledDistribution
from diffusion.decoding.proposers import drawn
from diffusion.prediction import Prediction


class EnergyHead(ModelHead["EnergyDistribution"]):
    """Importance sampling of ``q(x) exp(-E(x))``, with the energy of a small model of blocks p.

    By default ``E(x) = log q(x) - log p(x)``, the paper's autoregressive energy, so that the target is p given what is
    observed. With ``multiplies``, ``E(x) = -log p(x)``: the target is the product of prediction and model, as
    :class:`~diffusion.head.CoupledHead` has it with a circuit. The law of the draw tends to the target as the number of
    candidates grows. Temperature is the target's: candidates come from ``q^(1 / tau)``, weights are to the power 1 /
    tau; at 0 the best of candidates from q is taken. Positions are judged by q.

    Args:
        model: p, see :class:`~.models.BlockModel`.
        num_candidates: S.
        multiplies: whether the target is the product of q and p.

    Raises:
        ArgumentError: an argument has a wrong type or value.
    """

    kind: ClassVar[str] = "energy"

    def __init__(self, model: BlockModel, *, num_candidates: int = 16, multiplies: bool = False) -> None:
        super().__init__(model)
        checked_count("num_candidates", num_candidates)
        self.num_candidates = num_candidates
        self.multiplies = multiplies

    def _settings(self) -> dict[str, Any]:
        return {"num_candidates": self.num_candidates, "multiplies": self.multiplies}

    def _of_blocks(
        self, prediction: Prediction, tokens: Tensor, masked: Tensor, absent: Tensor | None
    ) -> EnergyDistribution:
        return EnergyDistribution(self, prediction, tokens, masked, absent)


@dataclass(frozen=True, eq=False)
class EnergyDistribution(DrawnDistribution):
    """Draws by importance sampling; see :class:`EnergyHead`."""

    head: EnergyHead
    constrained: ConstrainedCoupledDistribution | None = None
    """The prediction under the constraint, if there is one."""

    def under(self, automaton: DeterministicAutomaton, **ends: Tensor) -> EnergyDistribution:
        """Return the distribution with candidates that an automaton accepts: exact draws of q under the constraint.

        The weights stay as they are, so that the law of the draw tends to the target under the constraint.

        Args:
            automaton: over the V tokens.
            **ends: of :meth:`~diffusion.decoding.constraints.ConstrainedCoupledDistribution.under`.
        """
        constrained = ConstrainedCoupledDistribution.independent(
            self.prediction, self.tokens, self.masked, automaton, **ends
        )
        return replace(self, constrained=constrained)

    def draw(self, temperature: float, generator: RowGenerators) -> Tensor:
        """Draw S candidates, and one of them by its weight: int64 (W, L)."""
        if temperature == 0:  # a row has the same candidates, whoever asks
            generator = RowGenerators(torch.zeros_like(generator.seeds))
        numbers = range(self.head.num_candidates)
        candidates = torch.stack([self._candidate(temperature or 1.0, generator.at(4, n)) for n in numbers], 1)
        candidates = torch.where(self.masked.unsqueeze(1), candidates, self.tokens.unsqueeze(1))  # (W, S, L)
        scores = self._log_weights(candidates)
        scores = torch.where((scores > -torch.inf).any(1, keepdim=True), scores, 0.0)  # the model allows none of them
        chosen = scores.argmax(1) if temperature == 0 else generator.at(5).choose(scores / temperature)
        return candidates.take_along_dim(chosen[:, None, None], 1).squeeze(1)

    def _candidate(self, temperature: float, generator: RowGenerators) -> Tensor:
        if self.constrained is not None:
            return self.constrained.draw(temperature, generator)
        return drawn(self.prediction, temperature, generator)

    def posterior(self) -> Prediction:
        """Return the denoiser's own prediction, or its marginals under the constraint."""
        return self.prediction if self.constrained is None else self.constrained.posterior()

    def given(self, tokens: Tensor, observed: Tensor) -> EnergyDistribution:
        """Return the distribution given more tokens; see the base class."""
        dist = super().given(tokens, observed)
        if self.constrained is None:
            return dist
        return replace(dist, constrained=self.constrained.given(tokens, observed & self.masked))

    def _log_weights(self, candidates: Tensor) -> Tensor:
        """Return ``-E`` up to a constant, (W, S)."""
        flat = candidates.flatten(0, 1)
        terms = self.head.model.log_conditionals(flat).gather(2, flat.unsqueeze(-1)).squeeze(-1).detach()
        terms = terms.masked_fill(~self.present.repeat_interleave(candidates.shape[1], 0), 0.0)
        scores = terms.double().sum(1).unflatten(0, candidates.shape[:2])
        if self.head.multiplies:
            return scores
        log_q = torch.stack([self.prediction.log_prob_of(one) for one in candidates.unbind(1)], 1)
        return scores - log_q.double().masked_fill(~self.masked.unsqueeze(1), 0.0).sum(2)
