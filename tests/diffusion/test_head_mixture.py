"""Mixtures of heads and of the plain prediction: one joint output layer, exact like each of them."""

from types import SimpleNamespace

import pytest
import torch
from contextual_cases import DOUBLE, B, H
from hmm_cases import TEXTS, L, V, texts

import circuits as ct
from circuits.queries import DeterministicAutomaton
from diffusion import (
    CircuitAlone,
    CoupledHead,
    HeadMixture,
    LatentPotentials,
    LogitCache,
    NoiseCalibration,
    Prediction,
    fit_coupled,
    fit_jointly,
    generate,
)
from diffusion.errors import ArgumentError, ImpossibleEvidenceError
from diffusion.evaluation import misspecification_gap
from diffusion.testing.worlds import alternating


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


def test_fitted_weights_leave_out_what_is_never_right():
    """One circuit and one head expect wrong tokens, independently, and the last head the right ones."""
    tokens = torch.zeros(6, 4, dtype=torch.int64)
    masked = torch.tensor([[True] * count + [False] * (4 - count) for count in (1, 2, 3, 4, 4, 2)])
    heads = []
    for right, made in ((2, [CircuitAlone()]), (1, []), (0, [])):
        table = torch.full((3, 1), 0.05)
        table[right] = 0.9
        pc = ct.compile(ct.structures.hmm(4, 1, 3, emission=table.T))
        heads.append(CoupledHead(pc, conditioners=made))
    batch = SimpleNamespace(prediction=Prediction.from_logits(torch.zeros(6, 4, 3)), tokens=tokens, masked=masked)
    kept = HeadMixture(heads, num_knots=2).fit([batch])
    assert float(kept.log_weights.detach().softmax(1)[1, 1:3].sum()) < 0.01
    mixture = HeadMixture(heads, num_knots=3).fit([batch], decay=0.0)
    best = masked.sum(1) * torch.tensor(0.9).log()
    found = mixture.conditional_log_likelihood(batch.prediction, tokens, masked)
    torch.testing.assert_close(found, best, atol=1e-2, rtol=0)


def test_fitted_weights_are_no_worse_than_any_part(heads, said, block, generator):
    tokens, masked = block
    batch = SimpleNamespace(prediction=said, tokens=tokens, masked=masked)
    mixture = HeadMixture(heads, num_knots=2).fit([batch], decay=0.0)

    def loss(log_prob):
        return float(-log_prob.mean())

    with torch.no_grad():
        found = loss(mixture.distribution(said, tokens, masked).log_prob(tokens))
        parts = [loss(part.log_prob(tokens)) for part in mixture.distribution(said, tokens, masked).parts]
    assert found <= min(parts) + 1e-6


def test_the_circuit_alone_does_not_listen(heads, said, block):
    tokens, masked = block
    pc = heads[0].pc
    with torch.no_grad():
        found = CoupledHead(pc, conditioners=[CircuitAlone()]).conditional_log_likelihood(said, tokens, masked)
        torch.testing.assert_close(found, ct.queries.log_conditional(pc, tokens, ~masked))
        never = torch.nn.functional.one_hot(torch.full((B, L), 3), V).bool()
        narrow = Prediction.from_logits(said.log_q.masked_fill(never, -torch.inf))
        drawn = CoupledHead(pc, conditioners=[CircuitAlone()])(narrow, tokens, masked).sample((200,))
        assert not bool(((drawn == 3) & masked).any())


NO_TWO_ALIKE = DeterministicAutomaton.from_table(
    torch.tensor([[1 + v if s != 1 + v else -1 for v in range(V)] for s in range(1 + V)]), list(range(1 + V))
)
"""No token twice in a row."""


def ends(automaton, size=B):
    start = torch.zeros(size, automaton.num_states, dtype=torch.bool)
    start[:, 0] = True
    return {"start": start, "accept": torch.ones_like(start), "reads": torch.ones(size, L, dtype=torch.bool)}


def test_a_constraint_conditions_it(mixture, heads, said, block):
    """The law is that of the mixture over the texts that are accepted; so are that of more tokens and the marginals."""
    tokens, masked = torch.zeros(B, L, dtype=torch.int64), torch.ones(B, L, dtype=torch.bool)
    accepted = (texts(B)[..., 1:] != texts(B)[..., :-1]).all(-1)
    with torch.no_grad():
        law = law_of(mixture, heads, said, tokens, masked) * accepted
        dist = mixture.distribution(said, tokens, masked).under(NO_TWO_ALIKE, **ends(NO_TWO_ALIKE))
        torch.testing.assert_close(dist.log_prob(texts(B)).exp(), law / law.sum(0))
        one_hot = torch.nn.functional.one_hot(texts(B), V).double()
        marginals = (law[..., None, None] * one_hot).sum(0) / law.sum(0)[:, None, None]
        torch.testing.assert_close(dist.posterior().log_q.exp(), marginals)
        observed = torch.tensor([[False, True, False]]).expand(B, -1)
        law = law * (texts(B)[..., 1] == 2)
        given = dist.given(torch.full((B, L), 2), observed)
        torch.testing.assert_close(given.log_prob(texts(B)).exp(), law / law.sum(0))
        drawn = given.draw(1.0, ct.RowGenerators(torch.arange(B)))
        assert bool((drawn[:, 1:] != drawn[:, :-1]).all())


def test_a_component_that_cannot_keep_a_constraint_has_no_weight(said):
    """The circuit says token 0 three times: nothing is left of it where no token may come twice in a row."""
    always = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=DOUBLE)
    pc = ct.compile(ct.structures.hmm(L, 1, V, emission=always), dtype=DOUBLE)
    tokens, masked = torch.zeros(B, L, dtype=torch.int64), torch.ones(B, L, dtype=torch.bool)
    with torch.no_grad():
        dist = HeadMixture([CoupledHead(pc)]).distribution(said, tokens, masked)
        constrained = dist.under(NO_TWO_ALIKE, **ends(NO_TWO_ALIKE))
        assert constrained.log_weights[:, 1].tolist() == [-torch.inf] * B
        for seed in range(20):
            drawn = constrained.draw(1.0, ct.RowGenerators(torch.arange(B) + 100 * seed))
            assert bool((drawn[:, 1:] != drawn[:, :-1]).all())
        sure = said.with_observed(tokens, masked)
        with pytest.raises(ImpossibleEvidenceError, match="constraint: prediction and heads rule out"):
            HeadMixture([CoupledHead(pc)]).distribution(sure, tokens, masked).under(NO_TWO_ALIKE, **ends(NO_TWO_ALIKE))


def test_only_chains_are_decoded_under_a_constraint(heads):
    tree = ct.compile(ct.structures.quad_tree((2, 4), 2, ct.Categorical(V)), dtype=DOUBLE)
    HeadMixture(heads).check_constraint()
    with pytest.raises(ArgumentError, match="constraint: expected a head whose circuit is a chain"):
        HeadMixture([CoupledHead(tree)]).check_constraint()


@pytest.mark.parametrize("decode", ["latent", "marginal", "any_order", "joint"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_mode_decodes_and_each_row_alone(decode, temperature):
    world = alternating(4)
    weak = ct.compile(ct.structures.hmm(4, 2, 3), dtype=DOUBLE, seed=0)
    mixture = HeadMixture([CoupledHead(world.circuit(dtype=DOUBLE)), CoupledHead(weak)])
    with torch.no_grad():
        mixture.log_weights[:, 1] = 30.0  # all weight to the true circuit
    options = {"gen_length": 4, "block_length": 4, "num_steps": 1, "temperature": temperature, "decode": decode}

    def decoded(rows, **more):
        prompt = [[]] * len(rows)
        return generate(world.denoiser(), prompt, head=mixture, seeds=rows, **options, **more).tokens

    starts_with_1 = DeterministicAutomaton.from_table(torch.tensor([[-1, 1, -1], [1, 1, 1]]), [1])
    for more in ({}, {"constraint": starts_with_1}):
        found = decoded([3, 4, 5], **more)
        assert torch.equal(found, torch.cat([decoded([seed], **more) for seed in (3, 4, 5)]))
        if decode != "marginal":
            assert bool((found[:, 1:] != found[:, :-1]).all())
        assert not more or bool((found[:, 0] == 1).all())


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


def test_weights_are_fitted_to_batches():
    with pytest.raises(ArgumentError, match=r"batches: expected some, .*, got int; of a cache give \[cache.batch"):
        HeadMixture([CoupledHead(ct.compile(ct.structures.hmm(L, 2, V)))]).fit(3)


def test_what_all_components_rule_out_makes_no_weight_nan(mixture, said):
    tokens, every = torch.zeros(B, L, dtype=torch.int64), torch.ones(B, L, dtype=torch.bool)
    some = torch.zeros(B, L, dtype=torch.bool)
    some[0, 0] = True
    ruled_out = mixture.distribution(said.with_observed(tokens + 1, some), tokens, every).given(tokens, some)
    assert bool(ruled_out.log_weights.isfinite().all())
    torch.testing.assert_close(ruled_out.log_weights.exp().sum(1), torch.ones(B, dtype=DOUBLE))
    assert not bool(ruled_out.posterior().log_q.isnan().any())


def test_it_takes_what_a_head_takes(mixture, heads, said, block):
    """Logits, and predictions of masked positions alone."""
    tokens, masked = block
    expected = mixture.conditional_log_likelihood(said, tokens, masked)
    torch.testing.assert_close(mixture.conditional_log_likelihood(said.only(masked), tokens, masked), expected)
    plain = HeadMixture(heads[:1]).requires_grad_(False)
    found = plain.conditional_log_likelihood(said.log_q, tokens, masked)
    torch.testing.assert_close(found, plain.conditional_log_likelihood(said, tokens, masked))


def test_heads_that_list_tokens_list_them_under_a_constraint_too(heads, said):
    tokens, masked = torch.zeros(B, L, dtype=torch.int64), torch.ones(B, L, dtype=torch.bool)
    heads[0].top_k = 2
    mixture = HeadMixture(heads).requires_grad_(False)
    accepted = (texts(B)[..., 1:] != texts(B)[..., :-1]).all(-1)
    with torch.no_grad():
        law = law_of(mixture, heads, said, tokens, masked) * accepted
        dist = mixture.distribution(said, tokens, masked, keeps_list=True)  # as decoding under a constraint asks
        found = dist.under(NO_TWO_ALIKE, **ends(NO_TWO_ALIKE)).log_prob(texts(B)).exp()
    torch.testing.assert_close(found, law / law.sum(0))


def test_a_mixture_is_for_the_tokenizer_of_its_heads_and_is_not_fitted_as_one():
    world = alternating(4)
    denoiser, head = world.denoiser(), CoupledHead(world.circuit())
    denoiser.tokenizer_fingerprint, head.tokenizer_fingerprint = "one", "another"
    mixture, texts_of = HeadMixture([head]), torch.zeros(4, 4, dtype=torch.int64)
    with pytest.raises(ArgumentError, match="head: expected one for the tokenizer one, got one for another"):
        generate(denoiser, [[]], head=mixture, gen_length=4)
    cache = LogitCache(texts_of.numpy(), texts_of.bool().numpy(), torch.zeros(4, 4, 3).numpy(), None, 3, "made")
    for ask in (
        lambda: fit_coupled(mixture, cache, progress=False),
        lambda: fit_jointly(denoiser, mixture, texts_of, progress=False),
        lambda: misspecification_gap(denoiser, mixture, texts_of, progress=False),
    ):
        with pytest.raises(ArgumentError, match=r"head: expected df\.CoupledHead, got HeadMixture"):
            ask()
