from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion.denoisers.transformer import TransformerConfig, TransformerDenoiser
from diffusion.errors import ArgumentError, CheckpointError, CorpusError
from diffusion.training import denoiser as denoiser_training
from diffusion.training.denoiser import DenoiserTraining, TrainingCurve, held_out_loss, train_denoiser

PAD, MASK, EOS, FIRST = range(4)
PERIOD = 5
SHAPE = TransformerConfig(
    vocab_size=FIRST + PERIOD, mask_id=MASK, pad_id=PAD, eos_id=EOS, context_length=8, block_length=8, width=16,
    num_layers=1, num_heads=2,
)  # fmt: skip
TRAINING = DenoiserTraining(
    steps=12, batch_size=8, warmup_steps=2, validate_every=5, validation_windows=8, checkpoint_every=3
)
COUNTING = FIRST + torch.arange(400) % PERIOD


def train(
    seed: int = 0, config: DenoiserTraining = TRAINING, **arguments: Any
) -> tuple[dict[str, Tensor], TrainingCurve]:
    model = TransformerDenoiser(SHAPE, seed=seed)
    curve = train_denoiser(model, COUNTING, COUNTING[:200], config=config, progress=False, **arguments)
    return model.state_dict(), curve


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("loss", "schedule"), [("masked_mean", "linear"), ("elbo", "linear"), ("elbo", "cosine")])
def test_it_learns_to_count(loss: Any, schedule: Any) -> None:
    config = replace(TRAINING, steps=150, batch_size=16, learning_rate=1e-2, loss=loss, schedule=schedule)
    _, curve = train(config=config)
    assert curve.held_out[0] > 0.8 * math.log(PERIOD)
    assert curve.held_out[-1] < 0.25 * math.log(PERIOD)


def test_curve_has_an_entry_per_validation_and_one_at_the_end() -> None:
    _, curve = train()
    assert curve.steps == (5, 10, 12)
    assert len(curve.train) == len(curve.held_out) == 3
    assert all(math.isfinite(value) for value in curve.train + curve.held_out)


def test_same_seed_same_result_and_another_seed_another() -> None:
    first, again, other = train(), train(), train(config=replace(TRAINING, seed=1))
    assert same(first[0], again[0])
    assert first[1] == again[1]
    assert not same(first[0], other[0])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("killed_after", [1, 4, 6, 11, 12])
def test_killed_and_started_again_ends_like_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int
) -> None:
    path = tmp_path / "folder" / "run.safetensors"
    update = denoiser_training._update
    done = 0

    def update_until_killed(*arguments: Any) -> float:
        nonlocal done
        if done == killed_after:
            raise Killed
        done += 1
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(denoiser_training, "_update", update_until_killed)
        if killed_after < TRAINING.steps:
            with pytest.raises(Killed):
                train(checkpoint_path=path)
        else:
            train(checkpoint_path=path)
    resumed = train(checkpoint_path=path)
    uninterrupted = train()
    assert same(resumed[0], uninterrupted[0])
    assert resumed[1] == uninterrupted[1]


def test_finished_run_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.safetensors"
    finished = train(checkpoint_path=path)
    monkeypatch.setattr(denoiser_training, "_update", None)
    assert same(train(checkpoint_path=path)[0], finished[0])


@pytest.mark.parametrize("change", [{"learning_rate": 0.5}, {"steps": 13}, {"seed": 4}])
def test_checkpoint_of_another_run_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "run.safetensors"
    train(checkpoint_path=path)
    with pytest.raises(CheckpointError, match="expected this run, got one with a different configuration"):
        train(config=replace(TRAINING, **change), checkpoint_path=path)
    with pytest.raises(CheckpointError, match="a different held-out text and training text"):
        train_denoiser(TransformerDenoiser(SHAPE), COUNTING[1:], config=TRAINING, checkpoint_path=path, progress=False)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-4], lambda data: b"\x80\x04" + data])
def test_damaged_checkpoint_is_a_checkpoint_error(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "run.safetensors"
    train(checkpoint_path=path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError):
        train(checkpoint_path=path)


def test_saved_model_is_not_a_training_checkpoint(tmp_path: Path) -> None:
    TransformerDenoiser(SHAPE).save(tmp_path)
    with pytest.raises(CheckpointError, match="expected the format unfactor-training"):
        train(checkpoint_path=tmp_path / "model.safetensors")


@pytest.mark.parametrize("batch_size", [2, 7])
def test_training_loss_of_a_uniform_model_is_the_entropy_of_its_tokens(
    batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a sequence has no mask: it is not one that costs nothing."""

    def uniform(self: TransformerDenoiser, tokens: Tensor, *, window: tuple[int, int]) -> Tensor:
        return torch.zeros(len(tokens), window[1] - window[0], SHAPE.vocab_size)

    monkeypatch.setattr(TransformerDenoiser, "logits", uniform)
    model, config = TransformerDenoiser(SHAPE), replace(TRAINING, batch_size=batch_size)
    for step in range(20):
        loss = denoiser_training._loss(model, COUNTING, config, step)
        assert float(loss) == pytest.approx(math.log(SHAPE.vocab_size), rel=1e-6)


def test_untrained_model_knows_nothing() -> None:
    loss = held_out_loss(TransformerDenoiser(SHAPE), COUNTING.view(-1, 16), block_length=8)
    assert loss == pytest.approx(math.log(SHAPE.vocab_size), abs=0.2)


def test_held_out_loss_needs_windows() -> None:
    for shape, block_length in (((0, 16), 8), ((3, 16), 17), ((3, 16), 0)):
        with pytest.raises(ArgumentError, match="held_out: expected windows"):
            held_out_loss(TransformerDenoiser(SHAPE), torch.ones(shape, dtype=torch.long), block_length=block_length)


def test_matrix_products_in_bfloat16_train_too() -> None:
    _, curve = train(config=replace(TRAINING, precision="bfloat16"))
    _, exact = train(config=replace(TRAINING, precision="float32"))
    assert curve.held_out != exact.held_out
    assert curve.held_out == pytest.approx(exact.held_out, abs=0.05)


def test_text_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(CorpusError, match="expected at least one window of 16"):
        train_denoiser(TransformerDenoiser(SHAPE), COUNTING[:15], config=TRAINING, progress=False)
    with pytest.raises(ArgumentError, match="tokens: expected ids from"):
        train_denoiser(TransformerDenoiser(SHAPE), COUNTING + PERIOD, config=TRAINING, progress=False)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": -1}, {"batch_size": 0}, {"learning_rate": 0.0}, {"learning_rate": math.nan}, {"schedule": "cubic"},
        {"loss": "mean"},
        {"short_context_probability": 1.5}, {"gradient_clip": -1.0}, {"checkpoint_every": 0},
    ],
)  # fmt: skip
def test_bad_configuration_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(change))):
        replace(TRAINING, **change)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_the_precision_of_training_is_that_of_its_configuration(half: torch.dtype) -> None:
    config = replace(TRAINING, precision="float32", steps=3)
    expected, _ = train(config=config)
    with torch.autocast("cpu", dtype=half):
        found, _ = train(config=config)
    assert same(expected, found)
