"""The cache of what stands before a window: exact where attention is block-causal, and what it is where it is not."""

import json

import pytest
import torch

import circuits as ct
import diffusion as df
from diffusion.denoisers.layers import PrefixCache

pytestmark = pytest.mark.usefixtures("one_thread")
V, PAD, MASK, EOS = 12, 0, 1, 2


def model_of(attention, seed=0, **options):
    config = df.TransformerConfig(
        vocab_size=V, mask_id=MASK, pad_id=PAD, eos_id=EOS, context_length=8, block_length=4, max_length=40, width=16,
        num_layers=3, num_heads=2, attention=attention, **options,
    )  # fmt: skip
    model = df.TransformerDenoiser(config, seed=seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # so that what is attended to matters
    return model


@pytest.fixture
def tokens():
    return torch.randint(3, V, (3, 14), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("window", [None, (8, 12), (9, 12)])
def test_block_causal_attention_sees_blocks_up_to_its_own(window, tokens):
    """Which predictions change with which token: blocks of four, counted from the window's beginning."""
    model = model_of("block_causal")
    start, stop = window or (0, 14)
    canvas = tokens[:1]
    with torch.no_grad():
        before, reach = model.logits(canvas, window=window)[0], []
        for place in range(14):
            other = canvas.clone()
            other[0, place] = 3 + (canvas[0, place] - 2) % (V - 3)
            reach.append((model.logits(other, window=window)[0] != before).any(-1))
    block = (torch.arange(14) - start).div(4, rounding_mode="floor")
    expected = block[start:stop] >= block.unsqueeze(1)
    expected[stop:] = False
    assert torch.equal(torch.stack(reach), expected)


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("window", [(8, 12), (9, 13), (10, 12), (4, 14), (0, 4)])
def test_a_cache_changes_nothing_with_block_causal_attention(window, is_padded, tokens):
    model, cache = model_of("block_causal"), PrefixCache()
    valid = torch.ones_like(tokens, dtype=torch.bool)
    if is_padded:
        valid[1, :3] = valid[2, :7] = False
    with torch.no_grad():
        for step in range(4):  # the window fills, then the text before it changes in one row
            canvas = tokens.clone()
            canvas[:, window[0] + step : window[1]] = MASK
            canvas[2, window[0] - 1 if window[0] else 0] = 5 if step == 3 else 6
            expected = model.logits(canvas, valid=valid, window=window)
            found = model.logits(canvas, valid=valid, window=window, cache=cache)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    first = max(0, window[1] - model.config.span)
    assert cache.num_reused == (3 if window[0] > first else 0)


def test_a_bidirectional_prefix_keeps_what_it_saw_first(tokens):
    """The approximation: other logits while the window fills, the same ones once it is asked about anew."""
    model, cache, window = model_of("bidirectional"), PrefixCache(), (8, 12)
    with torch.no_grad():
        masked = tokens.clone()
        masked[:, 8:12] = MASK
        first = model.logits(masked, window=window, cache=cache)
        torch.testing.assert_close(first, model.logits(masked, window=window))
        again = model.logits(masked, window=window, cache=cache)
        torch.testing.assert_close(again, first, rtol=1e-4, atol=1e-4)
        exact = model.logits(tokens, window=window)
        assert (model.logits(tokens, window=window, cache=cache) - exact).abs().max() > 0.01
        model.logits(tokens, window=(9, 13), cache=cache)
        torch.testing.assert_close(model.logits(tokens, window=window, cache=cache), exact)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_text_with_and_without_a_cache(temperature):
    model = model_of("block_causal", seed=3)
    head = df.CoupledHead(ct.compile(ct.structures.hmm(4, 3, V), seed=0))
    prompts, seeds = [[3, 4, 5, 6, 7], [9, 4], [8, MASK, 9, 3, 3, 4, 5, 6, 7]], [1, 2, 3]
    for used, strategy, remask in ((None, "low_confidence", 0.0), (head, "entropy", 0.0), (head, "random", 0.3)):
        options = {"gen_length": 14, "num_steps": 12, "block_length": 4, "head": used, "strategy": strategy}
        options |= {"remask": remask, "temperature": temperature}
        without = df.generate(model, prompts, seeds=seeds, **options)
        cached = df.generate(model, prompts, seeds=seeds, cache=True, **options)
        assert torch.equal(cached.tokens, without.tokens)
        for row in range(3):
            alone = df.generate(model, prompts[row : row + 1], seeds=seeds[row : row + 1], cache=True, **options)
            assert torch.equal(alone.generated[0], cached.generated[row])


def test_a_cache_is_read_in_all_steps_of_a_block_but_the_first(monkeypatch):
    model, made = model_of("bidirectional"), []
    monkeypatch.setattr(model, "new_cache", lambda: made.append(PrefixCache()) or made[-1])
    out = df.generate(model, [[3, 4, 5]], gen_length=8, block_length=4, num_steps=8, cache=True, stop_at_eos=False)
    assert (out.num_calls, made[0].num_reused, len(made)) == (8, 6, 1)


def test_models_of_before_load_and_block_causal_ones_say_so(tmp_path, tokens):
    plain, causal = model_of("bidirectional"), model_of("block_causal")
    plain.save(tmp_path / "plain")
    assert "attention" not in json.loads((tmp_path / "plain" / "config.json").read_text())  # as it always was
    causal.save(tmp_path / "causal")
    for name, model in (("plain", plain), ("causal", causal)):
        loaded = df.TransformerDenoiser.load(tmp_path / name)
        assert loaded.config == model.config
        assert torch.equal(loaded.logits(tokens), model.logits(tokens))
    path = tmp_path / "causal" / "config.json"
    path.write_text(path.read_text().replace("block_causal", "sideways"))
    with pytest.raises(df.errors.CheckpointError):
        df.TransformerDenoiser.load(tmp_path / "causal")


def test_what_has_no_cache_is_refused(tokens):
    world = df.testing.worlds.cities()
    with pytest.raises(df.errors.ArgumentError, match="cache: expected a denoiser with a method new_cache"):
        df.generate(world.denoiser(), [[]], gen_length=2, cache=True)
    with pytest.raises(df.errors.ArgumentError, match="cache: expected what new_cache"):
        model_of("block_causal").logits(tokens, window=(8, 12), cache={})
    with pytest.raises(df.errors.ArgumentError, match="attention: expected one of"):
        model_of("sideways")
    assert isinstance(model_of("block_causal"), df.CachingDenoiser)
    assert not isinstance(world.denoiser(), df.CachingDenoiser)
