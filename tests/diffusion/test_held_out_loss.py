"""The held-out loss is an unbiased estimate of the mean over mask sizes, for any number of windows and any block."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from diffusion.denoisers.base import DenoiserSpec
from diffusion.errors import ArgumentError
from diffusion.training.denoiser import held_out_loss

MASK = 3
SIZES = [(1, 6), (2, 6), (3, 6), (4, 6), (6, 6), (7, 6), (9, 6), (12, 6), (3, 1), (5, 4), (10, 4)]  # (N, L)


class Spy:
    """Predicts token 1 with probability exp(-cost) where a text costs ``cost`` per masked token, and counts texts."""

    spec = DenoiserSpec(vocab_size=4, mask_id=MASK, eos_ids=(), pad_id=MASK, forbidden_ids=(MASK,), max_length=64)

    def __init__(self, cost):
        self.cost, self.num_texts = cost, 0

    def logits(self, tokens: Tensor, *, valid=None, t=None, window=None, cache=None) -> Tensor:
        self.num_texts += len(tokens)
        start, stop = window
        cost = self.cost(tokens[:, :start], (tokens[:, start:stop] == MASK).sum(1).double())
        log_p = torch.stack([(-torch.expm1(-cost)).log(), -cost], dim=-1)
        log_p = torch.cat([log_p, torch.full((len(tokens), 2), -math.inf, dtype=torch.float64)], dim=-1)
        return log_p[:, None].expand(-1, stop - start, -1)


@pytest.mark.parametrize(("num_windows", "length"), SIZES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_size_has_the_same_weight(num_windows: int, length: int, seed: int) -> None:
    held_out = torch.ones(num_windows, length, dtype=torch.long)
    found = held_out_loss(Spy(lambda _, size: size.sqrt()), held_out, block_length=length, seed=seed, batch_size=5)
    assert found == pytest.approx(sum(size**0.5 for size in range(1, length + 1)) / length, rel=1e-12)


@pytest.mark.parametrize(("num_windows", "length"), SIZES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_window_has_the_same_weight(num_windows: int, length: int, seed: int) -> None:
    held_out = torch.ones(num_windows, 5 + length, dtype=torch.long)
    held_out[:, :5] = torch.randint(3, (num_windows, 5), generator=torch.Generator().manual_seed(0))
    cost = held_out[:, :5].double().sum(1) + 1
    found = held_out_loss(Spy(lambda context, _: context.double().sum(1) + 1), held_out, block_length=length, seed=seed)
    assert found == pytest.approx(float(cost.mean()), rel=1e-12)


@pytest.mark.parametrize(("num_windows", "length"), SIZES)
def test_it_costs_a_prediction_per_window_and_less_than_a_block_more(num_windows: int, length: int) -> None:
    spy = Spy(lambda _, size: size)
    held_out_loss(spy, torch.ones(num_windows, length, dtype=torch.long), block_length=length)
    assert max(num_windows, length) <= spy.num_texts == num_windows + length - math.gcd(num_windows, length)


class Bayes:
    """The true conditional marginals of a distribution that is uniform over some texts."""

    spec = Spy.spec

    def __init__(self, texts: Tensor):
        self.texts = texts

    def logits(self, tokens: Tensor, *, valid=None, t=None, window=None, cache=None) -> Tensor:
        fits = ((tokens[:, None] == self.texts) | (tokens == MASK)[:, None]).all(-1).double()
        return torch.einsum("bs,slv->blv", fits, torch.nn.functional.one_hot(self.texts, 4).double()).log()


def distinct_texts(count: int, length: int) -> Tensor:
    every = torch.cartesian_prod(*[torch.arange(3)] * length)
    return every[torch.randperm(len(every), generator=torch.Generator().manual_seed(1))[:count]]


def mean_over_all_masks(denoiser: Bayes, texts: Tensor) -> float:
    """Return the loss by enumeration: every text under every mask, each size with the same weight."""
    length = texts.shape[1]
    total = 0.0
    for size in range(1, length + 1):
        masks = list(combinations(range(length), size))
        for mask in masks:
            hidden = torch.zeros(length, dtype=torch.bool)
            hidden[list(mask)] = True
            log_q = denoiser.logits(texts.masked_fill(hidden, MASK)).log_softmax(-1)
            cost = -log_q.gather(-1, texts[..., None]).squeeze(-1)[:, hidden].mean(1)
            total += float(cost.mean()) / len(masks) / length
    return total


def mean_and_error(denoiser: Bayes, held_out: Tensor, num_seeds: int = 1500) -> tuple[float, float]:
    """Return the mean of the estimate over many draws of its masks, and four standard errors of that mean."""
    draws = torch.tensor(
        [held_out_loss(denoiser, held_out, block_length=held_out.shape[1], seed=seed) for seed in range(num_seeds)]
    )
    return float(draws.mean()), 4 * float(draws.std()) / num_seeds**0.5


@pytest.mark.parametrize(("num_windows", "length"), [(1, 3), (2, 3), (3, 3), (4, 3), (7, 3), (3, 5)])
def test_its_expectation_is_the_mean_over_all_masks(num_windows: int, length: int) -> None:
    """The windows are some of the texts, so that each of them costs something else."""
    texts = distinct_texts(20, length)
    denoiser, held_out = Bayes(texts), texts[:num_windows]
    mean, error = mean_and_error(denoiser, held_out)
    assert error < 0.05
    assert mean == pytest.approx(mean_over_all_masks(denoiser, held_out), abs=error + 1e-9)


@pytest.mark.parametrize(("num_texts", "length"), [(4, 6), (9, 6), (8, 3)])
def test_a_bayes_optimal_denoiser_has_the_entropy_of_the_text(num_texts: int, length: int) -> None:
    """By the chain rule, in any order and so on average over random ones, the block costs its entropy, log N."""
    texts = distinct_texts(num_texts, length)
    assert mean_over_all_masks(Bayes(texts), texts) == pytest.approx(math.log(num_texts) / length, rel=1e-9)
    mean, error = mean_and_error(Bayes(texts), texts, num_seeds=600)
    assert mean == pytest.approx(math.log(num_texts) / length, abs=error)


def spoilt(how):
    """Return a denoiser that is right but for one thing."""
    spy = Spy(lambda context, num_masked: num_masked)
    right = spy.logits
    changes = {
        "NaN": lambda logits: logits.index_fill(1, torch.tensor([0]), torch.nan),
        "all forbidden": lambda logits: logits.index_fill(1, torch.tensor([0]), -torch.inf),
        "wide": lambda logits: torch.cat([logits, logits[..., :1]], -1),
        "narrow": lambda logits: logits[..., :3],
        "integers": lambda logits: logits.long(),
        "one row": lambda logits: logits[:1],
    }
    spy.logits = lambda tokens, **options: changes[how](right(tokens, **options))
    return spy


@pytest.mark.parametrize("how", ["NaN", "all forbidden", "wide", "narrow", "integers", "one row"])
def test_answers_that_are_no_prediction_have_no_loss(how):
    with pytest.raises(ArgumentError, match="denoiser: expected"):
        held_out_loss(spoilt(how), torch.ones(6, 4, dtype=torch.int64), block_length=3)
