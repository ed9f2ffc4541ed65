"""Hypothesis strategies that draw worlds."""

from __future__ import annotations

import itertools

import torch
from hypothesis import strategies as st

from diffusion.testing.worlds import World


@st.composite
def random_worlds(draw: st.DrawFn, *, max_length: int = 4, max_words: int = 3, endings: bool = True) -> World:
    """Draw a world: any small distribution over texts, some of them impossible, with ties or without.

    Args:
        draw: given by Hypothesis.
        max_length: the greatest L; all ``max_words ** max_length`` texts are enumerated.
        max_words: the greatest number of words.
        endings: whether in some worlds the last word is the end of a text, which then fills it.
    """
    length = draw(st.integers(1, max_length), label="length")
    num_words = draw(st.integers(1, max_words), label="num_words")
    eos_id = num_words - 1 if endings and num_words > 1 and draw(st.booleans(), label="endings") else None
    texts = [
        text
        for text in itertools.product(range(num_words), repeat=length)
        if eos_id not in text or set(text[text.index(eos_id) :]) == {eos_id}
    ]
    weights = draw(st.lists(st.integers(0, 5), min_size=len(texts), max_size=len(texts)), label="weights")
    if not any(weights):
        weights[0] = 1
    probs = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    words = tuple(chr(ord("a") + id) for id in range(num_words))
    return World(torch.tensor(texts), probs, words, eos_id)
