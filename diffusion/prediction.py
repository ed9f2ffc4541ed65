"""What a denoiser says about some positions: one categorical distribution each, of all tokens or of the best ones.

Everything that needs a prediction asks for it here: logits are checked, forbidden tokens ruled out, the rest normalised
and listed once, whoever uses them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from circuits.arguments import kind_of
from circuits.progress import check_stop
from diffusion.denoisers.base import Denoiser, FeatureDenoiser
from diffusion.denoisers.questions import check_logits
from diffusion.errors import ArgumentError

LogitsHook = Callable[[Tensor], Tensor]
"""Changes a denoiser's logits, float32 (B, L, V), before forbidden tokens are ruled out; must keep their shape."""

NEGLIGIBLE = -1e4
"""A log-probability that stands for zero: caches, of half precision, know none below -6e4, and no -inf."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Prediction:
    """Independent distributions of the tokens at L positions of B sequences.

    Attributes:
        log_q: log-probabilities, (B, L, V) of all tokens or (B, L, k) of the listed ones; -inf: impossible. What a
            conditioner made of them need not sum to 1.
        vocab_size: V.
        values: the listed tokens, int64 (B, L, k), distinct in a row but for those at -inf; all others are impossible.
            None: all tokens, in order.
        features: the denoiser's last hidden states at these positions, (B, L, H), or None.
        t: time of each sequence in the forward process, (B,), or None.
        where: bool (B, L), the n positions that something is said of; then ``log_q`` and ``values`` are (1, n, ...), in
            order, as :meth:`only` makes it. None: all.
    """

    log_q: Tensor
    vocab_size: int
    values: Tensor | None = None
    features: Tensor | None = None
    t: Tensor | None = None
    where: Tensor | None = None

    def __post_init__(self) -> None:
        log_q, values, features = self.log_q, self.values, self.features
        width = self.vocab_size if values is None else values.shape[-1]
        if log_q.dim() != 3 or not log_q.is_floating_point() or log_q.shape[2] != width:
            raise ArgumentError(
                f"log_q: expected floating point (B, L, {width}), got {log_q.dtype} {tuple(log_q.shape)}"
            )
        if values is not None and (values.shape != log_q.shape or values.dtype != torch.int64):
            raise ArgumentError(
                f"values: expected int64 of shape {tuple(log_q.shape)}, got {values.dtype} {tuple(values.shape)}"
            )
        if self.where is not None:
            where, expected = self.where, f"bool (B, L) with {log_q.shape[1]} positions"
            if not isinstance(where, Tensor) or where.dtype != torch.bool or where.dim() != 2:
                raise ArgumentError(f"where: expected {expected}, got {kind_of(where)}")
            if log_q.shape[:2] != (1, int(where.sum())):
                raise ArgumentError(f"where: expected {expected}, got {int(where.sum())} of {tuple(where.shape)}")
        if features is not None and (features.dim() != 3 or features.shape[:2] != self.shape):
            raise ArgumentError(
                f"features: expected (B, L, H) with (B, L) = {tuple(self.shape)}, got {tuple(features.shape)}"
            )

    @classmethod
    def ask(
        cls,
        denoiser: Denoiser,
        tokens: Tensor,  # shape: (B, length)
        *,
        valid: Tensor | None = None,  # shape: (B, length)
        t: Tensor | None = None,  # shape: (B,)
        window: tuple[int, int] | None = None,
        cache: Any = None,
        top_k: int | None = None,
        include: Tensor | None = None,  # shape: (B, L)
        logits_hook: LogitsHook | None = None,
        features: bool = False,
        forbidden_ids: Sequence[int] | None = None,
    ) -> Prediction:
        """Ask a denoiser about a window of a canvas. It is differentiable where the denoiser is.

        Args:
            denoiser: the masked-token predictor; called once.
            tokens: the canvas, int64 (B, length), with mask tokens at the masked positions.
            valid: bool (B, length), False at padding.
            t: time of each sequence, (B,), for denoisers that want it.
            window: ``(start, stop)``, the L positions that are asked about; None: all.
            cache: handed on to the denoiser.
            top_k: list the k best tokens of each position only, see :meth:`listed`; None: all.
            include: int64 (B, L), tokens that ``top_k`` must not drop, for instance the true ones.
            logits_hook: changes the logits before forbidden tokens are ruled out.
            features: whether the denoiser's last hidden states are to come along.
            forbidden_ids: tokens to rule out; None: those of the denoiser's spec.

        Returns:
            Normalised log-probabilities, float32 (float64 from a denoiser in float64), -inf at forbidden tokens.

        Raises:
            ArgumentError: the logits have a wrong shape or dtype, or at a masked position NaN, +inf or no token above
                -inf; or ``top_k`` or ``include`` do not fit, or the denoiser has no features.
            Interrupted: the work that asks was told to stop, see :func:`circuits.progress.request_stop`.
        """
        check_stop()
        who = type(denoiser).__name__
        given = {"valid": valid, "t": t, "window": window, "cache": cache}
        given = {name: value for name, value in given.items() if value is not None}
        hidden = None
        if features:
            if not isinstance(denoiser, FeatureDenoiser):
                raise ArgumentError(
                    f"denoiser: expected one with features, got {who}; give it a method logits_and_features"
                )
            logits, hidden = denoiser.logits_and_features(tokens, **given)
        else:
            logits = denoiser.logits(tokens, **given)
        start, stop = (0, tokens.shape[1]) if window is None else window
        check_logits(denoiser, logits, tokens, (start, stop))
        dtype = logits.dtype if logits.dtype == torch.float64 else torch.float32
        logits = logits.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if logits_hook is not None:
            shape = logits.shape
            logits = logits_hook(logits).clone()
            if logits.shape != shape:
                raise ArgumentError(f"logits_hook: expected logits {tuple(shape)} back, got {tuple(logits.shape)}")
        forbidden_ids = denoiser.spec.forbidden_ids if forbidden_ids is None else forbidden_ids
        forbidden = torch.tensor(forbidden_ids, device=logits.device)
        logits = logits.index_fill_(-1, forbidden, -torch.inf)
        matters = tokens[:, start:stop] == denoiser.spec.mask_id
        if valid is not None:
            matters = matters & valid[:, start:stop]
        return _normalised(
            logits, f"denoiser: {who}", matters, top_k=top_k, include=include, features=hidden, t=t, first=start
        )

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,  # shape: (B, L, V)
        masked: Tensor | None = None,  # shape: (B, L)
        *,
        top_k: int | None = None,
        include: Tensor | None = None,  # shape: (B, L)
        features: Tensor | None = None,  # shape: (B, L, H)
        t: Tensor | None = None,  # shape: (B,)
    ) -> Prediction:
        """Normalise logits that are at hand.

        Args:
            logits: unnormalised log-probabilities, (B, L, V); -inf forbids a token.
            masked: bool (B, L), where the logits matter; elsewhere they may be anything. None: everywhere.
            top_k: list the k best tokens of each position only, see :meth:`listed`; None: all.
            include: int64 (B, L), tokens that ``top_k`` must not drop.
            features: hidden states to go with them, (B, L, H).
            t: time of each sequence, (B,).

        Raises:
            ArgumentError: a wrong shape or dtype; NaN, +inf or no token above -inf where the logits matter; or
                ``top_k`` or ``include`` do not fit.
        """
        if not isinstance(logits, Tensor) or logits.dim() != 3 or not logits.is_floating_point():
            raise ArgumentError(f"logits: expected floating point (B, L, V), got {kind_of(logits)}")
        return _normalised(logits, "logits", masked, top_k=top_k, include=include, features=features, t=t)

    @property
    def num_listed(self) -> int:
        """How many tokens of each position have a log-probability: k, or V."""
        return self.log_q.shape[2]

    @property
    def shape(self) -> torch.Size:
        """(B, L)."""
        return self.log_q.shape[:2] if self.where is None else self.where.shape

    def only(self, where: Tensor) -> Prediction:
        """Return what is said of some positions alone, bool (B, L): what follows costs as much as there are of them.

        Raises ArgumentError for a wrong shape or dtype, or a position that nothing is said of.
        """
        if not isinstance(where, Tensor) or where.dtype != torch.bool or where.shape != self.shape:
            raise ArgumentError(f"where: expected bool {tuple(self.shape)}, got {kind_of(where)}")
        here = self.placed(where)
        values = None if self.values is None else self.values[here].unsqueeze(0)
        return replace(self, log_q=self.log_q[here].unsqueeze(0), values=values, where=where)

    def whole(self) -> Prediction:
        """Return the prediction of all positions; where nothing is said, any tokens are equally probable."""
        if self.where is None:
            return self
        shape, values = (*self.shape, self.num_listed), None
        log_q = self.log_q.new_full(shape, -math.log(self.num_listed)).index_put((self.where,), self.log_q[0])
        if self.values is not None:
            values = torch.arange(self.num_listed, device=log_q.device).expand(shape)
            values = values.index_put((self.where,), self.values[0])
        return replace(self, log_q=log_q, values=values, where=None)

    def rows(self, index: Tensor | slice) -> Prediction:
        """Return the predictions of some of the B sequences."""
        return self._map(lambda part: part[index], "log_q", "values", "features", "t")

    def at(self, positions: slice | Tensor) -> Prediction:
        """Return the predictions at some of the L positions: a slice, int64 (n,), or int64 (B, n), n in each row."""
        names = ("log_q", "values", "features")
        if isinstance(positions, slice) or positions.dim() == 1:
            return self._map(lambda part: part[:, positions], *names)
        return self._map(lambda part: part.take_along_dim(positions.unsqueeze(-1), 1), *names)

    def listed(self, top_k: int, include: Tensor | None = None) -> Prediction:
        """Keep the k most probable tokens of each position and, if it is not among them, that of ``include``.

        Args:
            top_k: k, at least 1 and at most V; the log-probabilities stay as they are.
            include: int64 (B, L). With it k + 1 tokens are listed; the last one is at -inf where it was listed already.

        Raises:
            ArgumentError: ``top_k`` or ``include`` do not fit.
        """
        _check_listing(top_k, include, self.shape, self.vocab_size)
        if top_k >= self.num_listed:
            return self
        log_q, index = self.log_q.topk(top_k, -1)
        values = index if self.values is None else self.values.gather(2, index)
        if include is not None:
            include = self.placed(include)
            log_q, values = _with_included(log_q, values, self._log_prob_of(include), include)
        return replace(self, log_q=log_q, values=values)

    def log_prob_of(self, tokens: Tensor) -> Tensor:
        """Return the log-probabilities of tokens, int64 (B, L): (B, L), -inf for tokens that are not listed.

        It is 0 where nothing is said. Raises ArgumentError for a wrong shape, or a token outside the vocabulary.
        """
        check_token_ids("tokens", tokens, self.shape, self.vocab_size)
        found = self._log_prob_of(self.placed(tokens))
        return found if self.where is None else found.new_zeros(self.shape).index_put((self.where,), found[0])

    def placed(self, of_positions: Tensor) -> Tensor:
        """Return what holds of positions, (B, L), as ``log_q`` has them: (B, L), or (1, n)."""
        return of_positions if self.where is None else of_positions[self.where].unsqueeze(0)

    def _log_prob_of(self, tokens: Tensor) -> Tensor:
        if self.values is None:
            return self.log_q.gather(2, tokens.unsqueeze(-1)).squeeze(-1)
        return self.log_q.masked_fill(self.values != tokens.unsqueeze(-1), -torch.inf).amax(-1)

    def dense(self) -> Tensor:
        """Return the log-probabilities of all tokens, (B, L, V); -inf for those that are not listed."""
        if self.where is not None:
            return self.whole().dense()
        if self.values is None:
            return self.log_q
        everything = self.log_q.new_full((*self.shape, self.vocab_size), -torch.inf)
        return everything.scatter_reduce(2, self.values, self.log_q, "amax")

    def normalised(self) -> Prediction:
        """Return the prediction with log-probabilities that sum to 1 over the tokens that are listed."""
        return replace(self, log_q=torch.log_softmax(self.log_q, -1))

    def tempered(self, temperature: float) -> Prediction:
        """Return ``q^(1 / tau)``, normalised over the listed tokens, tau >= 0; at 0 the best token has all of it."""
        best, index = self.log_q.max(-1, keepdim=True)
        if temperature == 0:
            greedy = torch.full_like(self.log_q, -torch.inf).scatter(2, index, 0.0)
            return replace(self, log_q=greedy)
        scaled = (self.log_q - best) / temperature  # the best stays at 0, however small the temperature
        return replace(self, log_q=torch.log_softmax(scaled, -1))

    def with_observed(self, tokens: Tensor, observed: Tensor) -> Prediction:
        """Return the prediction that is sure of ``tokens``, int64 (B, L), where ``observed``, bool (B, L), is True."""
        if self.where is not None:
            return self.whole().with_observed(tokens, observed)
        here, token = observed.unsqueeze(-1), tokens.masked_fill(~observed, 0).unsqueeze(-1)
        log_q = self.log_q.masked_fill(here, -torch.inf)
        if self.values is None:
            kept = self.log_q.gather(2, token)
            return replace(self, log_q=log_q.scatter_(2, token, kept.masked_fill(here, 0.0)))
        is_first = torch.arange(self.num_listed, device=log_q.device) == 0
        return replace(
            self, log_q=log_q.masked_fill(here & is_first, 0.0), values=torch.where(here, token, self.values)
        )

    def best(self) -> Tensor:
        """Return the most probable token of each position, int64 (B, L)."""
        if self.where is not None:
            return self.whole().best()
        return self._tokens_at(self.log_q.argmax(-1))

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw a token of each position, independently: int64 (B, L); log-probabilities need not be normalised."""
        if self.where is not None:
            return self.whole().draw(generator)
        clocks = torch.empty_like(self.log_q).exponential_(generator=generator)  # the first of them to ring wins
        return self._tokens_at((self.log_q - clocks.clamp_min_(torch.finfo(clocks.dtype).tiny).log_()).argmax(-1))

    def _tokens_at(self, index: Tensor) -> Tensor:
        return index if self.values is None else self.values.gather(2, index.unsqueeze(-1)).squeeze(-1)

    def _map(self, function: Callable[[Tensor], Tensor], *names: str) -> Prediction:
        if self.where is not None:
            return self.whole()._map(function, *names)
        parts: dict[str, Any] = {name: getattr(self, name) for name in names}
        parts = {name: None if part is None else function(part) for name, part in parts.items()}
        return replace(self, **parts)


def _normalised(
    logits: Tensor,
    who: str,
    matters: Tensor | None,
    *,
    top_k: int | None,
    include: Tensor | None,
    features: Tensor | None,
    t: Tensor | None,
    first: int = 0,
) -> Prediction:
    """Return the log-softmax of logits, all or listed; ``first`` is the position of the first of them, for errors."""
    vocab_size = logits.shape[2]
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    if include is not None or top_k is not None:
        _check_listing(vocab_size if top_k is None else top_k, include, logits.shape[:2], vocab_size)
    values = None
    if top_k is None or top_k == vocab_size:
        log_q = torch.log_softmax(logits, -1)
        broken = log_q.detach().amax(-1).isnan()
    else:
        best, values = logits.topk(top_k, -1)
        peak = best[..., :1]
        log_sum = (logits - peak).exp_().sum(-1, keepdim=True).log_()  # the one more tensor of size V, gone at once
        log_q = best - peak - log_sum
        broken = ~peak.detach().squeeze(-1).isfinite()
        if include is not None:
            extra = (logits.gather(2, include.unsqueeze(-1)) - peak - log_sum).squeeze(-1)
            log_q, values = _with_included(log_q, values, extra, include)
    if bool(broken.any()):
        wrong = broken if matters is None else broken & matters
        if bool(wrong.any()):
            raise _broken_logits(logits, who, wrong, first)
        log_q = log_q.masked_fill(broken.unsqueeze(-1), -math.log(vocab_size))
    return Prediction(log_q=log_q, vocab_size=vocab_size, values=values, features=features, t=t)


def _with_included(log_q: Tensor, values: Tensor, extra: Tensor, include: Tensor) -> tuple[Tensor, Tensor]:
    """Append the token ``include``, (B, L), to lists (B, L, k), with log-probability -inf where it was listed."""
    include = include.unsqueeze(-1)
    extra = extra.unsqueeze(-1).masked_fill((values == include).any(-1, keepdim=True), -torch.inf)
    return torch.cat([log_q, extra], -1), torch.cat([values, include], -1)


def _broken_logits(logits: Tensor, who: str, wrong: Tensor, first: int) -> ArgumentError:
    row, position = wrong.nonzero()[0].tolist()
    numbers = logits[row, position].detach()
    got = "NaN" if bool(numbers.isnan().any()) else "+inf" if bool((numbers == torch.inf).any()) else "-inf for all"
    return ArgumentError(
        f"{who}: expected rows with at least one finite entry and no NaN or +inf where a token is to be predicted, got "
        f"{got} at position {first + position} of sequence {row}; mend its weights, or forbid fewer tokens"
    )


def _check_listing(top_k: int, include: Tensor | None, shape: torch.Size, vocab_size: int) -> None:
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= vocab_size:
        raise ArgumentError(
            f"top_k: expected an integer >= 1 and at most the {vocab_size} tokens, or None for all, got {top_k!r}"
        )
    if include is not None:
        check_token_ids("include", include, shape, vocab_size)


def check_token_ids(name: str, tokens: Tensor, shape: torch.Size, vocab_size: int) -> None:
    """Raise ArgumentError unless ``tokens`` are int64 of this shape, from 0 to ``vocab_size`` - 1."""
    if not isinstance(tokens, Tensor) or tokens.shape != shape or tokens.dtype != torch.int64:
        raise ArgumentError(f"{name}: expected int64 of shape {tuple(shape)}, got {kind_of(tokens)}")
    outside = (tokens < 0) | (tokens >= vocab_size)
    if bool(outside.any()):
        raise ArgumentError(
            f"{name}: expected tokens from 0 to {vocab_size - 1}, got {int(tokens[outside][0])} at "
            f"{tuple(outside.nonzero()[0].tolist())}"
        )
