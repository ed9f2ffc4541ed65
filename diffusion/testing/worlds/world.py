"""A world: a small distribution over texts with words, its Bayes-optimal denoiser, and a circuit that equals it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import circuits as ct
from diffusion.denoisers.base import DenoiserSpec
from diffusion.errors import ArgumentError
from diffusion.testing.table import Table
from diffusion.testing.worlds.denoisers import BayesDenoiser, UniformDenoiser


@dataclass(frozen=True, eq=False, repr=False)
class World(Table):
    """An enumerable distribution over texts of L words, of which everything is known.

    Token ids are the positions in ``words``; the mask is the next id, so the vocabulary has one id more than words.

    Attributes:
        support: int64 (n, L), the possible texts.
        probs: float64 (n,), their probabilities; by default all the same.
        words: a name per token id; by default letters.
        eos_id: the id that fills a text from its end on, as LLaDA's texts are filled; None: all texts have L words.
        structure: a symbolic circuit with weights that equals the distribution, L variables of ``spec.vocab_size``
            categories; None: a mixture with one component per text.

    Raises:
        ArgumentError: probabilities that are none, or a text with an id that has no word.
    """

    words: tuple[str, ...] = ()
    eos_id: int | None = None
    structure: ct.Circuit | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        largest = int(self.support.max())
        if not self.words:
            object.__setattr__(self, "words", letters(largest + 1))
        if int(self.support.min()) < 0 or largest >= len(self.words):
            raise ArgumentError(
                f"support: expected ids from 0 to {len(self.words) - 1}, one per word, got ids from "
                f"{int(self.support.min())} to {largest}"
            )
        if self.eos_id is not None and not 0 <= self.eos_id < len(self.words):
            raise ArgumentError(f"eos_id: expected the id of a word, 0 to {len(self.words) - 1}, got {self.eos_id}")

    @property
    def mask_id(self) -> int:
        """The id of a masked position: the one after the last word."""
        return len(self.words)

    @property
    def spec(self) -> DenoiserSpec:
        """The facts about this world's denoisers; an ended text is padded with its end-of-text token."""
        return DenoiserSpec(
            vocab_size=len(self.words) + 1,
            mask_id=self.mask_id,
            eos_ids=() if self.eos_id is None else (self.eos_id,),
            pad_id=self.mask_id if self.eos_id is None else self.eos_id,
            forbidden_ids=(self.mask_id,),
            max_length=self.length,
        )

    @property
    def blank(self) -> Tensor:
        """A text that is all masks, int64 (L,)."""
        return torch.full((self.length,), self.mask_id)

    @property
    def texts(self) -> list[str]:
        """The possible texts in words."""
        return self.decode(self.support)

    def decode(
        self,
        tokens: Tensor,  # shape: (N, L)
    ) -> list[str]:
        """Return texts in words, ``_`` where a position is masked."""
        return [" ".join([*self.words, "_"][id] for id in text) for text in tokens.tolist()]

    def encode(self, text: str) -> Tensor:
        """Return the ids of words separated by spaces, ``_`` for the mask: int64 (number of words,).

        Raises ArgumentError for a word that this world does not have.
        """
        ids = {word: id for id, word in enumerate([*self.words, "_"])}
        unknown = [word for word in text.split() if word not in ids]
        if unknown:
            raise ArgumentError(f"text: expected words among {', '.join(ids)}, got {unknown[0]!r}")
        return torch.tensor([ids[word] for word in text.split()], dtype=torch.int64)

    def posterior(
        self,
        tokens: Tensor,  # shape: (L,)
    ) -> Tensor:  # shape: (n,)
        """Return the probability of each possible text given the tokens that are not masked, int64 (L,).

        Where no text agrees with all of them, those count that disagree in the fewest (the limit of rare misprints), so
        that the posterior exists everywhere.
        """
        mismatches = (tokens != self.support).sum(1)  # a mask differs from all texts alike
        weights = torch.where(mismatches == mismatches.min(), self.probs, 0.0)
        return weights / weights.sum()

    def denoiser(self) -> BayesDenoiser:
        """Return the denoiser that no other can beat: the exact posterior marginals."""
        return BayesDenoiser(self)

    def uniform_denoiser(self) -> UniformDenoiser:
        """Return a denoiser that knows nothing: a circuit coupled with it is the circuit alone."""
        return UniformDenoiser(self.spec)

    def circuit(self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> ct.CompiledCircuit:
        """Return the true circuit, compiled: its distribution is this one exactly."""
        return ct.compile(self.structure or self._mixture_of_texts(), device=device, dtype=dtype)

    def _mixture_of_texts(self) -> ct.Circuit:
        one_hot = torch.nn.functional.one_hot(self.support, len(self.words) + 1).double()  # (n, L, V)
        leaves = [
            ct.inputs(var, len(one_hot), ct.Categorical(one_hot.shape[2]), weights=one_hot[:, var].t().contiguous())
            for var in range(self.length)
        ]
        return ct.Circuit(ct.sum(ct.product(*leaves), num_units=1, weights=self.probs.unsqueeze(0)))


def letters(num_words: int) -> tuple[str, ...]:
    """Return names of words: a to z, then numbers."""
    return tuple(chr(ord("a") + id) if id < 26 else str(id) for id in range(num_words))
