"""Predictions: what a denoiser says is checked, normalised and listed once, and is what numpy makes of its logits."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats
from torch.utils._python_dispatch import TorchDispatchMode

import circuits as ct
import diffusion
from diffusion import Anywhere, CoupledDistribution, CoupledHead, DecodingConfig, DenoiserSpec, Prediction, generate
from diffusion.decoding.prompts import holed_canvas
from diffusion.decoding.step import decode_step
from diffusion.errors import ArgumentError

V, MASK, PAD = 6, 5, 4
SPEC = DenoiserSpec(vocab_size=V, mask_id=MASK, eos_ids=(), pad_id=PAD, forbidden_ids=(PAD, MASK), max_length=16)


class Table:
    """A denoiser with one row of logits per position, that keeps the options of its last call."""

    spec = SPEC

    def __init__(self, table, **change):
        self.table = table
        self.spec = DenoiserSpec(**{**vars(SPEC), **change})

    def logits(self, tokens, **options):
        self.options = options
        start, stop = options.get("window") or (0, tokens.shape[1])
        return self.table[start:stop].expand(len(tokens), -1, -1)


class WithFeatures(Table):
    def logits_and_features(self, tokens, **options):
        logits = self.logits(tokens, **options)
        return logits, torch.arange(logits.shape[1] * 2.0).reshape(1, -1, 2).expand(len(tokens), -1, -1)


@pytest.fixture
def table(generator):
    return torch.randn(8, V, generator=generator)


def canvas(rows=2, length=8):
    return torch.full((rows, length), MASK)


def log_softmax(logits):
    """By scipy in float64, with the forbidden tokens ruled out."""
    logits = logits.detach().double().numpy().copy()
    logits[..., [PAD, MASK]] = -np.inf
    return torch.from_numpy(special.log_softmax(logits, axis=-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_it_is_the_log_softmax_of_the_allowed_logits(dtype, table):
    told = Table(table.to(dtype))
    said = Prediction.ask(told, canvas(), window=(2, 6))
    assert said.log_q.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (said.log_q[..., [PAD, MASK]] == -torch.inf).all()
    torch.testing.assert_close(said.log_q[1].double(), log_softmax(table.to(dtype)[2:6]), rtol=1e-6, atol=1e-6)
    assert told.options == {"window": (2, 6)}
    torch.testing.assert_close(told.table, table.to(dtype))  # the denoiser's own tensor is left as it is


def test_options_reach_the_denoiser_and_its_features_come_along(table):
    told = WithFeatures(table)
    valid, t = torch.ones(2, 8, dtype=torch.bool), torch.tensor([0.5, 1.0])
    said = Prediction.ask(told, canvas(), valid=valid, t=t, cache="kept", features=True)
    assert told.options == {"valid": valid, "t": t, "cache": "kept"}
    assert said.features.shape == (2, 8, 2)
    assert torch.equal(said.t, t)
    assert torch.equal(said.rows(torch.tensor([1])).t, t[1:])
    assert torch.equal(said.at(slice(3, 5)).features, said.features[:, 3:5])
    with pytest.raises(ArgumentError, match="denoiser: expected one with features, got Table"):
        Prediction.ask(Table(table), canvas(), features=True)


@given(top_k=st.integers(1, V), seed=st.integers(0, 1000))
def test_a_list_holds_the_best_tokens_with_their_log_probabilities_among_all(top_k, seed):
    table = torch.randn(8, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    include = torch.randint(V - 2, (2, 8), generator=torch.Generator().manual_seed(seed))
    exact = log_softmax(table).expand(2, -1, -1)
    for extra in (None, include):
        said = Prediction.ask(Table(table), canvas(), top_k=top_k, include=extra)
        order = exact.argsort(-1, descending=True)[..., :top_k]
        kept = torch.zeros(2, 8, V, dtype=torch.bool).scatter_(2, order, True)
        if extra is not None:
            kept.scatter_(2, include.unsqueeze(-1), True)
        torch.testing.assert_close(said.dense(), exact.masked_fill(~kept, -torch.inf))
        assert said.num_listed == (V if top_k == V else top_k + (extra is not None))
        torch.testing.assert_close(Prediction.ask(Table(table), canvas()).listed(top_k, extra).dense(), said.dense())


@given(data=st.data())
def test_what_is_read_of_a_list_is_what_is_read_of_all(data):
    table = torch.randn(8, V, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    listed = Prediction.ask(Table(table), canvas(), top_k=3)
    dense = Prediction(log_q=listed.dense(), vocab_size=V)
    tokens = torch.tensor(data.draw(st.lists(st.integers(0, V - 1), min_size=16, max_size=16))).reshape(2, 8)
    observed = torch.tensor(data.draw(st.lists(st.booleans(), min_size=16, max_size=16))).reshape(2, 8)
    positions = torch.tensor(data.draw(st.lists(st.integers(0, 7), min_size=4, max_size=4))).reshape(2, 2)
    torch.testing.assert_close(listed.log_prob_of(tokens), dense.log_q.gather(2, tokens.unsqueeze(-1)).squeeze(-1))
    assert torch.equal(listed.best(), dense.best())
    sure = listed.with_observed(tokens, observed)
    torch.testing.assert_close(sure.dense(), dense.with_observed(tokens, observed).log_q)
    assert (sure.log_prob_of(tokens)[observed] == 0).all()
    torch.testing.assert_close(sure.dense()[~observed], dense.log_q[~observed])
    for at in (slice(2, 5), positions[0]):
        torch.testing.assert_close(listed.at(at).dense(), dense.log_q[:, at])
    torch.testing.assert_close(listed.at(positions).dense()[1], dense.log_q[1, positions[1]])
    torch.testing.assert_close(listed.rows(slice(1, 2)).dense(), dense.log_q[1:])


@pytest.mark.parametrize("top_k", [None, 3])
def test_temperatures_go_down_to_the_best_token_without_a_jump(top_k, table):
    said = Prediction.ask(Table(table), canvas(), top_k=top_k)
    for tau in (0.5, 2.0):
        expected = torch.softmax(said.dense() / tau, -1)
        torch.testing.assert_close(said.tempered(tau).dense().exp(), expected)
    greedy = said.tempered(0.0)
    for tau in (1e-6, 1e-37):
        torch.testing.assert_close(said.tempered(tau).dense().exp(), greedy.dense().exp())
    assert torch.equal(greedy.best(), said.best())
    assert (greedy.log_prob_of(said.best()) == 0).all()


@pytest.mark.parametrize("top_k", [None, 3])
def test_draws_follow_the_prediction(top_k, table, generator):
    said = Prediction.ask(Table(table), canvas(1, 1).expand(20_000, 1), top_k=top_k).normalised()
    counts = torch.bincount(said.draw(generator).flatten(), minlength=V)
    probs = said.dense()[0, 0].double().exp()
    probs = probs / probs.sum()
    assert counts[probs == 0].sum() == 0
    assert stats.chisquare(counts[probs > 0], probs[probs > 0] * 20_000).pvalue > 1e-3


def test_a_hook_changes_the_logits_but_not_what_is_forbidden(table):
    said = Prediction.ask(
        Table(table), canvas(), logits_hook=lambda logits: logits.index_fill(-1, torch.tensor([0]), 9)
    )
    assert (said.best() == 0).all()
    open_all = Prediction.ask(Table(table), canvas(), logits_hook=torch.zeros_like)
    torch.testing.assert_close(open_all.log_q[..., : V - 2].exp(), torch.full((2, 8, V - 2), 1 / (V - 2)))
    with pytest.raises(ArgumentError, match=r"logits_hook: expected logits \(2, 8, 6\) back"):
        Prediction.ask(Table(table), canvas(), logits_hook=lambda logits: logits[:1])


@pytest.mark.parametrize("top_k", [None, 2])
def test_it_is_differentiable_in_the_logits(top_k, table):
    table = table.double().requires_grad_()

    def probability(table):
        return Prediction.ask(Table(table), canvas(1), top_k=top_k).log_q[..., :2].exp()

    assert torch.autograd.gradcheck(probability, (table,))


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize(("value", "got"), [(torch.nan, "NaN"), (torch.inf, r"\+inf"), (-torch.inf, "-inf for all")])
def test_broken_logits_are_named_where_they_matter_and_nowhere_else(value, got, top_k, table):
    table[5] = value
    tokens, valid = canvas(), torch.ones(2, 8, dtype=torch.bool)
    message = f"denoiser: Table: expected rows .* got {got} at position 5 of sequence 0"
    with pytest.raises(ArgumentError, match=message):
        Prediction.ask(Table(table), tokens, window=(4, 8), top_k=top_k)
    with pytest.raises(ArgumentError, match="position 5 of sequence 1"):
        Prediction.ask(Table(table), tokens.index_put((torch.tensor(0), torch.tensor(5)), torch.tensor(1)), top_k=top_k)
    tokens[:, 5] = 3  # visible
    valid[:, 5] = False  # or padding
    for said in (
        Prediction.ask(Table(table), tokens, top_k=top_k),
        Prediction.ask(Table(table), canvas(), valid=valid, top_k=top_k),
    ):
        assert not said.log_q.isnan().any()


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(2, 8, V + 2), "spec.vocab_size is 6: set it to the width"),
        (torch.zeros(2, 8, V - 1), "spec.vocab_size is 6"),
        (torch.zeros(2, 8, V), r"it ignores window=\(4, 8\): return logits\[:, start:stop\]"),
        (torch.zeros(1, 4, V), r"expected logits \(2, 4, 6\) of Fixed, got \(1, 4, 6\)"),
        (torch.zeros(2, 4, V, dtype=torch.int64), "expected floating-point logits"),
        (torch.zeros(4, V), "expected floating-point logits"),
        ([[0.0]], "got list"),
    ],
)
@pytest.mark.parametrize("with_head", [False, True])
def test_logits_of_another_shape_are_refused_with_and_without_a_head(with_head, logits, message):
    class Fixed:
        spec = SPEC

        def logits(self, tokens, **options):
            return logits

    head = CoupledHead(ct.compile(ct.structures.hmm(4, 2, V), seed=0)) if with_head else None
    with pytest.raises(ArgumentError, match=message):
        generate(Fixed(), [[0, 1, 2, 3]] * 2, gen_length=4, block_length=4, num_steps=1, head=head)


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_denoiser_writes_no_text(value, with_head):
    head = CoupledHead(ct.compile(ct.structures.hmm(4, 2, V), seed=0)) if with_head else None
    with pytest.raises(ArgumentError, match="denoiser: Table: expected rows with at least one finite entry"):
        generate(Table(torch.full((8, V), value)), [[]], gen_length=4, block_length=4, num_steps=1, head=head)


@pytest.mark.parametrize("top_k", [True, False, 0, -3, "x", 2.0, V + 1])
def test_a_top_k_that_is_no_number_of_tokens_is_refused_everywhere(top_k, table):
    pc = ct.compile(ct.structures.hmm(8, 2, V), seed=0)
    said = Prediction.ask(Table(table), canvas())
    for attempt in (
        lambda: Prediction.ask(Table(table), canvas(), top_k=top_k),
        lambda: said.listed(top_k),
        lambda: CoupledHead(pc, top_k=top_k),
        lambda: CoupledDistribution(pc, said.log_q, canvas(), canvas() == MASK, top_k=top_k),
    ):
        with pytest.raises(ArgumentError, match="top_k: expected"):
            attempt()


def test_other_arguments_that_do_not_fit_are_named(table):
    said = Prediction.ask(Table(table), canvas())
    for attempt, message in (
        (lambda: said.log_prob_of(torch.full((2, 8), V)), "tokens: expected tokens from 0 to 5, got 6"),
        (lambda: said.log_prob_of(torch.zeros(2, 7, dtype=torch.int64)), r"tokens: expected int64 of shape \(2, 8\)"),
        (lambda: said.listed(2, torch.full((2, 8), -100)), "include: expected tokens from 0 to 5, got -100"),
        (lambda: Prediction(log_q=said.log_q, vocab_size=V + 1), "log_q: expected floating point"),
        (lambda: Prediction(log_q=said.log_q, vocab_size=V, values=said.log_q), "values: expected int64"),
        (lambda: Prediction(log_q=said.log_q, vocab_size=V, features=torch.zeros(2, 7, 3)), "features: expected"),
        (lambda: Prediction.from_logits(torch.zeros(2, 3)), "logits: expected floating point"),
        (lambda: Prediction.from_logits(torch.full((1, 1, 2), torch.nan)), "logits: expected rows"),
    ):
        with pytest.raises(ArgumentError, match=message):
            attempt()


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("normalization", ["global", "local"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("decode", ["latent", "marginal", "any_order", "joint"])
def test_nothing_as_large_as_the_logits_is_made_once_the_best_tokens_are_listed(decode, temperature, normalization):
    num_tokens, length, batch_size = 500, 8, 16
    pc = ct.compile(ct.structures.hmm(length, 2, num_tokens), seed=0)
    head = CoupledHead(pc, normalization=normalization, top_k=5)
    spec = {"vocab_size": num_tokens, "mask_id": 0, "pad_id": 0, "forbidden_ids": (0,)}
    told = Table(torch.randn(length, num_tokens, generator=torch.Generator().manual_seed(0)), **spec)
    tokens = torch.full((batch_size, length), told.spec.mask_id)
    canvas = holed_canvas(list(tokens), None, None, told.spec, torch.arange(batch_size), None)
    look = next(Anywhere(-(-length // 3)).looks(canvas))
    said = Prediction.ask(told, tokens, top_k=head.top_k)
    config = DecodingConfig(decode=decode, temperature=temperature, strategy="entropy")
    with torch.no_grad(), Largest() as largest:
        decode_step(canvas, look, said, Anywhere(), head, config)
    assert (~canvas.masked).sum() == 3 * batch_size
    assert largest.numel < batch_size * length * num_tokens / 4


def test_nobody_else_in_the_package_asks_a_denoiser():
    """Training a denoiser apart, which wants gradients and the forbidden tokens too."""
    package = Path(diffusion.__file__).parent
    asks = re.compile(r"(?<!self)(?<!control)(?<!self\._model)\.logits(_and_features)?\(")
    callers = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if asks.search(path.read_text())}
    callers = {path for path in callers if not path.startswith(("testing/", "denoisers/"))}
    assert callers == {"prediction.py", "training/denoiser.py"}
