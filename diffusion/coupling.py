"""The product of a circuit and a factorized prediction, as one exact distribution.

For a block of L positions with masked set M, observed tokens x_O and the denoiser's distributions q_i (i in M), coupled
discrete diffusion (Li et al. 2026, arXiv 2603.00045) predicts

    global:  p_hat(x | x_t) = p(x) prod_{i in M} q_i(x_i) 1[x_O observed] / Z

    local:   p_hat(x | x_t) = sum_z p(z | x_O) prod_{i in M} p(x_i | z_i) q_i(x_i) / Z_{i,z_i},
             Z_{i,n} = sum_v p(v | n) q_i(v)

The *global* normalisation multiplies the densities and divides by one number Z. The prediction q moves the posterior of
the circuit's latents: a latent whose leaves agree with q gains. The *local* normalisation renormalises every input
unit's product with q on its own. Then the latents follow the observed tokens only, the product is a circuit with other
leaves, normalised by construction, and plain EM applies to it. With a circuit that is uniform over values both are
exactly q.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

import circuits as ct
from circuits import CircuitDistribution, CompiledCircuit, Evidence
from circuits.arguments import checked_possible, kind_of
from circuits.distribution import kept, without_kept
from circuits.evidence import Indexed, Listed
from circuits.precision import own_precision
from diffusion.blocks import check_blocks, check_circuit, check_logits, check_tokens
from diffusion.errors import ArgumentError, ImpossibleEvidenceError
from diffusion.prediction import Prediction

if TYPE_CHECKING:
    from circuits import CircuitWeights, Sum

Normalization = Literal["global", "local"]
T = TypeVar("T")

_NUMBERS_AT_ONCE = 1 << 24

IGNORED_LABEL = -100
"""What training code puts where a label does not count, as in ``torch.nn.functional.cross_entropy``."""


class CoupledDistribution(CircuitDistribution):
    """The joint distribution of B blocks of tokens: a circuit times a factorized prediction, given what is observed.

    ``batch_shape`` is (B,), ``event_shape`` is (L,). It is the circuit under evidence: the observed tokens, and the
    prediction as soft evidence on the others; with local normalisation the evidence is relative to the prediction.
    Everything is exact and batched, and differentiable in the logits and in the circuit's weights.

    Args:
        pc: a circuit over L variables of V categories each.
        logits: unnormalised log-probabilities of the denoiser, (B, L, V); -inf forbids a token; rows at observed
            positions are ignored.
        tokens: int64 (B, L); entries at masked positions are ignored.
        masked: bool (B, L), True where the token is to be predicted.
        normalization: "global" or "local", see the module's text. It belongs to the distribution, so training and
            decoding cannot differ in it.
        top_k: keep only the k most probable tokens of each masked position (and those of ``include``), and rule out the
            others: the evidence then costs k instead of V. None keeps all.
        include: int64 (B, L), tokens that ``top_k`` must not drop, for instance the true ones in training.

    Attributes:
        said: what the circuit is multiplied with, of all positions or of the masked ones alone.
        normalization: as given.
        tokens, masked: the blocks: what is known of them, and what is to be predicted.

    Raises:
        ArgumentError: shapes or dtypes that do not fit, or logits with NaN or rows that forbid every token.
    """

    evidence: Evidence
    _posterior: ct.queries.Posterior | None = None

    def __init__(
        self,
        pc: CompiledCircuit,
        logits: Tensor,  # shape: (B, L, V)
        tokens: Tensor,  # shape: (B, L)
        masked: Tensor,  # shape: (B, L)
        *,
        normalization: Normalization = "global",
        top_k: int | None = None,
        include: Tensor | None = None,  # shape: (B, L)
    ) -> None:
        check_logits(pc, logits)
        check_blocks(tokens, masked, logits.shape[:2])
        prediction = Prediction.from_logits(logits.to(pc.dtype), masked, top_k=top_k, include=include)
        self._couple(pc, prediction, tokens, masked, normalization, None, None)

    @classmethod
    def of(
        cls,
        pc: CompiledCircuit,
        prediction: Prediction,
        tokens: Tensor,  # shape: (B, L)
        masked: Tensor,  # shape: (B, L)
        *,
        normalization: Normalization = "global",
        latents: Mapping[Sum | str, Tensor] | None = None,
        weights: CircuitWeights | None = None,
        absent: Tensor | None = None,  # shape: (B, L)
    ) -> CoupledDistribution:
        """Couple a circuit to a prediction of all tokens or of listed ones; nothing else is made dense.

        Arguments and errors are those of the class, but for:

        Args:
            prediction: for B sequences and L positions; tokens that it does not list are ruled out.
            latents: log-factors on latents, by sum node or name, see :meth:`circuits.Evidence.with_latents`.
            weights: of ``pc.weights(external=...)``, in place of the circuit's own.
            absent: bool (B, L), positions that a sequence does not have, which are summed out: whatever is said of them
                is ignored, and what is answered means nothing. None: every sequence has all L.
        """
        dist = cls.__new__(cls)
        dist._couple(pc, prediction, tokens, masked, normalization, latents, weights, absent)
        return dist

    @classmethod
    def from_listed(
        cls,
        pc: CompiledCircuit,
        values: Tensor,  # shape: (B, L, k)
        log_q: Tensor,  # shape: (B, L, k)
        tokens: Tensor,  # shape: (B, L)
        masked: Tensor,  # shape: (B, L)
        *,
        normalization: Normalization = "global",
    ) -> CoupledDistribution:
        """Build the distribution from a prediction that lists k tokens per position, such as cached top-k logits.

        Other arguments are those of the class.

        Args:
            values: the listed tokens, int64 (B, L, k), distinct within a row.
            log_q: their log-probabilities, (B, L, k); every other token is ruled out.
        """
        check_circuit(pc)
        prediction = Prediction(log_q=log_q, vocab_size=max(pc.circuit.num_categories), values=values)
        return cls.of(pc, prediction, tokens, masked, normalization=normalization)

    def _couple(
        self,
        pc: CompiledCircuit,
        prediction: Prediction,
        tokens: Tensor,
        masked: Tensor,
        normalization: Normalization,
        latents: Mapping[Sum | str, Tensor] | None,
        weights: CircuitWeights | None,
        absent: Tensor | None = None,
    ) -> None:
        check_circuit(pc)
        check_blocks(tokens, masked, prediction.shape)
        if absent is not None:
            check_blocks(tokens, absent, prediction.shape, "absent")
            tokens, masked = tokens.masked_fill(absent, 0), masked & ~absent
        num_vars, categories = pc.circuit.num_vars, set(pc.circuit.num_categories)
        if prediction.shape[1] != num_vars or {prediction.vocab_size} != categories:
            raise ArgumentError(
                f"prediction: the circuit has {num_vars} variables of {sorted(categories)} categories, got "
                f"{prediction.shape[1]} positions of {prediction.vocab_size} tokens"
            )
        if normalization not in get_args(Normalization):
            raise ArgumentError(f"normalization: expected one of {get_args(Normalization)}, got {normalization!r}")
        check_tokens("tokens", tokens.masked_fill(masked, 0), prediction.vocab_size)
        said = replace(prediction, log_q=prediction.log_q.to(pc.dtype))
        if said.where is not None and bool((masked & ~said.where).any()):
            raise ArgumentError("prediction: expected one of all masked positions, got one that lacks some")
        if said.where is None or not torch.equal(said.where, masked) or not bool(masked.any()):
            said = self.prediction = said.whole().with_observed(tokens, ~masked)
        evidence = Evidence.soft(said.log_q) if said.values is None else Evidence.sparse(said.values, said.log_q)
        if said.where is not None:  # of every position a token, or the row that is about it
            place = (masked.flatten().cumsum(0) - 1).view_as(masked)
            evidence = Evidence(Indexed(torch.where(masked, ~place, tokens), evidence.factors))
        if normalization == "local":
            evidence = evidence.relative_to(evidence.without(~masked))
        if absent is not None:
            evidence = evidence.without(absent)
        if latents:
            evidence = evidence.with_latents(latents)
        super().__init__(pc, evidence, weights=pc.weights() if weights is None else weights)
        self.said = said
        self.tokens = tokens
        self.masked = masked
        self.normalization = normalization
        self.summed_out = absent

    @functools.cached_property
    def prediction(self) -> Prediction:
        """What the circuit is multiplied with, sure of the tokens that are observed."""
        return self.said.with_observed(self.tokens, ~self.masked)

    @property
    def num_tokens(self) -> int:
        """V."""
        return self.said.vocab_size

    def given(self, tokens: Tensor, observed: Tensor) -> CoupledDistribution:
        """Return this distribution conditioned on more tokens, without asking the denoiser again.

        Args:
            tokens: int64 (B, L); entries that are not observed are ignored.
            observed: bool (B, L), which further positions are known.

        Raises:
            ArgumentError: shapes or dtypes that do not fit, or an observed token outside the vocabulary.
        """
        check_blocks(tokens, observed, self.prediction.shape, "observed")
        check_tokens("tokens", tokens.masked_fill(~observed, 0), self.num_tokens)
        observed = observed & self.masked
        sure = self.prediction.with_observed(tokens, observed)
        evidence = self.evidence.with_factors(sure.log_q, sure.values, self.evidence.missing)
        tokens, masked = torch.where(observed, tokens, self.tokens), self.masked & ~observed
        dist = self._with(evidence=evidence, said=sure, prediction=sure, tokens=tokens, masked=masked)
        if self._posterior is not None and not torch.is_grad_enabled():
            dist._posterior = self._posterior.given(tokens, observed)
        return dist

    def with_latents(self, latents: Mapping[Sum | str, Tensor]) -> CoupledDistribution:
        """Return this distribution with other log-factors on latents, see :meth:`circuits.Evidence.with_latents`."""
        return self._with(evidence=self.evidence.with_latents(latents))

    def _with(self, **attributes: Any) -> CoupledDistribution:
        dist = type(self).__new__(type(self))
        vars(dist).update(without_kept(vars(self)), **attributes)
        vars(dist).pop("_posterior", None)
        return dist

    def log_prob(self, value: Tensor, *, log_partition: Tensor | None = None) -> Tensor:
        """Return ``log p_hat(value | observed tokens)``; -inf where ``value`` differs from an observed token.

        Args:
            value: int64 (*sample_shape, B, L) or (B, L); labels of -100 at observed positions are ignored.
            log_partition: see :meth:`circuits.CircuitDistribution.log_prob`.

        Returns:
            (*sample_shape, B), in nats. For masked positions with the true tokens as value this is the conditional
            log-likelihood CLL of the coupled model.

        Raises:
            ArgumentError: a wrong shape, or a token outside the vocabulary.
            ImpossibleEvidenceError: the normaliser is zero.
        """
        if not isinstance(value, Tensor) or value.shape[-2:] != self.masked.shape or value.dtype != torch.int64:
            batch_size, length = self.masked.shape
            raise ArgumentError(f"value: expected int64 of shape (..., {batch_size}, {length}), got {kind_of(value)}")
        value = torch.where((value == IGNORED_LABEL) & ~self.masked, self.tokens, value)
        check_tokens("value", value, self.num_tokens)
        with _explained():
            if isinstance(self.evidence.factors, Indexed) and value.dim() == 2:
                return self._log_prob(self.evidence.factors, value, log_partition)
            return super().log_prob(value, log_partition=log_partition)

    @own_precision
    def _log_prob(self, factors: Indexed, value: Tensor, log_partition: Tensor | None) -> Tensor:
        """Ask about the values, (B, L), and about the evidence, if its normaliser is not known, in one pass."""
        if log_partition is not None:
            asked = replace(self.evidence, factors=Listed(value.unsqueeze(-1)))
            log_joint = self.pc.log_partition(asked, self.weights)
        else:
            twice = torch.arange(len(value), device=value.device).repeat(2)
            index = torch.cat([value, factors.index])
            latents = {key: torch.cat([log, log]) for key, log in (self.evidence.latents or {}).items()}
            asked = replace(self.evidence, factors=Indexed(index, factors.rows), latents=latents)
            assert self.weights is not None
            weights = self.weights if self.weights.batch_size == 1 else self.weights.of_queries(twice)
            log_joint, log_partition = self.pc.log_partition(asked, weights).split(len(value))
        checked_possible(log_partition)
        log_q = self.said.log_prob_of(value).sum(1)
        is_other = ((value != self.tokens) & ~self.masked).any(1)
        return (log_joint + log_q - log_partition).masked_fill(is_other, -torch.inf)

    def log_prob_at(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return ``log p_hat(x_C | observed tokens)`` of tokens at some positions C, the others summed out.

        It is the ratio of two normalisers, ``Z(x_C observed) prod_{i in C} q_i(x_i) / Z``.

        Args:
            tokens: int64 (B, L); entries outside C are ignored.
            positions: bool (B, L), C; what is observed already counts nothing.

        Returns:
            (B,), in nats; -inf where the tokens are impossible.

        Raises:
            ArgumentError: shapes or dtypes that do not fit, or a token outside the vocabulary.
            ImpossibleEvidenceError: the normaliser is zero.
        """
        given = self.given(tokens, positions)
        log_partition = self.log_partition
        with _explained():
            checked_possible(log_partition)
        positions = positions & self.masked
        log_q = self.prediction.log_prob_of(tokens.masked_fill(~positions, 0)).masked_fill(~positions, 0.0)
        return given.log_partition + log_q.sum(1) - log_partition

    @kept
    def marginal_probs(self) -> Tensor:
        """``p_hat(x_i = v | observed tokens)`` of every position and token, (B, L, V); rows sum to 1."""
        if self.evidence.values is None:
            return self.query(ct.queries.marginals, differentiable=True)
        probs = self.query(ct.queries.listed_marginals, differentiable=True)
        return probs.new_zeros(*probs.shape[:2], self.num_tokens).scatter_add(2, self.evidence.values, probs)

    def posterior(self) -> Prediction:
        """Return the exact marginals of every position, as a prediction of the tokens that this one's lists."""
        if self._inputs() is not None:
            query, position = self.masked.nonzero(as_tuple=True)
            log_q = self.prediction.log_q.clone()
            log_q[query, position] = self.posterior_at(query, position).log_q.squeeze(1)
            return replace(self.prediction, log_q=log_q)
        if self.evidence.values is None:
            log_q, values = self.marginal_probs.log(), self.prediction.values
            if values is not None:
                log_q = log_q.gather(2, values).masked_fill(self.prediction.log_q == -torch.inf, -torch.inf)
            return replace(self.prediction, log_q=log_q)
        return replace(self.prediction, log_q=self.query(ct.queries.listed_marginals, differentiable=True).log())

    def posterior_at(self, query: Tensor, position: Tensor) -> Prediction:
        """Return the exact marginals of n single positions, as a prediction (n, 1); without gradients.

        Args:
            query: which of the B blocks, int64 (n,).
            position: which masked position of it, int64 (n,).
        """
        inputs = self._inputs()
        if inputs is None:
            return self.posterior().rows(query).at(position.unsqueeze(1))
        with _explained():
            probs = inputs.probs_at(query, position)
        values = self.prediction.values
        listed = None if values is None else values[query, position].unsqueeze(1)
        return Prediction(log_q=probs.log().unsqueeze(1), vocab_size=self.num_tokens, values=listed)

    def distance(self, other: CoupledDistribution) -> Tensor:
        """Return bounds of the total variation distances between marginals here and there, (B, L).

        ``other`` is what this one was made of by :meth:`given`; positions that became known mean nothing.
        """
        here, there = self._inputs(), other._inputs()
        if here is None or there is None:
            return torch.ones(self.masked.shape, dtype=self.pc.dtype, device=self.masked.device)
        with _explained():
            return here.distance(there)

    def conditionals(self, index: Tensor, which: Tensor) -> Tensor | None:
        """Return how probable some tokens of every position are given single tokens of single positions.

        The circuit is asked about all of these together, as many as memory is bounded for; what its input units make of
        the prediction is computed once for all.

        Args:
            index: c tokens of every position, as places among those that are listed, int64 (B, L, c).
            which: which of these are conditioned on, one at a time, bool (B, L, c); none of them impossible.

        Returns:
            ``p_hat(x_j = index[b, j, w] | x_i = index[b, i, u])``, (B, L, c, L, c), 0 where that is not asked for; None
            where the circuit has weights for each block, or gradients are asked for.
        """
        inputs, values = self._inputs(), self.prediction.values
        if inputs is None or inputs.weights.batch_size > 1:
            return None
        tokens = index if values is None else values.gather(2, index)
        found = torch.zeros(*index.shape, *index.shape[1:], dtype=self.pc.dtype, device=index.device)
        length, device = index.shape[1], index.device
        for part in which.nonzero().split(max(1, _NUMBERS_AT_ONCE // self.pc.circuit.num_units)):
            block, position, candidate = part.unbind(1)
            copy = torch.arange(len(part), device=device)
            here = torch.arange(length, device=device) == position.unsqueeze(1)
            value = tokens[block, position, candidate].unsqueeze(1).expand(-1, length)
            given = inputs.rows(block).given(value, here)
            asked = copy.repeat_interleave(length), torch.arange(length, device=device).repeat(len(part))
            probs = given.probs_at(*asked, index[block].flatten(0, 1))
            found[block, position, candidate] = probs.unflatten(0, (len(part), length))
        return found

    def _inputs(self) -> ct.queries.Posterior | None:
        """Return the posterior that is asked in part, kept for the distributions given more; None with gradients."""
        if torch.is_grad_enabled():
            return None
        if "_posterior" not in vars(self):
            with contextlib.suppress(ct.PropertyError):
                self._posterior = self.query(ct.queries.posterior)
        return self._posterior

    def given_latents(
        self, generator: torch.Generator | ct.RowGenerators | None = None, *, temperature: float = 1.0
    ) -> Prediction:
        """Choose the circuit's latents; return ``log p(x_i = v | z_i)`` of the tokens that the prediction lists.

        Given the latents the tokens are independent: ``p_hat(x | z) = prod_i p(x_i | z_i) q_i(x_i) / Z_i``.

        Args:
            generator: of the draw.
            temperature: tau >= 0: the latents are drawn from ``p(z | e)^(1 / tau)``; 0 takes the best.

        Raises:
            ImpossibleEvidenceError: the normaliser is zero.
        """
        latents = self.query(ct.queries.sample_latents, 1, generator=generator, temperature=temperature)
        return replace(self.prediction, log_q=latents.log_weights(self.prediction.values))

    def draw(self, temperature: float = 1.0, generator: torch.Generator | ct.RowGenerators | None = None) -> Tensor:
        """Draw all tokens together at a temperature, int64 (B, L): at 1 an exact joint sample, at 0 the :attr:`mode`.

        Explanations, latents and tokens together, are drawn from their joint distribution to the power 1 / tau, see
        :func:`circuits.queries.sample`. Raises ImpossibleEvidenceError if the normaliser is zero.
        """
        return self.query(ct.queries.sample, 1, generator=generator, temperature=temperature)[0]

    def query(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Put a query of :mod:`circuits.queries` about this distribution, see the base class."""
        with _explained():
            return super().query(function, *arguments, **options)

    def __repr__(self) -> str:
        return (
            f"CoupledDistribution({self.pc.circuit}, batch_shape={tuple(self.batch_shape)}, "
            f"event_shape={tuple(self.event_shape)}, normalization={self.normalization!r})"
        )


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Say in the words of this package why a query is impossible."""
    try:
        yield
    except ImpossibleEvidenceError as error:
        raise ImpossibleEvidenceError(
            "logits: circuit and denoiser rule out every text for some blocks; allow more tokens, raise top_k, or "
            f"give the circuit no zero weights ({error})"
        ) from error
