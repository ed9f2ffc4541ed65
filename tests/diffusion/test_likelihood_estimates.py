"""The log-probability of texts one token at a time, and the bound that is its mean over orders."""

import itertools
import math

import numpy as np
import pytest
import torch
from likelihood_cases import EXACT, MASK, READER, all_texts, nothing

import diffusion as df
from diffusion.testing import reference, worlds

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("order", [None, [2, 0, 1], [[1, 2, 0]]])
def test_one_token_at_a_time_is_the_chain_rule(order):
    """With the Bayes-optimal denoiser it is log p in any order; with another the product of its conditionals."""
    order = None if order is None else torch.tensor(order)
    world, texts = worlds.hidden_markov(3, seed=2), all_texts(3)
    found = df.log_likelihood(world.denoiser(), nothing(27), texts, method="sequential", order=order)
    assert found.tolist() == pytest.approx(world.log_prob(texts).tolist(), abs=1e-4)
    text = [2, 0, 1]
    (found,) = df.log_likelihood(READER, [[1]], [text], method="sequential", order=order)
    canvas, expected = np.array([1, MASK, MASK, MASK]), 0.0
    for place in [0, 1, 2] if order is None else order.flatten().tolist():
        expected += math.log(reference.predicted(READER, canvas)[1 + place, text[place]])
        canvas[1 + place] = text[place]
    assert found.item() == pytest.approx(expected, abs=EXACT)


def test_one_token_at_a_time_with_a_head_asks_for_its_marginals():
    """The circuit over 3 positions alone: the chain rule gives its own probability, in any order."""
    world, texts = worlds.hidden_markov(3, seed=2), all_texts(3)
    head, uniform = df.CoupledHead(world.circuit()), world.uniform_denoiser()
    found = df.log_likelihood(
        uniform, nothing(27), texts, head=head, method="sequential", order=torch.tensor([2, 0, 1])
    )
    assert found.tolist() == pytest.approx(world.log_prob(texts).tolist(), abs=1e-4)


def exact_bound(denoiser, prompt, text):
    """Return the mean over all orders of the product of conditionals: (mean, order by order)."""
    values = []
    for order in itertools.permutations(range(len(text))):
        canvas = np.array([*prompt, *[MASK] * len(text)])
        total = 0.0
        for place in order:
            total += math.log(reference.predicted(denoiser, canvas)[len(prompt) + place, text[place]])
            canvas[len(prompt) + place] = text[place]
        values.append(total)
    return sum(values) / len(values)


@pytest.mark.parametrize("num_samples", [1, 3, 4])
def test_the_elbo_is_unbiased(num_samples):
    """Its mean over seeds is the mean over all orders, which is the integral over times."""
    expected, count = exact_bound(READER, [1], [2, 0, 1]), 3000
    found = df.log_likelihood(
        READER, [[1]] * count, [[2, 0, 1]] * count, method="elbo", num_samples=num_samples, seeds=list(range(count))
    )
    assert abs(found.mean().item() - expected) < 4 * found.std().item() / count**0.5
    steps = torch.linspace(0, 1, 2001)[1:].double() - 1 / 4000
    integral = 0.0
    for hidden in itertools.product([False, True], repeat=3):
        canvas = np.array(
            [1, *(MASK if is_masked else word for word, is_masked in zip([2, 0, 1], hidden, strict=True))]
        )
        q = reference.predicted(READER, canvas)[1:]
        log_q = sum(math.log(q[i, word]) for i, word in enumerate([2, 0, 1]) if hidden[i])
        share = float((steps ** (sum(hidden) - 1) * (1 - steps) ** (3 - sum(hidden))).mean()) if any(hidden) else 0.0
        integral += share * log_q
    assert expected == pytest.approx(integral, abs=1e-5)


def test_levels_are_evenly_spread():
    """Two tokens, two samples: one and two masked once each; only which one is masked is random."""
    pair = [2, 1]
    values = []
    both = reference.predicted(READER, np.array([MASK, MASK]))
    for place in (0, 1):
        canvas = np.array(pair)
        canvas[place] = MASK
        one = reference.predicted(READER, canvas)[place, pair[place]]
        values.append((2 * math.log(one) + math.log(both[0, 2]) + math.log(both[1, 1])) / 2)
    found = df.log_likelihood(READER, nothing(50), [pair] * 50, method="elbo", num_samples=2, seeds=list(range(50)))
    nearest = torch.stack([(found - value).abs() for value in values]).min(0)
    assert float(nearest.values.max()) < EXACT
    assert set(nearest.indices.tolist()) == {0, 1}


def test_the_elbo_of_the_truth_is_the_truth_and_of_blocks_the_sum():
    world, count = worlds.hidden_markov(3, seed=2), 2000
    text = [[0, 1, 1]] * count
    expected = float(world.log_prob(torch.tensor(text[:1])))
    for head, denoiser in ((None, world.denoiser()), (df.CoupledHead(world.circuit()), world.uniform_denoiser())):
        found = df.log_likelihood(
            denoiser, nothing(count), text, head=head, method="elbo", num_samples=3, seeds=list(range(count))
        )
        assert abs(found.mean().item() - expected) < 4 * found.std().item() / count**0.5 + EXACT
    one_by_one = df.log_likelihood(READER, [[1]], [[2, 0, 1]], method="sequential")
    blocks = df.log_likelihood(READER, [[1]], [[2, 0, 1]], method="elbo", block_length=1, num_samples=2)
    assert blocks.item() == pytest.approx(one_by_one.item(), abs=EXACT)
