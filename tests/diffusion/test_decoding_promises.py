"""What decoding promises: a row's text is its own; constraints hold; holes anywhere are filled."""

import itertools
import typing

import pytest
import torch

import circuits as ct
import diffusion as df
from diffusion.decoding.config import DecodeMode, Strategy

MODES, STRATEGIES = typing.get_args(DecodeMode), typing.get_args(Strategy)
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
    first = (MODES.index(decode) + list(PLANS).index(plan)) % 4  # every strategy with every plan and every mode
    for strategy in STRATEGIES[first::4]:
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
    for strategy, used in itertools.product(("low_confidence", "entropy", "threshold"), (head, None)):
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
