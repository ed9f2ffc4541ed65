"""Where learning starts: input units at the scale of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from circuits.algebra.semirings import LogSemiring
from circuits.arguments import checked_count, checked_number
from circuits.engine.compile import CompiledCircuit
from circuits.engine.question import Question
from circuits.errors import ArgumentError
from circuits.evidence import Evidence
from circuits.families import Categorical
from circuits.learning.em import check_em_options, em_step
from circuits.learning.samples import Samples, checked_samples
from circuits.precision import own_precision
from circuits.queries.flows import BankFlows, flow_shapes, traced_weights

if TYPE_CHECKING:
    import numpy as np

InitializedBy = Literal["random", "quantiles"]

_BATCH_SIZE = 512
_NUM_BATCHES: dict[InitializedBy, int] = {"random": 1, "quantiles": 16}


@own_precision
def initialize_inputs(
    pc: CompiledCircuit,
    data: Tensor | np.ndarray,  # shape: (N, D)
    *,
    observed: Tensor | np.ndarray | None = None,  # shape: (N, D)
    by: InitializedBy = "random",
    samples_per_unit: int = 8,
    bandwidth: float = 0.0,
    pseudocount: float = 1.0,
    seed: int = 0,
) -> None:
    """Fit every input unit to a part of the samples, in place.

    Call it before :func:`fit` where the initial parameters of a family, such as means from N(0, 1), are not at the
    scale of the data: units that are too far away from all samples would never be reached, and so never learn. It also
    saves the first epochs of families with many values, such as the 256 of a pixel.

    Args:
        pc: the circuit; its sum weights stay.
        data: (N, D), integers, or floating point with NaN for missing values.
        observed: bool (N, D), False where a value is missing.
        by: ``"random"``: every unit is fitted to a few random samples. ``"quantiles"``: the K units of a node share
            out the samples by the value of their variable, the k-th of K equal parts to unit k, equal values at random;
            for numbers, and for categories that are ordered.
        samples_per_unit: of ``"random"``: how many samples; fewer make units more different.
        bandwidth: b >= 0, for categories that are ordered: counts of categorical units spread to neighbouring values,
            in proportion to ``exp(-distance / b)``; 0: they do not. Other families stay as they are.
        pseudocount: a >= 0, see :func:`em_step`.
        seed: which samples.

    Raises:
        ArgumentError: an argument has a wrong type, shape or value.
    """
    check_em_options(pseudocount=pseudocount)
    _check_options(by, samples_per_unit, bandwidth)
    samples = checked_samples(pc, "data", Samples(data, observed), takes_labels=False)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(samples.x), generator=generator)[: _BATCH_SIZE * _NUM_BATCHES[by]]
    flows: BankFlows = {}
    for batch in samples.batches(_BATCH_SIZE, chosen):
        num_samples = samples_per_unit if by == "random" else None
        for name, flow in _assigned_flows(pc, batch.evidence, num_samples, generator).items():
            flows[name] = flows[name] + flow if name in flows else flow
    for name, family in pc.families.items():
        if bandwidth and isinstance(family, Categorical):
            flows[name] = _spread_matrix(family.num_categories, bandwidth).to(flows[name]) @ flows[name]
    for name, shape in flow_shapes(pc).items():
        flows.setdefault(name, torch.zeros(shape, device=pc.device))  # sums have none
    em_step(pc, flows, pseudocount=pseudocount)


def _assigned_flows(
    pc: CompiledCircuit, evidence: Evidence, samples_per_unit: int | None, generator: torch.Generator
) -> BankFlows:
    """Return the inputs' flows under responsibilities that are assigned, by quantiles or at random, not inferred."""
    with torch.inference_mode(False), torch.enable_grad():
        traced, sources = traced_weights(pc)
        leaf_values = Question(pc, evidence, traced).inputs(LogSemiring())
        shares = []
        for layer, value in zip(pc.input_layers, leaf_values, strict=True):
            missing = None if evidence.missing is None else evidence.missing[:, layer.variables].t()
            if samples_per_unit is None:
                assert evidence.values is not None
                shares.append(_by_quantiles(value, evidence.values[:, layer.variables, 0].t(), missing, generator))
            else:
                shares.append(_at_random(value, missing, samples_per_unit, generator))
        names = [name for name in pc.bank if name in pc.families]
        return dict(
            zip(names, torch.autograd.grad(leaf_values, [sources[name] for name in names], shares), strict=True)
        )


def _at_random(like: Tensor, missing: Tensor | None, samples_per_unit: int, generator: torch.Generator) -> Tensor:
    """Return 1 where a sample belongs to a unit, (F, K, B)."""
    order = torch.rand(like.shape, generator=generator).to(like.device)
    if missing is not None:
        order.masked_fill_(missing.unsqueeze(1), -1.0)
    best = order.topk(min(samples_per_unit, like.shape[-1]), -1).indices
    return torch.zeros_like(like).scatter_(-1, best, 1.0)


def _by_quantiles(like: Tensor, values: Tensor, missing: Tensor | None, generator: torch.Generator) -> Tensor:
    """Return 1 where a sample belongs to a unit, (F, K, B); ``values`` are (F, B)."""
    num_nodes, num_units, batch_size = like.shape
    shuffled = torch.randperm(batch_size, generator=generator).to(like.device)  # equal values in random order
    values = values[:, shuffled].double()
    num_known = torch.full((num_nodes, 1), batch_size, device=like.device)
    if missing is not None:
        values = values.masked_fill(missing[:, shuffled], torch.inf)
        num_known = num_known - missing.sum(1, keepdim=True)
    order = shuffled[values.argsort(dim=1, stable=True)]
    ranks = torch.arange(batch_size, device=like.device)
    unit = (ranks * num_units // num_known.clamp_min(1)).clamp_max(num_units - 1)
    shares = torch.zeros_like(like)
    shares[torch.arange(num_nodes, device=like.device).unsqueeze(1), unit, order] = (ranks < num_known).to(like.dtype)
    return shares


def _spread_matrix(num_categories: int, bandwidth: float) -> Tensor:
    """Return how much of each value's count, a column, goes to every value."""
    value = torch.arange(num_categories, dtype=torch.float64)
    return torch.softmax(-(value.unsqueeze(1) - value).abs() / bandwidth, 0)


def _check_options(by: str, samples_per_unit: int, bandwidth: float) -> None:
    if by not in get_args(InitializedBy):
        raise ArgumentError(f"by: expected {' or '.join(map(repr, get_args(InitializedBy)))}, got {by!r}")
    checked_count("samples_per_unit", samples_per_unit)
    checked_number("bandwidth", bandwidth, "a number of values")
