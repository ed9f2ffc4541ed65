"""What conditioners read of the context of a place: hidden states, the mask ratio and the position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from circuits import CompiledCircuit
from circuits.arguments import checked_count, checked_seed
from circuits.precision import own_matmul
from diffusion.blocks import check_circuit
from diffusion.errors import ArgumentError
from diffusion.prediction import Prediction

Places = Mapping[str, Sequence[int]]
"""By the name of a sum node the positions whose features are read, as many for every node."""


def checked_places(places: Places) -> dict[str, list[int]]:
    """Return places as JSON holds them.

    Raises:
        ArgumentError: there are none, a position is none, or nodes have different numbers of positions.
    """
    if not isinstance(places, Mapping) or not places:
        raise ArgumentError(f"positions: expected positions by the name of a sum node, got {places!r:.60}")
    found = {}
    for name, positions in places.items():
        if not isinstance(name, str) or isinstance(positions, str) or not isinstance(positions, Sequence):
            raise ArgumentError(f"positions: expected lists of positions by name, got {name!r}: {positions!r:.60}")
        found[name] = list(positions)
        for position in positions:
            checked_count(f"positions[{name!r}]", position, 0)
    if len({len(positions) for positions in found.values()}) > 1 or not next(iter(found.values())):
        raise ArgumentError("positions: expected as many positions, at least one, for every node, got others")
    return found


def check_sizes(*, hidden: int | None, seed: int, **counts: int) -> None:
    """Raise ArgumentError unless all are integers >= 1, ``hidden`` one or None, and ``seed`` a seed."""
    for name, value in (counts if hidden is None else counts | {"hidden": hidden}).items():
        checked_count(name, value)
    if checked_seed("seed", seed) is None:
        raise ArgumentError("seed: expected an integer, got None")


def checked_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of a table, (units, children); raise ArgumentError otherwise."""
    if not isinstance(shape, Sequence) or isinstance(shape, str) or len(shape) != 2:
        raise ArgumentError(f"shape: expected (units, children) of the nodes, got {shape!r:.60}")
    return checked_count("shape[0]", shape[0]), checked_count("shape[1]", shape[1])


def transitions_of(pc: CompiledCircuit, prefix: str) -> dict[str, list[int]]:
    """Return the places of the transitions of a circuit of :func:`circuits.structures.hmm`: ``t`` and ``t + 1``."""
    check_circuit(pc)
    places = {f"{prefix}transition{step}": [step, step + 1] for step in range(pc.circuit.num_vars - 1)}
    try:
        for name in (f"{prefix}initial", *places):
            pc.sum_node(name)
    except ArgumentError as error:
        raise ArgumentError(
            f"pc: expected a circuit of ct.structures.hmm, got one without its node {name!r}; give the prefix of its "
            "names, or build potentials, for_tree or for_block_sparse_hmm"
        ) from error
    return places


def check_nodes(pc: CompiledCircuit, places: Places, shape: Sequence[int], who: str) -> None:
    """Raise ArgumentError unless a circuit has these nodes, with tables of some shape, and these positions."""
    for name, positions in places.items():
        found = pc.sum_node(name).parameter_shape
        if tuple(found) != tuple(shape) or max(positions) >= pc.circuit.num_vars:
            raise ArgumentError(
                f"conditioners: expected a circuit whose {name!r} has a table {tuple(shape)} at positions "
                f"{list(positions)} for {who}, got {tuple(found)} in {pc.circuit}; build them for this circuit"
            )


def network(num_inputs: int, num_outputs: int, hidden: int | None, *, seed: int, is_zero: bool) -> nn.Module:
    """Return a linear map, or one after a layer of ``hidden`` units; random by seed, or the last map zero."""
    last = nn.Linear(num_inputs if hidden is None else hidden, num_outputs)
    first = [] if hidden is None else [nn.Linear(num_inputs, hidden)]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (*first, last):
            layer.weight.normal_(std=layer.in_features**-0.5, generator=generator)
            layer.bias.zero_()
        if is_zero:
            last.weight.zero_()
    return nn.Sequential(*first, nn.GELU(), last) if first else last


def is_zero(made: nn.Module) -> bool:
    """Return whether a :func:`network` is 0 whatever it reads, as it may be at first."""
    last = made[-1] if isinstance(made, nn.Sequential) else made
    return not any(bool(parameter.any()) for parameter in last.parameters())


def at_mask_ratio(
    masked: Tensor,  # shape: (B, L)
    *knots: Tensor,  # shape: (M, ...)
    where: Tensor | None = None,  # shape: (B, L)
) -> list[Tensor]:  # shape: (B, ...)
    """Return functions of the mask ratio, piecewise linear between M evenly spaced ratios from 0 to 1.

    With ``where`` they are those of the block of each of n positions, (n, ...).
    """
    last = len(knots[0]) - 1
    ratio = masked.to(knots[0].dtype).mean(-1, keepdim=True)
    shares = (1 - (ratio * last - torch.arange(last + 1, device=masked.device)).abs()).clamp_min(0)  # (B, M)
    if where is not None:
        shares = shares[where.nonzero()[:, 0]]
    return [own_matmul(shares, one.view(len(one), -1)).view(-1, *one.shape[1:]) for one in knots]


def read_block(
    num_features: int,
    prediction: Prediction,
    masked: Tensor,  # shape: (B, L)
    like: Tensor,
) -> Tensor:  # shape: (B, H + 1)
    """Return the mean of the features at masked positions, and the mask ratio; see :func:`read_context`."""
    features = _features(num_features, prediction).to(like)
    counts = masked.to(like).unsqueeze(-1)
    mean = (features.masked_fill(~masked.unsqueeze(-1), 0.0)).sum(1) / counts.sum(1).clamp_min(1)
    return torch.cat([mean, counts.mean(1)], -1)


def read_context(
    places: Places,
    num_features: int,
    prediction: Prediction,
    masked: Tensor,  # shape: (B, L)
    like: Tensor,
    *,
    has_position: bool = True,
) -> Tensor:  # shape: (B, n, S * H + 1 or + 2)
    """Return the features at the S positions of n nodes, the mask ratio, and the first position by the last of all.

    Args:
        places: the positions.
        num_features: H.
        prediction: whose features are read.
        masked: bool, True where a token is to be predicted.
        like: of the device and type that the result is to have.
        has_position: whether the position is a part of it.

    Raises:
        ArgumentError: the prediction has no features, or of another number.
    """
    index = torch.tensor(list(places.values()), device=like.device)  # (n, S)
    features = _features(num_features, prediction).to(like)[:, index].flatten(2)  # (B, n, S * H)
    shape = (*features.shape[:2], 1)
    parts = [features, masked.to(like.dtype).mean(-1)[:, None, None].expand(shape)]
    if has_position:
        parts.append((index[:, :1] / max(1, int(index.max()))).to(like).expand(shape))
    return torch.cat(parts, -1)


def _features(num_features: int, prediction: Prediction) -> Tensor:
    if prediction.features is None or prediction.features.shape[2] != num_features:
        got = "none" if prediction.features is None else f"{prediction.features.shape[2]}"
        raise ArgumentError(
            f"prediction: expected {num_features} features per position, got {got}; ask with features=True, and cache "
            "with cache_logits(..., features=True)"
        )
    return prediction.features
