"""Other joint output layers do what their papers say: laws by enumeration, or by sampling with a chi-square test."""

import pytest
import torch

import circuits as ct
import diffusion as df
from circuits import ArgumentError, RowGenerators
from diffusion.decoding.baselines import (
    AdaptiveHead,
    AutoregressiveModel,
    CausalHead,
    CircuitModel,
    CopulaHead,
    EnergyHead,
    MixtureHead,
    fit_autoregressive,
    fit_conditional,
)
from diffusion.testing import Table, chi_square, decoder_law, worlds
from diffusion.testing.heads import with_adaptive_head, with_head
from diffusion.testing.reference import Rule

NUM_SAMPLES = 4000
WORLDS = {
    "cities": worlds.cities(probs=[0.7, 0.3]),
    "parity": worlds.parity(3),
    "hidden Markov": worlds.hidden_markov(3, seed=1),
}
one_step = Rule(num_steps=1)


def sampled(world, head, num_samples=NUM_SAMPLES, **options):
    options = {"num_steps": 1, "temperature": 1.0, **options}
    nothing = torch.zeros(num_samples, 0, dtype=torch.int64)
    size = {"gen_length": world.length, "block_length": world.length}
    return df.generate(world.denoiser(), nothing, head=head, seeds=range(num_samples), **size, **options).generated


def prediction_of(world, batch=1):
    row = world.blank.unsqueeze(0).expand(batch, -1)
    return df.Prediction.ask(world.denoiser(), row), row, torch.ones(batch, world.length, dtype=torch.bool)


# Discrete copula diffusion


def test_a_copula_has_the_marginals_of_the_denoiser_and_the_odds_ratios_of_the_circuit():
    """On a 3 x 3 table by hand: iterative proportional fitting of rows and columns in turn."""
    generator = torch.Generator().manual_seed(0)
    joint = torch.rand(3, 3, generator=generator, dtype=torch.float64)
    joint = joint / joint.sum()
    texts = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    circuit = worlds.World(texts, joint.flatten()).circuit(dtype=torch.float64)  # 4 tokens with the mask
    q = torch.rand(2, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    log_q = torch.cat([q, torch.full((2, 1), -torch.inf, dtype=torch.float64)], 1).unsqueeze(0)
    head = CopulaHead(circuit, num_sweeps=200, tolerance=1e-10)
    tokens, masked = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool)
    dist = head.distribution(df.Prediction(log_q=log_q, vocab_size=4), tokens, masked)
    found = dist.log_prob(texts.unsqueeze(1))[:, 0].exp().reshape(3, 3)
    fitted = joint.clone()
    for _ in range(500):
        fitted = fitted * (q[0].exp() / fitted.sum(1)).unsqueeze(1)
        fitted = fitted * (q[1].exp() / fitted.sum(0))
    assert torch.allclose(found, fitted, atol=1e-8)
    assert torch.allclose(found.sum(1), q[0].exp(), atol=1e-8)
    assert torch.allclose(found.sum(0), q[1].exp(), atol=1e-8)
    ratio = lambda table: table[0, 0] * table[1, 1] / (table[0, 1] * table[1, 0])  # noqa: E731
    assert torch.allclose(ratio(found), ratio(joint), rtol=1e-6)


@pytest.mark.parametrize("name", WORLDS)
def test_the_true_copula_gives_the_world_at_any_number_of_steps(name):
    world = WORLDS[name]
    for num_steps in range(1, world.length + 1):
        law = decoder_law(
            with_head(world.denoiser(), CopulaHead(world.circuit()), Rule(num_steps=num_steps)), world.blank
        )
        assert law.total_variation(world) < 1e-4
    assert chi_square(sampled(world, CopulaHead(world.circuit())), world) > 1e-4


def test_the_copula_of_other_probabilities_is_that_of_the_world():
    """A circuit that knows which cities there are, not how many people live there."""
    world = WORLDS["cities"]
    law = decoder_law(with_head(world.denoiser(), CopulaHead(worlds.cities().circuit()), one_step), world.blank)
    assert law.total_variation(world) < 1e-4


# Energy-based diffusion


def test_the_law_of_energy_sampling_tends_to_its_target():
    world = WORLDS["hidden Markov"]
    model = CircuitModel(world.circuit())
    distances = [Table(sampled(world, EnergyHead(model, num_candidates=n))).total_variation(world) for n in (1, 4, 64)]
    assert distances[0] > 2 * distances[1] > 2 * distances[2]
    assert distances[2] < 0.04
    one = decoder_law(df.testing.reference.independent(world.denoiser(), one_step), world.blank)
    assert chi_square(sampled(world, EnergyHead(model, num_candidates=1)), one) > 1e-4  # nothing to choose from


def test_two_candidates_have_the_law_that_pairs_give():
    """E[draw = x] = sum over pairs of q(a) q(b) w(x) / (w(a) + w(b))."""
    world = WORLDS["hidden Markov"]
    q = decoder_law(df.testing.reference.independent(world.denoiser(), one_step), world.blank)
    weights = world.prob(q.support) / q.probs
    share = weights.unsqueeze(1) / (weights.unsqueeze(1) + weights)
    law = Table(q.support, 2 * q.probs * (share * q.probs).sum(1))
    samples = sampled(world, EnergyHead(CircuitModel(world.circuit()), num_candidates=2))
    assert chi_square(samples, law) > 1e-4
    assert chi_square(samples, q) < 1e-6


def test_a_product_energy_has_the_law_of_the_coupled_head():
    world = WORLDS["cities"]
    head = EnergyHead(CircuitModel(world.circuit()), num_candidates=64, multiplies=True)
    samples = sampled(world, head)
    share = (samples == world.encode("San Francisco")).all(1).double().mean()
    assert abs(share - 0.7**3 / (0.7**3 + 0.3**3)) < 0.02


# Adaptive parallel decoding


@pytest.mark.parametrize("name", WORLDS)
def test_corrected_adaptive_decoding_with_the_true_model_gives_the_world(name):
    world = WORLDS[name]
    head = AdaptiveHead(CircuitModel(world.circuit()), mixture_weight=0.0, corrects=True)
    law = decoder_law(with_adaptive_head(world.denoiser(), head), world.blank)
    assert law.total_variation(world) < 1e-5
    assert law.expected_steps < world.length - 0.1
    assert chi_square(sampled(world, head, num_steps=None), world) > 1e-4


@pytest.mark.parametrize("mixture_weight", [0.0, 0.5])
@pytest.mark.parametrize("corrects", [False, True])
def test_adaptive_decoding_follows_the_law_of_shared_gumbel_noise(mixture_weight, corrects):
    world = worlds.hidden_markov(3, seed=2)
    model = CircuitModel(ct.compile(ct.structures.hmm(3, 2, world.spec.vocab_size), seed=3))
    head = AdaptiveHead(model, mixture_weight=mixture_weight, corrects=corrects)
    law = decoder_law(with_adaptive_head(world.denoiser(), head), world.blank)
    assert chi_square(sampled(world, head, num_steps=None), law) > 1e-4
    assert law.total_variation(world) > 0.02


def test_with_all_weight_on_the_prediction_every_token_is_kept():
    world = WORLDS["parity"]
    head = AdaptiveHead(CircuitModel(world.circuit()), mixture_weight=1.0)
    law = decoder_law(with_adaptive_head(world.denoiser(), head), world.blank)
    assert law.expected_steps == pytest.approx(1.0)


def test_the_number_of_steps_is_kept_where_the_models_disagree():
    world = WORLDS["parity"]
    head = AdaptiveHead(CircuitModel(world.circuit()), mixture_weight=0.0)
    for num_steps in (1, 2):
        assert sampled(world, head, 64, num_steps=num_steps).max() < world.mask_id


# A causal network, and a mixture of products


def trained(world, head, steps):
    blocks = world.sample(2000, generator=torch.Generator().manual_seed(0))
    losses = fit_conditional(head, world.denoiser(), blocks, steps=steps)
    assert losses[-1] < losses[0]
    return head


def test_untrained_the_causal_network_is_the_prediction():
    world = WORLDS["hidden Markov"]
    head = CausalHead(world.spec.vocab_size, world.length)
    law = decoder_law(with_head(world.denoiser(), head, one_step), world.blank)
    expected = decoder_law(df.testing.reference.independent(world.denoiser(), one_step), world.blank)
    assert law.total_variation(expected) < 1e-5


@pytest.mark.parametrize("name", ["cities", "parity"])
def test_a_trained_causal_network_gives_the_world_in_one_step(name):
    world = WORLDS[name]
    head = trained(world, CausalHead(world.spec.vocab_size, world.length, width=32), 150)
    law = decoder_law(with_head(world.denoiser(), head, one_step), world.blank)
    assert law.total_variation(world) < 0.05
    assert chi_square(sampled(world, head), law) > 1e-4
    best = sampled(world, head, 4, temperature=0.0)
    assert bool((best == best[0]).all())
    assert float(world.prob(best[0])) > 0


@pytest.mark.parametrize(("name", "num_components"), [("cities", 4), ("parity", 8)])
def test_a_trained_mixture_with_enough_components_gives_the_world_in_one_step(name, num_components):
    world = WORLDS[name]
    head = MixtureHead(world.spec.vocab_size, world.length, num_components, width=32)
    law = decoder_law(with_head(world.denoiser(), trained(world, head, 300), one_step), world.blank)
    assert law.total_variation(world) < 0.05
    assert chi_square(sampled(world, head), law) > 1e-4


def test_one_component_cannot():
    world = WORLDS["cities"]
    head = trained(world, MixtureHead(world.spec.vocab_size, 2, 1, width=16), 100)
    assert decoder_law(with_head(world.denoiser(), head, one_step), world.blank).total_variation(world) > 0.3


def test_a_mixture_agrees_with_its_enumeration():
    """Marginals, conditionals, drawn and best explanations of random mixtures, with one position observed."""
    world = WORLDS["hidden Markov"]
    head = MixtureHead(world.spec.vocab_size, 3, 5, width=8, seed=1)
    prediction, row, masked = prediction_of(world)
    with torch.no_grad():
        dist = head.distribution(prediction, row, masked)
        texts = world.support.unsqueeze(1)
        joint = Table(world.support, dist.log_prob(texts)[:, 0].exp())
        for token in range(3):
            share = joint.probs[joint.support[:, 1] == token].sum()
            assert abs(float(dist.posterior().log_q[0, 1, token].exp()) - float(share)) < 1e-5
        observed = torch.tensor([[False, True, False]])
        given = dist.given(torch.tensor([[0, 2, 0]]), observed)
        fits = joint.support[:, 1] == 2
        conditional = given.log_prob(joint.support.unsqueeze(1))[:, 0].exp().double()
        assert torch.allclose(conditional, torch.where(fits, joint.probs, 0.0) / joint.probs[fits].sum(), atol=1e-5)
        best = (dist.log_weights[:, :, None] + dist.log_leaves[:, :, 0, :]).shape  # (1, K, V)
        assert best == (1, 5, world.spec.vocab_size)
        explained = dist.log_weights[0] + dist.log_leaves[0].amax(-1).sum(-1)
        expected = dist.log_leaves[0, explained.argmax()].argmax(-1)
        assert torch.equal(dist.draw(0.0, RowGenerators(torch.zeros(1, dtype=torch.int64)))[0], expected)
    for decode in ("latent", "joint"):
        assert chi_square(sampled(world, head, decode=decode), joint) > 1e-4
    marginals = sampled(world, head, decode="any_order", strategy="random")
    assert chi_square(marginals, joint) > 1e-4


def test_an_autoregressive_model_learns_the_world():
    world = WORLDS["hidden Markov"]
    model = AutoregressiveModel(world.spec.vocab_size, 3, width=16)
    blocks = world.sample(4000, generator=torch.Generator().manual_seed(0))
    fit_autoregressive(model, blocks, steps=200, batch_size=256)
    with torch.no_grad():
        log_p = model.log_conditionals(world.support).gather(2, world.support.unsqueeze(-1)).sum((1, 2))
        exact = CircuitModel(world.circuit()).log_conditionals(world.support)
    assert float((world.probs * (world.probs.log() - log_p)).sum()) < 0.02
    assert torch.allclose(
        exact.gather(2, world.support.unsqueeze(-1)).sum((1, 2)).double(), world.probs.log(), atol=1e-4
    )


def heads_of(world):
    vocab_size, model = world.spec.vocab_size, CircuitModel(world.circuit())
    return [
        CopulaHead(world.circuit()),
        EnergyHead(model, num_candidates=4),
        AdaptiveHead(model),
        CausalHead(vocab_size, world.length, width=8),
        MixtureHead(vocab_size, world.length, 2, width=8),
    ]


@pytest.mark.parametrize("index", range(5))
def test_a_row_does_not_depend_on_its_mates(index):
    """Alone or with others, at several temperatures, in blocks of which the last one is shorter, in several steps."""
    world = worlds.hidden_markov(5, seed=1)
    head = heads_of(worlds.hidden_markov(3, seed=1))[index]
    assert isinstance(head, df.JointHead)
    nothing = torch.zeros(6, 0, dtype=torch.int64)
    for temperature in (0.0, 0.5, 1.0):
        options = {"gen_length": 5, "head": head, "num_steps": 4, "temperature": temperature}
        together = df.generate(world.denoiser(), nothing, seeds=range(6), **options).generated
        assert bool((together < world.mask_id).all())
        alone = df.generate(world.denoiser(), nothing[:1], seeds=[3], **options).generated
        assert torch.equal(together[3:4], alone)
        if temperature == 0:
            assert bool((together == together[0]).all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda world: CopulaHead(3), "pc: expected a compiled circuit"),
        (lambda world: CopulaHead(world.circuit(), num_sweeps=0), "num_sweeps"),
        (lambda world: EnergyHead(world.circuit()), "model: expected a BlockModel"),
        (lambda world: EnergyHead(CircuitModel(world.circuit()), num_candidates=0), "num_candidates"),
        (lambda world: AdaptiveHead(CircuitModel(world.circuit()), mixture_weight=2.0), "mixture_weight: expected"),
        (lambda world: MixtureHead(4, 3, 0), "num_components"),
        (lambda world: CausalHead(0, 3), "vocab_size"),
        (lambda world: fit_conditional(CausalHead(5, 2), world.denoiser(), world.support[:, :1]), "blocks: expected"),
        (lambda world: sampled(world, CausalHead(5, 2), 2, decode="marginal"), "decode: expected one of joint"),
        (lambda world: sampled(world, CausalHead(7, 2), 2), "head: expected one over the denoiser's 5 tokens, got 7"),
        (lambda world: sampled(world, "head", 2), "head: expected df.CoupledHead"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ArgumentError, match=message):
        make(worlds.cities())
