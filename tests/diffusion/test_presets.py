"""Presets that no test can afford are run scaled down, and their sizes are those that the documentation says."""

from dataclasses import replace

import pytest
import torch
from tiny_folders import make_folder

from diffusion.app.fitting import initial_denoiser
from diffusion.app.recipe import PRESETS
from diffusion.app.workspace import Workspace


def scaled(recipe, corpus):
    """A recipe with all that makes it large as small as it can be."""
    denoiser, circuit = recipe.denoiser, recipe.circuit
    few = {"steps": 3, "batch_size": 4}
    return replace(
        recipe.with_text(str(corpus), None),
        text=replace(recipe.text, corpus=str(corpus), vocab_size=300),
        denoiser=replace(
            denoiser, width=16, num_heads=2, num_layers=1, training=replace(denoiser.training, warmup_steps=1, **few)
        ),
        circuit=replace(
            circuit, num_states=5, likelihood_blocks=40, cached_blocks=24, training=replace(circuit.training, **few)
        ),
        gap_windows=4,
    )


class Tokens:
    """What a tokenizer says of its size."""

    vocab_size, mask_id, pad_id, eos_id, forbidden_ids = PRESETS["gpu"].text.vocab_size, 1, 0, 2, (0, 1)


def test_the_preset_for_a_gpu_has_the_sizes_that_its_time_is_planned_for():
    recipe = PRESETS["gpu"]
    assert initial_denoiser(recipe, Tokens()).num_parameters == 38_813_696
    assert recipe.text.tokenizer == "bpe"
    assert recipe.circuit.num_states == 1024
    tokens = recipe.denoiser.training.batch_size * (recipe.denoiser.context_length + recipe.denoiser.block_length)
    assert 6 * 38_813_696 * tokens * recipe.denoiser.training.steps == pytest.approx(3.8e16, rel=0.01)  # operations
    per_token = 2 * (recipe.text.vocab_size + recipe.denoiser.width)  # bytes
    cached = per_token * recipe.denoiser.block_length * recipe.circuit.cached_blocks
    assert cached == pytest.approx(2.7e9, rel=0.01)


def test_the_preset_for_a_gpu_runs_at_every_size(tmp_path, one_thread):
    make_folder(tmp_path, fits=False)  # which writes a corpus
    recipe = scaled(PRESETS["gpu"], tmp_path / "corpus.txt")
    workspace = Workspace(tmp_path / "gpu", progress=False)
    workspace.train(recipe)
    head = workspace.fit(recipe)
    assert head.needs_features
    assert torch.isfinite(torch.tensor([row.coupled.value for row in workspace.evaluate_gap(recipe).rows])).all()
