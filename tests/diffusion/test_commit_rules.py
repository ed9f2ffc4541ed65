"""Which positions a step commits, and in which windows: rules against brute force."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuits as ct
import diffusion as df
from diffusion.decoding import rounds
from diffusion.decoding.commit import Ranking, commit
from diffusion.decoding.plans import Look
from diffusion.decoding.proposers import dependence_of
from diffusion.decoding.rounds import Outlook
from diffusion.prediction import Prediction

pytestmark = pytest.mark.usefixtures("one_thread")

N = 9


# Windows


def fewest(wanted, length):
    """The least number of intervals of this length that cover some positions, by trying all."""
    for count in itertools.count():
        for starts in itertools.combinations(range(N), count):
            if set(wanted) <= {i for start in starts for i in range(start, start + length)}:
                return count


@given(
    wanted=st.lists(st.lists(st.booleans(), min_size=N, max_size=N), min_size=1, max_size=3),
    pads=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=3, max_size=3),
    length=st.integers(1, 4),
    longest=st.integers(1, 5),
)
def test_windows_are_disjoint_and_as_few_as_can_be(wanted, pads, length, longest):
    wanted = torch.tensor(wanted)
    valid = torch.ones_like(wanted)
    for row, (left, right) in enumerate(pads[: len(wanted)]):
        valid[row, :left], valid[row, N - right :] = False, False
    wanted &= valid
    look = Look((0, N), wanted, wanted.sum(1), torch.zeros(len(wanted), dtype=torch.bool))
    windows = df.DynamicWindows(length=length).cover(look, wanted, valid, longest)
    assert bool((windows.lengths <= min(length, longest)).all())
    for row in range(len(wanted)):
        of_row = windows.rows == row
        pairs = zip(windows.starts[of_row].tolist(), windows.lengths[of_row].tolist(), strict=True)
        covered = [i for start, long in pairs for i in range(start, start + long)]
        assert len(covered) == len(set(covered))  # disjoint
        assert all(valid[row, i] for i in covered)
        places = wanted[row].nonzero().flatten().tolist()
        assert set(places) <= set(covered)
        assert int(of_row.sum()) == fewest(places, min(length, longest))


# Rules


@given(data=st.data())
def test_the_entropy_bound_is_the_rule_of_the_sampler(data):
    """The largest set of the most certain ones whose entropies, but for the largest, sum to at most the bound."""
    seed, bound = data.draw(st.integers(0, 999)), data.draw(st.sampled_from([0.0, 0.3, 1.0, 2.0]))
    generator = torch.Generator().manual_seed(seed)
    log_q = (3 * torch.randn(1, 6, 4, generator=generator, dtype=torch.float64)).log_softmax(-1)
    candidates = torch.rand(1, 6, generator=generator) < 0.7
    least = min(1, int(candidates.sum()))
    beliefs = Prediction(log_q=log_q, vocab_size=4)
    entropy = -(log_q.exp() * log_q).sum(-1)
    ranking = Ranking(-entropy, candidates, torch.tensor([least]), lambda: beliefs)
    config = df.DecodingConfig(strategy="entropy_bound", entropy_bound=bound)
    found = set(commit(ranking, config)[0].nonzero().flatten().tolist())
    places = candidates[0].nonzero().flatten().tolist()
    sets = [
        chosen
        for size in range(least, len(places) + 1)
        for chosen in itertools.combinations(places, size)
        if size == least or sum(sorted(entropy[0, list(chosen)].tolist())[:-1]) <= bound
    ]
    largest = max(map(len, sets))
    best = min((chosen for chosen in sets if len(chosen) == largest), key=lambda c: float(entropy[0, list(c)].sum()))
    assert found == set(best)


def pairs_head():
    """Words 0 and 1 are equal fair coins, word 2 a fair coin of its own, word 3 nearly certain."""
    eye, fair, sure = (
        torch.eye(3)[:2].t(),
        torch.tensor([[0.5, 0.5, 0.0]] * 2).t(),
        torch.tensor([[0.99, 0.01, 0.0]] * 2),
    )
    tables = [eye, eye, fair, sure.t()]
    leaves = [ct.inputs(i, 2, ct.Categorical(3), weights=table.contiguous()) for i, table in enumerate(tables)]
    root = ct.sum(ct.product(*leaves), num_units=1, weights=torch.tensor([[0.5, 0.5]]))
    return df.CoupledHead(ct.compile(ct.Circuit(root), dtype=torch.float64))


class Uniform:
    spec = df.DenoiserSpec(vocab_size=3, mask_id=2, eos_ids=(), pad_id=2, forbidden_ids=(2,), max_length=9)

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        start, stop = window or (0, tokens.shape[1])
        return torch.zeros(len(tokens), stop - start, 3)


def test_coupled_positions_go_together_and_independent_ones_wait():
    """Two equal coins have log 2 nats together, as each alone; two fair coins of their own have 2 log 2."""
    options = {"gen_length": 4, "strategy": "joint_entropy", "entropy_bound": 0.8, "temperature": 1.0, "seeds": [1]}
    out = df.generate(Uniform(), [[]], head=pairs_head(), record=True, **options)
    left = [set((step[0] == 2).nonzero().flatten().tolist()) for step in out.trajectory]
    assert left == [{0, 1, 2, 3}, {2}, set()]
    assert out.generated[0, 0] == out.generated[0, 1]
    loose = df.generate(Uniform(), [[]], head=pairs_head(), **{**options, "entropy_bound": 1.5})
    assert loose.num_calls == 1
    by_marginals = df.generate(
        Uniform(), [[]], head=pairs_head(), record=True, **{**options, "strategy": "entropy_bound"}
    )
    assert int((by_marginals.trajectory[1] != 2).sum()) == 3  # 0.056 + log 2 but for the largest


@pytest.mark.parametrize("num_candidates", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_dependence_is_the_mutual_information_or_less(num_candidates, seed):
    generator = torch.Generator().manual_seed(seed)
    tables = df.testing.worlds.hidden_markov(3, num_states=2, seed=seed)  # three words and the mask
    logits = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    logits[..., 3] = -torch.inf
    tokens, masked = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[True] * 3, [True, False, True]])
    dist = df.CoupledDistribution(tables.circuit(dtype=torch.float64), logits, tokens, masked)
    texts = torch.cartesian_prod(*[torch.arange(3)] * 3)
    joint = dist.log_prob(texts.unsqueeze(1).expand(-1, 2, -1)).exp().t().reshape(2, 3, 3, 3)
    found = dependence_of(dist, num_candidates)
    for i, j in itertools.combinations(range(3), 2):
        (other,) = {0, 1, 2} - {i, j}
        pair = joint.sum(other + 1)
        apart = pair.sum(2, keepdim=True) * pair.sum(1, keepdim=True)
        exact = torch.where(pair > 0, pair * (pair / apart).log(), 0.0).sum((1, 2))
        torch.testing.assert_close(found[:, i, j], found[:, j, i])
        if num_candidates >= 4:
            torch.testing.assert_close(found[:, i, j], exact, rtol=1e-6, atol=1e-9)
        assert bool((found[:, i, j] <= exact + 1e-9).all())


# Masking again


@pytest.mark.parametrize("plan", [df.Anywhere(4), df.Blocks(8, 4), df.DynamicWindows(4, 3)], ids=str)
def test_masking_again_takes_every_step_and_leaves_no_mask(plan):
    out = df.generate(Uniform(), [[], [0]], gen_length=8, plan=plan, remask=0.5, temperature=1.0, record=True)
    assert out.num_calls == 4
    assert not bool((out.generated == 2).any())
    written = [int((step[0, 1:] != 2).sum()) for step in out.trajectory]
    # of 8 left 2 are written, 1 taken back; of 7 left 3, half of 4; of 6 left 3, half of 5; the rest
    assert written == [0, 1, 2, 3, 8]


def test_the_least_certain_is_masked_again():
    class Sure(Uniform):
        def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
            return torch.tensor([0.9, 0.6, 0.7, 0.8]).unsqueeze(1).mul(torch.tensor([1.0, 0.0, 0.0])).add(
                torch.tensor([0.0, 1.0, 0.0]) * torch.tensor([[0.1], [0.4], [0.3], [0.2]])).log().expand(
                len(tokens), 4, 3).clone()  # fmt: skip

    out = df.generate(
        Sure(), [[]], gen_length=4, num_steps=2, block_length=4, remask=0.5, strategy="entropy", record=True
    )
    assert out.trajectory[1][0].tolist() == [0, 2, 2, 2]  # of the two most certain, 0.9 and 0.8, the latter
    assert out.trajectory[2][0].tolist() == [0, 0, 0, 0]


# What is refused


READER = Uniform()
HEAD = pairs_head()
GENERATE = [
    ({"seeds": 1.5}, "seeds: expected 1 integers"),
    ({"seeds": object()}, "seeds: expected 1 integers"),
    ({"seeds": "a"}, "seeds: expected 1 integers"),
    ({"seeds": [1], "generator": torch.Generator()}, "seeds: give either seeds or generator"),
    ({"generator": 3}, "generator: expected a torch.Generator"),
    ({"plan": "blocks"}, r"plan: expected df.Blocks\(...\), .* got str"),
    ({"plan": df.Blocks}, r"plan: expected df.Blocks\(...\), .* got Blocks"),
    ({"plan": df.Blocks(4), "num_steps": 2}, "num_steps: a plan has its own"),
    ({"plan": df.Blocks(4), "block_length": 2}, "block_length: a plan has its own"),
    ({"config": {}}, "config: expected df.DecodingConfig"),
    ({"on_step": 3}, "on_step: expected a function"),
    ({"head": "x"}, "head: expected df.CoupledHead"),
    ({"head": HEAD.pc}, "head: expected df.CoupledHead"),
    ({"constraint": "a*"}, "constraint: expected what df.constraints returns"),
    ({"gen_length": True}, "gen_length: expected an integer"),
    ({"valid": [[1]]}, "valid: expected bool"),
    ({"valid": torch.ones(1, 2)}, "valid: expected bool"),
    ({"threshold": 2}, "threshold: expected a probability"),
    ({"entropy_bound": -1}, "entropy_bound: expected"),
    ({"remask": 1.0}, "remask: expected a share below 1"),
    ({"activation_threshold": -1}, "activation_threshold: expected"),
    ({"denoiser": None}, "denoiser: expected one with spec and logits"),
]


@pytest.mark.parametrize(("change", "message"), GENERATE, ids=lambda value: None if isinstance(value, dict) else value)
def test_wrong_arguments_of_generate_are_named(change, message):
    with pytest.raises(df.errors.ArgumentError, match=message):
        df.generate(**{"denoiser": READER, "prompt": [[0]], "gen_length": 4, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masked": [[True]]}, "masked: expected bool"),
        ({"masked": torch.zeros(1, 2, dtype=torch.bool)}, "masked: expected True at every mask token"),
        ({"window_length": 0, "head": HEAD}, "window_length: expected an integer"),
        ({"window_length": 0}, "window_length: expected an integer"),
        ({"plan": df.Anywhere(), "num_steps": 1}, "num_steps: a plan has its own"),
        ({"plan": df.Anywhere(), "window_length": 1}, "window_length: a plan has its own"),
        ({"num_steps": -1}, "num_steps: expected an integer"),
        ({"tokens": []}, "tokens: expected"),
        ({"tokens": torch.zeros(0, 3, dtype=torch.int64)}, "tokens: expected"),
    ],
)
def test_wrong_arguments_of_infill_are_named(change, message):
    with pytest.raises(df.errors.ArgumentError, match=message):
        df.infill(**{"denoiser": READER, "tokens": [[0, 2]], **change})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: df.Blocks(0), "block_length: expected an integer"),
        (lambda: df.Blocks(2, 0), "num_steps: expected an integer"),
        (lambda: df.Anywhere(1.5), "num_steps: expected an integer"),
        (lambda: df.DynamicWindows(length=0), "window_length: expected an integer"),
        (lambda: df.DecodingConfig(decode="x"), "decode: expected one of"),
        (lambda: df.DecodingConfig(decode=[]), "decode: expected one of"),
        (lambda: df.DecodingConfig(remask=-1), "remask: expected a share"),
        (lambda: df.DecodingConfig(temperature=float("inf")), "temperature: expected 0, or"),
        (lambda: df.DecodingConfig(temperature=True), "temperature: expected 0, or"),
        (lambda: df.DecodingConfig().changed(tau=1), "tau: expected one of"),
    ],
)
def test_wrong_options_and_plans_are_named(make, message):
    with pytest.raises(df.errors.ArgumentError, match=message):
        make()


def test_an_empty_canvas_has_nothing_to_fill():
    assert df.infill(READER, [[]]).tokens.shape == (1, 0)
    assert df.infill(READER, [[0, 1]]).num_calls == 0


# One position after the other


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("strategy", ["low_confidence", "top_prob", "margin", "entropy", "random"])
@pytest.mark.parametrize("top_k", [None, 9])
def test_looking_at_few_positions_chooses_as_looking_at_all(monkeypatch, top_k, strategy, temperature):
    """Logits of several scales: beliefs that hardly move, and beliefs that move a lot."""
    head = df.CoupledHead(ct.compile(ct.structures.hmm(8, 6, 12), seed=0), top_k=top_k)
    looks = []
    original = Outlook._look
    monkeypatch.setattr(Outlook, "_look", lambda self, dist, where, *rest: looks.append(int(where.sum())) or original(
        self, dist, where, *rest
    ))  # fmt: skip
    for scale in (0.3, 2.0, 6.0):
        logits = scale * torch.randn(1, 8, 12, generator=torch.Generator().manual_seed(1))
        texts, counts = [], []
        for cheap in (0, 1 << 30):
            monkeypatch.setattr(rounds, "_CHEAP", cheap)
            looks.clear()
            out = df.generate(
                Saying(logits), [[]] * 20, gen_length=8, num_steps=2, head=head, decode="any_order", strategy=strategy,
                temperature=temperature, seeds=torch.arange(20), stop_at_eos=False,
            )  # fmt: skip
            texts.append(out.tokens)
            counts.append(sum(looks))
        assert torch.equal(*texts)
        assert counts[0] < counts[1]


class Saying:
    """A denoiser that says the same whatever it sees."""

    spec = df.DenoiserSpec(vocab_size=12, mask_id=11, eos_ids=(), pad_id=0, forbidden_ids=(11,), max_length=8)

    def __init__(self, said):
        self.said = said

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        start, stop = window or (0, tokens.shape[1])
        return self.said[:, start:stop].expand(len(tokens), -1, -1)


def test_the_weights_are_read_once_a_call(monkeypatch):
    head, reads = df.CoupledHead(ct.compile(ct.structures.hmm(8, 3, 12), seed=0)), []
    original = ct.CompiledCircuit.weights
    monkeypatch.setattr(ct.CompiledCircuit, "weights", lambda pc, **given: reads.append(pc) or original(pc, **given))
    for decode in ("latent", "marginal", "any_order", "joint"):
        reads.clear()
        df.generate(Saying(torch.zeros(1, 8, 12)), [[]], gen_length=8, num_steps=4, head=head, decode=decode)
        assert len(reads) == 1
