"""Whole chains in few calls of the denoiser, with and without a head: how natural they are, and how new."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from _antibody_data import LENGTH, RESIDUES, VOCABULARY
from _antibody_mutations import LOOP
from _barrier_losses import Masks, one_step_losses
from _bed_antibody import common
from torch import Tensor

import diffusion as df
from circuits.files import replace_file
from diffusion.evaluation.intervals import wilson

CALLS = (1, 2, 4, 8, 16)
QUARTERS = 4


def chains(
    denoiser: df.Denoiser, head: df.JointHead | None, calls: int, number: int, path: Path, *, seed: int
) -> list[str]:
    """Return chains drawn in so many calls, from the joint distribution of each call; kept in a file.

    Args:
        denoiser: that is called.
        head: its joint output layer; None: residues of one call are independent.
        calls: that whole chains take.
        number: of chains.
        path: the file.
        seed: of all draws.
    """
    if not path.is_file():
        out = df.generate(
            denoiser,
            torch.empty(number, 0, dtype=torch.int64),
            gen_length=LENGTH,
            num_steps=calls,
            head=head,
            decode="joint",
            strategy="random",
            temperature=1.0,
            generator=torch.Generator().manual_seed(seed),
        )
        with replace_file(path) as temporary:
            temporary.write_text(json.dumps(texts_of(out.tokens)), encoding="ascii")
    return json.loads(path.read_text("ascii"))


def texts_of(ids: Tensor) -> list[str]:
    """Return chains as letters."""
    return ["".join(VOCABULARY[id] for id in row) for row in ids.tolist()]


@torch.no_grad()
def quarter_losses(denoiser: df.Denoiser, windows: Tensor, forbidden: tuple[int, ...], *, seed: int) -> np.ndarray:
    """Return nats per residue, (N,), every residue predicted once with a quarter of the chain masked: four calls."""
    order = torch.rand(windows.shape, generator=torch.Generator().manual_seed(seed)).argsort(1)
    size = windows.shape[1] // QUARTERS
    count = {"quarter": torch.full((len(windows),), size)}
    parts = [
        one_step_losses(denoiser, windows, Masks(order.roll(part * size, 1), count), forbidden)["quarter"]
        for part in range(QUARTERS)
    ]
    return torch.stack(parts).mean(0).numpy()


def distances(one: list[str], other: list[str]) -> np.ndarray:
    """Return the residues of 100 that pairs of chains do not have in common, (n, m)."""
    places = [residues_at(chain) for chain in one]
    return np.array([[LENGTH - common(place, chain) for chain in other] for place in places])


def residues_at(chain: str) -> dict[str, int]:
    """Return the places of each residue, in bits."""
    places = dict.fromkeys(RESIDUES, 0)
    for number, residue in enumerate(chain):
        places[residue] |= 1 << number
    return places


def described(
    denoiser: df.Denoiser, drawn: list[str], training: list[str], forbidden: tuple[int, ...], *, seed: int
) -> dict[str, str]:
    """Return what a table says of some chains, with 95 % intervals."""
    ids = torch.tensor([[VOCABULARY.index(residue) for residue in chain] for chain in drawn])
    with_motif = wilson(sum(LOOP.search(chain) is not None for chain in drawn), len(drawn))
    nearest = distances(drawn, training).min(1)
    pairs = distances(drawn, drawn)[~np.eye(len(drawn), dtype=bool)].reshape(len(drawn), -1).mean(1)
    return {
        "with motif": f"{with_motif.value:.2f} [{with_motif.low:.2f}, {with_motif.high:.2f}]",
        "nats a residue": interval(quarter_losses(denoiser, ids, forbidden, seed=seed), 2),
        "to another chain": interval(pairs, 0),
        "to the nearest training read": interval(nearest, 0),
    }


def interval(values: np.ndarray, digits: int, num_bootstrap: int = 2000) -> str:
    """Return a mean with the interval of its resamples."""
    resamples = values[np.random.default_rng(0).integers(len(values), size=(num_bootstrap, len(values)))].mean(1)
    low, high = np.quantile(resamples, [0.025, 0.975])
    return f"{values.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
