"""Reference steps: what one step of each way of decoding does, spelled out by brute force.

They are oracles for tests of a decoder, and share no code with one: every draw is enumerated, every latent
configuration of the circuit too, in plain NumPy. Each function returns a step law for
:func:`~diffusion.testing.law.decoder_law`, at temperature 1 where nothing else is said.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

import circuits as ct
from diffusion.decoding.config import Strategy as DecodingStrategy
from diffusion.denoisers.base import Denoiser
from diffusion.errors import ArgumentError
from diffusion.testing.components import Components
from diffusion.testing.law import Law, Masked, StepLaw, Tokens, advance

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]
Bools = NDArray[np.bool_]

Strategy = Literal["low_confidence", "top_prob", "margin", "entropy", "random"]
_DECIMALS = 9


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which of the open positions a step commits: those with the highest scores.

    A step with n open positions and s steps left commits n / s of them, rounded up, and whatever ``threshold``,
    ``entropy_bound`` or ``joint_entropy`` adds. Scores that differ by less than 1e-9 tie; ties go to the left.

    Attributes:
        strategy: the score: ``low_confidence``: the probability of the token that was drawn; ``top_prob``: of the best
            token; ``margin``: the best minus the second best; ``entropy``: minus the entropy; ``random``: all orders
            are equally probable.
        num_steps: how many steps there are; None: a step commits at least one position.
        threshold: commit also every position whose score is greater.
        entropy_bound: commit also the most certain positions, as long as their entropies without the greatest sum to at
            most this, in nats (Ben-Hamu et al. 2025, arXiv 2505.24857).
        joint_entropy: commit also, one after the other, the position that adds the least to a bound of the joint
            entropy of what is committed, as long as that is at most this, in nats: position i adds ``H_i - max_j I(i;
            j)`` over those before, where each position tells apart its four most probable tokens and the rest.
    """

    strategy: Strategy = "random"
    num_steps: int | None = None
    threshold: float | None = None
    entropy_bound: float | None = None
    joint_entropy: float | None = None

    @classmethod
    def of(
        cls,
        strategy: DecodingStrategy,
        *,
        num_steps: int | None = None,
        threshold: float = 0.9,
        entropy_bound: float = 0.1,
    ) -> Rule:
        """Return the rule of a strategy of decoding, see :data:`diffusion.decoding.config.STRATEGIES`.

        Args:
            strategy: its name.
            num_steps: how many steps there are; None: a step commits at least one position.
            threshold: of ``threshold``.
            entropy_bound: of ``entropy_bound`` and ``joint_entropy``, in nats.
        """
        if strategy == "threshold":
            return cls(strategy="low_confidence", num_steps=num_steps, threshold=threshold)
        if strategy == "entropy_bound":
            return cls(strategy="entropy", num_steps=num_steps, entropy_bound=entropy_bound)
        if strategy == "joint_entropy":
            return cls(strategy="entropy", num_steps=num_steps, joint_entropy=entropy_bound)
        return cls(strategy=strategy, num_steps=num_steps)

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise ArgumentError(f"strategy: expected one of {', '.join(get_args(Strategy))}, got {self.strategy!r}")
        for name in ("entropy_bound", "joint_entropy"):
            if getattr(self, name) is not None and self.strategy != "entropy":
                raise ArgumentError(f"{name}: expected strategy='entropy', got {self.strategy!r}")

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
        if self.joint_entropy is not None:
            yield 1.0, np.broadcast_to(self._jointly_certain(draws, masked, count), draws.texts.shape)
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

    def _jointly_certain(self, draws: Draws, masked: Bools, count: int) -> Bools:
        """Return the positions that ``joint_entropy`` commits, at least ``count`` of them: bool (L,)."""
        entropies = -np.sum(draws.judge * np.log(np.where(draws.judge > 0, draws.judge, 1.0)), 1)
        adds, chosen, total = entropies.copy(), np.zeros_like(masked), 0.0
        for number in range(int(masked.sum())):
            position = int(np.where(masked & ~chosen, np.round(adds, _DECIMALS), np.inf).argmin())
            total += adds[position]
            if number >= count and total > (self.joint_entropy or 0.0):
                break
            chosen[position] = True
            if draws.dependence is not None:
                adds = np.minimum(adds, np.maximum(entropies - draws.dependence[position], 0.0))
        return chosen

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
    dependence: Floats | None = None  # shape: (L, L), the positions' mutual information in nats; None: there is none


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
    decode: str = "joint",
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
            its own given them, which also judge; but a threshold is one on the marginals. ``any_order``: a step commits
            in rounds as ``marginal`` does, in each one position and those that a threshold or bound adds, until it has
            its count, each round from the coupled distribution given what the step has committed; nothing is coupled
            anew, and the denoiser is not asked again.
        normalization: see :class:`~diffusion.coupling.CoupledDistribution`.
        window: ``(start, stop)``, the positions that the circuit is over; None: all. Open ones lie in it.

    Raises:
        ArgumentError: an unknown mode.
    """
    if decode not in DRAWS:
        raise ArgumentError(f"decode: expected one of {', '.join(DRAWS)}, got {decode!r}")
    coupling = _Coupling(Components.of(pc), normalization, window)
    if decode == "any_order":
        return _one_after_the_other(denoiser, coupling, rule)

    def draws(tokens: Ids, masked: Bools) -> Iterator[Draws]:
        return coupling.draws(predicted(denoiser, tokens), tokens, masked, decode, rule)

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

    def draws(self, q: Floats, tokens: Ids, masked: Bools, decode: str, rule: Rule) -> Iterator[Draws]:
        """Yield what a step may draw, given the prediction q, (L, V), for the whole text."""
        yield from self.draws_from(self.mixture(q, tokens, masked), q, tokens, masked, decode, rule)

    def mixture(self, q: Floats, tokens: Ids, masked: Bools) -> Components:
        """Return the coupled distribution of the window, given the prediction q, (L, V), for the whole text."""
        inside = self._inside_of(tokens)
        return self.components.coupled(q[inside], tokens[inside], masked[inside], self.normalization)

    def draws_from(
        self, mixture: Components, q: Floats, tokens: Ids, masked: Bools, decode: str, rule: Rule
    ) -> Iterator[Draws]:
        """Yield what a step may draw from a distribution of the window; elsewhere the prediction judges."""
        inside = self._inside_of(tokens)
        dependence = None
        if rule.joint_entropy is not None:
            dependence = np.zeros((len(tokens), len(tokens)))
            dependence[inside, inside] = mixture.mutual_information()
        for drawn in DRAWS[decode](mixture, tokens[inside], masked[inside]):
            texts = np.repeat(tokens[None], len(drawn.texts), 0)
            texts[:, inside] = drawn.texts
            judge = q.copy()
            judge[inside] = mixture.marginals if rule.threshold is not None else drawn.judge
            yield drawn._replace(texts=texts, judge=judge, dependence=dependence)

    def given(self, mixture: Components, tokens: Ids, observed: Bools) -> Components:
        """Return a distribution of the window given further tokens of the whole text."""
        inside = self._inside_of(tokens)
        return mixture.given(tokens[inside], observed[inside])

    def _inside_of(self, tokens: Ids) -> slice:
        return slice(*(self.window or (0, len(tokens))))


def _together(mixture: Components, tokens: Ids, masked: Bools) -> Iterator[Draws]:
    texts, _ = _products(mixture.marginals, tokens, masked)
    yield Draws(1.0, texts, mixture.prob(texts), mixture.marginals)


def _each_alone(mixture: Components, tokens: Ids, masked: Bools) -> Iterator[Draws]:
    yield Draws(1.0, *_products(mixture.marginals, tokens, masked), mixture.marginals)


def _given_latents(mixture: Components, tokens: Ids, masked: Bools) -> Iterator[Draws]:
    for share, given in zip(mixture.weights.tolist(), mixture.leaves, strict=True):
        yield Draws(share, *_products(given, tokens, masked), given)


DRAWS: dict[str, Callable[[Components, Ids, Bools], Iterator[Draws]]] = {
    "joint": _together,
    "marginal": _each_alone,
    "latent": _given_latents,
    "any_order": _each_alone,  # again and again
}
"""The law of what a step may draw from the distribution of a window, by mode."""


def _one_after_the_other(denoiser: Denoiser, coupling: _Coupling, rule: Rule) -> StepLaw:
    of_round = replace(rule, num_steps=None)

    def step_law(tokens: Tokens, masked: Masked, step: int) -> Iterator[tuple[float, Tokens, Masked]]:
        before, was_open = np.array(tokens), np.array(masked)
        q = predicted(denoiser, before)
        mixture = coupling.mixture(q, before, was_open)

        def draws(tokens: Ids, masked: Bools) -> Iterator[Draws]:
            given = coupling.given(mixture, tokens, was_open & ~masked)
            return coupling.draws_from(given, q, tokens, masked, "marginal", of_round)

        one = step_of(draws, of_round)
        most_open = sum(masked) - rule.count(sum(masked), step)
        law: Law = {(tokens, masked): 1.0}
        while law:
            law = advance(law, one, step)
            yield from ((prob, *state) for state, prob in law.items() if sum(state[1]) <= most_open)
            law = {state: prob for state, prob in law.items() if sum(state[1]) > most_open}

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


def possible_texts(table: NDArray[Any], tokens: Ids, masked: Bools) -> Ids:
    """Return all texts whose open positions have tokens that the rows of a table, (L, V), do not call 0: (S, L)."""
    values = [np.flatnonzero(table[i]).tolist() if masked[i] else [int(tokens[i])] for i in range(len(tokens))]
    return np.array(list(itertools.product(*values)))


def _products(table: Floats, tokens: Ids, masked: Bools) -> tuple[Ids, Floats]:
    """Return all texts that draws from the rows of (L, V) at open positions may give, and their probabilities."""
    texts = possible_texts(table, tokens, masked)
    return texts, np.prod(table[np.arange(len(tokens)), texts], 1, where=masked)


def _tempered(q: Floats, temperature: float) -> Floats:
    if temperature == 0:
        return np.eye(q.shape[1])[np.round(q, _DECIMALS).argmax(1)]
    sharpened = np.asarray((q / q.max(1, keepdims=True)) ** (1 / temperature))
    return sharpened / sharpened.sum(1, keepdims=True)
