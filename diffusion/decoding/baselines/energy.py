"""Energy-based diffusion (Xu et al. 2024, arXiv 2410.21357): candidates from the prediction, then one of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from circuits import RowGenerators
from circuits.arguments import checked_count
from diffusion.decoding.baselines.models import BlockModel, check_model, check_trailing
from diffusion.decoding.proposers import drawn
from diffusion.prediction import Prediction


class EnergyHead:
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

    activation_threshold = 1.0
    temperature = 1.0
    top_k: int | None = None
    needs_features = False
    modes = frozenset({"joint"})

    def __init__(self, model: BlockModel, *, num_candidates: int = 16, multiplies: bool = False) -> None:
        check_model(model)
        checked_count("num_candidates", num_candidates)
        self.model = model
        self.num_candidates = num_candidates
        self.multiplies = multiplies

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens."""
        return self.model.vocab_size

    @property
    def block_length(self) -> int:
        """L, the number of positions of the model."""
        return self.model.block_length

    def distribution(
        self,
        prediction: Prediction,
        tokens: Tensor,  # shape: (W, L)
        masked: Tensor,  # shape: (W, L)
        *,
        absent: Tensor | None = None,  # shape: (W, L)
    ) -> EnergyDistribution:
        """Return what candidates are drawn and weighed by; positions that are absent have to be the last ones."""
        check_trailing(absent)
        present = torch.ones_like(masked) if absent is None else ~absent
        tokens = tokens.masked_fill(masked | ~present, 0)
        return EnergyDistribution(self, prediction, tokens, masked & present, present)


@dataclass(frozen=True, eq=False)
class EnergyDistribution:
    """Draws by importance sampling; see :class:`EnergyHead`."""

    head: EnergyHead
    prediction: Prediction
    tokens: Tensor
    masked: Tensor
    present: Tensor

    def draw(self, temperature: float, generator: RowGenerators) -> Tensor:
        """Draw S candidates, and one of them by its weight: int64 (W, L)."""
        if temperature == 0:  # a row has the same candidates, whoever asks
            generator = RowGenerators(torch.zeros_like(generator.seeds))
        candidates = torch.stack(
            [
                drawn(self.prediction, temperature or 1.0, generator.at(4, number))
                for number in range(self.head.num_candidates)
            ],
            1,
        )
        candidates = torch.where(self.masked.unsqueeze(1), candidates, self.tokens.unsqueeze(1))  # (W, S, L)
        scores = self._log_weights(candidates)
        scores = torch.where((scores > -torch.inf).any(1, keepdim=True), scores, 0.0)  # the model allows none of them
        chosen = scores.argmax(1) if temperature == 0 else generator.at(5).choose(scores / temperature)
        return candidates.take_along_dim(chosen[:, None, None], 1).squeeze(1)

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

    def posterior(self) -> Prediction:
        """Return the denoiser's own prediction."""
        return self.prediction

    def given(self, tokens: Tensor, observed: Tensor) -> EnergyDistribution:
        """Return the distribution given more tokens."""
        observed = observed & self.masked
        return replace(
            self,
            prediction=self.prediction.with_observed(tokens, observed),
            tokens=torch.where(observed, tokens, self.tokens),
            masked=self.masked & ~observed,
        )
