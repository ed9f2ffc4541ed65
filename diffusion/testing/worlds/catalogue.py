"""The worlds: functions that return a :class:`~diffusion.testing.worlds.world.World`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import circuits as ct
from diffusion.errors import ArgumentError
from diffusion.testing.worlds.world import World, letters

_CITIES = (
    "San Francisco",
    "New York",
    "Los Angeles",
    "Las Vegas",
    "Buenos Aires",
    "Hong Kong",
    "Cape Town",
    "Tel Aviv",
)


def cities(num_cities: int = 2, *, probs: Sequence[float] | None = None) -> World:
    """Cities of two words that determine each other: "San Francisco", "New York", ... but never "San York".

    The true circuit is a hidden Markov model whose state is the city.

    Args:
        num_cities: 2 to 8.
        probs: of the cities; by default all the same.
    """
    count = _checked("num_cities", num_cities, 2, len(_CITIES))
    first, second = zip(*(city.split() for city in _CITIES[:count]), strict=True)
    texts = torch.arange(count).unsqueeze(1) + torch.tensor([0, count])
    weights = torch.full((count,), 1 / count) if probs is None else torch.tensor(probs)
    emission = torch.nn.functional.one_hot(texts.t(), 2 * count + 1)
    structure = _chain(weights, torch.eye(count).unsqueeze(0), emission)
    return World(texts, weights, (*first, *second), structure=structure)


def alternating(length: int = 4) -> World:
    """ABAB... or BABA... of some length, half and half; the true circuit is a hidden Markov model with 2 states."""
    _checked("length", length, 1)
    start = torch.tensor([[0], [1]])
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).expand(length - 1, 2, 2)
    emission = torch.eye(2, 3).expand(length, 2, 3)
    structure = _chain(torch.tensor([0.5, 0.5]), swap, emission)
    return World((start + torch.arange(length)) % 2, words=("A", "B"), structure=structure)


def hidden_markov(length: int = 4, *, num_states: int = 3, num_words: int = 3, seed: int = 0) -> World:
    """Texts of a random hidden Markov model, which is the true circuit (Rabiner 1989).

    Args:
        length: L >= 1.
        num_states: N >= 1.
        num_words: at most as many that all texts can be enumerated.
        seed: of the tables, which are softmax(2 x normal).
    """
    _checked("length", length, 1)
    generator = torch.Generator().manual_seed(seed)
    initial, transition, emission = (
        torch.softmax(2 * torch.randn(*shape, generator=generator, dtype=torch.float64), -1)
        for shape in ((num_states,), (num_states, num_states), (num_states, num_words))
    )
    texts = _all_texts(length, num_words)
    forward = initial * emission[:, texts[:, 0]].t()  # p(x_0..t, z_t), (n, N)
    for step in range(1, length):
        forward = forward @ transition * emission[:, texts[:, step]].t()
    with_mask = torch.cat([emission, torch.zeros(num_states, 1, dtype=torch.float64)], 1)
    structure = _chain(
        initial, transition.expand(length - 1, num_states, num_states), with_mask.expand(length, num_states, -1)
    )
    return World(texts, forward.sum(1), letters(num_words), structure=structure)


def parity(length: int = 4) -> World:
    """Bits with an even number of ones, all equally probable: every proper part of a text is fair coins.

    The true circuit is a hidden Markov model with 4 states: the bit, and the parity of the bits so far.
    """
    _checked("length", length, 1)
    states = list(itertools.product((0, 1), (0, 1)))  # (bit, parity with it)
    follows = torch.tensor([[float(parity == before ^ bit) for bit, parity in states] for _, before in states])
    tables = [follows[:1], *[follows] * (length - 1)]  # before the first bit the parity is even
    tables[-1] = tables[-1] * torch.tensor([float(parity == 0) for _, parity in states])
    tables = [table / table.sum(1, keepdim=True) for table in tables]
    emission = torch.tensor([[1.0 - bit, float(bit), 0.0] for bit, _ in states]).expand(length, 4, 3)
    structure = _chain(tables[0][0], torch.cat(tables[1:] or [follows[:0]]).reshape(-1, 4, 4), emission)
    texts = _all_texts(length, 2)
    return World(texts[texts.sum(1) % 2 == 0], words=("0", "1"), structure=structure)


def sums(largest: int = 9) -> World:
    """Worked sums ``a + b = c`` of digits with c at most ``largest``, 1 to 9, all equally probable.

    Any two of the numbers determine the third. The true circuit is a mixture with one component per sum.
    """
    _checked("largest", largest, 1, 9)
    plus, equals = largest + 1, largest + 2
    texts = [[a, plus, c - a, equals, c] for c in range(largest + 1) for a in range(c + 1)]
    return World(torch.tensor(texts), words=(*(str(digit) for digit in range(largest + 1)), "+", "="))


def endings(length: int = 4, *, num_words: int = 2, lengths: Sequence[float] | None = None) -> World:
    """Texts of every length: words that are fair dice, and end-of-text tokens from the end on.

    The true circuit is a hidden Markov model with 2 states: the text goes on, or has ended.

    Args:
        length: L >= 1, the greatest number of words.
        num_words: without the end-of-text token, which is the last id before the mask.
        lengths: the probabilities of 0, 1, ..., L words; by default 0.3 for none and the same for all others.
    """
    _checked("length", length, 1)
    _checked("num_words", num_words, 1)
    share = torch.tensor([0.3] + [0.7 / length] * length if lengths is None else list(lengths), dtype=torch.float64)
    if share.shape != (length + 1,):
        raise ArgumentError(f"lengths: expected {length + 1} probabilities, of 0 to {length} words, got {len(share)}")
    eos_id = num_words
    texts, probs = [], []
    for count in range(length + 1):
        beginnings = _all_texts(count, num_words)
        texts.append(torch.nn.functional.pad(beginnings, (0, length - count), value=eos_id))
        probs.append((share[count] / len(beginnings)).expand(len(beginnings)))
    at_least = share.flip(0).cumsum(0).flip(0)  # p(number of words >= count)
    hazard = torch.where(at_least > 0, share / at_least.clamp_min(1e-300), 1.0)[:length]  # p(ends there | got there)
    goes_on = torch.stack([1 - hazard, hazard], 1)  # (L, 2)
    stays = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(length, 2)
    emission = torch.zeros(2, num_words + 2, dtype=torch.float64)
    emission[0, :num_words], emission[1, eos_id] = 1 / num_words, 1.0
    structure = _chain(goes_on[0], torch.stack([goes_on, stays], 1)[1:], emission.expand(length, -1, -1))
    words = (*letters(num_words), "<eos>")
    return World(torch.cat(texts), torch.cat(probs), words, eos_id, structure=structure)


def random(seed: int, *, length: int = 4, num_words: int = 3, concentration: float = 0.3) -> World:
    """A distribution drawn from a Dirichlet distribution over all texts; the true circuit has a component per text.

    Args:
        seed: of the draw.
        length: L >= 1.
        num_words: at most as many that all texts can be enumerated.
        concentration: of the Dirichlet distribution; the smaller, the fewer texts have most of the probability.
    """
    _checked("length", length, 1)
    texts = _all_texts(length, num_words)
    probs = np.random.default_rng(seed).dirichlet(np.full(len(texts), concentration))
    return World(texts, torch.from_numpy(probs), letters(num_words))


def _chain(
    initial: Tensor,  # shape: (N,)
    transitions: Tensor,  # shape: (L - 1, N, N)
    emissions: Tensor,  # shape: (L, N, V)
) -> ct.Circuit:
    """Return a hidden Markov model with these tables."""
    length, num_states, num_values = emissions.shape
    return ct.structures.hmm(
        length,
        num_states,
        num_values,
        homogeneous=False,
        initial=initial.double(),
        transition=transitions.double(),
        emission=emissions.double(),
    )


def _all_texts(length: int, num_words: int) -> Tensor:
    """Return all texts in lexicographic order, int64 (num_words ** length, length)."""
    _checked("num_words", num_words, 1)
    if num_words**length > 1 << 20:
        raise ArgumentError(
            f"length: expected at most 2**20 texts, got {num_words} words ** {length} = {num_words**length}; a world "
            "is enumerated"
        )
    texts = list(itertools.product(range(num_words), repeat=length))
    return torch.tensor(texts, dtype=torch.int64).reshape(len(texts), length)


def _checked(name: str, value: int, least: int, most: int | None = None) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        bounds = f">= {least}" if most is None else f"from {least} to {most}"
        raise ArgumentError(f"{name}: expected an integer {bounds}, got {value!r}")
    return value
