"""Which of several structures a corpus asks for: each is fitted, and validation decides."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuits.arguments import checked_count
from circuits.engine.compile import CompiledCircuit, compile
from circuits.errors import ArgumentError
from circuits.learning.fit import fit
from circuits.learning.samples import Rows, Samples, checked_samples
from circuits.symbolic import Circuit


@dataclass(frozen=True, kw_only=True)
class StructureScore:
    """How well one of the structures did."""

    log_likelihood: float
    """Mean of the validation samples, in nats per sample."""
    behind: float
    """By how much that is less than the best one's."""
    standard_error: float
    """Of ``behind``: both are asked about the same samples, so it is that of the mean difference."""
    num_free_parameters: int
    """What AIC and BIC count."""


@dataclass(frozen=True, kw_only=True)
class StructureChoice:
    """The chosen structure, fitted."""

    name: str
    pc: CompiledCircuit
    scores: Mapping[str, StructureScore]
    """Of all, by name."""


def choose_structure(
    candidates: Mapping[str, Circuit],
    data: Samples | Rows,  # shape: (N, D)
    validation_data: Samples | Rows,  # shape: (M, D)
    *,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> StructureChoice:
    """Fit every structure, and return the smallest one that is not clearly worse than the best in validation.

    *Not clearly*: its mean validation log-likelihood is within one standard error of the best one's (the one-standard-
    error rule of Breiman, Friedman, Olshen, Stone 1984, with the standard error of the mean difference). *Smallest*: by
    free parameters.

    Args:
        candidates: symbolic circuits over the same variables, by name.
        data: as in :func:`fit`.
        validation_data: at least two samples; also what every fit takes its best epoch from.
        folder: where every fit keeps its checkpoint, ``{name}.safetensors``: an interrupted choice that is made again
            goes on where it was, and ends like one that was not. None: nothing is kept.
        seed: of the circuits' first weights.
        device: where they are.
        dtype: torch.float32 or torch.float64.
        **options: of :func:`fit`, the same for all.

    Raises:
        ArgumentError: no candidates, a name that no file can have, fewer than two validation samples, or none of the
            candidates allows them all; or what :func:`fit` refuses.
    """
    if not isinstance(candidates, Mapping) or not candidates:
        raise ArgumentError(f"candidates: expected circuits by name, got {candidates!r:.60}")
    for name, circuit in candidates.items():
        if not isinstance(name, str) or not name or Path(name).name != name or not isinstance(circuit, Circuit):
            raise ArgumentError(
                f"candidates: expected circuits by names that files can have, got {name!r}: {circuit!r:.60}"
            )
    if not isinstance(folder, str | os.PathLike | None):
        raise ArgumentError(f"folder: expected a path or None, got {folder!r:.60}")
    fitted = {}
    for name, circuit in candidates.items():
        pc = compile(circuit, device=device, dtype=dtype, seed=seed)
        checked_count("validation_data", len(checked_samples(pc, "validation_data", validation_data)), 2)
        path = None if folder is None else Path(folder) / f"{name}.safetensors"
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        fit(pc, data, validation_data=validation_data, checkpoint_path=path, **options)
        fitted[name] = pc
    return choose_fitted(fitted, validation_data)


def choose_fitted(
    fitted: Mapping[str, CompiledCircuit],
    validation_data: Samples | Rows,  # shape: (M, D)
) -> StructureChoice:
    """Return the smallest circuit that is not clearly worse than the best one, as :func:`choose_structure` does.

    Args:
        fitted: circuits over the same variables, by name, each learnt in its own way.
        validation_data: at least two samples.

    Raises:
        ArgumentError: no circuits, fewer than two validation samples, or no circuit allows them all.
    """
    is_mapping = isinstance(fitted, Mapping) and len(fitted) > 0
    if not is_mapping or not all(isinstance(pc, CompiledCircuit) for pc in fitted.values()):
        raise ArgumentError(f"fitted: expected compiled circuits by name, got {fitted!r:.60}")
    losses = {name: _log_likelihoods(pc, validation_data) for name, pc in fitted.items()}
    checked_count("validation_data", len(next(iter(losses.values()))), 2)
    best = max(losses, key=lambda name: float(losses[name].mean()))
    if not float(losses[best].mean()) > -torch.inf:
        raise ArgumentError(
            "validation_data: expected samples that some candidate allows, got one that each rules out; raise "
            "pseudocount, or leave it out"
        )
    scores = {}
    for name, own in losses.items():
        difference = losses[best] - own
        error = float(difference.std() / len(own) ** 0.5) if bool(difference.isfinite().all()) else 0.0
        scores[name] = StructureScore(
            log_likelihood=float(own.mean()),
            behind=float(difference.mean()),
            standard_error=error,
            num_free_parameters=fitted[name].num_free_parameters,
        )
    near = [name for name, score in scores.items() if score.behind <= score.standard_error]
    chosen = min(near, key=lambda name: (scores[name].num_free_parameters, scores[name].behind))
    return StructureChoice(name=chosen, pc=fitted[chosen], scores=scores)


@torch.no_grad()
def _log_likelihoods(pc: CompiledCircuit, data: Samples | Rows) -> Tensor:
    """Return the log-likelihood of every sample, of what is observed: float64 (N,)."""
    batches = checked_samples(pc, "data", data).batches(256)
    return torch.cat([pc.log_partition(batch.evidence).double().cpu() for batch in batches])
