"""A circuit over some of a denoiser's tokens: its C categories stand for C of the denoiser's V ids.

A denoiser may be wider than its tokenizer (padding of the embedding), or a circuit be over a few tokens of interest.
Everything outside of the circuit's vocabulary has probability zero in the product, so its normaliser sums over nothing
else. Tokens are translated here, on their way into a coupled distribution and out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from circuits import CompiledCircuit, RowGenerators
from circuits.queries import DeterministicAutomaton
from diffusion.coupling import IGNORED_LABEL, CoupledDistribution
from diffusion.errors import ArgumentError
from diffusion.prediction import NEGLIGIBLE, Prediction


def checked_vocabulary(vocabulary: Sequence[int] | Tensor, pc: CompiledCircuit) -> Tensor:
    """Return the ids of a circuit's categories, int64 (C,); raises ArgumentError unless each has one of its own."""
    categories = set(pc.circuit.num_categories)
    try:
        ids = torch.as_tensor(vocabulary)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"vocabulary: expected whole numbers, got {vocabulary!r:.80}") from error
    if ids.dim() != 1 or ids.dtype != torch.int64 or {len(ids)} != categories:
        raise ArgumentError(
            f"vocabulary: expected one id for each of the circuit's {sorted(categories)} categories, got {ids.dtype} "
            f"{tuple(ids.shape)}"
        )
    if bool((ids < 0).any()) or len(ids.unique()) != len(ids):
        raise ArgumentError("vocabulary: expected ids >= 0, no two of them equal, got others")
    return ids


def check_padding(prediction: Prediction, masked: Tensor, num_categories: int) -> None:
    """Raise ArgumentError unless a prediction is of a circuit's C tokens, and of padding ids that it never predicts.

    It matters where it is ``masked``, bool (B, L).
    """
    if num_categories <= prediction.vocab_size:
        if prediction.values is None:
            beyond = prediction.log_q[..., num_categories:].amax(-1)
        else:
            beyond = prediction.log_q.masked_fill(prediction.values < num_categories, -torch.inf).amax(-1)
        if not bool(((beyond > NEGLIGIBLE) & prediction.placed(masked)).any()):
            return
    raise ArgumentError(
        f"prediction: expected one of the circuit's {num_categories} tokens, got one of {prediction.vocab_size}; "
        "forbid the other ids, or say which ids the circuit is about, df.CoupledHead(pc, vocabulary=...)"
    )


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Which of V tokens the categories of a circuit stand for.

    Attributes:
        ids: the token of every category, int64 (C,), distinct.
        num_tokens: V.
    """

    ids: Tensor
    num_tokens: int

    def __post_init__(self) -> None:
        if int(self.ids.max()) >= self.num_tokens:
            raise ArgumentError(
                f"vocabulary: expected ids below the denoiser's {self.num_tokens} tokens, got {int(self.ids.max())}; "
                "the circuit is for another denoiser"
            )

    def categories(self, tokens: Tensor) -> Tensor:
        """Return the categories of tokens, int64 of any shape; -1 for a token without one."""
        table = torch.full((self.num_tokens,), -1, device=tokens.device)
        table[self.ids.to(tokens.device)] = torch.arange(len(self.ids), device=tokens.device)
        return table[tokens.clamp(0, self.num_tokens - 1)].masked_fill((tokens < 0) | (tokens >= self.num_tokens), -1)

    def known(self, name: str, tokens: Tensor, where: Tensor) -> Tensor:
        """Return the categories of tokens, 0 where not bool ``where``; raises ArgumentError if another has none."""
        categories = self.categories(tokens)
        unknown = (categories < 0) & where
        if bool(unknown.any()):
            place = tuple(unknown.nonzero()[0].tolist())
            raise ArgumentError(
                f"{name}: expected tokens of the circuit's vocabulary, got {int(tokens[place])} at {place}; leave such "
                "texts out, or take a circuit that has this token"
            )
        return categories.clamp_min(0)

    def narrowed(self, prediction: Prediction, masked: Tensor) -> Prediction:
        """Return what a prediction of tokens says about categories; of all of them it is normalised over these.

        Raises ArgumentError if it rules out all of them at a position that matters, bool ``masked``.
        """
        if prediction.values is None:
            logits = prediction.log_q.index_select(2, self.ids.to(prediction.log_q.device))
            narrow = Prediction.from_logits(logits, prediction.placed(masked))
            return replace(prediction, log_q=narrow.log_q, vocab_size=len(self.ids))
        values = self.categories(prediction.values)
        log_q = prediction.log_q.masked_fill(values < 0, -torch.inf)
        return replace(prediction, log_q=log_q, values=values.clamp_min(0), vocab_size=len(self.ids))

    def widened(self, prediction: Prediction) -> Prediction:
        """Return a prediction of categories as one of tokens, listed."""
        ids = self.ids.to(prediction.log_q.device)
        values = ids.expand(prediction.log_q.shape) if prediction.values is None else ids[prediction.values]
        return replace(prediction, values=values, vocab_size=self.num_tokens)

    def automaton(self, automaton: DeterministicAutomaton) -> DeterministicAutomaton:
        """Return an automaton that reads tokens as one that reads categories."""
        return replace(automaton, classes=automaton.classes[self.ids.to(automaton.classes.device)])

    def tokens(self, categories: Tensor) -> Tensor:
        """Return the tokens of categories, int64 of any shape."""
        return self.ids.to(categories.device)[categories]


@dataclass(frozen=True, eq=False)
class MappedDistribution:
    """A coupled distribution over categories that is asked, and answers, in tokens.

    Attributes:
        of_categories: the distribution of the circuit's categories, with all its queries.
        vocabulary: from categories to tokens and back.
        tokens: of the blocks, int64 (B, L); entries at masked positions are ignored.
    """

    of_categories: CoupledDistribution
    vocabulary: Vocabulary
    tokens: Tensor

    @property
    def masked(self) -> Tensor:
        """Where a token is to be predicted, bool (B, L)."""
        return self.of_categories.masked

    @property
    def prediction(self) -> Prediction:
        """The denoiser's prediction, of the tokens that have a category."""
        return self.vocabulary.widened(self.of_categories.prediction)

    @property
    def log_partition(self) -> Tensor:
        """``log Z``, (B,), in nats."""
        log_partition: Tensor = self.of_categories.log_partition
        return log_partition

    @property
    def marginal_probs(self) -> Tensor:
        """The probability of every token at every position, (B, L, V); rows sum to 1."""
        narrow: Tensor = self.of_categories.marginal_probs
        wide = narrow.new_zeros(*narrow.shape[:2], self.vocabulary.num_tokens)
        return wide.index_copy(2, self.vocabulary.ids.to(narrow.device), narrow)

    @property
    def mode(self) -> Tensor:
        """The tokens of the most probable explanation, int64 (B, L)."""
        return self.vocabulary.tokens(self.of_categories.mode)

    def log_prob(self, value: Tensor, *, log_partition: Tensor | None = None) -> Tensor:
        """Return the log-probability of tokens, see :meth:`CoupledDistribution.log_prob`; -inf: one has no category."""
        categories = self.vocabulary.categories(value)
        ignored = (value == IGNORED_LABEL) & ~self.masked
        is_impossible = ((categories < 0) & ~ignored).any(-1)
        known = categories.clamp_min(0).masked_fill(ignored, IGNORED_LABEL)
        log_prob = self.of_categories.log_prob(known, log_partition=log_partition)
        return log_prob.masked_fill(is_impossible, -torch.inf)

    def log_prob_at(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return that of tokens at some positions, see :meth:`CoupledDistribution.log_prob_at`."""
        categories = self.vocabulary.categories(tokens)
        is_impossible = ((categories < 0) & positions & self.masked).any(-1)
        return self.of_categories.log_prob_at(categories.clamp_min(0), positions).masked_fill(is_impossible, -torch.inf)

    def given(self, tokens: Tensor, observed: Tensor) -> MappedDistribution:
        """Return the distribution given more tokens, see :meth:`CoupledDistribution.given`."""
        categories = self.vocabulary.known("tokens", tokens, observed & self.masked)
        all_tokens = torch.where(observed & self.masked, tokens, self.tokens)
        return MappedDistribution(self.of_categories.given(categories, observed), self.vocabulary, all_tokens)

    def posterior(self) -> Prediction:
        """Return the exact marginals of every position."""
        return self.vocabulary.widened(self.of_categories.posterior())

    def given_latents(
        self, generator: torch.Generator | RowGenerators | None = None, *, temperature: float = 1.0
    ) -> Prediction:
        """Choose the circuit's latents, see :meth:`CoupledDistribution.given_latents`."""
        return self.vocabulary.widened(self.of_categories.given_latents(generator, temperature=temperature))

    def draw(self, temperature: float = 1.0, generator: torch.Generator | RowGenerators | None = None) -> Tensor:
        """Draw all tokens together, int64 (B, L), see :meth:`CoupledDistribution.draw`."""
        return self.vocabulary.tokens(self.of_categories.draw(temperature, generator))

    def sample(self, sample_shape: Sequence[int] = (), *, generator: torch.Generator | None = None) -> Tensor:
        """Draw exact, independent samples: int64 (*sample_shape, B, L)."""
        return self.vocabulary.tokens(self.of_categories.sample(sample_shape, generator=generator))

    def mapped(self, change: Callable[[CoupledDistribution], CoupledDistribution]) -> MappedDistribution:
        """Return the same with another distribution of categories, made of this one's."""
        return replace(self, of_categories=change(self.of_categories))


Coupled = CoupledDistribution | MappedDistribution
"""What a head answers: a distribution that is asked about tokens."""
