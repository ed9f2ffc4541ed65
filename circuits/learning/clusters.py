"""k-means on samples, to start mixtures from: one expert per cluster."""

from __future__ import annotations

import torch
from torch import Tensor

from circuits.arguments import checked_count, kind_of
from circuits.errors import ArgumentError
from circuits.precision import own_precision
from circuits.queries.flows import checked_sample_weights

_MAX_ELEMENTS = 1 << 24


@own_precision
@torch.no_grad()
def kmeans(
    data: Tensor,  # shape: (N, D)
    num_clusters: int,
    *,
    sample_weights: Tensor | None = None,  # shape: (N,)
    num_steps: int = 20,
    seed: int = 0,
) -> Tensor:  # shape: (N,)
    """Assign samples to clusters by Lloyd's algorithm from k-means++ centres (Lloyd 1982; Arthur, Vassilvitskii 2007).

    The distance is Euclidean between the values as they are: for binary and ordered variables. Give one-hot or scaled
    columns for others.

    Args:
        data: numbers (N, D).
        num_clusters: K >= 1; fewer clusters come back where fewer samples are distinct.
        sample_weights: how often each sample counts, (N,) >= 0; once when omitted.
        num_steps: of Lloyd's algorithm at most; it ends when no assignment changes.
        seed: for the first centres.

    Returns:
        int64 (N,), from 0 to K - 1.

    Raises:
        ArgumentError: an argument has a wrong shape or value.
    """
    if not isinstance(data, Tensor) or data.dim() != 2 or 0 in data.shape or data.is_complex():
        raise ArgumentError(f"data: expected a tensor of numbers (N, D) with N, D >= 1, got {kind_of(data)}")
    checked_count("num_clusters", num_clusters)
    checked_count("num_steps", num_steps, least=0)
    weights = torch.ones(len(data), device=data.device)
    if sample_weights is not None:
        weights = checked_sample_weights(sample_weights, weights)
    if not float(weights.sum()) > 0:
        raise ArgumentError("sample_weights: expected some that are > 0, all are zero")
    x = _centred(data.double(), weights.double()).float()
    if not bool(x.isfinite().all()):
        raise ArgumentError("data: expected finite numbers, got NaN, infinite or too large ones; fill them in")
    centres = _first_centres(x, weights, num_clusters, torch.Generator().manual_seed(seed))
    labels = _nearest(x, centres)[1]
    for _ in range(num_steps):
        shares = torch.nn.functional.one_hot(labels, len(centres)).to(x.dtype) * weights.unsqueeze(1)
        masses = shares.sum(0).unsqueeze(1)
        centres = torch.where(masses > 0, (shares.t() @ x) / masses.clamp_min(torch.finfo(x.dtype).tiny), centres)
        before, labels = labels, _nearest(x, centres)[1]
        if torch.equal(labels, before):
            break
    return labels


def _centred(x: Tensor, weights: Tensor) -> Tensor:
    """Return the samples less the one nearest to their mean: far from the origin, squared distances lose digits."""
    mean = weights @ x / weights.sum()
    return x - x[(x - mean).square().sum(1).argmin()]


def _first_centres(x: Tensor, weights: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Draw samples one by one in proportion to their squared distance from the centres so far (k-means++)."""
    chances = weights
    centres: list[Tensor] = []
    while len(centres) < num_clusters and float(chances.sum()) > 0:
        cumulative = chances.double().cumsum(0)
        drawn = torch.rand((), generator=generator, dtype=torch.float64).to(x.device) * cumulative[-1]
        centres.append(x[int(torch.searchsorted(cumulative, drawn, right=True).clamp_max(len(x) - 1))])
        chances = weights * _nearest(x, torch.stack(centres))[0]
    return torch.stack(centres)


def _nearest(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared distance of every sample to its nearest centre, and which that is, (N,) each."""
    half_norms = (centres**2).sum(1) / 2
    distances, labels = [], []
    for rows in x.split(max(1, _MAX_ELEMENTS // len(centres))):
        scores = half_norms - rows @ centres.t()
        least, nearest = scores.min(1)
        distances.append((2 * least + (rows**2).sum(1)).clamp_min(0))
        labels.append(nearest)
    return torch.cat(distances), torch.cat(labels)
