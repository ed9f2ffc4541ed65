"""LLaDA and iLLaDA: their layouts, special tokens and masks."""

import tempfile
from pathlib import Path

import pytest
import tiny_models as tiny
import torch

import diffusion as df
from diffusion.errors import ArgumentError, CheckpointError

pytest.importorskip("transformers", reason="LLaDA runs on the Llama classes of transformers")

ILLADA = tiny.llama_config(model_type="illada", architectures=["ILLaDAForCausalLM"], tie_word_embeddings=True)


def llada(folder, *, num_shards=3, weights=None, files=(), **config):
    weights = tiny.llama_weights(num_key_value_heads=tiny.NUM_HEADS) if weights is None else weights
    published = tiny.in_the_layout_of_llada(weights)
    return tiny.publish(folder, tiny.llada_config(**config), published, num_shards=num_shards, files=files)


class TestLLaDA(df.testing.DenoiserTestCase):
    def make_denoiser(self):
        with tempfile.TemporaryDirectory() as folder:
            return df.load_denoiser(llada(Path(folder)))


class TestILLaDA(df.testing.DenoiserTestCase):
    def make_denoiser(self):
        with tempfile.TemporaryDirectory() as folder:
            return df.load_denoiser(tiny.publish(Path(folder), ILLADA, tiny.llama_weights(tied=True)))


def test_the_layout_is_that_of_the_published_files(tmp_path):
    names = set(tiny.in_the_layout_of_llada(tiny.llama_weights()))
    first = {f"model.transformer.blocks.0.{name}_proj.weight" for name in ("q", "k", "v", "ff", "up")}
    assert first < names
    assert {"model.transformer.blocks.1.attn_out.weight", "model.transformer.blocks.1.ff_out.weight"} < names
    assert {"model.transformer.wte.weight", "model.transformer.ln_f.weight", "model.transformer.ff_out.weight"} < names
    assert {"model.transformer.blocks.0.attn_norm.weight", "model.transformer.blocks.0.ff_norm.weight"} < names
    assert len(names) == 3 + 9 * tiny.NUM_LAYERS


@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_position_of_llada_sees_every_other(tmp_path, num_shards):
    weights, tokens = tiny.llama_weights(num_key_value_heads=tiny.NUM_HEADS), tiny.a_text()
    model = df.load_denoiser(llada(tmp_path, weights=weights, num_shards=num_shards))
    expected = tiny.llama_by_hand(weights, tokens, tiny.everything, num_key_value_heads=tiny.NUM_HEADS)
    torch.testing.assert_close(model.logits(tokens[None])[0].double(), expected, atol=1e-5, rtol=1e-5)


def test_every_position_of_illada_sees_every_other_and_its_output_is_its_embedding(tmp_path):
    weights, tokens = tiny.llama_weights(tied=True), tiny.a_text()
    model = df.load_denoiser(tiny.publish(tmp_path, ILLADA, weights, num_shards=2))
    expected = tiny.llama_by_hand(weights, tokens, tiny.everything)
    torch.testing.assert_close(model.logits(tokens[None])[0].double(), expected, atol=1e-5, rtol=1e-5)
    assert model.head.weight is model.backbone.model.embed_tokens.weight


def test_an_output_layer_that_is_tied_may_be_in_the_files_too(tmp_path):
    weights = tiny.llama_weights(tied=True)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    model = df.load_denoiser(tiny.publish(tmp_path, ILLADA, weights))
    assert torch.equal(model.head.weight, weights["lm_head.weight"])


def test_a_batch_with_padding_has_the_logits_of_each_text_alone(tmp_path):
    model = df.load_denoiser(llada(tmp_path))
    texts = [tiny.a_text(length, seed=length) for length in range(7, 15)]
    batch = torch.full((8, 14), tiny.PAD)
    for row, text in zip(batch, texts, strict=True):
        row[-len(text) :] = text
    valid = torch.arange(14) >= 14 - torch.tensor([[len(text)] for text in texts])
    together, features = model.logits_and_features(batch, valid=valid, window=(9, 14))
    for row, text in enumerate(texts):
        alone, its_features = model.logits_and_features(text[None], window=(len(text) - 5, len(text)))
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(features[row : row + 1], its_features, atol=1e-5, rtol=1e-5)


def test_logits_are_read_from_the_features(tmp_path):
    model = df.load_denoiser(llada(tmp_path))
    assert isinstance(model, df.FeatureDenoiser)
    assert not isinstance(model, df.CachingDenoiser)
    logits, features = model.logits_and_features(tiny.a_text()[None])
    assert features.shape == (1, 9, tiny.WIDTH)
    torch.testing.assert_close(features @ model.head.weight.T, logits)


def test_special_tokens_are_those_of_config_and_tokenizer(tmp_path):
    files = {"tokenizer.json": tiny.tokenizer_json()}
    model = df.load_denoiser(llada(tmp_path, files=files))
    spec = model.spec
    assert model.tokenizer_fingerprint == df.load_tokenizer(tmp_path).fingerprint
    assert (spec.vocab_size, spec.mask_id, spec.pad_id, spec.max_length) == (20, tiny.MASK, tiny.PAD, 32)
    assert spec.eos_ids == (tiny.END, tiny.TURN)
    assert spec.forbidden_ids == (tiny.MASK, 18, 19)  # the vocabulary is wider than the tokenizer


def test_without_a_config_for_it_the_mask_is_what_the_tokenizer_calls_so(tmp_path):
    files = {"tokenizer.json": tiny.tokenizer_json()}
    assert df.load_denoiser(llada(tmp_path, files=files, mask_token_id=None)).spec.mask_id == tiny.MASK


def test_the_special_tokens_of_the_real_models():
    from diffusion.denoisers.adapters.llada import ILLADA, LLADA

    assert (LLADA.mask_id, LLADA.end_ids, ILLADA.mask_id) == (126336, (126081, 126348), 5)


@pytest.mark.parametrize(
    ("key", "value"), [("activation_type", "swiglu"), ("rope", False), ("block_type", "sequential"), ("alibi", True)]
)
def test_another_architecture_is_refused(tmp_path, key, value):
    with pytest.raises(ArgumentError, match=key):
        df.load_denoiser(llada(tmp_path, **{key: value}))


@pytest.mark.parametrize(("key", "value"), [("d_model", None), ("n_layers", "2"), ("mask_token_id", 99)])
def test_a_config_that_cannot_be_is_refused(tmp_path, key, value):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        df.load_denoiser(llada(tmp_path, **{key: value}))


def test_weights_of_another_shape_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="missing"):
        df.load_denoiser(llada(tmp_path, n_layers=3))


def test_weights_may_be_converted_and_spread(tmp_path):
    folder, tokens = llada(tmp_path), tiny.a_text()[None]
    expected = df.load_denoiser(folder).logits(tokens)
    half = df.load_denoiser(folder, dtype="bfloat16")
    assert half.head.weight.dtype == torch.bfloat16
    assert half.logits(tokens).dtype == torch.float32
    torch.testing.assert_close(half.logits(tokens), expected, atol=0.5, rtol=0.1)
    pytest.importorskip("accelerate", reason="weights are spread with accelerate")
    layers = {f"backbone.model.layers.{layer}": "cpu" for layer in range(tiny.NUM_LAYERS)}
    rest = dict.fromkeys(["backbone.model.embed_tokens", "backbone.model.norm", "backbone.model.rotary_emb"], "cpu")
    for device in ("auto", {"": "cpu"}, {**layers, **rest, "head": "cpu"}):
        torch.testing.assert_close(df.load_denoiser(folder, device=device).logits(tokens), expected)
    with pytest.raises(ArgumentError, match="head"):
        df.load_denoiser(folder, device={**layers, **rest})
