"""The law of a decoder by enumeration: the reference steps, and theorems about them."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuits as ct
import diffusion as df
from diffusion.testing import Table, chi_square, decoder_law, random_worlds, reference, worlds
from diffusion.testing.components import Components
from diffusion.testing.reference import Rule
from diffusion.testing.worlds import World

EXACT = 1e-6  # logits are float32
LAW_KEEPING = ["random", "entropy", "margin", "top_prob"]
STRATEGIES = ["low_confidence", *LAW_KEEPING]
COINS = World.from_joint(torch.outer(torch.tensor([0.4, 0.6]), torch.tensor([0.3, 0.7])).double().log())
WORLDS = {
    "cities": worlds.cities(3, probs=[0.5, 0.3, 0.2]),
    "alternating": worlds.alternating(4),
    "hidden Markov": worlds.hidden_markov(4, seed=1),
    "parity": worlds.parity(4),
    "sums": worlds.sums(2),
    "endings": worlds.endings(3),
    "random": worlds.random(0, length=3),
}
EVERY_WORLD = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)


def bayes_law(world, **rule):
    """Independent tokens from the Bayes-optimal denoiser."""
    return decoder_law(reference.independent(world.denoiser(), Rule(**rule)), world.blank)


def circuit_law(world, *, decode="joint", **rule):
    """The true circuit alone: nothing is known besides."""
    pc = world.circuit(dtype=torch.float64)
    return decoder_law(reference.coupled(world.uniform_denoiser(), pc, Rule(**rule), decode=decode), world.blank)


def test_a_decoder_of_coins_has_the_law_of_coins():
    """Two positions, one after the other: the law is the product, the number of steps 2."""

    def step_law(tokens, masked, step):
        for value, prob in ((0, 0.25), (1, 0.75)):
            yield prob, (*tokens[:step], value, *tokens[step + 1 :]), tuple(i > step for i in range(2))

    law = decoder_law(step_law, [9, 9])
    assert law.support.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert law.probs.tolist() == [0.0625, 0.1875, 0.1875, 0.5625]
    assert law.expected_steps == 2


def test_equal_states_are_merged():
    """60 fair coins, of which only the number of ones is written down: 61 states, not 2 ** 60."""

    def step_law(tokens, masked, step):
        for value in (0, 1):
            yield 0.5, (tokens[0] + value,), (step < 59,)

    law = decoder_law(step_law, [0])
    expected = [math.comb(60, ones) / 2**60 for ones in range(61)]
    assert law.probs.tolist() == pytest.approx(expected, rel=1e-9)


def test_a_decoder_that_masks_again_has_the_mean_of_a_geometric_number_of_steps():
    """The only position is kept with probability 1/4, otherwise masked again: 4 steps in the mean."""

    def step_law(tokens, masked, step):
        yield 0.25, (1,), (False,)
        yield 0.75, (0,), (step < 500,)

    assert decoder_law(step_law, [0]).expected_steps == pytest.approx(4, abs=1e-9)
    with pytest.raises(ct.ArgumentError, match="step_law: 1 states are open after max_steps=100 steps"):
        decoder_law(step_law, [0], max_steps=100)


def test_outcomes_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ct.ArgumentError, match=r"sum to 1, got 0.5 for tokens=\(0,\), masked=\(True,\), step=0"):
        decoder_law(lambda tokens, masked, step: [(0.5, (1,), (False,))], [0])
    with pytest.raises(ct.ArgumentError, match="masked: expected 2 truth values"):
        decoder_law(lambda *state: [], [0, 0], [True])


@given(world=random_worlds(max_length=3))
@settings(max_examples=15)
def test_one_bayes_optimal_token_at_a_time_keeps_the_law(world):
    """Whatever the order, as long as it does not look at the draw."""
    for strategy in LAW_KEEPING:
        assert bayes_law(world, strategy=strategy).total_variation(world) < EXACT


@EVERY_WORLD
@pytest.mark.parametrize("strategy", LAW_KEEPING)
def test_the_true_circuit_keeps_the_law_at_any_number_of_steps(world, strategy):
    for num_steps in range(1, world.length + 1):
        assert circuit_law(world, strategy=strategy, num_steps=num_steps).total_variation(world) < EXACT


@EVERY_WORLD
def test_the_true_circuit_and_one_joint_step_give_distance_zero(world):
    for decode in ("joint", "latent"):
        for strategy in STRATEGIES:
            law = circuit_law(world, decode=decode, strategy=strategy, num_steps=1)
            assert law.total_variation(world) < EXACT
            assert law.expected_steps == pytest.approx(1)


@pytest.mark.parametrize("strategy", LAW_KEEPING)
def test_the_true_circuit_in_any_order_keeps_the_law(strategy):
    world = worlds.hidden_markov(3)
    for num_steps in (1, 2, 3):
        law = circuit_law(world, decode="any_order", strategy=strategy, num_steps=num_steps)
        assert law.total_variation(world) < EXACT


def test_latents_that_judge_change_the_law_unless_all_is_committed():
    """In latent mode entropy and its like look at the latents that were drawn, and so at the draw."""
    world = worlds.hidden_markov(4)
    distances = {
        strategy: circuit_law(world, decode="latent", strategy=strategy, num_steps=2).total_variation(world)
        for strategy in STRATEGIES
    }
    assert distances.pop("random") < EXACT
    assert min(distances.values()) > 0.02


def coupled_law(pc, logits, world, normalization):
    """The law of one joint step, from the coupled distribution itself."""
    tokens, masked = world.blank.unsqueeze(0), torch.ones(1, world.length, dtype=torch.bool)
    dist = df.CoupledDistribution(pc, logits, tokens, masked, normalization=normalization)
    texts = torch.tensor(list(itertools.product(range(world.spec.vocab_size), repeat=world.length)))
    return Table(texts, dist.log_prob(texts.unsqueeze(1)).detach()[:, 0].exp())


def coupled_distance(world, denoiser, normalization):
    logits = denoiser.logits(world.blank.unsqueeze(0)).double()
    return coupled_law(world.circuit(dtype=torch.float64), logits, world, normalization).total_variation(world)


@EVERY_WORLD
def test_the_true_circuit_times_a_uniform_prediction_is_the_truth(world):
    for normalization in ("global", "local"):
        assert coupled_distance(world, world.uniform_denoiser(), normalization) < EXACT


@EVERY_WORLD
def test_the_true_circuit_times_the_bayes_prediction_counts_the_marginals_twice(world):
    """Globally normalised it is p(x) prod_i p_i(x_i) / Z, with p_i the marginals."""
    marginals = torch.zeros(world.length, world.spec.vocab_size, dtype=torch.float64)
    marginals.scatter_add_(1, world.support.t(), world.probs.expand(world.length, -1))
    product = world.probs * marginals[torch.arange(world.length), world.support].prod(1)
    counted_twice = Table(world.support, product / product.sum())
    logits = world.denoiser().logits(world.blank.unsqueeze(0)).double()
    law = coupled_law(world.circuit(dtype=torch.float64), logits, world, "global")
    assert law.total_variation(counted_twice) < EXACT


@pytest.mark.parametrize("world", [worlds.cities(3), worlds.alternating(4), worlds.parity(4)], ids=str)
def test_counting_twice_does_no_harm_where_the_product_of_the_marginals_is_constant(world):
    assert coupled_distance(world, world.denoiser(), "global") < EXACT


def test_two_unequal_cities_become_more_unequal():
    """0.7 and 0.3: with every word counted twice 0.7 ** 3 : 0.3 ** 3."""
    world = worlds.cities(probs=[0.7, 0.3])
    expected = 0.7**3 / (0.7**3 + 0.3**3)
    assert coupled_distance(world, world.denoiser(), "global") == pytest.approx(expected - 0.7, abs=EXACT)


@pytest.mark.parametrize("name", ["cities", "alternating", "parity", "sums", "random"])
@pytest.mark.parametrize("seed", range(3))
def test_local_normalisation_ignores_the_prediction_where_the_latents_determine_the_text(name, seed):
    """Each input unit knows one token: its product with q, renormalised, is itself, whatever q."""
    world = WORLDS[name]
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, world.length, world.spec.vocab_size, generator=generator, dtype=torch.float64)
    assert coupled_law(world.circuit(dtype=torch.float64), logits, world, "local").total_variation(world) < EXACT


def test_local_normalisation_is_exact_where_the_prediction_says_no_more_than_a_leaf():
    """All words are equally probable to the leaves and to the Bayes-optimal prediction; not so in a Markov chain."""
    assert coupled_distance(WORLDS["endings"], WORLDS["endings"].denoiser(), "local") < EXACT
    assert coupled_distance(WORLDS["endings"], WORLDS["endings"].denoiser(), "global") > 0.05
    assert coupled_distance(WORLDS["hidden Markov"], WORLDS["hidden Markov"].denoiser(), "local") > 0.05


def test_two_coins_with_low_confidence():
    """The second coin is committed when it falls on 1 (0.7), or is thrown again after the first: 0.7 + 0.3 x 0.7."""
    second = torch.tensor([[0, 1], [1, 1]])
    assert bayes_law(COINS, strategy="low_confidence").prob(second).sum() == pytest.approx(0.91, abs=EXACT)
    assert bayes_law(COINS, strategy="random").prob(second).sum() == pytest.approx(0.7, abs=EXACT)


def test_low_confidence_is_far_from_the_law():
    """Three words, six positions, a Bayes-optimal denoiser, one token at a time: 0.61 where random order has 0."""
    world = worlds.random(0, length=6, concentration=1.0)
    distance = bayes_law(world, strategy="low_confidence").total_variation(world)
    assert distance == pytest.approx(0.612, abs=1e-3)
    assert bayes_law(world, strategy="entropy").total_variation(world) < EXACT


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_a_threshold_on_the_drawn_token_does_not_keep_the_law_either(threshold):
    world = worlds.hidden_markov(4)
    law = bayes_law(world, strategy="low_confidence", threshold=threshold)
    assert law.total_variation(world) > 0.15
    assert 1 < law.expected_steps < 4


def test_low_confidence_ends_texts_too_early():
    """Eight positions, 30 % empty texts: 1 - 0.7 ** 8 = 94 % come out, since an end is surer than any of three words.

    An end that is drawn at any of the positions wins the first step, and the rest follows.
    """
    texts = torch.arange(4).unsqueeze(1).expand(4, 8)
    world = World(texts, torch.tensor([0.7 / 3] * 3 + [0.3]), words=("a", "b", "c", "<eos>"), eos_id=3)
    empty = texts[3]
    assert bayes_law(world, strategy="low_confidence").prob(empty) == pytest.approx(1 - 0.7**8, abs=EXACT)
    assert world.prob(empty) == pytest.approx(0.3)
    for length in (2, 4):  # the same when the words are fair dice
        world = worlds.endings(length, num_words=3, lengths=[0.3, *[0] * (length - 1), 0.7])
        law = bayes_law(world, strategy="low_confidence")
        assert law.prob(torch.full((length,), 3)) == pytest.approx(1 - 0.7**length, abs=EXACT)
        assert bayes_law(world, strategy="random").total_variation(world) < EXACT


def test_independent_tokens_in_one_step_are_the_product_of_the_marginals():
    """ "San Francisco", "San York", "New Francisco", "New York": a quarter each, half of them no cities."""
    world = worlds.cities()
    law = bayes_law(world, num_steps=1)
    assert law.probs.tolist() == pytest.approx([0.25] * 4, abs=EXACT)
    assert law.total_variation(world) == pytest.approx(0.5, abs=EXACT)


def test_fewer_steps_are_farther_from_the_truth():
    world = worlds.hidden_markov(4)
    distances = [bayes_law(world, num_steps=steps).total_variation(world) for steps in (1, 2, 4)]
    assert distances[0] > distances[1] > 0.02
    assert distances[2] < EXACT


@given(world=random_worlds(max_length=3), data=st.data())
@settings(max_examples=15)
def test_the_components_of_a_circuit_sum_to_it(world, data):
    circuit = data.draw(ct.testing.circuits(min_vars=2, max_vars=2, max_units=2, max_categories=3))
    for pc in (world.circuit(dtype=torch.float64), ct.compile(circuit, dtype=torch.float64, seed=0)):
        if len(set(pc.circuit.num_categories)) > 1:
            continue  # the components are of texts: all positions have one vocabulary
        joint = ct.testing.enumerate_joint(pc)
        texts = torch.cartesian_prod(*(torch.arange(count) for count in joint.shape)).reshape(-1, joint.dim())
        found = torch.from_numpy(Components.of(pc).prob(texts.numpy()))
        torch.testing.assert_close(found, joint.flatten().exp(), rtol=1e-9, atol=1e-12)


def test_temperature_sharpens_the_draw_and_not_the_judge():
    """q ** 2 of the coins is drawn from; at 0 the best token; committed in the order of q either way."""
    denoiser = COINS.denoiser()
    for temperature, first, second in ((0.5, 0.36 / 0.52, 0.49 / 0.58), (0, 1.0, 1.0), (1.0, 0.6, 0.7)):
        law = decoder_law(reference.independent(denoiser, Rule(num_steps=1), temperature=temperature), COINS.blank)
        assert law.prob(torch.tensor([[1, 0], [1, 1]])).sum() == pytest.approx(first, abs=EXACT)
        assert law.prob(torch.tensor([[0, 1], [1, 1]])).sum() == pytest.approx(second, abs=EXACT)
    sure = Rule(strategy="top_prob", threshold=0.65)  # the second coin only, at every temperature
    for temperature in (1.0, 0.1, 0.01, 0):
        law = decoder_law(reference.independent(denoiser, sure, temperature=temperature), COINS.blank)
        assert law.expected_steps == 2


def test_an_entropy_bound_commits_what_is_certain_together():
    """Entropies 0 (twice), log 2 (twice), of which a bound of 0 lets one join the certain ones, log 2 both."""
    certain, fair = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.5, 0.5]).double()
    world = World.from_joint(torch.einsum("a,b,c,d->abcd", certain, fair, certain, fair).log())
    steps = {
        bound: bayes_law(world, strategy="entropy", entropy_bound=bound).expected_steps
        for bound in (0.0, math.log(2) - 0.01, math.log(2) + 0.01)
    }
    assert list(steps.values()) == [2, 2, 1]


@pytest.mark.parametrize(("bound", "expected_steps"), [(0.8, 2), (1.5, 1)])
def test_a_joint_entropy_commits_what_is_coupled_together(bound, expected_steps):
    """Two equal coins have log 2 nats together; a fair coin of its own joins them at 2 log 2."""
    coins = World(torch.tensor([[0, 0, 0], [0, 0, 1], [1, 1, 0], [1, 1, 1]]))
    rule = Rule.of("joint_entropy", entropy_bound=bound)
    for decode in ("joint", "latent"):
        step_law = reference.coupled(coins.uniform_denoiser(), coins.circuit(), rule, decode=decode)
        law = decoder_law(step_law, coins.blank)
        steps = {"latent": 1}.get(decode, expected_steps)  # given the latents all is certain
        assert law.expected_steps == pytest.approx(steps), decode
        assert law.total_variation(coins) < EXACT
    apart = decoder_law(reference.independent(coins.denoiser(), rule), coins.blank)  # who knows of no dependence
    assert apart.expected_steps == pytest.approx(2)
    assert (apart.total_variation(coins) < EXACT) == (bound == 0.8)  # the second coin is certain, or drawn apart


@pytest.mark.parametrize("num_candidates", [1, 2, 6])
def test_mutual_information_is_that_of_pairs_of_told_apart_tokens(num_candidates):
    generator = torch.Generator().manual_seed(num_candidates)
    joint = torch.rand(5, 5, 5, generator=generator, dtype=torch.float64) ** 4
    joint = joint / joint.sum()
    found = Components.of(World.from_joint(joint.log()).circuit(dtype=torch.float64))
    found = found.mutual_information(num_candidates)
    for i, j in itertools.permutations(range(3), 2):
        marginals = (joint.sum((1, 2)), joint.sum((0, 2)), joint.sum((0, 1)))
        ranks = [marginal.argsort(descending=True).argsort() for marginal in marginals]
        cells = torch.zeros(5, 5, dtype=torch.float64)
        for x in itertools.product(range(5), repeat=3):
            a, b = (min(int(ranks[k][x[k]]), num_candidates) for k in (i, j))
            cells[a, b] += joint[x]
        apart = cells.sum(1, keepdim=True) * cells.sum(0)
        expected = torch.where(cells > 0, cells * (cells / apart).log(), 0.0).sum()
        assert found[i, j] == pytest.approx(float(expected), abs=1e-9)
    assert not found.diagonal().any()


@pytest.mark.parametrize(("strategy", "bound"), [("threshold", 0.0), ("entropy_bound", 1.3), ("joint_entropy", 1.75)])
def test_expected_steps_are_the_calls_that_the_decoder_takes(strategy, bound):
    world = worlds.random(3, length=3, concentration=1.0)
    pc = ct.compile(ct.structures.hmm(3, 2, world.spec.vocab_size), dtype=torch.float64, seed=1)
    options = {"strategy": strategy, "threshold": 0.45, "entropy_bound": bound}
    rule = Rule.of(**options)
    for decode in reference.DRAWS:
        law = decoder_law(reference.coupled(world.denoiser(), pc, rule, decode=decode), world.blank)
        out = df.generate(
            world.denoiser(), torch.zeros(1500, 0, dtype=torch.int64), gen_length=3, head=df.CoupledHead(pc),
            decode=decode, temperature=1.0, seeds=range(1500), **options,
        )  # fmt: skip
        calls = out.row_calls.double()
        error = max(0.1, float(calls.std())) / len(calls) ** 0.5
        assert abs(float(calls.mean()) - law.expected_steps) < 4.5 * error, decode
        assert 1.05 < law.expected_steps < 2.95, decode
        assert chi_square(out.generated, law) > 1e-4, decode


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pc, d: Rule(strategy="best"), "strategy: expected one of low_confidence"),
        (lambda pc, d: Rule(strategy="margin", entropy_bound=1.0), "entropy_bound: expected strategy='entropy'"),
        (lambda pc, d: reference.coupled(d, pc, Rule(), decode="all"), "decode: expected one of joint"),
        (lambda pc, d: Rule(joint_entropy=1.0), "joint_entropy: expected strategy='entropy'"),
        (
            lambda pc, d: Components.of(ct.compile(ct.structures.hmm(20, 2, 2))),
            "pc: expected at most 16384 latent configurations",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ct.ArgumentError, match=message):
        call(COINS.circuit(), COINS.denoiser())


def test_a_circuit_that_rules_every_text_out_is_named():
    class AlwaysTails:
        spec = COINS.spec

        def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
            return torch.tensor([0.0, -torch.inf, 0.0]).expand(len(tokens), 2, 3).clone()

    only_heads = World(torch.tensor([[1, 1]])).circuit()
    step_law = reference.coupled(AlwaysTails(), only_heads, Rule())
    with pytest.raises(ct.ImpossibleEvidenceError, match="rule out every text"):
        decoder_law(step_law, COINS.blank)
