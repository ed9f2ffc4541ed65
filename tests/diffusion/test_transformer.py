from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion.denoisers.base import Denoiser, DenoiserSpec
from diffusion.denoisers.transformer import TransformerConfig, TransformerDenoiser
from diffusion.errors import ArgumentError, CheckpointError

PAD, MASK, EOS, UNK = range(4)
CONFIG = TransformerConfig(
    vocab_size=12, mask_id=MASK, pad_id=PAD, eos_id=EOS, forbidden_ids=(UNK,), context_length=6, block_length=4,
    max_length=40, width=16, num_layers=2, num_heads=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> TransformerDenoiser:
    model = TransformerDenoiser(CONFIG, seed=1)
    with torch.no_grad():  # larger than at initialisation, so that every part of the model matters
        for parameter in model.parameters():
            parameter.mul_(2).add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return model


def some_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 12, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_it_is_a_denoiser(model: TransformerDenoiser) -> None:
    assert isinstance(model, Denoiser)
    assert model.spec == DenoiserSpec(
        vocab_size=12, mask_id=MASK, eos_ids=(EOS,), pad_id=PAD, forbidden_ids=(PAD, MASK, UNK), max_length=40
    )
    logits = model.logits(some_tokens(3, 10))
    assert logits.shape == (3, 10, 12)
    assert logits.dtype == torch.float32


def test_every_position_sees_every_other(model: TransformerDenoiser) -> None:
    tokens = some_tokens(1, 8)
    reference = model.logits(tokens)
    for position in (0, 7):
        changed = tokens.clone()
        changed[0, position] = MASK
        assert bool(((model.logits(changed) - reference).abs().amax(-1) > 1e-6).all())


def test_order_of_the_tokens_matters(model: TransformerDenoiser) -> None:
    tokens = torch.tensor([[4, 5, 6, MASK]])
    assert not torch.allclose(model.logits(tokens)[:, -1], model.logits(tokens[:, [1, 0, 2, 3]])[:, -1], atol=1e-4)


@pytest.mark.parametrize("num_padding", [1, 5])
def test_padding_at_the_left_changes_nothing(model: TransformerDenoiser, num_padding: int) -> None:
    tokens = some_tokens(2, 5)
    padding = torch.full((2, num_padding), PAD)
    padded = torch.cat([padding, tokens], dim=1)
    valid = torch.cat([torch.zeros_like(padding), torch.ones_like(tokens)], dim=1).bool()
    torch.testing.assert_close(
        model.logits(padded, valid=valid)[:, num_padding:], model.logits(tokens), atol=1e-4, rtol=1e-4
    )


def test_sequences_of_a_batch_do_not_touch_each_other(model: TransformerDenoiser) -> None:
    tokens = some_tokens(3, 8)
    valid = torch.tensor([[True] * 8, [False] * 3 + [True] * 5, [False] * 8])
    together = model.logits(tokens, valid=valid)
    for row in range(3):
        alone = model.logits(tokens[row : row + 1], valid=valid[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)


def test_rows_of_padding_alone_give_finite_logits_and_gradients(model: TransformerDenoiser) -> None:
    model.zero_grad()
    logits = model.logits(torch.full((2, 5), PAD), valid=torch.zeros(2, 5, dtype=torch.bool))
    logits.square().sum().backward()
    assert bool(logits.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("window", [(6, 10), (0, 10), (2, 7), (4, 4)])
def test_window_up_to_the_span_is_a_slice_of_the_text_before_its_end(
    model: TransformerDenoiser, window: tuple[int, int]
) -> None:
    tokens = some_tokens(2, 10)
    start, stop = window
    expected = model.logits(tokens[:, :stop])[:, start:]
    torch.testing.assert_close(model.logits(tokens, window=window), expected, atol=1e-4, rtol=1e-4)


def test_window_looks_only_at_the_span_that_ends_with_it(model: TransformerDenoiser) -> None:
    tokens = some_tokens(1, 40)
    window = (26, 30)
    reference = model.logits(tokens, window=window)
    outside, inside = tokens.clone(), tokens.clone()
    outside[:, :20], outside[:, 30:] = MASK, MASK
    inside[:, 20] = MASK
    torch.testing.assert_close(model.logits(outside, window=window), reference)
    assert not torch.allclose(model.logits(inside, window=window), reference)


def test_window_applies_to_valid_too(model: TransformerDenoiser) -> None:
    tokens = some_tokens(2, 30)
    valid = torch.arange(30) >= torch.tensor([[0], [24]])
    expected = model.logits(tokens[:, 20:], valid=valid[:, 20:])[:, 6:]
    torch.testing.assert_close(model.logits(tokens, valid=valid, window=(26, 30)), expected, atol=1e-5, rtol=1e-5)


def test_same_seed_same_weights_and_other_randomness_is_left_alone() -> None:
    first, again, other = (TransformerDenoiser(CONFIG, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_saved_is_loaded(model: TransformerDenoiser, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    loaded = TransformerDenoiser.load(tmp_path / "model")
    tokens = some_tokens(2, 10)
    assert loaded.config == model.config
    assert torch.equal(loaded.logits(tokens), model.logits(tokens))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]


def damaged_config(**changes: object):
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return damage


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["embedding.weight"]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").write_text("[]"),
        damaged_config(format="something else"),
        damaged_config(format_version=99),
        damaged_config(width=32),
        damaged_config(width="16"),
        damaged_config(num_heads=0),
        damaged_config(surprise=1),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x80\x04nonsense"),
        without_a_tensor,
    ],
)
def test_damaged_folder_is_a_checkpoint_error(model: TransformerDenoiser, tmp_path: Path, damage) -> None:
    model.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError):
        TransformerDenoiser.load(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.logits(torch.full((1, 3), 12)), "ids from 0 to 11, got 12 to 12"),
        (lambda m: m.logits(torch.full((1, 3), -1)), "got -1 to -1"),
        (lambda m: m.logits(torch.zeros(1, 3)), "tokens: expected int64"),
        (lambda m: m.logits(torch.zeros(3).long()), r"expected int64 \(B, L\)"),
        (lambda m: m.logits(torch.zeros(1, 41).long()), "at most max_length = 40 positions, got 41"),
        (lambda m: m.logits(torch.zeros(1, 3).long(), valid=torch.ones(1, 3)), "valid: expected bool"),
        (lambda m: m.logits(torch.zeros(1, 3).long(), valid=torch.ones(1, 2).bool()), "valid: expected bool"),
        (lambda m: m.logits(torch.zeros(1, 3).long(), window=(2, 4)), "window: expected 0 <= start"),
        (lambda m: m.logits(torch.zeros(1, 3).long(), window=(2, 1)), "window: expected 0 <= start"),
        (lambda m: replace(CONFIG, num_heads=3), "width: expected a multiple of 2"),
        (lambda m: replace(CONFIG, num_layers=0), "num_layers: expected an integer >= 1"),
        (lambda m: replace(CONFIG, max_length=9), "max_length: expected at least context_length"),
        (lambda m: TransformerDenoiser(replace(CONFIG, mask_id=12)), "mask_id: expected 0 to"),
        (lambda m: replace(m.spec, forbidden_ids=()), "forbidden_ids: expected mask_id"),
    ],
)
def test_bad_arguments_are_named(model: TransformerDenoiser, call, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call(model)


def test_half_precision_and_tensors_without_numbers_are_refused_in_words() -> None:
    tokens = some_tokens(2, 4)
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ArgumentError, match=r"model: expected weights in float32.*call model\.float\(\)"):
            TransformerDenoiser(CONFIG).to(dtype).logits(tokens)
    for bad in (tokens.to("meta"), tokens.to_sparse()):
        with pytest.raises(ArgumentError, match="tokens: expected a"):
            TransformerDenoiser(CONFIG).logits(bad)
