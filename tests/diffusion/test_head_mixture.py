"""Mixtures of heads and of the plain prediction: one joint output layer, exact like each of them."""

from types import SimpleNamespace

import pytest
import torch
from contextual_cases import DOUBLE, B, H, random_block, random_prediction
from hmm_cases import TEXTS, L, V, texts

import circuits as ct
from diffusion import (
    CoupledHead,
    HeadMixture,
    LatentPotentials,
    NoiseCalibration,
    Prediction,
    generate,
)
from diffusion.errors import ArgumentError
from diffusion.testing.worlds import alternating


@pytest.fixture
def said(generator):
    return random_prediction(generator)


@pytest.fixture
def block(generator):
    return random_block(generator)


@pytest.fixture
def heads(generator):
    """A plain one, and one with a calibration and potentials."""
    one, two = (ct.compile(ct.structures.hmm(L, n, V), dtype=DOUBLE, seed=n) for n in (2, 3))
    made = [NoiseCalibration(V, 2).double(), LatentPotentials.for_hmm(two, H).double()]
    for module in made:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
    return [CoupledHead(one), CoupledHead(two, conditioners=made)]


@pytest.fixture
def mixture(heads, generator):
    made = HeadMixture(heads, num_knots=3)
    torch.nn.init.normal_(made.log_weights, generator=generator)
    return made.requires_grad_(False)


def plain_law(said, tokens, masked):
    """prod q_i(x_i) of all texts, 0 where they are not what is visible: (V ** L, B)."""
    q = said.log_q.softmax(-1).gather(2, texts(B).permute(1, 2, 0)).masked_fill(~masked.unsqueeze(-1), 1.0).prod(1).T
    return q * ((texts(B) == tokens) | masked).all(-1)


def law_of(mixture, heads, said, tokens, masked):
    laws = [plain_law(said, tokens, masked), *(head(said, tokens, masked).log_prob(texts(B)).exp() for head in heads)]
    ratio = masked.double().mean(1) * 2
    low = ratio.floor().clamp(max=1).long()
    knots = mixture.log_weights
    gates = ((1 - (ratio - low))[:, None] * knots[low] + (ratio - low)[:, None] * knots[low + 1]).softmax(1)
    return (torch.stack(laws, -1) * gates).sum(-1)


def test_it_is_the_mixture_of_the_formula(mixture, heads, said, block):
    with torch.no_grad():
        law = law_of(mixture, heads, said, *block)
        dist = mixture.distribution(said, *block)
        torch.testing.assert_close(dist.log_prob(texts(B)).exp(), law)
        torch.testing.assert_close(law.sum(0), torch.ones(B, dtype=DOUBLE))
        one_hot = torch.nn.functional.one_hot(texts(B), V).double()
        torch.testing.assert_close(dist.posterior().log_q.exp(), (law[..., None, None] * one_hot).sum(0))


def test_what_becomes_known_conditions_it(mixture, heads, said, block):
    tokens, masked = block
    observed = torch.tensor([[False, True, False]]).expand(B, -1)
    with torch.no_grad():
        law = law_of(mixture, heads, said, tokens, masked) * (texts(B)[..., 1] == tokens[:, 1])
        dist = mixture.distribution(said, tokens, masked).given(tokens, observed)
        torch.testing.assert_close(dist.log_prob(texts(B)).exp(), law / law.sum(0))
        assert torch.equal(dist.masked, masked & ~observed)


def test_a_head_that_rules_a_token_out_has_no_weight_after_it(said, block):
    tokens, masked = torch.full((B, L), 3), torch.ones(B, L, dtype=torch.bool)
    never = torch.tensor([[0.5, 0.5, 0.0, 0.0]], dtype=DOUBLE)
    pc = ct.compile(ct.structures.hmm(L, 1, V, emission=never), dtype=DOUBLE)
    observed = torch.tensor([[True, False, False]]).expand(B, -1)
    with torch.no_grad():
        dist = HeadMixture([CoupledHead(pc)]).distribution(said, tokens, masked).given(tokens, observed)
        law = plain_law(said, tokens, ~observed)
        torch.testing.assert_close(dist.log_prob(texts(B)).exp(), law)
        assert bool(dist.posterior().log_q.exp()[:, 1:].sum(-1).allclose(torch.ones(B, L - 1, dtype=DOUBLE)))


@pytest.mark.parametrize("through_latents", [False, True])
def test_draws_have_its_law(through_latents, mixture, heads, said, block):
    """Tokens drawn together, or on their own given component and latents: the same law; by the chi-square statistic."""
    tokens, masked = (part[:1].expand(6000, -1) for part in block)
    log_q, features = (part[:1].expand(6000, -1, -1) for part in (said.log_q, said.features))
    many = Prediction(log_q=log_q, vocab_size=V, features=features)
    dist = mixture.distribution(many, tokens, masked)
    seeds = ct.RowGenerators(torch.arange(6000))
    if through_latents:
        given = dist.given_latents(seeds)
        drawn = seeds.at(99).choose(given.log_q + dist.prediction.log_q)
    else:
        drawn = dist.draw(1.0, seeds)
    code = (drawn * torch.tensor([V * V, V, 1])).sum(1)
    expected = law_of(mixture, heads, said, *block)[:, 0] * 6000
    common = expected > 5
    counts = torch.bincount(code, minlength=V**L).double()
    statistic = ((counts - expected).square() / expected)[common].sum()
    assert float(statistic) < common.sum() + 5 * (2 * common.sum()) ** 0.5
    best = dist.draw(0.0, seeds)[0]
    scores = dist.log_prob(best.expand(6000, -1))[0]
    assert float(scores) >= float(dist.log_prob(drawn).max()) - 3


def test_fitted_weights_are_no_worse_than_any_part(heads, said, block, generator):
    tokens, masked = block
    batch = SimpleNamespace(prediction=said, tokens=tokens, masked=masked)
    mixture = HeadMixture(heads, num_knots=2).fit([batch], decay=0.0)

    def loss(log_prob):
        return float(-(log_prob / masked.sum(1)).mean())

    with torch.no_grad():
        found = loss(mixture.distribution(said, tokens, masked).log_prob(tokens))
        parts = [loss(part.log_prob(tokens)) for part in mixture.distribution(said, tokens, masked).parts]
    assert found <= min(parts) + 1e-6


@pytest.mark.parametrize("decode", ["latent", "marginal", "any_order", "joint"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_mode_decodes_and_each_row_alone(decode, temperature):
    world = alternating(4)
    weak = ct.compile(ct.structures.hmm(4, 2, 3), dtype=DOUBLE, seed=0)
    mixture = HeadMixture([CoupledHead(world.circuit(dtype=DOUBLE)), CoupledHead(weak)])
    with torch.no_grad():
        mixture.log_weights[:, 1] = 30.0  # all weight to the true circuit
    options = {"gen_length": 4, "block_length": 4, "num_steps": 1, "temperature": temperature, "decode": decode}

    def decoded(rows):
        prompt = [[]] * len(rows)
        return generate(world.denoiser(), prompt, head=mixture, seeds=rows, **options).tokens

    found = decoded([3, 4, 5])
    assert torch.equal(found, torch.cat([decoded([seed]) for seed in (3, 4, 5)]))
    if decode != "marginal":
        assert bool((found[:, 1:] != found[:, :-1]).all())


def test_heads_that_do_not_fit_together_are_named(heads):
    other = CoupledHead(ct.compile(ct.structures.hmm(L + 1, 2, V), dtype=DOUBLE))
    with pytest.raises(ArgumentError, match=r"heads: expected one or more df\.CoupledHead, got \[\]"):
        HeadMixture([])
    with pytest.raises(ArgumentError, match="heads: expected as many positions and tokens in all of them"):
        HeadMixture([heads[0], other])
    assert HeadMixture(heads).needs_features
    assert not HeadMixture(heads[:1]).needs_features
    assert len(TEXTS) == V**L


@pytest.mark.parametrize(
    ("masked", "q", "decay", "message"),
    [
        (False, 0.0, 0.0, "batches: expected blocks with masked tokens, got none"),
        (True, -torch.inf, 0.0, "batches: expected blocks that the prediction or a head holds possible"),
        (True, 0.0, -1.0, "decay: expected a number >= 0, got -1.0"),
    ],
)
def test_weights_are_not_fitted_to_what_says_nothing(heads, masked, q, decay, message):
    tokens = torch.zeros(B, L, dtype=torch.int64)
    log_q = torch.zeros(B, L, V, dtype=DOUBLE)
    log_q[..., 0] = q
    batch = SimpleNamespace(
        prediction=Prediction.from_logits(log_q),
        tokens=tokens,
        masked=torch.full_like(tokens, masked, dtype=torch.bool),
    )
    with pytest.raises(ArgumentError, match=message):
        HeadMixture(heads[:1]).fit([batch], decay=decay)
    with pytest.raises(ArgumentError, match="batches: expected blocks with masked tokens"):
        HeadMixture(heads[:1]).fit([])
    with pytest.raises(ArgumentError, match="vocab_size"):
        HeadMixture(heads[:1], vocab_size=-1)


def test_what_all_components_rule_out_makes_no_weight_nan(mixture, said):
    tokens, every = torch.zeros(B, L, dtype=torch.int64), torch.ones(B, L, dtype=torch.bool)
    some = torch.zeros(B, L, dtype=torch.bool)
    some[0, 0] = True
    ruled_out = mixture.distribution(said.with_observed(tokens + 1, some), tokens, every).given(tokens, some)
    assert bool(ruled_out.log_weights.isfinite().all())
    torch.testing.assert_close(ruled_out.log_weights.exp().sum(1), torch.ones(B, dtype=DOUBLE))
    assert not bool(ruled_out.posterior().log_q.isnan().any())
