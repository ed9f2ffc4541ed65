"""Caching for training at scale: answers of different lengths, blocks to come, shards side by side, half precision."""

import numpy as np
import pytest
import torch

import circuits as ct
import diffusion as df
from diffusion.training.answers import answer_windows

pytestmark = pytest.mark.usefixtures("one_thread")
V, PAD, MASK, EOS, CONTEXT, L = 9, 7, 8, 6, 4, 3
CONFIG = df.TransformerConfig(
    vocab_size=V, mask_id=MASK, pad_id=PAD, eos_id=EOS, forbidden_ids=(PAD, MASK), context_length=CONTEXT,
    block_length=L, width=16, num_layers=1, num_heads=2,
)  # fmt: skip
SPEC = df.TransformerDenoiser(CONFIG, seed=0).spec
PAIRS = [([1, 2, 3, 4, 5], [0, 1, 2, 3]), ([], [4, 5, 1]), ([2], [3])]


@pytest.fixture(scope="module")
def denoiser():
    model = df.TransformerDenoiser(CONFIG, seed=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # so that what is attended to matters
    return model


def cached(denoiser, windows, path, **options):
    return df.cache_logits(denoiser, windows, path, block_length=L, batch_size=4, progress=False, **options)


def test_answers_are_cut_into_blocks_after_what_stands_before_them():
    windows, valid = answer_windows(PAIRS, SPEC, context_length=CONTEXT, block_length=L)
    assert windows.tolist() == [
        [2, 3, 4, 5, 0, 1, 2],
        [5, 0, 1, 2, 3, EOS, EOS],
        [PAD, PAD, PAD, PAD, 4, 5, 1],
        [PAD, PAD, PAD, 2, 3, EOS, EOS],
    ]
    assert valid.tolist() == [[token != PAD for token in row] for row in windows.tolist()]
    with pytest.raises(df.errors.ArgumentError, match="pairs: expected an answer"):
        answer_windows([([1, 2], [])], SPEC, context_length=CONTEXT, block_length=L)


def test_padding_says_what_the_unpadded_text_says(denoiser, tmp_path):
    windows, valid = answer_windows(PAIRS, SPEC, context_length=CONTEXT, block_length=L)
    batch = cached(denoiser, windows, tmp_path, valid=valid).batch(slice(None))
    for row in range(len(windows)):
        text = windows[row][valid[row]].clone()
        text[-L:] = text[-L:].masked_fill(batch.masked[row], MASK)
        with torch.no_grad():
            logits = denoiser.logits(text.unsqueeze(0), window=(len(text) - L, len(text)))[0]
        logits[:, [PAD, MASK]] = -torch.inf
        torch.testing.assert_close(batch.log_q[row].exp(), torch.softmax(logits, -1), rtol=0, atol=2e-3)  # float16


def test_the_blocks_to_come_are_masked(denoiser, tmp_path):
    windows = torch.randint(6, (6, CONTEXT + L), generator=torch.Generator().manual_seed(0))
    batch = cached(denoiser, windows, tmp_path / "suffix", suffix_length=2 * L).batch(slice(None))
    canvas = torch.cat([windows, torch.full((6, 2 * L), MASK)], 1)
    canvas[:, CONTEXT : CONTEXT + L].masked_fill_(batch.masked, MASK)
    with torch.no_grad():
        logits = denoiser.logits(canvas, window=(CONTEXT, CONTEXT + L))
    logits[..., [PAD, MASK]] = -torch.inf
    torch.testing.assert_close(batch.log_q.exp(), torch.softmax(logits, -1), rtol=0, atol=2e-3)
    with pytest.raises(df.errors.CheckpointError, match="another suffix_length"):
        cached(denoiser, windows, tmp_path / "suffix")


def test_the_end_of_a_block_is_masked_as_often_as_random_tokens_are(denoiser, tmp_path):
    windows = torch.randint(6, (9, CONTEXT + L), generator=torch.Generator().manual_seed(0))
    random, suffix = (
        cached(denoiser, windows, tmp_path / masks, masks=masks, features=True).batch(slice(None))
        for masks in ("random", "suffix")
    )
    count = random.masked.sum(1, keepdim=True)
    assert torch.equal(suffix.masked, torch.arange(L) >= L - count)
    assert not torch.equal(suffix.masked, random.masked)
    canvas = windows.clone()
    canvas[:, CONTEXT:].masked_fill_(suffix.masked, MASK)
    with torch.no_grad():
        logits = denoiser.logits(canvas, window=(CONTEXT, CONTEXT + L))
    logits[..., [PAD, MASK]] = -torch.inf
    torch.testing.assert_close(suffix.log_q.exp(), torch.softmax(logits, -1), rtol=0, atol=2e-3)
    with pytest.raises(df.errors.CheckpointError, match="another masks"):
        cached(denoiser, windows, tmp_path / "suffix", features=True)


@pytest.mark.parametrize("top_k", [None, 3])
def test_shards_are_read_as_one_cache(denoiser, tmp_path, top_k):
    windows = torch.randint(6, (11, CONTEXT + L), generator=torch.Generator().manual_seed(0))
    path = tmp_path / "cache"
    shards = []
    for index in (2, 0):
        shards.append(cached(denoiser, windows, path, shard=(index, 3), top_k=top_k, features=True))
    with pytest.raises(df.errors.CheckpointError, match="expected 3 shards, got 2"):
        df.LogitCache.open(path)
    shards.append(cached(denoiser, windows, path, shard=(1, 3), top_k=top_k, features=True))
    whole, parts = df.LogitCache.open(path), [shards[1], shards[2], shards[0]]
    assert np.array_equal(whole.tokens, torch.cat([windows[index::3, CONTEXT:] for index in range(3)]).numpy())
    assert len({part.masked[:3].tobytes() for part in parts}) == 3  # each has noise of its own
    rows = np.array([0, 5, 10, 3, 3])
    found, everything = whole.batch(rows), [part.batch(slice(None)) for part in parts]
    for name in ("tokens", "masked", "log_q", "features", *(() if top_k is None else ("values",))):
        expected = torch.cat([getattr(one, name) for one in everything])
        assert torch.equal(getattr(found, name), expected[rows])
        assert torch.equal(getattr(whole.batch(slice(2, 9)), name), expected[2:9])
    assert torch.equal(whole.batch(rows, masked_only=True).log_q[0], found.log_q[found.masked])
    head = df.CoupledHead(ct.compile(ct.structures.hmm(L, 2, V), seed=0))
    curve = df.fit_coupled(head, whole, whole, config=df.CircuitTraining(steps=2, batch_size=4), progress=False)
    assert np.isfinite(curve.held_out).all()


def test_a_denoiser_in_bfloat16_is_cached_with_its_features(denoiser, tmp_path):
    class Half:
        spec = denoiser.spec

        def logits_and_features(self, tokens, **options):
            return tuple(one.bfloat16() for one in denoiser.logits_and_features(tokens, **options))

        def logits(self, tokens, **options):
            return self.logits_and_features(tokens, **options)[0]

    windows = torch.randint(6, (5, CONTEXT + L), generator=torch.Generator().manual_seed(0))
    half, full = (
        cached(model, windows, tmp_path / name, features=True).batch(slice(None))
        for name, model in (("half", Half()), ("full", denoiser))
    )
    torch.testing.assert_close(half.log_q.exp(), full.log_q.exp(), rtol=0, atol=0.02)
    torch.testing.assert_close(half.features, full.features, rtol=0.02, atol=0.02)


def test_what_cannot_be_cached_is_refused(denoiser, tmp_path):
    windows = torch.zeros(3, CONTEXT + L, dtype=torch.int64)
    padded = torch.ones(3, CONTEXT + L, dtype=torch.bool)
    padded[0, -1] = False
    for options, name in (
        ({"valid": padded[:2]}, "valid"),
        ({"valid": padded}, "valid"),
        ({"shard": (3, 3)}, "shard"),
        ({"shard": (3, 4)}, "shard"),
        ({"suffix_length": -1}, "suffix_length"),
        ({"masks": "prefix"}, "masks"),
    ):
        with pytest.raises(df.errors.ArgumentError, match=f"^{name}: expected"):
            cached(denoiser, windows, tmp_path / "none", **options)
