"""Dream: biases of Qwen2, and outputs that are one position ahead."""

import json
import tempfile
from pathlib import Path

import pytest
import tiny_models as tiny
import torch

import diffusion as df

pytest.importorskip("transformers", reason="Dream runs on the Qwen2 classes of transformers")

CONFIG = tiny.llama_config(
    model_type="Dream", architectures=["DreamModel"], mask_token_id=tiny.MASK, pad_token_id=tiny.PAD
)
CONFIG |= {"use_sliding_window": False, "rope_scaling": None, "tie_word_embeddings": False}


def dream(folder, weights=None, **config):
    return tiny.publish(folder, CONFIG | config, weights or tiny.llama_weights(bias=True), num_shards=2)


class TestDream(df.testing.DenoiserTestCase):
    def make_denoiser(self):
        with tempfile.TemporaryDirectory() as folder:
            return df.load_denoiser(dream(Path(folder)))


def test_logits_are_those_of_the_position_before(tmp_path):
    weights, tokens = tiny.llama_weights(bias=True), tiny.a_text()
    raw = tiny.llama_by_hand(weights, tokens, tiny.everything)
    expected = torch.cat([raw[:1], raw[:-1]])
    model = df.load_denoiser(dream(tmp_path, weights))
    torch.testing.assert_close(model.logits(tokens[None])[0].double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        model.logits(tokens[None], window=(3, 5))[0].double(), expected[3:5], atol=1e-5, rtol=1e-5
    )


def test_features_are_those_that_the_logits_are_read_from(tmp_path):
    model = df.load_denoiser(dream(tmp_path))
    logits, features = model.logits_and_features(tiny.a_text()[None], window=(0, 4))
    torch.testing.assert_close(features @ model.head.weight.T, logits)


def test_padding_is_never_the_position_before(tmp_path):
    model, tokens = df.load_denoiser(dream(tmp_path)), tiny.a_text()
    padded = torch.cat([torch.full((3,), tiny.PAD), tokens])[None]
    valid = torch.arange(12)[None] >= 3
    torch.testing.assert_close(model.logits(padded, valid=valid)[:, 3:], model.logits(tokens[None]))


def test_special_tokens(tmp_path):
    spec = df.load_denoiser(dream(tmp_path)).spec
    assert (spec.mask_id, spec.pad_id, spec.eos_ids) == (tiny.MASK, tiny.PAD, (tiny.END,))
    from diffusion.denoisers.adapters.dream import SPECIALS

    assert (SPECIALS.mask_id, SPECIALS.pad_id) == (151666, 151643)


def test_the_vocabulary_may_lie_in_the_older_files(tmp_path):
    folder = dream(tmp_path, mask_token_id=None)
    added = {"<|mask|>": 13, "<|im_end|>": 16, "<|endoftext|>": tiny.END}
    letters = {chr(ord("a") + id): id for id in range(18) if id not in added.values()}
    for name, content in (("vocab.json", letters), ("added_tokens.json", added)):
        (folder / name).write_text(json.dumps(content))
    spec = df.load_denoiser(folder).spec
    assert (spec.mask_id, spec.eos_ids, spec.forbidden_ids) == (13, (tiny.END, 16), (13, 18, 19))
