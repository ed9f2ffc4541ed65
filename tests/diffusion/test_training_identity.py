"""A checkpoint of denoiser or head training continues the run that wrote it alone, and its damage is noticed."""

import hashlib
import json
import random
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import circuits as ct
from circuits.progress import forget_stop, request_stop
from diffusion import (
    CircuitTraining,
    CoupledHead,
    DenoiserTraining,
    NoiseCalibration,
    TransformerConfig,
    TransformerDenoiser,
    cache_logits,
    fit_coupled,
    train_denoiser,
)
from diffusion.errors import CheckpointError
from diffusion.errors import Interrupted as Stopped
from diffusion.training import circuit, denoiser

V, L = 9, 4
SHAPE = TransformerConfig(
    vocab_size=V, mask_id=8, pad_id=7, eos_id=6, context_length=4, block_length=L, width=16, num_layers=1, num_heads=2
)
TOKENS = torch.randint(6, (200,), generator=torch.Generator().manual_seed(0))
DENOISER_RUN = DenoiserTraining(steps=6, batch_size=4, warmup_steps=2, validate_every=4, checkpoint_every=2)
HEAD_RUN = CircuitTraining(steps=6, batch_size=8, validate_every=4, checkpoint_every=2)


class Interrupted(BaseException):
    pass


def interrupted_after(module, function, num_updates):
    original, calls = getattr(module, function), []

    def until(*arguments):
        if len(calls) == num_updates:
            raise Interrupted
        calls.append(arguments)
        return original(*arguments)

    return patch.object(module, function, until)


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def nudged(model, position):
    """Move one of all numbers to the next that there is."""
    flat = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    position %= len(flat)
    flat[position] = torch.nextafter(flat[position], torch.tensor(torch.inf))
    torch.nn.utils.vector_to_parameters(flat, model.parameters())
    return model


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    windows = TOKENS.view(-1, 8)
    model = TransformerDenoiser(SHAPE, seed=0)
    return cache_logits(model, windows, tmp_path_factory.mktemp("cache"), block_length=L, progress=False)


def new_denoiser(seed=0):
    return TransformerDenoiser(SHAPE, seed=seed)


def new_head(seed=0, **options):
    calibration = NoiseCalibration.dividing_out(torch.arange(V), num_knots=2)
    options = {"normalization": "global", "calibration": calibration} | options
    return CoupledHead(ct.compile(ct.structures.hmm(L, 2, V), seed=seed), **options)


@pytest.fixture(params=["denoiser", "head"])
def kind(request, cache):
    """Return (a new model of a seed, training it, what interrupts the training)."""

    def train(model, path=None):
        train_denoiser(model, TOKENS, TOKENS[:50], config=DENOISER_RUN, checkpoint_path=path, progress=False)
        return model

    def fit(model, path=None):
        fit_coupled(model, cache, config=HEAD_RUN, checkpoint_path=path, progress=False)
        return model

    if request.param == "denoiser":
        return new_denoiser, train, (denoiser, "_update")
    return new_head, fit, (circuit, "_rows_of")


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_updates=st.integers(2, 5), position=st.integers(0, 10_000), is_nudged=st.booleans(), seed=st.integers(1, 9))
def test_an_interrupted_run_is_continued_from_its_own_start_alone(
    kind, tmp_path, num_updates, position, is_nudged, seed
):
    new, train, place = kind
    path = tmp_path / "run.safetensors"
    path.unlink(missing_ok=True)
    with interrupted_after(*place, num_updates), pytest.raises(Interrupted):
        train(new(), path)
    before = path.read_bytes()
    elsewhere, untouched = (nudged(new(), position) if is_nudged else new(seed) for _ in range(2))
    with pytest.raises(
        CheckpointError, match=r"expected the weights .*started elsewhere; make model and optimizer as for"
    ):
        train(elsewhere, path)
    assert same(elsewhere, untouched)
    assert path.read_bytes() == before
    assert same(train(new(), path), train(new()))


@pytest.mark.parametrize("num_updates", [1, 3, 6])
def test_a_run_that_is_asked_to_stop_writes_its_checkpoint_and_goes_on_from_there(kind, tmp_path, num_updates):
    """Not from the last checkpoint that was due; and what it has measured is in the curve."""
    new, train, (module, function) = kind
    path, original, calls = tmp_path / "run.safetensors", getattr(module, function), []

    def counted(*arguments):
        calls.append(arguments)
        if len(calls) == num_updates:
            request_stop("SIGTERM")
        return original(*arguments)

    with patch.object(module, function, counted):
        try:
            if num_updates < 6:
                with pytest.raises(Stopped, match=f"SIGTERM after {num_updates} of 6 updates; the same call goes on"):
                    train(new(), path)
                forget_stop()
            resumed = train(new(), path)
        finally:
            forget_stop()
    assert len(calls) == 6
    assert same(resumed, train(new()))


def test_a_finished_run_in_memory_is_not_repeated(kind, tmp_path):
    new, train, place = kind
    path = tmp_path / "run.safetensors"
    model = train(new(), path)
    with interrupted_after(*place, 0):
        assert same(train(model, path), train(new(), path))


def test_flipped_bits_of_a_checkpoint_are_noticed(kind, tmp_path):
    new, train, _ = kind
    path, draw = tmp_path / "run.safetensors", random.Random(0)
    train(new(), path)
    content = path.read_bytes()
    for _ in range(50):
        position, bit = draw.randrange(len(content)), draw.randrange(8)
        path.write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :])
        with pytest.raises(CheckpointError, match="delete it or give another checkpoint_path"):
            train(new(), path)


def test_everything_that_a_head_is_set_to_is_part_of_its_run(cache, tmp_path):
    path = tmp_path / "run.safetensors"

    def fit(head):
        fit_coupled(head, cache, config=HEAD_RUN, checkpoint_path=path, progress=False)

    fit(new_head())
    fixed = new_head()
    fixed.pc.requires_grad_(False)
    others = [
        new_head(top_k=3),
        new_head(normalization="local"),
        new_head(calibration=None),
        new_head(calibration=NoiseCalibration(V, num_knots=3)),
        CoupledHead(ct.compile(ct.structures.hmm(L, 3, V), seed=0), calibration=new_head().calibration),
        fixed,
    ]
    for other in others:
        with pytest.raises(CheckpointError, match="expected this run, got one with a different head; delete it"):
            fit(other)
    with pytest.raises(CheckpointError, match="started elsewhere"):
        fit(new_head(calibration=NoiseCalibration(V, num_knots=2)))
    fit(CoupledHead(new_head().pc, 0.3, 0.5, calibration=new_head().calibration))  # those are for decoding


def test_two_structures_of_the_same_shapes_are_two_heads(cache, tmp_path):
    """One has the variables in another order than the other, and the same parameters."""
    path = tmp_path / "run.safetensors"

    def head(order):
        leaves = {var: ct.inputs(var, 2, ct.Categorical(V), name=f"leaf{var}") for var in range(L)}
        node = leaves[order[0]]
        for var in order[1:]:
            node = ct.sum(ct.product(leaves[var], node), num_units=2)
        return CoupledHead(ct.compile(ct.Circuit(ct.sum(node, num_units=1)), seed=0))

    first, second = head((0, 1, 2, 3)), head((0, 1, 3, 2))
    assert {n: tuple(p.shape) for n, p in first.named_parameters()} == {
        n: tuple(p.shape) for n, p in second.named_parameters()
    }
    fit_coupled(first, cache, config=HEAD_RUN, checkpoint_path=path, progress=False)
    with pytest.raises(CheckpointError, match="expected this run, got one with a different head"):
        fit_coupled(second, cache, config=HEAD_RUN, checkpoint_path=path, progress=False)


def test_a_cache_of_other_forbidden_tokens_or_features_is_another_cache(tmp_path):
    windows = TOKENS.view(-1, 8)

    def cached(place, forbidden=(), **options):
        model = TransformerDenoiser(replace(SHAPE, forbidden_ids=forbidden), seed=0)
        return cache_logits(model, windows, tmp_path / place, block_length=L, progress=False, **options)

    cached("plain")
    with pytest.raises(CheckpointError, match="one of another forbidden_ids; delete it"):
        cached("plain", forbidden=(5,))
    with pytest.raises(CheckpointError, match="one of another num_features"):
        cached("plain", features=True)
    cached("features", features=True)
    with pytest.raises(CheckpointError, match="one of another num_features"):
        cached("features")
    assert cached("features", features=True).features is not None


def test_a_cache_of_before_which_does_not_say_its_forbidden_tokens_is_opened(tmp_path):
    def cached():
        return cache_logits(new_denoiser(), TOKENS.view(-1, 8), tmp_path, block_length=L, progress=False)

    batch = cached().batch(slice(None))
    path = tmp_path / "meta.json"
    meta = json.loads(path.read_text())
    del meta["forbidden_ids"], meta["done"], meta["digest"]
    digest = hashlib.sha256(json.dumps(meta).encode()).hexdigest()  # of how it was made, then of its one batch
    rows = [np.load(tmp_path / f"{name}.npy").tobytes() for name in ("tokens", "masked", "log_q")]
    digest = hashlib.sha256(digest.encode() + b"".join(rows)).hexdigest()
    path.write_text(json.dumps(meta | {"done": len(batch.tokens), "digest": digest}))
    assert torch.equal(cached().batch(slice(None)).log_q, batch.log_q)
