"""Reference steps: what one step of each way of decoding does, spelled out by brute force.

They are oracles for tests of a decoder, and share no code with one: every draw is enumerated, every latent
configuration of the circuit too, in plain NumPy. Each function returns a step law for
:func:`~diffusion.testing.law.decoder_law`, at temperature 1 where nothing else is said.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

import circuits as ct
from diffusion.denoisers.base import Denoiser
from diffusion.errors import ArgumentError
from diffusion.testing.components import Components
from diffusion.testing.law import Law, Masked, StepLaw, Tokens, advance

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]
Bools = NDArray[np.bool_]

Strategy = Literal["low_confidence", "top_prob", "margin", "entropy", "random"]
Mode = Literal["joint", "marginal", "latent", "any_order"]
_DECIMALS = 9


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which of the open positions a step commits: those with the highest scores.

    A step with n open positions and s steps left commits n / s of them, rounded up, and whatever ``threshold`` or
    ``entropy_bound`` adds. Scores that differ by less than 1e-9 tie; ties go to the left.

    Attributes:
        strategy: the score: ``low_confidence``: the probability of the token that was drawn; ``top_prob``: of the best
            token; ``margin``: the best minus the second best; ``entropy``: minus the entropy; ``random``: all orders
            are equally probable.
        num_steps: how many steps there are; None: a step commits at least one position.
        threshold: commit also every position whose score is greater.
        entropy_bound: commit also the most certain positions, as long as their entropies without the greatest sum to at
            most this, in nats (Ben-Hamu et al. 2025, arXiv 2505.24857).
    """

    strategy: Strategy = "random"
    num_steps: int | None = None
    threshold: float | None = None
    entropy_bound: float | None = None

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise ArgumentError(f"strategy: expected one of {', '.join(get_args(Strategy))}, got {self.strategy!r}")
        if self.entropy_bound is not None and self.strategy != "entropy":
            raise ArgumentError(f"entropy_bound: expected strategy='entropy', got {self.strategy!r}")

    def count(self, num_open: int, step: int) -> int:
        """Return how many positions a step commits at least."""
        return 1 if self.num_steps is None else -(-num_open // max(1, self.num_steps - step))

    def committed(self, draws: Draws, masked: Bools, count: int) -> Iterator[tuple[float, Bools]]:
        """Yield sets of positions and their probability: which positions each draw commits, bool (S, L)."""
        open_positions = np.flatnonzero(masked)
        if self.strategy == "random":
            subsets = list(itertools.combinations(open_positions, count))
            for subset in subsets:
                chosen = np.zeros_like(masked)
                chosen[list(subset)] = True
                yield 1 / len(subsets), np.broadcast_to(chosen, draws.texts.shape)
            return
        scores = self._scores(draws)
        ranked = np.argsort(np.where(masked, -scores, np.inf), axis=1, kind="stable")
        rank = np.argsort(ranked, axis=1, kind="stable")
        chosen = rank < count
        if self.threshold is not None:
            chosen |= scores > self.threshold
        if self.entropy_bound is not None:
            entropies = np.take_along_axis(np.where(masked, -scores, 0.0), ranked, 1)  # open ones first, ascending
            within = np.cumsum(entropies, 1) - entropies <= self.entropy_bound
            chosen |= np.take_along_axis(within, rank, 1)
        yield 1.0, chosen & masked

    def _scores(self, draws: Draws) -> Floats:
        """Return the score of every position in every draw, (S, L)."""
        judge = draws.judge
        if self.strategy == "low_confidence":
            scores = judge[np.arange(judge.shape[0]), draws.texts]
        elif self.strategy == "entropy":
            scores = np.sum(judge * np.log(np.where(judge > 0, judge, 1.0)), 1)
        else:
            best = np.sort(judge, 1)[:, ::-1]
            scores = best[:, 0] - best[:, 1] if self.strategy == "margin" else best[:, 0]
        return np.broadcast_to(np.round(scores, _DECIMALS), draws.texts.shape)


class Draws(NamedTuple):
    """All texts that a step may draw at the open positions, and how reliability is judged.

    Several of them, with shares that sum to 1, are the law of a draw.
    """

    share: float
    texts: Ids  # shape: (S, L)
    probs: Floats  # shape: (S,)
    judge: Floats  # shape: (L, V)


def independent(denoiser: Denoiser, rule: Rule, *, temperature: float = 1.0) -> StepLaw:
    """Return the step of the factorized baseline: every token on its own from q, judged by q.

    Args:
        denoiser: gives q, its forbidden ids left out.
        rule: what is committed.
        temperature: tokens are drawn from ``q ** (1 / temperature)``, the best ones at 0; q itself judges.
    """

    def draws(tokens: Ids, masked: Bools) -> Iterator[Draws]:
        q = predicted(denoiser, tokens)
        yield Draws(1.0, *_products(_tempered(q, temperature), tokens, masked), q)

    return step_of(draws, rule)


def coupled(
    denoiser: Denoiser,
    pc: ct.CompiledCircuit,
    rule: Rule,
    *,
    decode: Mode = "joint",
    normalization: Literal["global", "local"] = "global",
    window: tuple[int, int] | None = None,
) -> StepLaw:
    """Return the step of decoding with a circuit, whose latent configurations are enumerated.

    Args:
        denoiser: gives q, its forbidden ids left out.
        pc: the circuit, over the positions of the window.
        rule: what is committed.
        decode: ``joint``: the tokens are drawn from the coupled distribution; ``marginal``: every token on its own,
            from its marginal; both are judged by the marginals. ``latent``: the latents are drawn, then every token on
            its own given them, which also judge. ``any_order``: the positions of a step are committed one after the
            other as ``marginal`` does, each from the coupled distribution given those before; nothing is coupled anew,
            and the denoiser is not asked again.
        normalization: see :class:`~diffusion.coupling.CoupledDistribution`.
        window: ``(start, stop)``, the positions that the circuit is over; None: all. Open ones lie in it.

    Raises:
        ArgumentError: an unknown mode, or ``any_order`` with a rule that commits more than a count.
    """
    if decode not in get_args(Mode):
        raise ArgumentError(f"decode: expected one of {', '.join(get_args(Mode))}, got {decode!r}")
    coupling = _Coupling(Components.of(pc), normalization, window)
    if decode == "any_order":
        return _one_after_the_other(denoiser, coupling, rule)

    def draws(tokens: Ids, masked: Bools) -> Iterator[Draws]:
        return coupling.draws(predicted(denoiser, tokens), tokens, masked, decode)

    return step_of(draws, rule)


def predicted(denoiser: Denoiser, tokens: Ids) -> Floats:
    """Return what a denoiser says about one text, its forbidden ids left out: probabilities (L, V)."""
    with torch.no_grad():
        logits = denoiser.logits(torch.from_numpy(tokens).unsqueeze(0))[0].double()
    logits[:, list(denoiser.spec.forbidden_ids)] = -torch.inf
    return np.asarray(torch.softmax(logits, -1).cpu().numpy())


@dataclass(frozen=True)
class _Coupling:
    """A circuit as a mixture, and where and how it is coupled."""

    components: Components
    normalization: str
    window: tuple[int, int] | None

    def draws(self, q: Floats, tokens: Ids, masked: Bools, decode: str) -> Iterator[Draws]:
        """Yield what a step may draw, given the prediction q, (L, V), for the whole text."""
        yield from self.draws_from(self.mixture(q, tokens, masked), q, tokens, masked, decode)

    def mixture(self, q: Floats, tokens: Ids, masked: Bools) -> Components:
        """Return the coupled distribution of the window, given the prediction q, (L, V), for the whole text."""
        inside = self._inside_of(tokens)
        return self.components.coupled(q[inside], tokens[inside], masked[inside], self.normalization)

    def draws_from(self, mixture: Components, q: Floats, tokens: Ids, masked: Bools, decode: str) -> Iterator[Draws]:
        """Yield what a step may draw from a distribution of the window; elsewhere the prediction judges."""
        inside = self._inside_of(tokens)
        for drawn in self._inside(mixture, tokens[inside], masked[inside], decode):
            texts = np.repeat(tokens[None], len(drawn.texts), 0)
            texts[:, inside] = drawn.texts
            judge = q.copy()
            judge[inside] = drawn.judge
            yield drawn._replace(texts=texts, judge=judge)

    def given(self, mixture: Components, tokens: Ids, observed: Bools) -> Components:
        """Return a distribution of the window given further tokens of the whole text."""
        inside = self._inside_of(tokens)
        return mixture.given(tokens[inside], observed[inside])

    def _inside_of(self, tokens: Ids) -> slice:
        return slice(*(self.window or (0, len(tokens))))

    @staticmethod
    def _inside(mixture: Components, tokens: Ids, masked: Bools, decode: str) -> Iterator[Draws]:
        if decode == "latent":
            for share, given in zip(mixture.weights.tolist(), mixture.leaves, strict=True):
                yield Draws(share, *_products(given, tokens, masked), given)
            return
        texts, probs = _products(mixture.marginals, tokens, masked)
        yield Draws(1.0, texts, probs if decode == "marginal" else mixture.prob(texts), mixture.marginals)


def _one_after_the_other(denoiser: Denoiser, coupling: _Coupling, rule: Rule) -> StepLaw:
    if rule.threshold is not None or rule.entropy_bound is not None:
        raise ArgumentError("rule: expected no threshold and no entropy_bound with decode='any_order'")

    def step_law(tokens: Tokens, masked: Masked, step: int) -> Iterator[tuple[float, Tokens, Masked]]:
        before, was_open = np.array(tokens), np.array(masked)
        q = predicted(denoiser, before)
        mixture = coupling.mixture(q, before, was_open)

        def draws(tokens: Ids, masked: Bools) -> Iterator[Draws]:
            given = coupling.given(mixture, tokens, was_open & ~masked)
            return coupling.draws_from(given, q, tokens, masked, "marginal")

        one = step_of(draws, Rule(strategy=rule.strategy))
        law: Law = {(tokens, masked): 1.0}
        for _ in range(rule.count(sum(masked), step)):
            law = advance(law, one, step)
        yield from ((prob, *state) for state, prob in law.items())

    return step_law


def step_of(draws: Callable[[Ids, Bools], Iterator[Draws]], rule: Rule) -> StepLaw:
    """Return the step that draws texts and commits some of their positions.

    Args:
        draws: what may be drawn, from tokens (L,) and open positions, bool (L,).
        rule: what is committed.
    """

    def step_law(tokens: Tokens, masked: Masked, step: int) -> Iterator[tuple[float, Tokens, Masked]]:
        before, is_open = np.array(tokens), np.array(masked)
        count = rule.count(int(is_open.sum()), step)
        for drawn in draws(before, is_open):
            for share, committed in rule.committed(drawn, is_open, count):
                after = np.where(committed, drawn.texts, before)
                still_open = is_open & ~committed
                probs = drawn.share * share * drawn.probs
                for prob, text, rest in zip(probs.tolist(), after.tolist(), still_open.tolist(), strict=True):
                    yield prob, tuple(text), tuple(rest)

    return step_law


def _values(table: Floats, tokens: Ids, masked: Bools) -> list[list[int]]:
    """Return the possible tokens of every position: those with a probability, or the one that is there."""
    return [np.flatnonzero(table[i]).tolist() if masked[i] else [int(tokens[i])] for i in range(len(tokens))]


def _products(table: Floats, tokens: Ids, masked: Bools) -> tuple[Ids, Floats]:
    """Return all texts that draws from the rows of (L, V) at open positions may give, and their probabilities."""
    texts = np.array(list(itertools.product(*_values(table, tokens, masked))))
    return texts, np.prod(table[np.arange(len(tokens)), texts], 1, where=masked)


def _tempered(q: Floats, temperature: float) -> Floats:
    if temperature == 0:
        return np.eye(q.shape[1])[np.round(q, _DECIMALS).argmax(1)]
    sharpened = np.asarray((q / q.max(1, keepdims=True)) ** (1 / temperature))
    return sharpened / sharpened.sum(1, keepdims=True)
