"""The log-probability of texts under the decoder itself, against its enumerated law."""

import itertools
import math
import typing

import numpy as np
import pytest
import torch
from likelihood_cases import EXACT, MASK, READER, Reader, V, all_texts, hmm_head, nothing

import circuits as ct
import diffusion as df
from diffusion.decoding.config import KEEPS_LAW, MODES, Strategy
from diffusion.decoding.plans import Plan
from diffusion.errors import ArgumentError, ImpossibleEvidenceError
from diffusion.testing import decoder_law, reference, worlds
from diffusion.testing.components import Components
from diffusion.testing.reference import Rule

RULES = ["entropy", "margin", "top_prob"]
WORLD = worlds.random(3, length=3, concentration=1.0)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("strategy", RULES)
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_the_decoder_has_the_likelihood_of_its_law_without_a_circuit(strategy, num_steps):
    law = decoder_law(
        reference.independent(WORLD.denoiser(), Rule(strategy=strategy, num_steps=num_steps)), WORLD.blank
    )
    texts = all_texts(3)
    found = df.log_likelihood(WORLD.denoiser(), nothing(27), texts, strategy=strategy, num_steps=num_steps)
    assert found.exp().sum().item() == pytest.approx(1.0, abs=EXACT)
    assert found.exp().tolist() == pytest.approx(law.prob(texts).tolist(), abs=EXACT)


@pytest.mark.parametrize("strategy", RULES)
@pytest.mark.parametrize(
    ("decode", "normalization"),
    list(itertools.product(("joint", "marginal", "any_order"), ("global", "local"))),
)
def test_the_decoder_has_the_likelihood_of_its_law_with_a_circuit(decode, normalization, strategy):
    head, texts = hmm_head(3, WORLD.spec.vocab_size, normalization=normalization), all_texts(3)
    for num_steps in (1, 2):
        step_law = reference.coupled(
            WORLD.denoiser(), head.pc, Rule(strategy=strategy, num_steps=num_steps), decode=decode,
            normalization=normalization,
        )  # fmt: skip
        law = decoder_law(step_law, WORLD.blank)
        found = df.log_likelihood(
            WORLD.denoiser(), nothing(27), texts, head=head, decode=decode, strategy=strategy, num_steps=num_steps
        )
        assert found.exp().tolist() == pytest.approx(law.prob(texts).tolist(), abs=EXACT)


@pytest.mark.parametrize("normalization", ["global", "local"])
def test_in_any_order_one_step_is_the_joint_distribution_by_the_chain_rule(normalization):
    head, texts = hmm_head(3, WORLD.spec.vocab_size, normalization=normalization), all_texts(3)
    q = reference.predicted(WORLD.denoiser(), WORLD.blank.numpy())
    mixture = Components.of(head.pc).coupled(q, WORLD.blank.numpy(), np.ones(3, bool), normalization)
    for strategy in RULES:
        found = df.log_likelihood(
            WORLD.denoiser(), nothing(27), texts, head=head, decode="any_order", strategy=strategy, num_steps=1
        )
        assert found.exp().tolist() == pytest.approx(mixture.prob(texts.numpy()).tolist(), abs=EXACT)


def test_an_entropy_bound_commits_what_its_law_commits():
    texts = all_texts(3)
    for bound in (0.3, 1.2):
        rule = Rule(strategy="entropy", entropy_bound=bound)
        law = decoder_law(reference.independent(WORLD.denoiser(), rule), WORLD.blank)
        found = df.log_likelihood(WORLD.denoiser(), nothing(27), texts, strategy="entropy_bound", entropy_bound=bound)
        assert found.exp().tolist() == pytest.approx(law.prob(texts).tolist(), abs=EXACT)


def test_blocks_have_the_likelihood_of_the_blocks_one_after_the_other():
    """Prompt of 1, blocks of 2 and 1 tokens, each in one joint step."""
    head, prompt, texts = hmm_head(2, 5), torch.tensor([2]), all_texts(3)
    components = Components.of(head.pc)
    found = df.log_likelihood(READER, prompt.expand(27, 1), texts, head=head, num_steps=2)
    for text, log_prob in zip(texts.tolist(), found.tolist(), strict=True):
        canvas = np.array([2, MASK, MASK, MASK])
        q = reference.predicted(READER, canvas)
        first = components.coupled(q[1:3], canvas[1:3], np.array([True, True]), "global").prob(np.array([text[:2]]))
        canvas[1:3] = text[:2]
        q = np.concatenate([reference.predicted(READER, canvas)[3:], np.ones((1, 5))])  # the last block has one token
        last = components.coupled(q, np.zeros(2, int), np.array([True, True]), "global").marginals[0, text[2]]
        assert log_prob == pytest.approx(math.log(first[0]) + math.log(last), abs=EXACT)


PLANS: dict[str, typing.Callable[[], Plan]] = {
    "blocks": lambda: df.Blocks(2, 3),
    "anywhere": lambda: df.Anywhere(3),
    "windows": lambda: df.DynamicWindows(2),
    "short windows": lambda: df.DynamicWindows(3, length=1),
}


@pytest.mark.parametrize("strategy", sorted(KEEPS_LAW))
@pytest.mark.parametrize("plan", PLANS)
def test_the_probabilities_of_all_answers_sum_to_one(plan, strategy):
    """With every plan, mode and strategy that keeps the law; the order that is drawn is the seeds'."""
    texts = all_texts(4)
    for decode in ("independent", "marginal", "any_order", "joint"):
        head = None if decode == "independent" or plan == "anywhere" else hmm_head(2, 5)
        found = df.log_likelihood(
            READER, [[0, 1]] * 81, texts, head=head, decode=decode, strategy=strategy, plan=PLANS[plan](),
            seeds=[5] * 81, entropy_bound=1.0,
        )  # fmt: skip
        assert found.exp().sum().item() == pytest.approx(1.0, abs=1e-4), decode


def test_listed_tokens_share_all_probability():
    found = df.log_likelihood(READER, nothing(27), all_texts(3), head=hmm_head(3, 5, top_k=2), num_steps=1)
    assert found.exp().sum().item() == pytest.approx(1.0, abs=EXACT)
    assert int((found > -torch.inf).sum()) == 8
    head = hmm_head(3, 5, top_k=2)
    head.activation_threshold = 0.0  # the circuit is never used, the list is
    found = df.log_likelihood(READER, nothing(27), all_texts(3), head=head, num_steps=1)
    assert found.exp().sum().item() == pytest.approx(1.0, abs=EXACT)


@pytest.mark.parametrize("plan", ["blocks", "windows"])
def test_a_row_has_the_likelihood_that_it_has_alone(plan):
    """Whatever the lengths of its mates' prompts and answers."""
    prompts, answers = [[0, 1, 2], [], [2]], [[1, 0, 2, 2, 1], [2, 1], [0, 0, 1]]
    for decode, strategy in (("joint", "entropy"), ("any_order", "random"), ("marginal", "margin")):
        options = {"head": hmm_head(2, 5), "decode": decode, "strategy": strategy, "plan": PLANS[plan]()}
        together = df.log_likelihood(READER, prompts, answers, seeds=[1, 2, 3], **options)
        for row in range(3):
            alone = df.log_likelihood(
                READER, prompts[row : row + 1], answers[row : row + 1], seeds=[row + 1], **options
            )
            assert alone.item() == pytest.approx(together[row].item(), abs=EXACT)
    padded = torch.tensor([[1, 0, 2, 2, 1], [2, 1, 4, 4, 4], [0, 0, 1, 4, 4]])
    for method in ("sequential", "elbo"):
        ragged = df.log_likelihood(READER, prompts, answers, method=method, block_length=2, seeds=[1, 2, 3])
        found = df.log_likelihood(READER, prompts, padded, method=method, block_length=2, seeds=[1, 2, 3])
        assert torch.equal(ragged, found)
        alone = df.log_likelihood(READER, prompts[1:2], answers[1:2], method=method, block_length=2, seeds=[2])
        assert alone.item() == pytest.approx(ragged[1].item(), abs=EXACT)


def test_a_random_order_is_the_one_that_the_seed_draws():
    """Two tokens, one after the other, in one of two orders: given each order the law is the chain's."""
    world = worlds.hidden_markov(2, num_words=2, seed=4)
    weak = Reader()
    by_order = []
    for first in (0, 1):
        canvas = np.array([MASK, MASK])
        table = np.zeros((V, V))
        for one in range(V):
            canvas[:] = MASK
            p = reference.predicted(weak, canvas)[first, one]
            canvas[first] = one
            row = reference.predicted(weak, canvas)[1 - first]
            for other in range(V):
                table[(one, other) if first == 0 else (other, one)] = p * row[other]
        by_order.append(math.log(table[1, 2]))
    assert abs(by_order[0] - by_order[1]) > 0.01
    assert world.length == 2
    count = 400
    found = df.log_likelihood(weak, nothing(count), [[1, 2]] * count, strategy="random", seeds=list(range(count)))
    is_first = (found - by_order[0]).abs() < EXACT
    assert bool((is_first | ((found - by_order[1]).abs() < EXACT)).all())
    assert 150 < int(is_first.sum()) < 250


def test_the_teacher_follows_the_decoder():
    """The likelihood of what was generated, with its seeds, is what the record of the generation says."""
    out = df.generate(
        READER, [[0, 1], [2]], gen_length=4, num_steps=2, temperature=1.0, strategy="random", seeds=[3, 4], record=True,
        stop_at_eos=False,
    )  # fmt: skip
    expected = torch.zeros(2)
    for before, after in itertools.pairwise(out.trajectory):
        valid = torch.tensor([[True] * 6, [False] + [True] * 5])
        log_q = df.Prediction.ask(READER, before, valid=valid, window=(2, 6)).log_prob_of(after[:, 2:].clamp(max=2))
        expected += (log_q * ((before != after) & valid)[:, 2:]).sum(1)
    found = df.log_likelihood(READER, [[0, 1], [2]], out.generated, num_steps=2, strategy="random", seeds=[3, 4])
    assert found.tolist() == pytest.approx(expected.tolist(), abs=EXACT)


def test_impossible_texts_have_log_probability_minus_infinity_and_their_mates_do_not():
    world = worlds.parity(4)
    pc = world.circuit()
    texts = torch.tensor([[1, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0]])
    for decode in ("joint", "marginal", "any_order"):
        for num_steps in (1, 2, 4):
            found = df.log_likelihood(
                world.uniform_denoiser(), nothing(3), texts, head=df.CoupledHead(pc), decode=decode, num_steps=num_steps
            )
            sure = decode != "marginal" or num_steps == 4
            assert found.isneginf().tolist() == [sure, False, sure], (decode, num_steps)
            if sure:
                assert found[1].item() == pytest.approx(math.log(1 / 8), abs=EXACT)
    never = df.log_likelihood(READER, nothing(2), [[0, 1, 0], [0, 0, 1]], head=hmm_head(3, 5, top_k=1), num_steps=2)
    assert bool(never.isneginf().any())


def test_what_follows_an_impossible_token_is_not_asked_for():
    """AABA is impossible from its second token on; ABAB beside it has its probability, in every mode and plan."""
    world = worlds.alternating(4)
    texts = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 1]])
    head, denoiser = df.CoupledHead(world.circuit()), world.uniform_denoiser()
    for decode, num_steps in (("any_order", 1), ("any_order", 2), ("marginal", 4), ("joint", 2), ("joint", 4)):
        for plan in (df.Blocks(4, num_steps), df.DynamicWindows(num_steps)):
            found = df.log_likelihood(denoiser, nothing(2), texts, head=head, decode=decode, plan=plan)
            assert found[0].item() == -torch.inf
            assert found[1].item() == pytest.approx(math.log(1 / 2), abs=EXACT)
    found = df.log_likelihood(denoiser, nothing(2), texts, head=head, method="sequential")
    assert found.isneginf().tolist() == [True, False]
    with pytest.raises(ImpossibleEvidenceError, match="rule out every text"):  # with AA visible nothing has a marginal
        df.log_likelihood(denoiser, nothing(2), texts, head=head, method="elbo", seeds=[1, 2])


def test_a_circuit_gives_the_probability_of_some_positions():
    """Against the enumeration of its components, with absent and observed positions, both normalisations."""
    generator = torch.Generator().manual_seed(0)
    pc = ct.compile(ct.structures.hmm(3, 2, 4), seed=5, dtype=torch.float64)
    logits = torch.randn(1, 3, 4, generator=generator, dtype=torch.float64)
    tokens, masked = torch.tensor([[1, 3, 0]]), torch.tensor([[True, False, True]])
    texts = all_texts(3, 4).numpy()
    for normalization in ("global", "local"):
        dist = df.CoupledDistribution(pc, logits, tokens, masked, normalization=normalization)
        q = torch.softmax(logits[0], -1).numpy()
        mixture = Components.of(pc).coupled(q, tokens[0].numpy(), masked[0].numpy(), normalization)
        for token in range(4):
            asked = torch.tensor([[token, 2, 0]])
            found = dist.log_prob_at(asked, torch.tensor([[True, True, False]]))
            expected = mixture.prob(texts)[texts[:, 0] == token].sum()
            assert found.exp().item() == pytest.approx(expected, rel=1e-9)
        assert dist.log_prob_at(tokens, masked).item() == pytest.approx(dist.log_prob(tokens).item(), rel=1e-9)
    impossible = df.CoupledDistribution(worlds.parity(3).circuit(), torch.zeros(1, 3, 3), tokens.clamp(max=1), masked)
    assert impossible.log_prob_at(torch.tensor([[0, 1, 0]]), masked).item() == -torch.inf
    never = df.CoupledDistribution(
        worlds.parity(2).circuit(), torch.zeros(1, 2, 3), torch.tensor([[2, 0]]), torch.tensor([[False, True]])
    )
    with pytest.raises(ImpossibleEvidenceError, match="rule out every text"):
        never.log_prob_at(torch.tensor([[2, 0]]), torch.tensor([[False, True]]))


BAD = [
    ({"temperature": 0.5}, "temperature: expected 1, got 0.5"),
    ({"config": df.DecodingConfig()}, "temperature: expected 1, got 0.0"),
    ({"decode": "latent", "strategy": "random"}, "decode: expected one of independent, marginal, any_order, joint"),
    ({"remask": 0.1}, "remask: expected 0"),
    ({"strategy": "low_confidence"}, "strategy: expected one of entropy, .*, got 'low_confidence'"),
    ({"strategy": "threshold"}, "strategy: expected one of entropy"),
    ({"method": "exact"}, "method: expected one of decoder, elbo, sequential, got 'exact'"),
    ({"method": "elbo", "num_steps": 2}, "num_steps: method='elbo' has no such option; expected one of num_samples"),
    ({"num_samples": 2}, "num_samples: method='decoder' has no such option"),
    ({"method": "elbo", "num_samples": 0}, "num_samples"),
    ({"method": "sequential", "order": torch.tensor([0, 0])}, "order: expected every position from 0 to 1 once"),
    ({"method": "sequential", "order": torch.tensor([0])}, r"order: expected int64 \(2,\) or \(1, 2\)"),
    ({"block_length": 0}, "block_length"),
    ({"seeds": [1, 2]}, "seeds: expected 1 integers"),
    ({"answer": [[0, MASK]]}, r"answer: expected texts without mask tokens \(3\)"),
    ({"prompt": [[0, MASK]]}, r"prompt: expected texts without mask tokens \(3\)"),
    ({"answer": [[4, 0]]}, "answer: expected padding at the right only"),
    ({"answer": [[0, 1], [0, 1]]}, "answer: expected as many rows as prompt, 1, got 2"),
    ({"answer": [[0, 9]]}, "answer: expected token ids from 0 to 4, got 9"),
    ({"answer": "text"}, "answer: .*got text"),
    ({"answer": [[0] * 12]}, "answer: expected at most the denoiser's 12 positions"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_what_has_no_likelihood_is_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        df.log_likelihood(READER, options.pop("prompt", [[0]]), options.pop("answer", [[0, 1]]), **options)


def test_every_mode_and_strategy_is_either_measured_or_refused():
    for decode, strategy in itertools.product(tuple(MODES), typing.get_args(Strategy)):
        config = df.DecodingConfig(decode=decode, strategy=strategy, temperature=1.0)
        keeps = config.keeps_law and decode != "latent"
        try:
            found = df.log_likelihood(READER, [[0]], [[0, 1]], head=hmm_head(2, 5), config=config)
        except ArgumentError:
            assert not keeps
        else:
            assert keeps
            assert -20 < found.item() < 0


def test_an_empty_answer_is_certain():
    for method in ("decoder", "elbo", "sequential"):
        assert df.log_likelihood(READER, [[0, 1]], [[]], method=method).tolist() == [0.0]
    found = df.log_likelihood(READER, [[0, 1], [2]], [[], [1]])
    assert found[0].item() == 0
    assert found[1].item() < 0
