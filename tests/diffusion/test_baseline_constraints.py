"""Baseline heads under a constraint: their own law, given that the text is accepted; those that cannot are refused."""

import pytest
import torch

import circuits as ct
import diffusion as df
from circuits import ArgumentError, RowGenerators
from circuits.queries import DeterministicAutomaton
from diffusion.decoding.baselines import AdaptiveHead, CausalHead, CircuitModel, CopulaHead, EnergyHead, MixtureHead
from diffusion.testing import Table, chi_square, worlds

WORLD = worlds.hidden_markov(3, seed=1)  # 3 words and the mask
V = WORLD.spec.vocab_size
NUM_SAMPLES = 3000


def odd_number_of_first_words():
    """Accept texts in which word 0 occurs once or three times, and word 1 never follows word 2."""
    table = torch.tensor([[1, 0, 2, -1], [0, 1, 3, -1], [1, -1, 2, -1], [0, -1, 3, -1]])
    return DeterministicAutomaton.from_table(table, [1, 3])


A = odd_number_of_first_words()


def given_acceptance(texts, probs):
    probs = probs.double() * A.accepts(texts)
    return Table(texts, probs / probs.sum())


def sampled(head, num_samples=NUM_SAMPLES, length=3, world=WORLD, **options):
    options = {"num_steps": 1, "temperature": 1.0, "constraint": A, **options}
    nothing = torch.zeros(num_samples, 0, dtype=torch.int64)
    return df.generate(
        world.denoiser(), nothing, gen_length=length, block_length=3, head=head, seeds=range(num_samples), **options
    ).generated


def whole_block(head):
    tokens, masked = WORLD.blank.unsqueeze(0), torch.ones(1, 3, dtype=torch.bool)
    return head.distribution(df.Prediction.ask(WORLD.denoiser(), tokens), tokens, masked)


def constrained(dist):
    number = torch.arange(A.num_states)
    reads = torch.ones(1, 3, dtype=torch.bool)
    return dist.under(A, start=(number == A.start).unsqueeze(0), accept=A.accepting.unsqueeze(0), reads=reads)


def mixture(num_components=4, seed=1):
    head = MixtureHead(V, 3, num_components, width=8, seed=seed)
    with torch.no_grad():
        head.components.mul_(3)
        head.weights.bias.normal_(generator=torch.Generator().manual_seed(0))
    return head.requires_grad_(False)


TEXTS = torch.cartesian_prod(*[torch.arange(3)] * 3)


def test_a_constrained_mixture_is_the_mixture_of_what_is_accepted():
    """Acceptance, marginals and marginals given a token, against all 27 texts."""
    dist = whole_block(mixture())
    joint = dist.log_prob(TEXTS.unsqueeze(1))[:, 0].double().exp()
    under, law = constrained(dist), given_acceptance(TEXTS, joint)
    assert float(under.log_acceptance) == pytest.approx(float((joint * A.accepts(TEXTS)).sum().log()), abs=1e-5)
    for i in range(3):
        expected = torch.stack([law.probs[law.support[:, i] == v].sum() for v in range(V)])
        assert torch.allclose(under.posterior().log_q[0, i].exp().double(), expected, atol=1e-5)
    given = under.given(torch.tensor([[0, 2, 0]]), torch.tensor([[False, True, False]]))
    fits = law.support[:, 1] == 2
    for i in (0, 2):
        expected = torch.stack([law.probs[fits & (law.support[:, i] == v)].sum() for v in range(V)])
        found = given.posterior().log_q[0, i].exp().double()
        assert torch.allclose(found, expected / law.probs[fits].sum(), atol=1e-5)


def explanations(dist, temperature):
    """Return the law of accepted texts whose explanations, component and tokens, have the power 1 / tau."""
    leaves = dist.log_leaves[0].double().gather(2, TEXTS.t().expand(dist.log_leaves.shape[1], -1, -1)).sum(1)  # (K, n)
    return (dist.log_weights[0].double().unsqueeze(1) + leaves) / temperature


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("decode", ["joint", "latent"])
def test_draws_of_a_constrained_mixture_follow_its_law(decode, temperature):
    head = mixture()
    law = given_acceptance(TEXTS, explanations(whole_block(head), temperature).exp().sum(0))
    assert chi_square(sampled(head, decode=decode, temperature=temperature), law) > 1e-4


@pytest.mark.parametrize("decode", ["joint", "latent"])
def test_the_best_of_a_constrained_mixture_is_the_best_accepted_explanation(decode):
    found_others = 0
    for seed in range(8):
        head = mixture(seed=seed)
        scores = explanations(whole_block(head), 1.0).amax(0)
        best = TEXTS[scores.masked_fill(~A.accepts(TEXTS), -torch.inf).argmax()]
        assert torch.equal(sampled(head, 1, decode=decode, temperature=0.0)[0], best)
        found_others += not bool(A.accepts(TEXTS[scores.argmax()].unsqueeze(0)))
    assert found_others  # the constraint took the best away


def test_one_marginal_after_the_other_keeps_the_law_of_a_constrained_mixture():
    head = mixture()
    law = given_acceptance(TEXTS, whole_block(head).log_prob(TEXTS.unsqueeze(1))[:, 0].exp())
    assert chi_square(sampled(head, decode="any_order", strategy="random"), law) > 1e-4


def test_a_component_that_cannot_keep_the_constraint_has_no_share():
    """One component writes 000, the other 111; an odd number of 0 leaves the first, however small its weight."""
    dist = whole_block(mixture(2))
    leaves = torch.full_like(dist.log_leaves, -torch.inf)
    leaves[0, 0, :, 0] = leaves[0, 1, :, 1] = 0.0
    dist = type(dist)(torch.tensor([[0.01, 0.99]]).log(), leaves, dist.prediction, dist.tokens, dist.masked)
    under = constrained(dist)
    generator = RowGenerators(torch.zeros(1, dtype=torch.int64))
    assert under.posterior().best().tolist() == [[0, 0, 0]]
    for temperature in (0.0, 0.5, 1.0):
        assert under.draw(temperature, generator).tolist() == [[0, 0, 0]]
    both_second = type(dist)(dist.log_weights, leaves[:, [1, 1]], dist.prediction, dist.tokens, dist.masked)
    impossible = constrained(both_second)
    with pytest.raises(ct.ImpossibleEvidenceError, match="loosen the constraint"):
        impossible.draw(1.0, generator)


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_constrained_copula_is_the_copula_of_accepted_texts(top_k):
    """With all tokens; with a list of two, the best token of every class of the automaton is added, here all."""
    head = CopulaHead(ct.compile(ct.structures.hmm(3, 2, V), seed=3), top_k=top_k)
    every = CopulaHead(head.pc)
    law = given_acceptance(TEXTS, whole_block(every).log_prob(TEXTS.unsqueeze(1))[:, 0].exp())
    assert chi_square(sampled(head), law) > 1e-4
    assert chi_square(sampled(head, decode="any_order", strategy="random"), law) > 1e-4


def test_candidates_under_a_constraint_are_those_of_the_prediction_given_it():
    """One candidate: q given acceptance. Many: the model p given acceptance."""
    q = df.Prediction.ask(WORLD.denoiser(), WORLD.blank.unsqueeze(0)).log_q[0].double().exp()
    apart = given_acceptance(TEXTS, q[torch.arange(3), TEXTS].prod(1))
    model = CircuitModel(WORLD.circuit())
    assert chi_square(sampled(EnergyHead(model, num_candidates=1)), apart) > 1e-4
    target = given_acceptance(TEXTS, WORLD.prob(TEXTS))
    few, many = (Table(sampled(EnergyHead(model, num_candidates=n))).total_variation(target) for n in (1, 64))
    assert many < 0.04 < few / 2


HEADS = [
    CopulaHead(WORLD.circuit()),
    CopulaHead(WORLD.circuit(), top_k=1),
    EnergyHead(CircuitModel(WORLD.circuit()), num_candidates=3),
    mixture(3),
]


@pytest.mark.parametrize("index", range(len(HEADS)))
def test_every_text_is_accepted_over_steps_and_blocks(index):
    """Five tokens in blocks of three and two, in four steps; the state travels along the canvas."""
    head, world = HEADS[index], worlds.hidden_markov(5, seed=1)
    for decode in sorted(head.modes):
        for temperature in (0.0, 1.0):
            texts = sampled(head, 40, 5, world, num_steps=4, decode=decode, temperature=temperature, strategy="entropy")
            assert bool(A.accepts(texts).all())


class Counting:
    def __init__(self, denoiser):
        self.denoiser, self.spec, self.num_calls = denoiser, denoiser.spec, 0

    def logits(self, tokens, **options):
        self.num_calls += 1
        return self.denoiser.logits(tokens, **options)


class WithoutConstraints:
    """A head of somebody's own."""

    activation_threshold, temperature, top_k, needs_features = 1.0, 1.0, None, False
    block_length, vocab_size, modes = 3, V, frozenset({"joint"})

    def distribution(self, prediction, tokens, masked, *, absent=None):
        raise AssertionError


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda: CausalHead(V, 3, width=8), "got CausalHead, which cannot tell .* network; decode without a head, or"),
        (lambda: AdaptiveHead(CircuitModel(WORLD.circuit())), "got AdaptiveHead, which cannot tell .* model; decode"),
        (WithoutConstraints, "expected df.CoupledHead, another head with check_constraint, or no head, got Without"),
        (lambda: CopulaHead(not_a_chain()), "whose circuit is a chain, got another; .*use ct.structures.hmm, or"),
        (lambda: df.CoupledHead(not_a_chain()), "whose circuit is a chain, got another; .*use ct.structures.hmm, or"),
    ],
)
def test_heads_that_are_not_exact_are_refused_before_the_first_call(head, message):
    denoiser, nothing = Counting(WORLD.denoiser()), torch.zeros(2, 0, dtype=torch.int64)
    with pytest.raises(ArgumentError, match="constraint: .*" + message):
        df.generate(denoiser, nothing, gen_length=3, head=head(), constraint=A)
    assert denoiser.num_calls == 0
    out = df.generate(denoiser, nothing, gen_length=3, head=head(), constraint=A, decode="independent")
    assert bool(A.accepts(out.generated).all())


def not_a_chain():
    """Return a circuit that puts the first variable and the last one together."""
    one, two, three = (ct.inputs(i, 2, ct.Categorical(V)) for i in range(3))
    return ct.compile(
        ct.Circuit(ct.sum(ct.product(ct.sum(ct.product(one, three), num_units=2), two), num_units=1)), seed=0
    )
