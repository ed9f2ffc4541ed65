"""What is killed: each scenario can be started again, ends in files, and leaves an old or a new version at any time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import circuits as ct
import diffusion as df
from diffusion.app.workspace import CircuitRecipe, DenoiserRecipe, Recipe, TextRecipe, Workspace
from diffusion.conditioners import NoiseCalibration
from diffusion.training import logit_cache
from diffusion.training.circuit import CircuitTraining
from diffusion.training.denoiser import DenoiserTraining

V, L = 9, 4
SHAPE = df.TransformerConfig(
    vocab_size=V, mask_id=8, pad_id=7, eos_id=6, context_length=4, block_length=L, width=16, num_layers=1, num_heads=2
)
WINDOWS = torch.randint(6, (24, 8), generator=torch.Generator().manual_seed(0))
TEXT = "\n\n".join(f"The {i}th text says that {i} and {i + 1} make {2 * i + 1}. " * 3 for i in range(24))
logit_cache.SECONDS_BETWEEN_RECORDS = 0.0  # a point after every batch


@dataclass(frozen=True)
class Scenario:
    """A piece of work that a kill may end anywhere.

    Attributes:
        run: does it, or goes on with it.
        prepare: what is there before.
        check: says what is wrong after a kill, None if nothing is.
    """

    run: Callable[[Path], Any]
    prepare: Callable[[Path], Any] = lambda root: None
    check: Callable[[Path], str | None] = lambda root: None


def pc_of(seed: int, states: int = 2) -> ct.CompiledCircuit:
    return ct.compile(ct.structures.hmm(L, states, V), seed=seed)


def head_of(seed: int) -> df.CoupledHead:
    return df.CoupledHead(pc_of(seed), temperature=1.0 + seed, calibration=NoiseCalibration(V, num_knots=2))


def saved(name: str, make: Callable[[int], Any], save: Callable[[Any, Path], Any], load: Callable[[Path], Any]) -> Any:
    """A model in a folder, replaced by another: a reader finds one of the two."""

    def check(root: Path) -> str | None:
        found = state_of(load(root / name))
        return None if any(same(found, state_of(make(seed))) for seed in (0, 1)) else "neither version is there"

    return Scenario(lambda root: save(make(1), root / name), lambda root: save(make(0), root / name), check)


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {**model.state_dict(), "temperature": torch.tensor(getattr(model, "temperature", 0.0))}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def fit(root: Path) -> None:
    pc, data = pc_of(0), WINDOWS[:, :L]
    ct.learning.fit(
        pc, data, num_epochs=3, batch_size=12, checkpoint_path=root / "fit.safetensors", progress=False, seed=0
    )
    ct.save(pc, root / "fitted")


def cache(root: Path) -> Any:
    return df.cache_logits(
        df.TransformerDenoiser(SHAPE), WINDOWS, root / "cache", block_length=L, top_k=3, batch_size=8, progress=False
    )


def coupled(root: Path) -> None:
    head, training = head_of(0), CircuitTraining(steps=4, batch_size=8, validate_every=2, checkpoint_every=1)
    predictions = df.LogitCache.open(root / "cache")
    df.fit_coupled(
        head, predictions, predictions, config=training, checkpoint_path=root / "run.safetensors", progress=False
    )
    head.save(root / "head")


def denoiser(root: Path) -> None:
    model, training = df.TransformerDenoiser(SHAPE), DenoiserTraining(steps=3, batch_size=4, checkpoint_every=1)
    tokens = WINDOWS.flatten()
    df.train_denoiser(model, tokens, tokens, config=training, checkpoint_path=root / "run.safetensors", progress=False)
    model.save(root / "denoiser")


def recipe(root: Path) -> Recipe:
    corpus = root.parent / "corpus.txt"
    if not corpus.exists():  # another process may read it just now
        corpus.write_text(TEXT)
    return Recipe(
        text=TextRecipe(corpus=str(corpus)),
        denoiser=DenoiserRecipe(
            context_length=8, block_length=8, width=16, num_layers=1, num_heads=2, max_length=64,
            training=DenoiserTraining(steps=3, batch_size=4),
        ),
        circuit=CircuitRecipe(
            num_states=3, likelihood_blocks=64, likelihood_epochs=1, cached_blocks=32,
            training=CircuitTraining(steps=3, batch_size=16),
        ),
        gap_windows=4,
        texts=4,
    )  # fmt: skip


def workspace(root: Path) -> None:
    models = Workspace(root / "models", progress=False)
    models.train(recipe(root))
    models.fit(recipe(root))
    models.evaluate_gap(recipe(root))


def refit(root: Path) -> None:
    models, before = Workspace(root / "models", progress=False), recipe(root)
    models.fit(replace(before, circuit=replace(before.circuit, likelihood_epochs=2)))


def refit_check(root: Path) -> str | None:
    models = Workspace(root / "models", progress=False)
    found = [path.exists() for path in (models.path / "head", models.path / "likelihood")]
    if not all(found):
        return "the circuit of before is gone and the new one is not there"
    models.head()
    return None


SCENARIOS: dict[str, Scenario] = {
    "circuit": saved("pc", pc_of, ct.save, ct.load),
    "head": saved("head", head_of, lambda head, path: head.save(path), df.CoupledHead.load),
    "new head": Scenario(lambda root: head_of(0).save(root / "deep" / "head")),
    "fit": Scenario(fit),
    "cache": Scenario(cache),
    "coupled": Scenario(coupled, cache),
    "denoiser": Scenario(denoiser),
    "workspace": Scenario(workspace),
    "refit": Scenario(refit, workspace, refit_check),
}
