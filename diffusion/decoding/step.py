"""One decoding step: choose tokens for the masked positions of a block, and which of them to commit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from diffusion.coupling import CoupledDistribution
from diffusion.decoding.remasking import Strategy, check_strategy, choose_positions, reliability
from diffusion.errors import ArgumentError
from diffusion.head import CoupledHead, check_temperature
from diffusion.prediction import Prediction

DecodeMode = Literal["independent", "latent", "marginal", "any_order", "joint"]


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How a step chooses.

    Attributes:
        decode: ``independent``: every token on its own, without the circuit; ``latent``: draw the circuit's latents
            from their posterior, then every token on its own given them, with log q / tau + log p(v | z); ``marginal``:
            every token from its exact posterior marginal; ``any_order``: commit the most reliable position, ask the
            circuit again without asking the denoiser, and so on; ``joint``: one exact joint sample, or at temperature
            0 the most probable explanation.
        strategy: what makes a position reliable, see :mod:`diffusion.decoding.remasking`.
        temperature: tau >= 0; 0 takes the best token. ``joint`` takes 0 and 1 only: tempering the product is #P-hard.
        threshold: for the strategy ``threshold``: commit every position whose token has more than this probability.
    """

    decode: DecodeMode = "latent"
    strategy: Strategy = "low_confidence"
    temperature: float = 1.0
    threshold: float = 0.9

    def __post_init__(self) -> None:
        if self.decode not in get_args(DecodeMode):
            raise ArgumentError(f"decode: expected one of {', '.join(get_args(DecodeMode))}, got {self.decode!r}")
        check_strategy(self.strategy)
        check_temperature(self.temperature)
        if not 0 <= self.threshold <= 1:
            raise ArgumentError(f"threshold: expected a probability, got {self.threshold!r}")
        if self.decode == "joint" and self.temperature not in (0.0, 1.0):
            raise ArgumentError(
                f"temperature: decode='joint' takes 1 (exact sample) or 0 (most probable explanation), got "
                f"{self.temperature}; tempering a mixture is #P-hard, decode='latent' tempers the tokens given the "
                "latents"
            )

    @property
    def commit_above(self) -> float | None:
        """The probability above which a position is committed in any case; None: none is."""
        return self.threshold if self.strategy == "threshold" else None


class Step(NamedTuple):
    """What one decoding step did to a block."""

    tokens: Tensor
    """int64 (B, L); positions that were not committed are as before."""
    committed: Tensor
    """bool (B, L), the positions decoded in this step."""


class _Proposal(NamedTuple):
    tokens: Tensor  # shape: (B, L)
    prediction: Prediction  # normalised, what reliability is judged by


def decode_step(
    prediction: Prediction | Tensor,
    tokens: Tensor,  # shape: (B, L)
    masked: Tensor,  # shape: (B, L)
    counts: Tensor,  # shape: (B,)
    *,
    head: CoupledHead | None,
    options: DecodeOptions,
    generator: torch.Generator | None = None,
) -> Step:
    """Decode the ``counts`` most reliable masked positions of each sequence.

    The circuit is asked only for sequences where ``head`` is active, by their own mask ratio; the others are decoded
    independently.

    Args:
        prediction: what the denoiser says about the block, or its logits with forbidden tokens at -inf, (B, L, V).
        tokens: the block so far, int64 (B, L).
        masked: open positions, bool (B, L).
        counts: how many to commit, int64 (B,).
        head: the circuit; None: the factorized baseline.
        options: how to choose.
        generator: for all draws, on the device of ``tokens``.
    """
    if isinstance(prediction, Tensor):
        prediction = Prediction.from_logits(prediction, masked)
    if head is None or options.decode == "independent":
        return _independent_step(prediction, tokens, masked, counts, options, generator)
    active = head.is_active(masked) & masked.any(-1)
    if not bool(active.any()):
        return _independent_step(prediction, tokens, masked, counts, options, generator)
    if bool(active.all()):
        return _coupled_step(head.distribution(prediction, tokens, masked), counts, options, generator)
    new_tokens, committed = tokens.clone(), torch.zeros_like(masked)
    for rows, is_coupled in ((active, True), (~active, False)):
        part = prediction.rows(rows), tokens[rows], masked[rows]
        if is_coupled:
            step = _coupled_step(head.distribution(*part), counts[rows], options, generator)
        else:
            step = _independent_step(*part, counts[rows], options, generator)
        new_tokens[rows], committed[rows] = step.tokens, step.committed
    return Step(new_tokens, committed)


def _independent_step(
    prediction: Prediction,
    tokens: Tensor,
    masked: Tensor,
    counts: Tensor,
    options: DecodeOptions,
    generator: torch.Generator | None,
) -> Step:
    proposal = _propose(prediction, options, generator)
    return _commit(proposal, tokens, masked, counts, options, generator)


def _coupled_step(
    dist: CoupledDistribution,
    counts: Tensor,
    options: DecodeOptions,
    generator: torch.Generator | None,
) -> Step:
    if options.decode == "any_order":
        return _any_order_step(dist, counts, options, generator)
    if options.decode == "latent":
        latent = dist.given_latents(generator)
        proposal = _propose(dist.prediction, options, generator, factors=latent.log_q)
    elif options.decode == "marginal":
        proposal = _propose(dist.posterior(), options, generator)
    else:
        chosen = dist.mode if options.temperature == 0 else dist.sample(generator=generator)
        proposal = _Proposal(chosen, dist.posterior())
    return _commit(proposal, dist.tokens, dist.masked, counts, options, generator)


def _any_order_step(
    dist: CoupledDistribution, counts: Tensor, options: DecodeOptions, generator: torch.Generator | None
) -> Step:
    """Commit one position after the other; the next question is asked given the tokens committed before."""
    masked = dist.masked
    for done in range(int(counts.max())):
        proposal = _propose(dist.posterior(), options, generator)
        one_more = (counts > done).long()
        tokens, committed = _commit(proposal, dist.tokens, dist.masked, one_more, options, generator)
        dist = dist.given(tokens, committed)
    return Step(dist.tokens, masked & ~dist.masked)


def _propose(
    prediction: Prediction,
    options: DecodeOptions,
    generator: torch.Generator | None,
    *,
    factors: Tensor | None = None,
) -> _Proposal:
    """Choose each token on its own from the tempered prediction, times ``factors``, which are not tempered."""
    scores = prediction.log_q / (options.temperature or 1.0)
    prediction = replace(prediction, log_q=torch.log_softmax(scores if factors is None else scores + factors, -1))
    return _Proposal(prediction.best() if options.temperature == 0 else prediction.draw(generator), prediction)


def _commit(
    proposal: _Proposal,
    tokens: Tensor,
    masked: Tensor,
    counts: Tensor,
    options: DecodeOptions,
    generator: torch.Generator | None,
) -> Step:
    scores = reliability(options.strategy, proposal.prediction, proposal.tokens, generator=generator)
    committed = choose_positions(scores, masked, counts, threshold=options.commit_above)
    return Step(torch.where(committed, proposal.tokens, tokens), committed)
