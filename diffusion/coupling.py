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

from collections.abc import Sequence
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from circuits import CompiledCircuit, Evidence, passes
from circuits.conditioning import LayerValues, conditions_of
from circuits.semiring import ChoosingSemiring, LogSemiring, MaxSemiring
from diffusion.errors import ArgumentError, ImpossibleEvidenceError

Normalization = Literal["global", "local"]


class CoupledDistribution(Distribution):
    """The joint distribution of B blocks of tokens: a circuit times a factorized prediction, given what is observed.

    ``batch_shape`` is (B,), ``event_shape`` is (L,). Everything is exact and batched, and differentiable in the logits
    and in the circuit's weights.

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

    Raises:
        ArgumentError: shapes or dtypes that do not fit, or logits with NaN or rows that forbid every token.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  - as the base class declares it
    has_enumerate_support = False

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
        _check_arguments(pc, logits, tokens, masked, normalization, top_k, include)
        log_q = torch.log_softmax(logits.to(pc.dtype).masked_fill(~masked.unsqueeze(-1), 0.0), -1)
        if top_k is not None and top_k < log_q.shape[-1]:
            self._set_up(pc, *_list_best(log_q, top_k, include), tokens, masked, normalization)
        else:
            self._set_up(pc, None, log_q, tokens, masked, normalization)

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

        Args:
            pc: a circuit over L variables.
            values: the listed tokens, int64 (B, L, k), distinct within a row.
            log_q: their log-probabilities, (B, L, k); every other token is ruled out.
            tokens: int64 (B, L); entries at masked positions are ignored.
            masked: bool (B, L).
            normalization: "global" or "local".
        """
        dist = cls.__new__(cls)
        dist._set_up(pc, values, log_q.to(pc.dtype), tokens, masked, normalization)
        return dist

    def _set_up(
        self,
        pc: CompiledCircuit,
        values: Tensor | None,
        log_q: Tensor,
        tokens: Tensor,
        masked: Tensor,
        normalization: Normalization,
    ) -> None:
        self.pc = pc
        self.tokens = tokens
        self.masked = masked
        self.normalization = normalization
        self.num_tokens = pc.circuit.num_categories[0]
        self._banks = pc.weights()
        if values is None:
            self.evidence = Evidence.mixed(tokens, ~masked, log_q)
            self._prediction = Evidence(log_q.masked_fill(~masked.unsqueeze(-1), 0.0), None, ~masked)
        else:
            self.evidence = _listed_evidence(values, log_q, tokens, masked)
            self._prediction = Evidence(self.evidence.log_factors, self.evidence.values, ~masked)
        super().__init__(masked.shape[:1], masked.shape[1:], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """Tokens from 0 to V - 1."""
        return constraints.independent(constraints.integer_interval(0, self.num_tokens - 1), 1)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> CoupledDistribution:
        """Not supported: repeat the logits and tokens instead, so that the cost is visible."""
        raise ArgumentError(
            f"batch_shape: cannot expand to {tuple(batch_shape)}; repeat logits, tokens and masked instead"
        )

    @cached_property
    def log_partition(self) -> Tensor:
        """The normaliser, (B,): log Z of the module's text (global), or log p(x_O) (local)."""
        return passes.log_root(self.pc, self._leaves(self.evidence), self._banks)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ``log p_hat(value | observed tokens)``; -inf where ``value`` differs from an observed token.

        Args:
            value: int64 (*sample_shape, B, L) or (B, L).

        Returns:
            (*sample_shape, B), in nats. For masked positions with the true tokens as value this is the conditional
            log-likelihood CLL of the coupled model.

        Raises:
            ArgumentError: a wrong shape, or a token outside the vocabulary.
            ImpossibleEvidenceError: the normaliser is zero.
        """
        if value.shape[-2:] != self.masked.shape:
            raise ArgumentError(
                f"value: expected int64 tokens of shape (..., {self.masked.shape[0]}, {self.masked.shape[1]}), got "
                f"{tuple(value.shape)}"
            )
        _check_tokens(value, self.num_tokens)
        log_z = self._checked(self.log_partition)
        blocks = value.reshape(-1, *self.masked.shape)  # (S, B, L)
        factors = self._log_q_of(blocks).masked_fill(~self.masked & (blocks != self.tokens), -torch.inf)
        scored = Evidence(factors.flatten(0, 1).unsqueeze(-1), blocks.flatten(0, 1).unsqueeze(-1), None)
        log_joint = passes.log_root(self.pc, self._leaves(scored, num_copies=len(blocks)), self._banks)
        return (log_joint.reshape(blocks.shape[:2]) - log_z).reshape(value.shape[:-1])

    @cached_property
    def log_prediction(self) -> Tensor:
        """``log q_i(v)`` as it enters the product, (B, L, V): 0 at observed positions, -inf at tokens not listed."""
        return self._prediction.dense(self.num_tokens, self.pc.dtype)

    @cached_property
    def marginal_probs(self) -> Tensor:
        """``p_hat(x_i = v | observed tokens)`` of every position and token, (B, L, V); rows sum to 1."""
        return self.marginals_given(self.evidence)

    def marginals_given(self, evidence: Evidence) -> Tensor:
        """Return the marginals (B, L, V) under other evidence, such as this one's with more tokens observed."""
        assert evidence.log_factors is not None

        def log_z_of(factors: Tensor, banks: passes.Banks) -> Tensor:
            traced = evidence.with_factors(factors, evidence.values, evidence.missing)
            return self._checked(passes.log_root(self.pc, self._leaves(traced, banks=banks), banks))

        grad = passes.factor_gradients(log_z_of, evidence.log_factors, self._banks)
        if evidence.values is None:
            return grad
        return grad.new_zeros(*grad.shape[:2], self.num_tokens).scatter_add(2, evidence.values, grad)

    def sample(self, sample_shape: Sequence[int] = (), *, generator: torch.Generator | None = None) -> Tensor:
        """Draw exact joint samples: int64 (*sample_shape, B, L); observed positions hold their tokens.

        Raises:
            ImpossibleEvidenceError: the normaliser is zero.
        """
        shape = torch.Size(sample_shape)
        with torch.no_grad():
            units, query = self._choose_units(LogSemiring(), shape.numel(), generator)
            values = passes.draw_values(self.pc, LogSemiring(), self.evidence, self._banks, units, query, generator)
        return values.reshape(*shape, *self.masked.shape)

    @property
    def mode(self) -> Tensor:
        """The tokens of the most probable explanation, int64 (B, L): the maximum over latents and tokens together.

        It is the most probable x itself only if the circuit is deterministic; that maximum is NP-hard in general.
        """
        with torch.no_grad():
            units, query = self._choose_units(MaxSemiring(), 1, None)
            return passes.draw_values(self.pc, MaxSemiring(), self.evidence, self._banks, units, query, None)

    def sample_latent_log_weights(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw the circuit's latents from their posterior; return log p(x_i = v | z_i) for all v: (B, L, V).

        Given the latents the tokens are independent: ``p_hat(x | z) = prod_i p(x_i | z_i) q_i(x_i) / Z_i``.

        Raises:
            ImpossibleEvidenceError: the normaliser is zero.
        """
        with torch.no_grad():
            units, _ = self._choose_units(LogSemiring(), 1, generator)
            result = torch.empty(*self.masked.shape, self.num_tokens, dtype=self.pc.dtype, device=self.pc.device)
            for layer, reached in zip(self.pc.input_layers, units, strict=True):
                node, block = (reached >= 0).nonzero(as_tuple=True)
                table = self._banks[layer.parameter_rows.bank].log
                rows = table[layer.parameter_rows.index[node], :, reached[node, block]]
                result[block, layer.variables[node]] = rows
        return result

    def __repr__(self) -> str:
        return (
            f"CoupledDistribution({self.pc.circuit}, batch_shape={tuple(self.batch_shape)}, "
            f"event_shape={tuple(self.event_shape)}, normalization={self.normalization!r})"
        )

    @cached_property
    def _leaf_normalisers(self) -> list[Tensor]:
        """log Z_{i,n} at masked positions, 0 at observed ones: per input layer (F, K, B)."""
        return self.pc.leaves(self._prediction, self._banks)

    def _leaves(
        self,
        evidence: Evidence,
        semiring: ChoosingSemiring | None = None,
        banks: passes.Banks | None = None,
        num_copies: int = 1,
    ) -> list[Tensor]:
        """Evaluate the input units under evidence on ``num_copies`` of the batch; local: divided by Z_{i,n}."""
        evidence.check(self.pc.num_categories)
        values = passes.leaves(self.pc, semiring or LogSemiring(), evidence, banks or self._banks)
        if self.normalization == "global":
            return values
        normalised = [
            value - normaliser.masked_fill(normaliser == -torch.inf, 0.0).repeat(1, 1, num_copies)
            for value, normaliser in zip(values, self._leaf_normalisers, strict=True)
        ]
        return LayerValues(normalised, conditions_of(values))

    def _log_q_of(self, blocks: Tensor) -> Tensor:
        """Return log q_i at the tokens of ``blocks``, (S, B, L); 0 at observed positions, -inf at tokens not listed."""
        log_q, values = self._prediction.log_factors, self._prediction.values
        assert log_q is not None
        if values is None:
            chosen = log_q.expand(len(blocks), -1, -1, -1).gather(3, blocks.unsqueeze(-1)).squeeze(-1)
        else:
            chosen = log_q.masked_fill(values != blocks.unsqueeze(-1), -torch.inf).amax(-1)
        return chosen.masked_fill(~self.masked, 0.0)

    def _choose_units(
        self, semiring: ChoosingSemiring, num_samples: int, generator: torch.Generator | None
    ) -> tuple[list[Tensor], Tensor]:
        leaf_values = self._leaves(self.evidence, semiring)
        outputs = passes.upward(self.pc, semiring, leaf_values, self._banks, keep=True)
        root = outputs[-1]
        assert root is not None
        self._checked(root[0, 0])
        return passes.downward_choice(self.pc, semiring, outputs, self._banks, num_samples, generator)

    @staticmethod
    def _checked(log_z: Tensor) -> Tensor:
        impossible = (log_z == -torch.inf).nonzero().flatten().tolist()
        if impossible:
            raise ImpossibleEvidenceError(
                f"circuit and denoiser rule out every text for {len(impossible)} of {len(log_z)} blocks (the first "
                "is block "
                f"{impossible[0]}): allow more tokens, raise top_k, or give the circuit no zero weights"
            )
        return log_z


def _list_best(log_q: Tensor, top_k: int, include: Tensor | None) -> tuple[Tensor, Tensor]:
    """List the k best tokens of each position, and the one of ``include``: tokens and log-probabilities (B, L, k)."""
    factors, values = log_q.topk(top_k, -1)
    if include is None:
        return values, factors
    is_listed = (values == include.unsqueeze(-1)).any(-1, keepdim=True)
    extra = log_q.gather(2, include.unsqueeze(-1)).masked_fill(is_listed, -torch.inf)
    return torch.cat([values, include.unsqueeze(-1)], -1), torch.cat([factors, extra], -1)


def _listed_evidence(values: Tensor, log_q: Tensor, tokens: Tensor, masked: Tensor) -> Evidence:
    """Replace the list of each observed position by its one token."""
    observed = ~masked.unsqueeze(-1)
    is_first = torch.arange(values.shape[-1], device=values.device) == 0
    factors = torch.where(observed, torch.where(is_first, 0.0, -torch.inf).to(log_q.dtype), log_q)
    return Evidence.sparse(torch.where(observed, tokens.unsqueeze(-1), values), factors)


def _check_arguments(
    pc: CompiledCircuit,
    logits: Tensor,
    tokens: Tensor,
    masked: Tensor,
    normalization: str,
    top_k: int | None,
    include: Tensor | None,
) -> None:
    if not isinstance(pc, CompiledCircuit):
        raise ArgumentError(f"pc: expected a compiled circuit, ct.compile(circuit), got {type(pc).__name__}")
    num_vars, categories = pc.circuit.num_vars, set(pc.circuit.num_categories)
    if logits.dim() != 3 or not logits.is_floating_point():
        raise ArgumentError(f"logits: expected floating point (B, L, V), got {logits.dtype} {tuple(logits.shape)}")
    shape = logits.shape[:2]
    if shape[1] != num_vars or categories != {logits.shape[2]}:
        raise ArgumentError(
            f"logits: the circuit has {num_vars} variables of {sorted(categories)} categories, so expected (B, "
            f"{num_vars}, "
            f"{max(categories)}), got {tuple(logits.shape)}"
        )
    if tokens.shape != shape or tokens.dtype != torch.int64:
        raise ArgumentError(f"tokens: expected int64 of shape {tuple(shape)}, got {tokens.dtype} {tuple(tokens.shape)}")
    if masked.shape != shape or masked.dtype != torch.bool:
        raise ArgumentError(f"masked: expected bool of shape {tuple(shape)}, got {masked.dtype} {tuple(masked.shape)}")
    if include is not None and (include.shape != shape or include.dtype != torch.int64):
        raise ArgumentError(
            f"include: expected int64 of shape {tuple(shape)}, got {include.dtype} {tuple(include.shape)}"
        )
    if normalization not in get_args(Normalization):
        raise ArgumentError(f"normalization: expected one of {get_args(Normalization)}, got {normalization!r}")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ArgumentError(f"top_k: expected an integer >= 1 or None, got {top_k!r}")
    best = logits.detach().amax(-1).masked_fill(~masked, 0.0)
    if not bool(best.isfinite().all()):
        raise ArgumentError(
            "logits: expected rows with at least one finite entry and no NaN or +inf at masked positions; row maxima "
            "are "
            f"{best[~best.isfinite()][:3].tolist()}"
        )


def _check_tokens(tokens: Tensor, num_tokens: int) -> None:
    if bool(((tokens < 0) | (tokens >= num_tokens)).any()):
        raise ArgumentError(
            f"value: expected tokens from 0 to {num_tokens - 1}, got values from {int(tokens.min())} to "
            f"{int(tokens.max())}"
        )
