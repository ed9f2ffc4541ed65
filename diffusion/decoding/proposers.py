"""Proposers: from the distribution of windows to tokens, and to what their reliability is judged by.

A proposer takes the joint distribution of W windows, the options, and random numbers for each window. A way of decoding
is a proposer with its row of :data:`~diffusion.decoding.config.MODES` above it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from circuits import RowGenerators
from diffusion.coupling import CoupledDistribution
from diffusion.decoding.config import MODES, DecodeMode, DecodingConfig, mode
from diffusion.decoding.joint import JointDistribution, LatentDistribution, SelfAccepting
from diffusion.errors import ArgumentError
from diffusion.prediction import Prediction
from diffusion.vocabulary import Coupled


@dataclass(frozen=True, eq=False)
class Proposal:
    """Tokens for all positions of W windows, and what may be asked about them.

    Attributes:
        tokens: int64 (W, n).
        beliefs: about the positions; only a ranking asks for them.
        accepted: bool (W, n), which tokens are kept where it is not for a strategy to say.
        log_prob: the log-probability (W,) that a draw has these tokens at positions bool (W, n); of given tokens only.
    """

    tokens: Tensor
    beliefs: Callable[[], Prediction]
    accepted: Tensor | None = None
    log_prob: Callable[[Tensor], Tensor] | None = None


def drawn(beliefs: Prediction, temperature: float, generators: RowGenerators) -> Tensor:
    """Draw every token on its own from beliefs to the power 1 / tau, int64 (W, n); the best at tau = 0."""
    if temperature == 0:
        return beliefs.best()
    scores = (beliefs.log_q - beliefs.log_q.amax(-1, keepdim=True)) / temperature
    index = generators.choose(scores)
    return index if beliefs.values is None else beliefs.values.gather(2, index.unsqueeze(-1)).squeeze(-1)


@mode("independent", "every token on its own from q^(1 / tau), without the circuit")
def independent(prediction: Prediction, config: DecodingConfig, generators: RowGenerators) -> Proposal:
    """Propose every token on its own, without the circuit."""
    return Proposal(drawn(prediction, config.temperature, generators), lambda: prediction)


@mode(
    "latent",
    "the circuit's latents z from p(z | e)^(1 / tau), then every token from (q p(. | z))^(1 / tau)",
    draws_latents=True,
)
def latent(dist: LatentDistribution, config: DecodingConfig, generators: RowGenerators) -> Proposal:
    """Choose the circuit's latents, then every token on its own given them; judged given them too.

    Given the latents nearly everything is certain, so ``threshold`` judges by the marginals instead.
    """
    given = dist.given_latents(generators, temperature=config.temperature)
    beliefs = Prediction(log_q=given.log_q + dist.prediction.log_q, values=given.values, vocab_size=given.vocab_size)
    beliefs = beliefs.normalised()
    tokens = drawn(beliefs, config.temperature, generators.at(1))
    return Proposal(tokens, dist.posterior if config.chosen_strategy == "threshold" else lambda: beliefs)


@mode(
    "any_order",
    "one token after the other from its marginal given those before, without asking the denoiser again",
    each_alone=True,
    one_by_one=True,
)
@mode("marginal", "every token on its own from its exact posterior marginal, to the power 1 / tau", each_alone=True)
def marginal(dist: JointDistribution, config: DecodingConfig, generators: RowGenerators) -> Proposal:
    """Propose every token on its own from its exact posterior marginal."""
    beliefs = dist.posterior()
    return Proposal(drawn(beliefs, config.temperature, generators), lambda: beliefs)


@mode("joint", "all tokens together from the circuit's explanations, latents and tokens, to the power 1 / tau")
def joint(dist: JointDistribution, config: DecodingConfig, generators: RowGenerators) -> Proposal:
    """Propose all tokens together: an exact joint sample at temperature 1, the most probable explanation at 0."""
    if isinstance(dist, SelfAccepting):
        tokens, accepted = dist.draw_accepted(config.temperature, generators)
        return Proposal(tokens, dist.posterior, accepted)
    return Proposal(dist.draw(config.temperature, generators), dist.posterior)


def given(tokens: Tensor, source: JointDistribution | Prediction, decode: DecodeMode) -> Proposal:
    """Propose tokens that are given, int64 (W, n), in place of draws at temperature 1.

    Args:
        tokens: what to propose.
        source: of the draws: the joint distribution of W windows, or a prediction without a circuit.
        decode: how they would be drawn: all together, or each on its own.
    """
    if not MODES[decode].each_alone and not isinstance(source, Prediction):
        if not isinstance(source, Coupled):
            raise ArgumentError(
                f"head: expected a circuit, whose joint probabilities are exact, got one of {type(source).__name__}"
            )
        return Proposal(tokens, source.posterior, log_prob=partial(source.log_prob_at, tokens))
    beliefs = source if isinstance(source, Prediction) else source.posterior()

    def log_prob(positions: Tensor) -> Tensor:
        each = beliefs.normalised().log_prob_of(tokens)  # draws are from the tokens that are listed
        return each.double().masked_fill(~positions, 0.0).sum(-1)

    return Proposal(tokens, lambda: beliefs, log_prob=log_prob)


def dependence_of(dist: JointDistribution, num_candidates: int = 4) -> Tensor:
    """Return a lower bound of the mutual information of all pairs of positions, (W, n, n), in nats.

    It is that of the position's tokens, told apart as its ``num_candidates`` most probable ones and the rest; exact by
    conditioning on each of these in turn. Of positions that are not masked it is 0.
    """
    beliefs = dist.posterior()
    log_p, index = beliefs.log_q.topk(min(num_candidates, beliefs.num_listed), -1)
    p = log_p.exp().double()  # (W, n, c)
    own = _with_rest(p)
    which = (p > 1e-9) & dist.masked.unsqueeze(-1)
    found = dist.conditionals(index, which) if isinstance(dist, CoupledDistribution) else None
    if found is None:
        found = _one_after_the_other(dist, beliefs, index, which)
    weight = (p * which)[..., None, None]
    together = weight * _with_rest(found.double())  # p(x_i = u, x_j = w), (W, n, c, n, c + 1)
    rest = (own.unsqueeze(1) - together.sum(2)).clamp_min(0.0)  # with x_i not among the candidates
    information = _terms(together, weight * own[:, None, None]).sum(2)
    information += _terms(rest, own[:, :, -1:, None] * own.unsqueeze(1))
    information = torch.maximum(information, information.transpose(1, 2)).clamp_min(0.0)
    is_open = dist.masked.unsqueeze(1) & dist.masked.unsqueeze(2)  # what is known has nothing to tell
    return information.masked_fill(~is_open, 0.0)


def _with_rest(p: Tensor) -> Tensor:
    return torch.cat([p, (1 - p.sum(-1, keepdim=True)).clamp_min(0.0)], -1)


def _one_after_the_other(dist: JointDistribution, beliefs: Prediction, index: Tensor, which: Tensor) -> Tensor:
    """Return what :meth:`~diffusion.coupling.CoupledDistribution.conditionals` does, of any distribution."""
    tokens = index if beliefs.values is None else beliefs.values.gather(2, index)
    found = torch.zeros(*index.shape, *index.shape[1:], dtype=beliefs.log_q.dtype, device=index.device)
    for i, c in which.any(0).nonzero().tolist():
        here = torch.zeros(which.shape[:2], dtype=torch.bool, device=which.device)
        here[:, i] = which[:, i, c]
        given = dist.given(tokens[..., c], here).posterior()
        found[:, i, c] = torch.stack([given.log_prob_of(column) for column in tokens.unbind(-1)], -1).exp()
    return found


def _terms(together: Tensor, apart: Tensor) -> Tensor:
    ratio = torch.where((together > 0) & (apart > 0), together / apart.clamp_min(1e-300), 1.0)
    return (together * ratio.log()).sum(-1)
