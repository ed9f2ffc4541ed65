"""MDLM and BD3-LM: the diffusion transformer, its noise level, and the substitution of logits."""

import math
import tempfile
from pathlib import Path

import pytest
import tiny_models as tiny
import torch

import diffusion as df
from diffusion.errors import ArgumentError

LAST = tiny.VOCABULARY - 1
"""The mask comes after the vocabulary of GPT-2."""
BLOCK = 3


def a_text(length=9):
    tokens = tiny.a_text(length)
    return tokens.masked_fill(tokens == tiny.MASK, LAST)


def mdlm(folder, weights=None, **config):
    config = tiny.dit_config(model_type="mdlm", architectures=["MDLM"], **config)
    return tiny.publish(folder, config, weights or tiny.dit_weights())


def bd3lm(folder, weights=None, **config):
    config = {"block_size": BLOCK, "cross_attn": True, "adaln": True, "causal": False, **config}
    config = tiny.dit_config(model_type="bd3lm", architectures=["BD3LM"], **config)
    limits = {"sampling_eps_min": torch.tensor(1e-3), "sampling_eps_max": torch.tensor(0.999)}
    return tiny.publish(folder, config, limits | (weights or tiny.dit_weights()))


def substituted(raw, tokens):
    """Log-probabilities of the published parameterisation: no masks, and what is known stays."""
    raw = raw.clone()
    raw[:, LAST] = -torch.inf
    log_p = raw.log_softmax(-1)
    known = tokens != LAST
    log_p[known] = -torch.inf
    log_p[known, tokens[known]] = 0
    return log_p


def check(model, tokens, raw, **options):
    expected = substituted(raw, tokens)
    logits = model.logits(tokens[None], **options)[0]
    assert bool(logits.isfinite().all())
    torch.testing.assert_close(logits.double().softmax(-1), expected.exp(), atol=1e-5, rtol=1e-4)


class TestMDLM(df.testing.DenoiserTestCase):
    def make_denoiser(self):
        with tempfile.TemporaryDirectory() as folder:
            return df.load_denoiser(mdlm(Path(folder)))


class TestTimedMDLM(df.testing.DenoiserTestCase):
    def make_denoiser(self):
        with tempfile.TemporaryDirectory() as folder:
            return df.load_denoiser(mdlm(Path(folder), time_conditioning=True))


class TestBD3LM(df.testing.DenoiserTestCase):
    def make_denoiser(self):
        with tempfile.TemporaryDirectory() as folder:
            return df.load_denoiser(bd3lm(Path(folder)))

    def cached_logits(self, denoiser, tokens, window):
        cache = denoiser.new_cache()
        with torch.no_grad():
            denoiser.logits(tokens, window=window, cache=cache)
            return denoiser.logits(tokens, window=window, cache=cache)


def test_mdlm_sees_everything_without_noise(tmp_path):
    weights, tokens = tiny.dit_weights(), a_text()
    check(df.load_denoiser(mdlm(tmp_path, weights)), tokens, tiny.dit_by_hand(weights, tokens, tiny.everything))


@pytest.mark.parametrize("t", [0.25, 0.999])
def test_the_noise_of_a_time_is_that_of_the_log_linear_schedule(tmp_path, t):
    weights, tokens = tiny.dit_weights(), a_text()
    model = df.load_denoiser(mdlm(tmp_path, weights, time_conditioning=True))
    raw = tiny.dit_by_hand(weights, tokens, tiny.everything, sigma=-math.log(1 - (1 - 1e-3) * t))
    check(model, tokens, raw, t=torch.tensor([t]))


def test_without_a_time_it_is_the_share_of_masks_among_valid_positions(tmp_path):
    tokens = a_text()[None]  # 3 masks of 9
    model = df.load_denoiser(mdlm(tmp_path, time_conditioning=True))
    expected = model.logits(tokens, t=torch.tensor([3 / 9]))
    torch.testing.assert_close(model.logits(tokens), expected)
    padded = torch.cat([torch.full((1, 4), LAST), tokens], 1)
    valid = torch.arange(13)[None] >= 4
    torch.testing.assert_close(model.logits(padded, valid=valid)[:, 4:], expected, atol=1e-4, rtol=1e-4)


def test_time_means_nothing_to_a_model_trained_without(tmp_path):
    model, tokens = df.load_denoiser(mdlm(tmp_path)), a_text()[None]
    assert torch.equal(model.logits(tokens, t=torch.tensor([0.9])), model.logits(tokens))


def test_blocks_see_themselves_and_those_before(tmp_path):
    weights, tokens = tiny.dit_weights(), a_text()
    raw = tiny.dit_by_hand(weights, tokens, tiny.blocks_of(BLOCK))
    check(df.load_denoiser(bd3lm(tmp_path, weights)), tokens, raw)


def test_without_blocks_everything_is_seen(tmp_path):
    weights, tokens = tiny.dit_weights(), a_text()
    raw = tiny.dit_by_hand(weights, tokens, tiny.everything)
    check(df.load_denoiser(bd3lm(tmp_path, weights, cross_attn=False)), tokens, raw)


def test_a_transformer_without_modulation(tmp_path):
    weights, tokens = tiny.dit_weights(), a_text()
    still = {name: torch.zeros_like(w) if "adaLN" in name else w for name, w in weights.items()}
    gates = torch.zeros(6, tiny.WIDTH)
    gates[[2, 5]] = 1
    still |= {name: gates.flatten() for name in still if name.endswith("adaLN_modulation.bias") and "blocks" in name}
    kept = {name: w for name, w in weights.items() if "adaLN" not in name and "sigma_map" not in name}
    raw = tiny.dit_by_hand(still, tokens, tiny.blocks_of(BLOCK))
    check(df.load_denoiser(bd3lm(tmp_path, kept, adaln=False)), tokens, raw)


def test_a_noise_level_for_each_block_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="time_conditioning"):
        df.load_denoiser(bd3lm(tmp_path, time_conditioning=True))


def test_special_tokens_are_those_of_gpt2_and_a_mask(tmp_path):
    spec = df.load_denoiser(mdlm(tmp_path)).spec
    assert (spec.vocab_size, spec.mask_id, spec.forbidden_ids, spec.max_length) == (20, 19, (19,), 32)
    weights = tiny.dit_weights()
    wide = {name: w for name, w in weights.items() if not name.endswith(("embedding", "linear.weight", "linear.bias"))}
    wide |= {
        "backbone.vocab_embed.embedding": torch.zeros(50258, tiny.WIDTH),
        "backbone.output_layer.linear.weight": torch.zeros(50258, tiny.WIDTH),
        "backbone.output_layer.linear.bias": torch.zeros(50258),
    }
    spec = df.load_denoiser(mdlm(tmp_path / "wide", wide, vocab_size=50258)).spec
    assert (spec.mask_id, spec.eos_ids, spec.pad_id) == (50257, (50256,), 50256)


def test_a_small_model_lies_on_one_device(tmp_path):
    with pytest.raises(ArgumentError, match="device"):
        df.load_denoiser(mdlm(tmp_path), device="auto")
