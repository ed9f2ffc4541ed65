"""What decoding promises: a row's text is its own; constraints hold; holes anywhere are filled."""

import itertools
import typing

import pytest
import torch

import circuits as ct
import diffusion as df
from diffusion.decoding.config import MODES, Strategy

STRATEGIES = typing.get_args(Strategy)
ORDER = tuple(MODES)
V, MASK, PAD, EOS, L = 7, 6, 5, 4, 4

pytestmark = pytest.mark.usefixtures("one_thread")


class Reader:
    """A denoiser whose prediction depends on all visible tokens by their distance, and ignores padding."""

    spec = df.DenoiserSpec(
        vocab_size=V, mask_id=MASK, eos_ids=(EOS,), pad_id=PAD, forbidden_ids=(MASK, PAD), max_length=40
    )

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.effect = torch.randn(81, V, V, generator=generator, dtype=torch.float64)
        self.effect[..., EOS] -= 2.0

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        start, stop = window or (0, tokens.shape[1])
        valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
        places = torch.arange(tokens.shape[1])
        distance = places[start:stop].unsqueeze(1) - places + 40
        effects = self.effect[distance][:, places, tokens]  # (n, B, T, V)
        return (effects * valid.unsqueeze(-1)).sum(2).transpose(0, 1).float()


@pytest.fixture(scope="module")
def denoiser():
    return Reader()


@pytest.fixture(scope="module")
def head():
    return df.CoupledHead(ct.compile(ct.structures.hmm(L, 3, V), seed=0))


PLANS = {
    "blocks": lambda: df.Blocks(L, 6),
    "windows": lambda: df.DynamicWindows(5),
    "short windows": lambda: df.DynamicWindows(5, length=2),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize("decode", MODES)
def test_a_row_has_the_same_text_alone_and_beside_any_mates(decode, temperature, plan, denoiser, head):
    prompts, seeds = [[0, 1, 2], [], [2, MASK, 1, 0, 3]], [7, 2**62, 7]
    first = ORDER.index(decode) + 3 * list(PLANS).index(plan) + 4 * (temperature > 0)
    for strategy in STRATEGIES[first % 8 :: 8]:
        options = {"gen_length": 9, "head": head, "decode": decode, "strategy": strategy, "temperature": temperature}
        together = df.generate(denoiser, prompts, seeds=seeds, plan=PLANS[plan](), **options)
        assert not bool((together.generated == MASK).any())
        for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            alone = df.generate(denoiser, [prompt], seeds=[seed], plan=PLANS[plan](), **options)
            assert torch.equal(alone.generated[0], together.generated[row]), (strategy, row)


@pytest.mark.parametrize("decode", MODES)
def test_infilling_fills_every_hole_and_nothing_else(decode, denoiser, head):
    canvas = torch.tensor([[0, MASK, 1, 2, MASK, MASK, 3, 1, MASK], [MASK] * 9, [0, 1, 2, 3, 0, 1, 2, 3, 0]])
    out = df.infill(denoiser, canvas, head=head, decode=decode, num_steps=3, seeds=[1, 2, 3], temperature=1.0)
    filled = canvas == MASK
    assert torch.equal(out.tokens[~filled], canvas[~filled])
    assert not bool(torch.isin(out.tokens, torch.tensor([MASK, PAD])).any())
    assert out.num_windows[2] == 0


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("decode", MODES)
def test_texts_satisfy_their_constraint_whatever_the_plan(decode, plan, denoiser, head):
    """Tokens 0 and 1 alternate, but for one 3: an automaton of four states, two of which accept."""
    table = torch.full((4, V), -1)
    table[0, 0], table[1, 1], table[2, 0], table[3, 1] = 1, 0, 3, 2
    table[0, 3], table[1, 3] = 2, 3
    automaton = df.constraints.automaton(ct.queries.Automaton.deterministic(table, [2, 3]))
    accepted = {text for text in itertools.product((0, 1, 3), repeat=7) if text.count(3) == 1 and _alternates(text)}
    first = ORDER.index(decode) + list(PLANS).index(plan)
    some = [(STRATEGIES[(first + further) % 8], head) for further in (0, 3, 6)]
    for strategy, used in [*some, (STRATEGIES[first % 8], None)]:
        out = df.generate(
            denoiser, [[0], [2, 2], []], gen_length=7, plan=PLANS[plan](), head=used, decode=decode, strategy=strategy,
            threshold=0.5, temperature=1.0, seeds=[1, 2, 3], constraint=automaton, stop_at_eos=False,
        )  # fmt: skip
        assert all(tuple(row.tolist()) in accepted for row in out.generated), (strategy, used, out.generated)


def _alternates(text):
    rest = [token for token in text if token != 3]
    return rest[0] == 0 and all(a != b for a, b in itertools.pairwise(rest)) if rest else True


@pytest.mark.parametrize("decode", MODES)
def test_texts_that_end_satisfy_their_constraint(decode, head):
    """Tokens 0 and 1 alternate and then the text ends: the padding after it counts for nothing."""

    class Ending(Reader):
        def logits(self, *args, **kwargs):
            return super().logits(*args, **kwargs) + 15.0 * (torch.arange(V) == EOS)

    table = torch.full((2, V), -1)
    table[0, 0], table[1, 1] = 1, 0
    automaton = df.constraints.automaton(ct.queries.Automaton.deterministic(table, [0, 1]))
    out = df.generate(
        Ending(), [[2]] * 20, gen_length=9, block_length=3, num_steps=5, head=head, decode=decode, temperature=1.0,
        seeds=range(20), constraint=automaton,
    )  # fmt: skip
    lengths = set()
    for row in out.generated.tolist():
        text = row[: row.index(EOS)] if EOS in row else row
        assert text == [i % 2 for i in range(len(text))]
        assert row[len(text) :] == [EOS, *[PAD] * (8 - len(text))][: 9 - len(text)]
        lengths.add(len(text))
    assert len(lengths) > 1


def test_a_constraint_that_no_text_satisfies_is_refused_before_the_denoiser_is_asked(head):
    table = torch.full((2, V), -1)
    table[0, 0], table[1, 1] = 1, 0
    automaton = df.constraints.automaton(ct.queries.Automaton.deterministic(table, [0]))

    class Unasked(Reader):
        def logits(self, *args, **kwargs):
            raise AssertionError("asked")

    with pytest.raises(df.errors.ArgumentError, match="constraint: expected a canvas that some text fits into"):
        df.generate(Unasked(), [[0]], gen_length=7, head=head, constraint=automaton, stop_at_eos=False)


@pytest.mark.parametrize("plan", [df.Blocks(4, 2), df.DynamicWindows(2), df.Anywhere(1)], ids=str)
@pytest.mark.parametrize("decode", ["marginal", "any_order"])
def test_the_last_step_leaves_no_mask_though_draws_contradict_each_other(decode, plan, denoiser):
    """Words that must alternate, drawn one by one: what contradicts the rest is drawn again, given the rest."""
    either = torch.full((3, V), -1)
    either[0, 0], either[0, 1], either[1, 1], either[2, 0] = 1, 2, 2, 1
    automaton = df.constraints.automaton(ct.queries.Automaton.deterministic(either, [1, 2]))
    long = df.CoupledHead(ct.compile(ct.structures.hmm(8, 2, V), seed=0))
    out = df.generate(
        denoiser, [[], [0]] * 8, gen_length=7, plan=plan, head=long, decode=decode, strategy="random", temperature=1.0,
        seeds=list(range(16)), constraint=automaton, stop_at_eos=False,
    )  # fmt: skip
    assert bool(automaton.accepts(out.generated).all())


def alone(denoiser, row, **options):
    return df.infill(denoiser, [row], **options).tokens[0]


HOLED = [[0, MASK, 1, MASK, MASK, 2], [MASK] * 3, [1, 2, MASK], [MASK, 0, 1, 1, 0, 2, 3, 3, MASK, 0], [2, 2]]


@pytest.mark.parametrize("decode", MODES)
def test_greedy_rows_with_holes_are_their_own_without_seeds(decode, denoiser, head):
    """Batches of 1 to 5, padded at the right: no random number matters."""
    for strategy in ("low_confidence", "margin", "entropy_bound", "joint_entropy", "threshold"):
        options = {"head": head, "decode": decode, "strategy": strategy, "num_steps": 2}
        texts = [alone(denoiser, row, **options) for row in HOLED]
        for size in (2, 5):
            out = df.infill(denoiser, HOLED[:size], **options)
            for row, text in enumerate(texts[:size]):
                assert torch.equal(out.tokens[row, : len(text)], text), (strategy, size)


@pytest.mark.parametrize("size", range(2, 9))
def test_a_row_is_the_same_in_batches_of_any_size(size, denoiser, head):
    """Ragged last blocks, steps that do not divide, a text shorter than the block."""
    prompt = [0, 2, 1]
    for gen_length, plan in ((3, df.Blocks(4, 2)), (10, df.Blocks(4, 7)), (7, df.DynamicWindows(3))):
        options = {"gen_length": gen_length, "plan": plan, "head": head, "temperature": 0.7}
        one = df.generate(denoiser, [prompt], seeds=[11], **options)
        mates = [[1] * (n % 5) for n in range(size - 1)]
        many = df.generate(denoiser, [*mates, prompt], seeds=[*range(size - 1), 11], **options)
        assert torch.equal(one.generated[0], many.generated[-1])
        assert int(one.row_calls[0]) == int(many.row_calls[-1])


@pytest.mark.parametrize("plan", [df.DynamicWindows(3), df.DynamicWindows(3, 2), df.Anywhere(3)], ids=str)
@pytest.mark.parametrize("strategy", ["entropy", "random", "low_confidence"])
def test_padding_that_an_attention_mask_tells_moves_nothing(strategy, plan, denoiser, head):
    """At the left or at the right; random numbers count from a row's first token."""
    used = None if isinstance(plan, df.Anywhere) else head
    options = {"plan": plan, "head": used, "strategy": strategy, "temperature": 0.8, "seeds": [3]}
    row = HOLED[0]
    text = alone(denoiser, row, **options)
    for left, right in ((3, 0), (0, 2), (2, 1)):
        padded = torch.tensor([[0] * left + row + [0] * right])  # what stands at padding means nothing
        attention_mask = torch.tensor([[0] * left + [1] * len(row) + [0] * right])
        out = df.infill(denoiser, padded, valid=attention_mask, **options)
        assert torch.equal(out.tokens[0, left : left + len(row)], text)


def test_a_prompt_with_an_attention_mask_is_the_prompt_without_padding(denoiser, head):
    options = {"gen_length": 6, "head": head, "temperature": 0.9, "seeds": [5]}
    one = df.generate(denoiser, [[1, 2]], **options)
    padded = df.generate(denoiser, torch.tensor([[3, 3, 1, 2]]), valid=torch.tensor([[0, 0, 1, 1]]), **options)
    assert torch.equal(one.generated, padded.generated)


@pytest.mark.parametrize("decode", MODES)
def test_rows_under_a_constraint_are_their_own(decode, denoiser, head):
    """Also where one row has its last step and its mates go on."""
    table = torch.full((3, V), -1)
    table[0, 0], table[0, 1], table[1, 1], table[2, 0] = 1, 2, 2, 1
    automaton = df.constraints.automaton(ct.queries.Automaton.deterministic(table, [1, 2]))
    rows, seeds = [[MASK] * 3, [MASK] * 7, [0, MASK, 0, MASK]], [4, 5, 6]
    options = {"head": head, "decode": decode, "temperature": 1.0, "strategy": "entropy", "num_steps": 3}
    for row, seed in zip(rows, seeds, strict=True):
        mates = [[MASK] * len(row), row]
        together = df.infill(denoiser, mates, seeds=[1, seed], constraint=automaton, **options).tokens[1]
        assert torch.equal(together, alone(denoiser, row, seeds=[seed], constraint=automaton, **options))
        assert bool(automaton.accepts(together.unsqueeze(0)))


# What was broken once


class Table:
    """The same prediction whatever is visible."""

    def __init__(self, probs):
        self.log_probs = torch.tensor(probs).log()
        self.spec = df.DenoiserSpec(vocab_size=self.log_probs.shape[-1], mask_id=self.log_probs.shape[-1] - 1,
            eos_ids=(), pad_id=self.log_probs.shape[-1] - 1, forbidden_ids=(self.log_probs.shape[-1] - 1,),
            max_length=len(probs))  # fmt: skip

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        start, stop = window or (0, tokens.shape[1])
        return self.log_probs[start:stop].expand(len(tokens), -1, -1).clone()


def uniform_head(length, num_tokens):
    leaves = [ct.inputs(i, 1, ct.Categorical(num_tokens), weights=torch.full((num_tokens, 1), 1 / num_tokens)) for i in range(length)]  # fmt: skip  # noqa: E501
    return df.CoupledHead(ct.compile(ct.Circuit(ct.sum(ct.product(*leaves), num_units=1))))


def test_the_default_above_temperature_zero_keeps_the_law_of_two_coins():
    """0.6 and 0.7, two steps: 0.7 of the second coins fall on 1; with low_confidence 0.7 + 0.3 x 0.7."""
    coins, num = Table([[0.4, 0.6, 0.0], [0.3, 0.7, 0.0]]), 6000
    options = {
        "gen_length": 2,
        "num_steps": 2,
        "head": uniform_head(2, 3),
        "temperature": 1.0,
        "seeds": list(range(num)),
    }
    ones = {
        strategy: (df.generate(coins, [[]] * num, strategy=strategy, **options).generated[:, 1] == 1).double().mean()
        for strategy in (None, "random", "low_confidence")
    }
    assert float(ones[None]) == pytest.approx(0.7, abs=0.025)  # four standard deviations
    assert float(ones["random"]) == pytest.approx(0.7, abs=0.025)
    assert float(ones["low_confidence"]) == pytest.approx(0.91, abs=0.025)


@pytest.mark.parametrize("has_head", [True, False])
def test_confidence_is_not_tempered(has_head):
    coins = Table([[0.4, 0.6, 0.0]] * 8)
    head = uniform_head(8, 3) if has_head else None
    for temperature in (1.0, 0.2, 0.1, 0.01, 0.0):
        options = {"gen_length": 8, "strategy": "threshold", "threshold": 0.9, "temperature": temperature, "seeds": [1]}
        assert df.generate(coins, [[]], head=head, **options).num_calls == 8


def test_the_surest_positions_come_first_at_every_temperature():
    rising = Table([[1 - p, p, 0.0] for p in (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)])
    for temperature in (0.0, 0.01):
        out = df.generate(rising, [[]], gen_length=8, strategy="low_confidence", temperature=temperature, record=True)
        order = [int(((before == 2) & (after != 2)).nonzero()[0, 1]) for before, after in
                 itertools.pairwise(out.trajectory)]  # fmt: skip
        assert order == [7, 6, 5, 4, 3, 2, 1, 0]


def two_cities():
    one_hot = torch.eye(5)
    first = ct.inputs(0, 2, ct.Categorical(5), weights=one_hot[[0, 1]].t().contiguous())
    second = ct.inputs(1, 2, ct.Categorical(5), weights=one_hot[[2, 3]].t().contiguous())
    weights = torch.tensor([[0.5, 0.5]])
    return df.CoupledHead(ct.compile(ct.Circuit(ct.sum(ct.product(first, second), num_units=1, weights=weights))))


@pytest.mark.parametrize("decode", ["latent", "joint", "any_order"])
def test_the_circuit_does_not_fade_as_the_temperature_falls(decode):
    """San Francisco or New York, never San York; at 0 always the same city."""
    words = Table([[0.499999, 0.499999, 1e-6, 1e-6, 0.0], [1e-6, 1e-6, 0.499999, 0.499999, 0.0]])
    for temperature in (1.0, 0.05, 0.01, 0.001, 0.0):
        out = df.generate(words, [[]] * 200, gen_length=2, num_steps=1, head=two_cities(), decode=decode,
                          temperature=temperature, seeds=list(range(200)))  # fmt: skip
        assert bool((out.generated[:, 1] == out.generated[:, 0] + 2).all()), temperature
        assert len(torch.unique(out.generated, dim=0)) == (1 if temperature == 0 else 2), temperature


def test_a_row_of_any_order_commits_its_own_count():
    """Prompt 0 is sure of five words, prompt 1 of none; the last two words agree, unless the denoiser sees one."""
    leaves = [ct.inputs(i, 2, ct.Categorical(3)) for i in range(8)]
    pc = ct.compile(ct.Circuit(ct.sum(ct.product(*leaves), num_units=1)), seed=0)
    for i, leaf in enumerate(leaves):
        pc.set_weights(
            leaf, torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0]] if i < 6 else [[0.95, 0.05, 0], [0.05, 0.95, 0]]).T
        )
    pc.set_weights(pc.circuit.root, torch.tensor([[0.5, 0.5]]))

    class Differing:
        spec = df.DenoiserSpec(vocab_size=3, mask_id=2, eos_ids=(), pad_id=2, forbidden_ids=(2,), max_length=9)

        def logits(self, tokens, **_):
            logits, seen = torch.zeros(len(tokens), 8, 3), tokens[:, 7]
            logits[tokens[:, 0] == 0, :5, 0] = 9.0
            logits[seen == 0, 7, 1] = 9.0
            logits[seen == 1, 7, 0] = 9.0
            logits[:, 5, 0] += 0.4
            logits[:, 6, 0] += 0.2
            return logits

    for rows in ([[0]], [[0], [1]]):
        out = df.generate(
            Differing(), rows, gen_length=8, num_steps=4, head=df.CoupledHead(pc), decode="any_order",
            strategy="threshold", threshold=0.8,
        )  # fmt: skip
        assert out.generated[0].tolist() == [0] * 7 + [1]


def test_a_threshold_on_latents_is_one_on_marginals():
    """Given the latents all is certain; but a fair choice of two cities is not above 0.9."""
    words = Table([[0.5, 0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5, 0.0]])
    for decode in ("latent", "marginal", "joint"):
        out = df.generate(
            words, [[]], gen_length=2, head=two_cities(), decode=decode, strategy="threshold", temperature=1.0
        )
        assert out.num_calls == 2, decode


@pytest.mark.parametrize("has_head", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_logits_are_refused(value, has_head):
    broken = Table([[0.5, 0.5, 0.0]] * 2)
    broken.log_probs = torch.full((2, 3), value)
    with pytest.raises(df.errors.ArgumentError, match="denoiser: Table: expected"):
        df.generate(broken, [[]], gen_length=2, head=uniform_head(2, 3) if has_head else None)
    broken.log_probs = torch.zeros(2, 5)  # more than the vocabulary
    with pytest.raises(df.errors.ArgumentError, match="denoiser: expected logits"):
        df.generate(broken, [[]], gen_length=2, head=uniform_head(2, 3) if has_head else None)


def test_the_circuit_is_used_by_default_and_the_output_says_so(denoiser, head):
    out = df.generate(denoiser, [[0], []], gen_length=8, num_steps=2, head=head)
    assert out.num_windows.tolist() == out.num_coupled.tolist() == [2, 2]
    resting = df.generate(denoiser, [[0], []], gen_length=8, num_steps=2, head=head, activation_threshold=0.7)
    assert resting.num_coupled.tolist() == [0, 0]


def test_a_ratio_at_the_threshold_is_not_below_it(denoiser):
    """14 of 25 masked is not below 0.56, though 0.56 x 25 is above 14 in floating point."""
    pc = ct.compile(ct.structures.hmm(25, 1, V), seed=0)
    head = df.CoupledHead(pc, activation_threshold=0.56)
    canvas = torch.tensor([[MASK] * 14 + [0] * 11, [MASK] * 13 + [0] * 12])
    out = df.infill(denoiser, canvas, head=head, num_steps=1)
    assert out.num_coupled.tolist() == [0, 1]
