"""The head of a folder: the conditioners of its recipe, and what it was fitted as."""

import json
from dataclasses import asdict, replace

from diffusion.app.fitting import was_fitted
from diffusion.app.recipe import PRESETS


def test_a_head_that_was_fitted_before_an_option_existed_was_fitted_at_its_default(tmp_path):
    recipe, stamp = PRESETS["default"], tmp_path / "circuit.json"
    older = {"circuit": asdict(recipe.circuit), "seed": recipe.seed}
    del older["circuit"]["has_potentials"], older["circuit"]["training"]["feature_learning_rate"]
    stamp.write_text(json.dumps(older))
    assert was_fitted(tmp_path, recipe)
    assert not was_fitted(tmp_path, replace(recipe, circuit=replace(recipe.circuit, has_potentials=True)))
    assert not was_fitted(tmp_path, replace(recipe, seed=1))
