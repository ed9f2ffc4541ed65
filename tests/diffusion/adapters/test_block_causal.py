"""SDAR, and the cache of block-causal models; models with code of their own."""

import tempfile
from pathlib import Path

import pytest
import tiny_models as tiny
import torch

import diffusion as df
from diffusion.errors import ArgumentError

pytest.importorskip("transformers", reason="SDAR runs on the Qwen3 classes of transformers")

BLOCK = 3
CONFIG = tiny.llama_config(
    model_type="sdar", architectures=["SDARForCausalLM"], block_size=BLOCK, head_dim=tiny.HEAD_WIDTH
)
CONFIG |= {"mask_token_id": tiny.MASK, "tie_word_embeddings": False, "pad_token_id": tiny.PAD}


def sdar(folder, weights=None, files=(), **config):
    weights = weights or tiny.llama_weights(query_norm=True)
    return tiny.publish(folder, CONFIG | config, weights, num_shards=2, files=files)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return df.load_denoiser(sdar(tmp_path_factory.mktemp("sdar")))


class TestSDAR(df.testing.DenoiserTestCase):
    def make_denoiser(self):
        with tempfile.TemporaryDirectory() as folder:
            return df.load_denoiser(sdar(Path(folder)))

    def cached_logits(self, denoiser, tokens, window):
        cache = denoiser.new_cache()
        with torch.no_grad():
            denoiser.logits(tokens, window=window, cache=cache)
            return denoiser.logits(tokens, window=window, cache=cache)


def test_blocks_see_themselves_and_those_before(tmp_path):
    weights, tokens = tiny.llama_weights(query_norm=True), tiny.a_text()
    model = df.load_denoiser(sdar(tmp_path, weights))
    expected = tiny.llama_by_hand(weights, tokens, tiny.blocks_of(BLOCK))
    torch.testing.assert_close(model.logits(tokens[None])[0].double(), expected, atol=1e-5, rtol=1e-5)


def test_nothing_after_a_window_s_last_block_is_seen(model):
    tokens = tiny.a_text()[None]
    other = torch.cat([tokens[:, :6], 14 - tokens[:, 6:].clamp_max(14)], 1)
    assert torch.equal(model.logits(tokens, window=(2, 5)), model.logits(other, window=(2, 5)))
    assert not torch.allclose(model.logits(tokens, window=(2, 7)), model.logits(other, window=(2, 7)))


def test_special_tokens(tmp_path):
    files = {"generation_config.json": {"eos_token_id": [16, tiny.END]}}
    spec = df.load_denoiser(sdar(tmp_path, files=files)).spec
    assert (spec.mask_id, spec.pad_id, spec.eos_ids) == (tiny.MASK, tiny.PAD, (tiny.END, 16))


@pytest.mark.parametrize("padding", [0, 1, 2, 4])
def test_the_cache_of_a_decoding_changes_nothing_and_is_used(model, padding):
    """Windows move on, tokens are written, and an earlier one is changed: rows with different paddings."""
    generator = torch.Generator().manual_seed(padding)
    tokens = torch.randint(0, tiny.END, (3, 16), generator=generator)
    pads = torch.tensor([0, padding, 2])
    valid = torch.arange(16) >= pads[:, None]
    tokens[:, 5:] = tiny.MASK
    cache = model.new_cache()
    with torch.no_grad():
        for start in range(5, 16, 3):
            window = start, min(start + 3, 16)
            for position in range(*window):
                expected = model.logits(tokens, valid=valid, window=window)
                found = model.logits(tokens, valid=valid, window=window, cache=cache)
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
                tokens[:, position] = torch.randint(0, tiny.END, (3,), generator=generator)
            tokens[1, 4] = (tokens[1, 4] + 1) % tiny.END  # as an editor would
        assert cache.num_reused >= 5
        assert cache.layers[0][0].shape[2] >= 9
        expected = model.logits(tokens[:2, 1:12], window=(8, 11))
        torch.testing.assert_close(model.logits(tokens[:2, 1:12], window=(8, 11), cache=cache), expected)


def test_the_cache_saves_the_computation_of_the_blocks_before(model, monkeypatch):
    asked = []
    forward = model.backbone.forward
    monkeypatch.setattr(
        model.backbone, "forward", lambda tokens, *a, **k: (asked.append(tokens.shape[1]), forward(tokens, *a, **k))[1]
    )
    tokens, cache = tiny.a_text(12)[None], model.new_cache()
    with torch.no_grad():
        for window in ((6, 9), (6, 9), (9, 12), (9, 12)):
            model.logits(tokens, window=window, cache=cache)
    assert asked == [9, 3, 6, 3]


def test_gradients_do_not_go_through_a_cache(model):
    tokens, cache = tiny.a_text()[None], model.new_cache()
    model.logits(tokens, window=(6, 9), cache=cache).sum().backward()
    assert cache.tokens is None
    assert model.backbone.model.embed_tokens.weight.grad is not None
    model.zero_grad()


def test_decoding_with_a_cache_writes_the_same_text(model):
    prompts = torch.randint(0, tiny.END, (8, 5), generator=torch.Generator().manual_seed(0))
    valid = torch.arange(5) >= torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])[:, None]
    options = {"gen_length": 7, "block_length": 3, "num_steps": 7, "temperature": 0.0, "stop_at_eos": False}
    together = df.generate(model, prompts, valid=valid, cache=True, **options).generated
    for row in range(8):
        alone = df.generate(model, prompts[row : row + 1, valid[row]], **options).generated
        assert torch.equal(together[row], alone[0])


def test_something_else_than_a_cache_is_refused(model):
    with pytest.raises(ArgumentError, match="cache"):
        model.logits(tiny.a_text()[None], cache={})


REMOTE = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM


class TinyConfig(Qwen3Config):
    model_type = "llada2_moe"


class TinyModel(Qwen3ForCausalLM):
    config_class = TinyConfig

    def get_decoder(self):
        model, outer = self.model, self

        class Decoder(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = model

            def forward(self, input_ids, attention_mask, position_ids, use_cache):
                assert attention_mask.shape == (*input_ids.shape[:1], 1, *(2 * input_ids.shape[1:]))
                assert set(attention_mask.unique().tolist()) <= {0.0, 1.0}
                bias = (1 - attention_mask) * torch.finfo(attention_mask.dtype).min
                return self.inner(input_ids, attention_mask=bias, position_ids=position_ids, use_cache=use_cache)

        return Decoder()
"""


def remote(folder, weights):
    config = CONFIG | {
        "model_type": "llada2_moe",
        "architectures": ["TinyModel"],
        "auto_map": {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyModel"},
    }
    tiny.publish(folder, config, weights)
    (folder / "modeling_tiny.py").write_text(REMOTE)
    return folder


def test_code_of_a_model_runs_only_when_that_is_asked_for(tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    weights, tokens = tiny.llama_weights(query_norm=True), tiny.a_text()
    folder = remote(tmp_path / "model", weights)
    with pytest.raises(ArgumentError, match="trust_remote_code=True"):
        df.load_denoiser(folder)
    assert not (tmp_path / "modules").exists()
    model = df.load_denoiser(folder, trust_remote_code=True)
    expected = tiny.llama_by_hand(weights, tokens, tiny.blocks_of(BLOCK))
    torch.testing.assert_close(model.logits(tokens[None])[0].double(), expected, atol=1e-5, rtol=1e-5)
    assert not isinstance(model, df.CachingDenoiser)
    with pytest.raises(ArgumentError, match="cache"):
        model.logits(tokens[None], cache=df.load_denoiser(sdar(tmp_path / "sdar")).new_cache())
