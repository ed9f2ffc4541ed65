"""Decoding: what is committed, in which order, and that every mode and strategy ends with a full text."""

import typing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuits as ct
from diffusion import CoupledHead, DenoiserSpec, generate, infill
from diffusion.decoding.commit import SCORES, Ranking
from diffusion.decoding.config import MODES, Strategy
from diffusion.errors import ArgumentError
from diffusion.prediction import Prediction

V, L, MASK, PAD, EOS = 7, 4, 6, 5, 4
STRATEGIES = typing.get_args(Strategy)


class TableDenoiser:
    """Logits that depend on the position and on how many tokens are visible, and a record of the calls."""

    def __init__(self, table):
        self.table = table
        self.calls = []
        self.spec = DenoiserSpec(
            vocab_size=V, mask_id=MASK, eos_ids=(EOS,), pad_id=PAD, forbidden_ids=(MASK, PAD), max_length=20
        )

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        start, stop = window or (0, tokens.shape[1])
        self.calls.append((tokens.clone(), valid.clone(), window))
        return self.table[start:stop].expand(len(tokens), -1, -1).clone()


@pytest.fixture
def denoiser(generator):
    table = torch.randn(20, V, generator=generator)
    table[:, EOS] = -50.0
    return TableDenoiser(table)


@pytest.fixture
def head():
    return CoupledHead(ct.compile(ct.structures.hmm(L, 3, V), seed=0), activation_threshold=1.0)


def seeded():
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("decode", MODES)
def test_every_mode_and_strategy_fills_the_text_and_repeats_with_its_seed(decode, strategy, denoiser, head):
    options = {"gen_length": 8, "block_length": L, "num_steps": 4, "head": head, "decode": decode, "strategy": strategy}
    prompt = [[0, 1, 2], [3], []]
    out = generate(denoiser, prompt, **options, generator=seeded())
    assert out.tokens.shape == (3, 11)
    assert out.prompt_length == 3
    assert not torch.isin(out.generated, torch.tensor([MASK, PAD])).any()
    assert out.tokens[0, :3].tolist() == [0, 1, 2]
    assert out.tokens[1, :3].tolist() == [PAD, PAD, 3]
    assert out.valid.sum(1).tolist() == [11, 9, 8]
    again = generate(denoiser, prompt, **options, generator=seeded())
    assert torch.equal(out.tokens, again.tokens)


@pytest.mark.parametrize("decode", MODES)
def test_a_trajectory_only_ever_fills_masks(decode, denoiser, head):
    out = generate(
        denoiser, [[0, 1]] * 2, gen_length=8, block_length=L, num_steps=4, head=head, decode=decode, record=True,
        generator=seeded(),
    )  # fmt: skip
    assert out.num_calls == 4 == len(denoiser.calls)
    assert len(out.trajectory) == 5
    assert (out.trajectory[0][:, 2:] == MASK).all()
    for before, after in zip(out.trajectory, out.trajectory[1:], strict=False):
        assert torch.equal(before[before != MASK], after[before != MASK])
        assert ((before == MASK) & (after != MASK)).sum(1).tolist() == [2, 2]
    assert torch.equal(out.trajectory[-1], out.tokens)
    first_block = [window for _, _, window in denoiser.calls]
    assert first_block == [(2, 6), (2, 6), (6, 10), (6, 10)]


def test_uneven_steps_commit_the_larger_share_first(denoiser):
    out = generate(denoiser, [[0]], gen_length=4, block_length=4, num_steps=3, record=True)
    assert [(step == MASK).sum().item() for step in out.trajectory] == [4, 2, 1, 0]


def test_without_a_head_greedy_decoding_takes_the_best_allowed_token_everywhere(denoiser):
    out = generate(denoiser, [[0, 1]], gen_length=8, block_length=L, num_steps=2, temperature=0.0)
    allowed = denoiser.table[2:10].clone()
    allowed[:, [MASK, PAD]] = -torch.inf
    assert torch.equal(out.generated[0], allowed.argmax(-1))


def test_a_uniform_circuit_changes_nothing_when_greedy(denoiser):
    leaves = [ct.inputs(i, 2, ct.Categorical(V), weights=torch.full((V, 2), 1 / V)) for i in range(L)]
    head = CoupledHead(ct.compile(ct.Circuit(ct.sum(ct.product(*leaves), num_units=1)), seed=0), 1.0, temperature=0.0)
    plain = generate(denoiser, [[0]], gen_length=8, block_length=L, num_steps=4, temperature=0.0)
    for decode in MODES:
        coupled = generate(denoiser, [[0]], gen_length=8, block_length=L, num_steps=4, head=head, decode=decode)
        assert torch.equal(coupled.tokens, plain.tokens), decode


def test_joint_decoding_in_one_step_draws_from_the_coupled_distribution(denoiser, head):
    num_texts = 4000
    out = generate(
        denoiser, torch.zeros(num_texts, 0, dtype=torch.int64), gen_length=L, block_length=L, num_steps=1, head=head,
        decode="joint", temperature=1.0, stop_at_eos=False, generator=seeded(),
    )  # fmt: skip
    logits = denoiser.table[:L].clone()
    logits[:, [MASK, PAD]] = -torch.inf
    dist = head.distribution(logits.unsqueeze(0), torch.full((1, L), MASK), torch.ones(1, L, dtype=torch.bool))
    pairs = torch.bincount(out.generated[:, 0] * V + out.generated[:, 1], minlength=V * V) / num_texts
    samples = dist.sample((40_000,), generator=seeded())[:, 0]
    expected = torch.bincount(samples[:, 0] * V + samples[:, 1], minlength=V * V) / len(samples)
    assert (pairs - expected).abs().max() < 0.03


def test_the_circuit_rests_above_its_threshold(denoiser, head):
    resting = CoupledHead(head.pc, activation_threshold=0.6)
    options = {"gen_length": L, "block_length": L, "decode": "joint", "stop_at_eos": False, "temperature": 1.0}
    first_only = generate(denoiser, [[0]] * 8, num_steps=1, head=resting, generator=seeded(), **options)
    plain = generate(denoiser, [[0]] * 8, num_steps=1, generator=seeded(), **options)
    assert torch.equal(first_only.tokens, plain.tokens)  # all masked: ratio 1 is not below 0.6
    assert first_only.num_windows.tolist() == [1] * 8
    assert first_only.num_coupled.tolist() == [0] * 8
    coupled = generate(denoiser, [[0]] * 8, num_steps=1, head=head, generator=seeded(), **options)
    assert coupled.num_coupled.tolist() == [1] * 8
    assert not torch.equal(coupled.tokens, plain.tokens)


def test_rows_are_coupled_by_their_own_mask_ratio(head, denoiser):
    resting = CoupledHead(head.pc, activation_threshold=0.6)
    canvas = torch.tensor([[MASK] * 4, [MASK, MASK, 0, 1]])
    options = {"num_steps": 1, "decode": "marginal"}
    both = infill(denoiser, canvas, head=resting, **options)
    assert both.num_coupled.tolist() == [0, 1]
    plain, coupled = infill(denoiser, canvas, **options), infill(denoiser, canvas, head=head, **options)
    assert torch.equal(both.tokens, torch.stack([plain.tokens[0], coupled.tokens[1]]))


def test_any_order_with_temperature_zero_follows_the_conditionals(head, denoiser):
    out = generate(
        denoiser, [[]], gen_length=L, num_steps=1, head=head, decode="any_order", strategy="top_prob", stop_at_eos=False
    )
    logits = denoiser.table[:L].unsqueeze(0).clone()
    logits[..., [MASK, PAD]] = -torch.inf
    expected, still = torch.zeros(1, L, dtype=torch.int64), torch.ones(1, L, dtype=torch.bool)
    for _ in range(L):
        probs = head.distribution(logits, expected, still).marginal_probs.detach()
        best = probs.amax(-1).masked_fill(~still, -1).argmax(-1).item()
        expected[0, best] = probs[0, best].argmax()
        still[0, best] = False
    assert torch.equal(out.generated, expected)


def test_the_threshold_strategy_needs_fewer_calls_when_sure(denoiser):
    denoiser.table = torch.full((20, V), -10.0)
    denoiser.table[:, 1] = 10.0
    out = generate(denoiser, [[0]], gen_length=4, block_length=4, num_steps=4, strategy="threshold", threshold=0.9)
    assert out.num_calls == 1
    unsure = generate(denoiser, [[0]], gen_length=4, block_length=4, num_steps=4, strategy="threshold", threshold=1.0)
    assert unsure.num_calls == 4


def test_a_text_ends_at_its_end_of_text_token(denoiser):
    denoiser.table[:, EOS] = torch.where(torch.arange(20) == 3, 50.0, -50.0)
    out = generate(denoiser, [[0, 1], [0, 1]], gen_length=8, block_length=4, num_steps=4, temperature=0.0)
    assert out.num_calls == 1  # nothing before the end is masked any more
    assert (out.generated[:, 1] == EOS).all()
    assert (out.generated[:, 2:] == PAD).all()
    assert not out.valid[:, 4:].any()
    whole = generate(denoiser, [[0, 1]], gen_length=8, block_length=4, num_steps=4, temperature=0.0, stop_at_eos=False)
    assert not (whole.generated == PAD).any()


@given(st.data())
def test_exactly_the_best_masked_positions_are_committed(data):
    scores = torch.tensor(data.draw(st.lists(st.floats(0, 1), min_size=6, max_size=6)))[None]
    masked = torch.tensor(data.draw(st.lists(st.booleans(), min_size=6, max_size=6)))[None]
    count = data.draw(st.integers(0, int(masked.sum())))
    chosen = Ranking(scores, masked, torch.tensor([count]), None).best(torch.tensor([count]))
    assert chosen.sum() == count
    assert not (chosen & ~masked).any()
    left = masked & ~chosen
    if 0 < count < int(masked.sum()):
        assert scores[chosen].min() >= scores[left].max()


def test_reliability_is_what_its_name_says():
    probs = torch.tensor([[[0.5, 0.3, 0.2], [0.0, 1.0, 0.0]]])
    tokens = torch.tensor([[1, 1]])
    beliefs = Prediction(log_q=probs.log(), vocab_size=3)
    values = {name: score(beliefs, tokens, ct.RowGenerators(torch.tensor([0])))[0] for name, score in SCORES.items()}
    torch.testing.assert_close(values["low_confidence"], torch.tensor([0.3, 1.0]))
    torch.testing.assert_close(values["threshold"], torch.tensor([0.3, 1.0]))
    torch.testing.assert_close(values["top_prob"], torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(values["margin"], torch.tensor([0.2, 1.0]))
    torch.testing.assert_close(values["entropy"], torch.tensor([-1.0296530, 0.0]))
    assert set(values) == set(STRATEGIES)
    assert ((values["random"] >= 0) & (values["random"] < 1)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 1}, "num_steps: expected at least one for each of the 2 blocks, got 1"),
        ({"gen_length": 0}, "gen_length: expected an integer >= 1"),
        ({"block_length": 8}, "window_length: expected windows of at most the circuit's 4 positions, got 8"),
        ({"strategy": "best"}, "strategy: expected one of"),
        ({"decode": "magic"}, "decode: expected one of"),
        ({"temperature": -1.0}, "temperature: expected 0, or a number"),
        ({"temperature": 1e-40}, "temperature: expected 0, or a number"),
        ({"temperature": float("nan")}, "temperature: expected 0, or a number"),
        ({"temprature": 1.0}, "temprature: no such option"),
        ({"prompt": [[0] * 13]}, "prompt: expected at most the denoiser's 20 positions in all, got 21"),
        ({"prompt": "text"}, "prompt: expected int64"),
        ({"prompt": [[1.7, 2.2]]}, "prompt: expected int64 .* got torch.float32"),
        ({"seeds": [1, 2]}, "seeds: expected 1 integers of 64 bits"),
        ({"prompt": []}, "prompt: expected"),
        ({"prompt": [[99]]}, "prompt: expected token ids from 0 to 6, got 99"),
    ],
)
def test_wrong_arguments_are_named(change, message, denoiser, head):
    arguments = {"prompt": [[0]], "gen_length": 8, "block_length": L, "num_steps": 2, "head": head, **change}
    with pytest.raises(ArgumentError, match=message):
        generate(denoiser, **arguments)
