"""The coupled distribution of blocks under a constraint: the same questions, exact answers, accepted texts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

import circuits as ct
from circuits import CompiledCircuit, ConstrainedDistribution, PropertyError
from circuits.distribution import without_kept
from circuits.queries import DeterministicAutomaton
from circuits.queries.automata import reading_order
from diffusion.coupling import IGNORED_LABEL, CoupledDistribution
from diffusion.errors import ArgumentError
from diffusion.prediction import Prediction
from diffusion.vocabulary import MappedDistribution

T = TypeVar("T")


class ConstrainedCoupledDistribution(CoupledDistribution):
    """The joint distribution of B blocks of tokens, given that an automaton accepts them; see :meth:`under`.

    It answers like a :class:`~diffusion.coupling.CoupledDistribution`, so that all ways of decoding work with it.
    """

    constrained: ConstrainedDistribution
    """The circuit under its evidence and the automaton."""

    @classmethod
    def under(
        cls,
        dist: CoupledDistribution,
        automaton: DeterministicAutomaton,
        *,
        start: Tensor | None = None,  # shape: (B, S)
        accept: Tensor | None = None,  # shape: (B, S)
        reads: Tensor | None = None,  # shape: (B, L)
    ) -> ConstrainedCoupledDistribution:
        """Return a coupled distribution under a constraint.

        Args:
            dist: whose circuit is a chain, such as a hidden Markov model.
            automaton: over the V tokens.
            start: in which states the blocks may begin, bool or log-weights; None: in the automaton's own start.
            accept: in which states they may end; None: in its own accepting states.
            reads: which positions it reads, bool; None: all.

        Raises:
            ArgumentError: shapes that do not fit.
            PropertyError: the circuit is not a chain.
        """
        constrained = ConstrainedDistribution(
            dist.pc, dist.evidence, automaton, start=start, accept=accept, reads=reads, weights=dist.weights
        )
        return cls._around(dist, constrained)

    @classmethod
    def independent(
        cls,
        prediction: Prediction,
        tokens: Tensor,  # shape: (B, L)
        masked: Tensor,  # shape: (B, L)
        automaton: DeterministicAutomaton,
        **options: Any,
    ) -> ConstrainedCoupledDistribution:
        """Return a prediction without a circuit under a constraint: tokens are independent but for the automaton.

        Args:
            prediction: for B blocks of L positions.
            tokens: int64 (B, L); entries at masked positions are ignored.
            masked: bool (B, L).
            automaton: over the V tokens.
            **options: of :meth:`under`.
        """
        log_q = prediction.log_q
        pc = _uniform(prediction.shape[1], prediction.vocab_size, log_q.device, log_q.dtype)
        return cls.under(CoupledDistribution.of(pc, prediction, tokens, masked), automaton, **options)

    @classmethod
    def _around(cls, dist: CoupledDistribution, constrained: ConstrainedDistribution) -> ConstrainedCoupledDistribution:
        new = cls.__new__(cls)
        vars(new).update(without_kept(vars(dist)), constrained=constrained, _posterior=None)
        return new

    def given(self, tokens: Tensor, observed: Tensor) -> ConstrainedCoupledDistribution:
        """Return this distribution conditioned on more tokens; see the base class."""
        dist = CoupledDistribution.given(self, tokens, observed)
        return self._around(dist, self.constrained.given(dist.evidence))

    @property
    def log_partition(self) -> Tensor:
        """``log Z``, (B,); -inf where nothing that is accepted is possible."""
        return self.constrained.log_partition

    @property
    def log_acceptance(self) -> Tensor:
        """Log-probability that the constraint holds without being imposed, (B,), in nats."""
        return self.constrained.log_acceptance

    def log_prob(self, value: Tensor, *, log_partition: Tensor | None = None) -> Tensor:
        """Return the log-probability of tokens, int64 (*sample_shape, B, L): (*sample_shape, B); see the base class."""
        if isinstance(value, Tensor) and value.shape[-2:] == self.masked.shape:
            value = torch.where((value == IGNORED_LABEL) & ~self.masked, self.tokens, value)
        log_prob = self.constrained.log_prob(value)
        return log_prob if log_partition is None else log_prob + self.log_partition - log_partition

    @property
    def marginal_probs(self) -> Tensor:
        """The probability of every token at every position, (B, L, V); rows sum to 1."""
        return self.constrained.marginal_probs

    def posterior(self) -> Prediction:
        """Return the exact marginals of every position, as a prediction of the tokens that this one's lists."""
        return replace(self.prediction, log_q=self.constrained.listed_marginal_probs.log())

    def sample(self, sample_shape: Sequence[int] = (), *, generator: torch.Generator | None = None) -> Tensor:
        """Draw exact joint samples, all of them accepted: int64 (*sample_shape, B, L)."""
        return self.constrained.sample(sample_shape, generator=generator)

    @property
    def mode(self) -> Tensor:
        """The accepted tokens of the most probable explanation, int64 (B, L)."""
        return self.constrained.mode

    @property
    def mean(self) -> Tensor:
        """The mean of every token's number, (B, L)."""
        return self.constrained.mean

    @property
    def variance(self) -> Tensor:
        """The variance of every token's number, (B, L)."""
        return self.constrained.variance

    def entropy(self) -> Tensor:
        """Refuse; see :meth:`circuits.ConstrainedDistribution.entropy`."""
        return self.constrained.entropy()

    def given_latents(
        self, generator: torch.Generator | ct.RowGenerators | None = None, *, temperature: float = 1.0
    ) -> Prediction:
        """Choose latents and the automaton's path; return ``log p(x_i = v | z_i)``, -inf where the path forbids v.

        Given both the tokens are independent, and whatever is drawn, at any temperature, is accepted.

        Args:
            generator: of the draw.
            temperature: tau >= 0, of latents and path; 0 takes the best.
        """
        choice = self.constrained.sample_latents(generator=generator, temperature=temperature)
        return replace(self.prediction, log_q=choice.log_weights(self.prediction.values))

    def draw(self, temperature: float = 1.0, generator: torch.Generator | ct.RowGenerators | None = None) -> Tensor:
        """Draw all tokens together at a temperature, all of them accepted: int64 (B, L); see the base class."""
        return self.constrained.sample(generator=generator, temperature=temperature)

    def query(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Refuse; see :meth:`circuits.ConstrainedDistribution.query`."""
        return self.constrained.query(function, *arguments, **options)


def under(dist: Any, automaton: DeterministicAutomaton, **options: Any) -> Any:
    """Return the distribution of a head's blocks given that an automaton over the denoiser's tokens accepts them.

    Args:
        dist: a coupled distribution, one that is asked in tokens, or another with a method ``under`` of its own.
        automaton: over the V tokens.
        **options: of :meth:`ConstrainedCoupledDistribution.under`.
    """
    if isinstance(dist, CoupledDistribution):
        return ConstrainedCoupledDistribution.under(dist, automaton, **options)
    if isinstance(dist, MappedDistribution):
        read = dist.vocabulary.automaton(automaton)
        return dist.mapped(lambda own: ConstrainedCoupledDistribution.under(own, read, **options))
    return dist.under(automaton, **options)


def check_chain(pc: CompiledCircuit) -> None:
    """Raise ArgumentError unless a circuit is a chain, whose product with an automaton is exact."""
    try:
        reading_order(pc, "constraint")
    except PropertyError as error:
        raise ArgumentError(
            f"constraint: expected a head whose circuit is a chain, got another; {error}; use ct.structures.hmm, or "
            "decode without the head"
        ) from error


@functools.lru_cache(maxsize=8)
def _uniform(num_vars: int, num_tokens: int, device: torch.device, dtype: torch.dtype) -> CompiledCircuit:
    """Return the chain of one state whose tokens are uniform: times a prediction it is the prediction."""
    emission = torch.full((1, num_tokens), 1 / num_tokens, dtype=torch.float64)
    pc = ct.compile(ct.structures.hmm(num_vars, 1, num_tokens, emission=emission), dtype=dtype, seed=0)
    return pc.requires_grad_(False).to(device)
