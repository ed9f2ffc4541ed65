"""The denoiser and the head that a recipe asks for, before they are trained."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import circuits as ct
from circuits import Circuit, CompiledCircuit
from circuits.reading import record_of
from circuits.store import made_from
from diffusion.app.recipe import CircuitRecipe, Recipe
from diffusion.conditioners.base import Conditioner
from diffusion.conditioners.latent_potentials import LatentPotentials
from diffusion.conditioners.low_rank_transitions import LowRankTransitions
from diffusion.conditioners.marginal_matching import MarginalMatching
from diffusion.conditioners.mixture_weights import MixtureWeights
from diffusion.conditioners.noise_calibration import NoiseCalibration
from diffusion.conditioners.transition_gates import TransitionGates
from diffusion.denoisers.transformer import TransformerConfig, TransformerDenoiser
from diffusion.errors import CheckpointError
from diffusion.head import FORMAT as HEAD
from diffusion.head import CoupledHead
from diffusion.json_files import read_json
from diffusion.text.tokenizer import TextTokenizer
from diffusion.training.logit_cache import LogitCache

_MOST_EMISSIONS = 1 << 24
"""Of tables by position; beyond, a structure has none."""

STAMP = "circuit.json"
"""What the head was fitted with, in folders of before; its manifest says it now."""


def initial_denoiser(recipe: Recipe, tokenizer: TextTokenizer) -> TransformerDenoiser:
    """Return a denoiser of a recipe's shape for the tokens of a tokenizer, with the weights of the recipe's seed."""
    shape = recipe.denoiser
    return TransformerDenoiser(
        TransformerConfig(
            vocab_size=tokenizer.vocab_size,
            mask_id=tokenizer.mask_id,
            pad_id=tokenizer.pad_id,
            eos_id=tokenizer.eos_id,
            forbidden_ids=tokenizer.forbidden_ids,
            context_length=shape.context_length,
            block_length=shape.block_length,
            max_length=shape.max_length,
            width=shape.width,
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            attention=shape.attention,
        ),
        seed=recipe.seed,
    )


def structures_of(settings: CircuitRecipe, block_length: int, num_tokens: int) -> dict[str, Circuit]:
    """Return the structures, by name, that validation is to choose from; of a model that grows, the first."""
    states = settings.num_states
    if settings.structure == "hmm":
        return {"hmm": ct.structures.hmm(block_length, states >> settings.num_splits, num_tokens)}
    sizes = sorted({max(1, states // 2), states, 2 * states})
    found = {f"hmm-{size}": ct.structures.hmm(block_length, size, num_tokens) for size in sizes}
    few = max(1, states // 4)
    if block_length * few * num_tokens <= _MOST_EMISSIONS:
        found[f"hmm-{few}-by-position"] = ct.structures.hmm(block_length, few, num_tokens, homogeneous=False)
    return found


def initial_head(pc: CompiledCircuit, settings: CircuitRecipe, cache: LogitCache) -> CoupledHead:
    """Return a head on a circuit of maximum likelihood, with the conditioners that a recipe asks for.

    The cache is of the predictions that it will be fitted on, with features where ``settings.needs_features``.
    """
    conditioners: list[Conditioner] = []
    calibration = None
    if settings.has_calibration:
        counts = np.bincount(cache.tokens.ravel(), minlength=cache.vocab_size)
        calibration = NoiseCalibration.dividing_out(torch.from_numpy(counts))
        conditioners.append(calibration)
    options: dict[str, Any] = {"hidden": settings.hidden_units}
    if settings.has_mixture:
        pc = MixtureWeights.with_independent(pc, calibration)
        options["prefix"] = "member0."
    num_features = None
    if settings.needs_features:
        assert cache.features is not None
        num_features = cache.features.shape[2]
        if settings.has_potentials:
            conditioners.append(LatentPotentials.for_hmm(pc, num_features, **options))
        if settings.transitions == "gates":
            conditioners.append(TransitionGates.for_hmm(pc, num_features, num_tables=settings.num_tables, **options))
        if settings.transitions == "low_rank":
            conditioners.append(LowRankTransitions.for_hmm(pc, num_features, rank=settings.rank, **options))
    if settings.has_mixture:
        conditioners.append(MixtureWeights.for_mixture(pc, num_features, hidden=settings.hidden_units, power=1.0))
    if settings.num_matching_steps:
        conditioners.append(MarginalMatching(settings.num_matching_steps))
    return CoupledHead(pc, conditioners=conditioners, normalization=settings.normalization).to(pc.device)


def origin(recipe: Recipe) -> dict[str, Any]:
    """Return what a circuit and a head depend on, besides the denoiser and the text of their folder."""
    return {"circuit": asdict(recipe.circuit), "seed": recipe.seed}


def was_fitted(folder: Path, recipe: Recipe) -> bool:
    """Return whether a folder's head was fitted as a recipe says: by its manifest, or the file beside it of before.

    Raises CheckpointError if the head is damaged.
    """
    found = made_from(folder / "head", HEAD)
    try:
        found = read_json(folder / STAMP) if found is None else found
        return record_of(CircuitRecipe, found["circuit"]) == recipe.circuit and found["seed"] == recipe.seed
    except (CheckpointError, KeyError, TypeError):
        return False
