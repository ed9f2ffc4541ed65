"""The log-likelihood of plain text as a second term of the coupled objective."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_coupled_em import L, N, V, cache_of, config_of, head_of, linear

import circuits as ct
import diffusion as df
from circuits.learning.distributed import Processes
from circuits.progress import forget_stop, request_stop
from diffusion.errors import ArgumentError, CheckpointError, Interrupted
from diffusion.training.circuit import CacheTraining, coupled_loss
from diffusion.training.joint import _Training

pytestmark = pytest.mark.usefixtures("one_thread")


def text_of(count, seed=5):
    return torch.from_numpy(np.random.default_rng(seed).integers(V, size=(count, L)))


def log_likelihood(pc, text):
    """Of every block, by enumeration of all."""
    return ct.testing.enumerate_joint(pc)[tuple(text.unbind(1))]


@pytest.mark.parametrize(("weighting", "per_token"), [("masked_mean", L), ("uniform", 1)])
def test_the_gradient_is_that_of_both_terms(weighting, per_token):
    cache, head, text = cache_of(), head_of(calibration=df.NoiseCalibration(V)), text_of(17)
    config = config_of(optimizer="adam", weighting=weighting, likelihood_weight=0.7)
    training = CacheTraining(head, cache, None, config, text=text)
    training.optimizer.step = lambda: None  # the gradients are looked at, not followed
    loss, _ = training.update(0)
    found = [parameter.grad.clone() for parameter in head.parameters()]
    batch = cache.batch(slice(None))
    nats = -batch.distribution(head).log_prob(batch.tokens)
    if weighting == "masked_mean":
        nats = (nats / batch.masked.sum(1))[batch.masked.any(1)]
    assert float(loss) == pytest.approx(nats.mean().item())  # of the coupled term alone
    torch.testing.assert_close(head.pc(text), log_likelihood(head.pc, text))
    expected = nats.mean() - 0.7 * head.pc(text).mean() / per_token
    gradients = torch.autograd.grad(expected, list(head.parameters()))
    torch.testing.assert_close(found, list(gradients), rtol=1e-6, atol=1e-8)


def test_where_the_prediction_says_nothing_the_step_is_that_of_anemone_on_both_texts():
    blank = cache_of(np.zeros((N, L, V)), np.ones((N, L), dtype=bool))
    ours, theirs, text = head_of(), head_of(), text_of(N)
    config = config_of(step_size=0.3, likelihood_weight=0.5)
    CacheTraining(ours, blank, None, config, text=text).update(0)
    flows, plain = (ct.learning.expected_flows(theirs.pc, x)[0] for x in (torch.from_numpy(blank.tokens), text))
    both = {name: flow + 0.5 * plain[name] for name, flow in flows.items()}
    ct.learning.anemone_step(theirs.pc, both, 1.5 * N, step_size=0.3, momentum=0.0)
    for name, weights in linear(theirs.pc).items():
        torch.testing.assert_close(linear(ours.pc)[name], weights, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["adam", "anemone"])
def test_a_circuit_does_not_follow_a_few_noised_blocks(optimizer):
    """Of 4 blocks a fit learns the law of 4 blocks; with text of the same law it keeps that."""
    world = torch.softmax(torch.randn(V**L, generator=torch.Generator().manual_seed(0)), 0)
    blocks = torch.cartesian_prod(*[torch.arange(V)] * L)
    draw = torch.multinomial(world, 600, replacement=True, generator=torch.Generator().manual_seed(1))
    text, few = blocks[draw[:500]], blocks[draw[500:504]]
    cache = df.LogitCache(few.numpy(), np.ones((4, L), dtype=bool), np.zeros((4, L, V)), None, V, "few")
    heads = {}
    for weight in (0.0, 3.0):
        heads[weight] = head_of()
        config = config_of(optimizer=optimizer, steps=40, batch_size=100, learning_rate=0.1, likelihood_weight=weight)
        df.fit_coupled(heads[weight], cache, text=text if weight else None, config=config, progress=False)
    held_out = blocks[draw[504:]]
    alone, kept = (float(log_likelihood(head.pc, held_out).mean()) for head in heads.values())
    assert kept > alone + 0.5
    assert coupled_loss(heads[0.0], cache) < coupled_loss(heads[3.0], cache)


@pytest.mark.parametrize("optimizer", ["adam", "anemone"])
def test_an_interrupted_run_ends_like_one_that_was_not(optimizer, tmp_path, monkeypatch):
    cache, text, path = cache_of(), text_of(50), tmp_path / "fit.safetensors"
    config = config_of(optimizer=optimizer, steps=9, batch_size=20, checkpoint_every=2, likelihood_weight=0.3)

    def fit(head, text=text, config=config, **options):
        return df.fit_coupled(head, cache, text=text, config=config, progress=False, **options)

    straight, resumed = head_of(), head_of()
    curve, update = fit(straight), CacheTraining.update

    def watched(self, step):
        if step == 4:
            request_stop("asked to stop")
        return update(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(CacheTraining, "update", watched)
        with pytest.raises(Interrupted):
            fit(resumed, checkpoint_path=path)
    forget_stop()
    for other in ({"text": text_of(50, seed=6)}, {"config": replace(config, likelihood_weight=0.4)}):
        with pytest.raises(CheckpointError, match=r"a different (text|configuration)"):
            fit(head_of(), **other, checkpoint_path=path)
    assert fit(resumed, checkpoint_path=path) == curve
    for name, weights in linear(straight.pc).items():
        assert torch.equal(linear(resumed.pc)[name], weights)


def test_text_is_of_the_denoisers_tokens():
    """Categories 0, 1, 2, 3 stand for the tokens 5, 3, 1, 0."""
    ids, cache = torch.tensor([5, 3, 1, 0]), cache_of()
    wide = np.full((N, L, 6), -1e5)
    wide[..., ids.numpy()] = cache.log_q
    of_tokens = df.LogitCache(ids[cache.tokens].numpy(), cache.masked, wide, None, 6, "wide", None, (2, 4))
    config, text = config_of(optimizer="adam", steps=3, likelihood_weight=1.0), text_of(30)
    plain, mapped = head_of(), head_of(vocabulary=ids)
    df.fit_coupled(plain, cache, text=text, config=config, progress=False)
    df.fit_coupled(mapped, of_tokens, text=ids[text], config=config, progress=False)
    torch.testing.assert_close(linear(mapped.pc), linear(plain.pc), rtol=1e-6, atol=1e-7)
    with pytest.raises(ArgumentError, match="text: expected tokens of the circuit's vocabulary, got 4"):
        df.fit_coupled(mapped, of_tokens, text=torch.full((1, L), 4), config=config, progress=False)


class Frequent(torch.nn.Module):
    spec = df.DenoiserSpec(
        vocab_size=V + 1, mask_id=V, eos_ids=(), pad_id=V, forbidden_ids=(V,), max_length=L
    )  # fmt: skip

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(V + 1, dtype=torch.float64))

    def logits(self, tokens, *, valid=None, t=None, window=None, cache=None):
        return self.table.expand(*tokens.shape, -1)


def test_joint_training_counts_the_blocks_of_its_windows():
    windows, gradients = text_of(6), []
    for weight in (0.0, 0.7):
        head = head_of()
        config = df.JointTraining(steps=9, batch_size=6, likelihood_weight=weight)
        training = _Training(Frequent(), head, windows, None, config, Processes())
        training.optimizer.step = lambda: None
        training.update(0)
        gradients.append([parameter.grad.clone() for parameter in head.parameters()])
    plain = torch.autograd.grad(-0.7 * head.pc(windows).mean() / L, list(head.parameters()))
    found = [after - before for before, after in zip(*gradients, strict=True)]
    torch.testing.assert_close(found, list(plain), rtol=1e-6, atol=1e-9)
    with pytest.raises(ArgumentError, match="likelihood_weight: expected a number >= 0"):
        df.JointTraining(likelihood_weight=-1.0)
    for weight in (1e7, 1e300):  # of which gradients, or their squares, are infinite in single precision
        with pytest.raises(ArgumentError, match=r"likelihood_weight: expected at most 1e\+06, got"):
            df.CircuitTraining(likelihood_weight=weight)


@pytest.mark.parametrize(
    ("text", "weight", "message"),
    [
        (None, 0.5, "text: expected it with a likelihood_weight > 0 and else none, got none"),
        (text_of(3), 0.0, "text: expected it with a likelihood_weight > 0 and else none, got some"),
        (text_of(3)[:, :2], 0.5, r"text: expected int64 \(n >= 1, 3\)"),
        (text_of(0), 0.5, r"text: expected int64 \(n >= 1, 3\)"),
        (text_of(3) + V, 0.5, "text: expected tokens from 0 to 3"),
        (text_of(3).double(), 0.5, "text: expected int64"),
    ],
)
def test_what_does_not_fit_is_refused(text, weight, message):
    with pytest.raises(ArgumentError, match=message):
        df.fit_coupled(head_of(), cache_of(), text=text, config=config_of(likelihood_weight=weight), progress=False)


def test_impossible_text_is_refused():
    head = head_of()
    leaf = head.pc.circuit.inputs[0]
    head.pc.set_weights(leaf, torch.tensor([[0.0], [1.0], [1.0], [1.0]]).expand(V, 3))
    config = config_of(optimizer="adam", steps=1, likelihood_weight=0.5)
    cache = cache_of(masked=np.ones((N, L), dtype=bool))
    some = df.LogitCache(cache.tokens.clip(1), cache.masked, cache.log_q, None, V, "some")
    with pytest.raises(ArgumentError, match="text: expected blocks that the circuit holds possible"):
        df.fit_coupled(head, some, text=torch.zeros(2, L, dtype=torch.int64), config=config, progress=False)
