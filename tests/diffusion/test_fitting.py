"""The head of a folder: the conditioners of its recipe, and what it was fitted as."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from tiny_folders import make_folder

import circuits as ct
from diffusion import (
    CircuitTraining,
    CoupledHead,
    LatentPotentials,
    LowRankTransitions,
    MixtureWeights,
    TransformerConfig,
    TransformerDenoiser,
    TransitionGates,
    cache_logits,
    fit_coupled,
)
from diffusion.app.fitting import initial_head, structures_of, was_fitted
from diffusion.app.recipe import PRESETS, CircuitRecipe
from diffusion.app.workspace import Workspace
from diffusion.errors import ArgumentError, Interrupted
from diffusion.training.circuit import coupled_loss


def test_a_head_that_was_fitted_before_an_option_existed_was_fitted_at_its_default(tmp_path):
    recipe, stamp = PRESETS["default"], tmp_path / "circuit.json"
    older = {"circuit": asdict(recipe.circuit), "seed": recipe.seed}
    del older["circuit"]["transitions"], older["circuit"]["hidden_units"], older["circuit"]["has_potentials"]
    del older["circuit"]["normalization"]
    del older["circuit"]["training"]["feature_learning_rate"]
    stamp.write_text(json.dumps(older))
    assert was_fitted(tmp_path, recipe)
    assert not was_fitted(tmp_path, replace(recipe, circuit=replace(recipe.circuit, has_potentials=True)))
    assert not was_fitted(tmp_path, replace(recipe, seed=1))


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({}, []),
        ({"has_potentials": True, "hidden_units": 5}, [LatentPotentials]),
        ({"has_potentials": True, "transitions": "gates", "num_tables": 3}, [LatentPotentials, TransitionGates]),
        ({"transitions": "low_rank", "rank": 2}, [LowRankTransitions]),
        ({"has_mixture": True}, [MixtureWeights]),
        ({"has_mixture": True, "has_potentials": True}, [LatentPotentials, MixtureWeights]),
        ({"normalization": "local", "has_potentials": True}, [LatentPotentials]),
    ],
)
def test_a_recipe_says_which_conditioners_are_learnt(options, kinds, tmp_path):
    config = TransformerConfig(
        vocab_size=9, mask_id=8, pad_id=7, eos_id=6, context_length=4, block_length=4, width=16, num_layers=1,
        num_heads=2,
    )  # fmt: skip
    windows = torch.randint(6, (40, 8), generator=torch.Generator().manual_seed(0))
    settings = CircuitRecipe(is_calibrated=False, training=CircuitTraining(steps=12, batch_size=40), **options)
    cache = cache_logits(
        TransformerDenoiser(config, seed=0).eval(), windows, tmp_path / "cache", block_length=4,
        features=settings.needs_features, progress=False,
    )  # fmt: skip
    pc = ct.compile(ct.structures.hmm(4, 3, 9), seed=0)
    head = initial_head(pc, settings, cache)
    assert [type(made) for made in head.conditioners] == kinds
    assert head.normalization == settings.normalization
    before = coupled_loss(head, cache)
    if "has_mixture" not in options:
        plain = CoupledHead(pc, normalization=settings.normalization)
        assert before == pytest.approx(coupled_loss(plain, cache), rel=1e-6)
    start = [parameter.detach().clone() for parameter in head.parameters()]
    fit_coupled(head, cache, config=settings.training, progress=False)
    assert coupled_loss(head, cache) < before
    assert all(not torch.equal(old, new) for old, new in zip(start, head.parameters(), strict=True))
    head.save(tmp_path / "head")
    assert coupled_loss(CoupledHead.load(tmp_path / "head"), cache) == pytest.approx(
        coupled_loss(head, cache), rel=1e-5
    )


def test_validation_chooses_the_structure_of_a_folders_circuit(tmp_path):
    """Among half, as many and twice the states, and a quarter by position; and the fit goes on where it was."""
    folder = make_folder(tmp_path, fits=False)
    space = Workspace(folder, progress=False)
    recipe = space.recipe()
    settings = replace(recipe.circuit, structure="auto", num_states=4, has_mixture=True)
    length, num_tokens = recipe.denoiser.block_length, space.tokenizer().vocab_size
    names = {"hmm-2", "hmm-4", "hmm-8", "hmm-1-by-position"}
    candidates = structures_of(settings, length, num_tokens)
    assert set(candidates) == names
    assert not any("by" in name for name in structures_of(settings, 1 << 12, 1 << 14))  # too many numbers
    head = space.fit(replace(recipe, circuit=settings))
    kept = ct.load(folder / "likelihood")
    assert kept.circuit.num_parameters in {one.num_parameters for one in candidates.values()}
    assert head.pc.circuit.node("member0.initial").parameter_shape == kept.circuit.node("initial").parameter_shape
    (place,) = (path for path in (folder / "checkpoints").iterdir() if path.is_dir() and "likelihood" in path.name)
    assert {path.stem for path in place.iterdir()} == names
    assert was_fitted(folder, replace(recipe, circuit=settings))
    space.fit(recipe)
    assert not place.exists()


def test_a_circuit_that_grows_ends_with_its_states_and_goes_on_where_it_was(tmp_path, monkeypatch):
    folder = make_folder(tmp_path, fits=False)
    space = Workspace(folder, progress=False)
    recipe = space.recipe()
    grows = replace(recipe, circuit=replace(recipe.circuit, num_states=8, num_splits=2))
    begun, fit = [], ct.learning.fit

    def watched(pc, *data, **options):
        begun.append(pc.log_weights("transition0").shape[0])
        if begun == [2, 4]:
            raise Interrupted("asked to stop")
        return fit(pc, *data, **options)

    monkeypatch.setattr(ct.learning, "fit", watched)
    with pytest.raises(Interrupted):
        space.fit(grows)
    head = space.fit(grows)
    assert begun == [2, 4, 2, 4, 8]
    assert head.pc.log_weights("transition0").shape == (8, 8)
    assert was_fitted(folder, grows)
    assert not was_fitted(folder, replace(grows, circuit=replace(grows.circuit, num_splits=0)))
    assert not list((folder / "checkpoints").glob("likelihood-*-*"))  # what smaller models left behind


@pytest.mark.parametrize("options", [{"num_states": 6}, {"num_states": 8, "structure": "auto"}])
def test_states_that_cannot_be_split_so_often_are_refused(options):
    with pytest.raises(ArgumentError, match="grow: expected a multiple of 4 states of the structure hmm"):
        CircuitRecipe(num_splits=2, **options)
