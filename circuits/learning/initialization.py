"""Where learning starts: input units at the scale of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuits.compile import CompiledCircuit
from circuits.errors import ArgumentError
from circuits.evidence import Evidence
from circuits.learning import em
from circuits.learning._samples import checked_samples
from circuits.semiring import LogSemiring

if TYPE_CHECKING:
    import numpy as np

_MOST_SAMPLES = 512


def initialize_inputs(
    pc: CompiledCircuit,
    data: Tensor | np.ndarray,  # shape: (N, D)
    *,
    observed: Tensor | np.ndarray | None = None,  # shape: (N, D)
    samples_per_unit: int = 8,
    pseudocount: float = 1.0,
    seed: int = 0,
) -> None:
    """Fit every input unit to a few random samples, in place.

    Call it before :func:`fit` where the initial parameters of a family, such as means from N(0, 1), are not at the
    scale of the data: units that are too far away from all samples would never be reached, and so never learn.

    Args:
        pc: the circuit; its sum weights stay.
        data: (N, D), integers, or floating point with NaN for missing values.
        observed: bool (N, D), False where a value is missing.
        samples_per_unit: how many of them each unit is fitted to; fewer make units more different.
        pseudocount: a >= 0, see :func:`em_step`.
        seed: which samples.

    Raises:
        ArgumentError: an argument has a wrong type, shape or value.
    """
    if not isinstance(samples_per_unit, int) or samples_per_unit < 1:
        raise ArgumentError(f"samples_per_unit: expected an integer >= 1, got {samples_per_unit!r}")
    samples = checked_samples(pc, "data", data, observed, None)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(samples.x), generator=generator)[:_MOST_SAMPLES]
    x, is_observed = (
        None if tensor is None else tensor[chosen.to(tensor.device)].to(pc.device)
        for tensor in (samples.x, samples.observed)
    )
    assert x is not None
    evidence = Evidence.observe(x, is_observed)
    with torch.inference_mode(False), torch.enable_grad():
        banks, sources = em.traced_weights(pc)
        leaf_values = [layer(LogSemiring(), evidence, banks[layer.parameter_rows.bank]) for layer in pc.input_layers]
        # an M-step with responsibilities that are drawn instead of inferred
        shares = []
        for layer, value in zip(pc.input_layers, leaf_values, strict=True):
            order = torch.rand(value.shape, generator=generator).to(value.device)
            if evidence.missing is not None:
                order.masked_fill_(evidence.missing[:, layer.variables].t().unsqueeze(1), -1.0)
            best = order.topk(min(samples_per_unit, len(chosen)), -1).indices
            shares.append(torch.zeros_like(value).scatter_(-1, best, 1.0))
        names = [name for name in pc.bank if name in pc.families]
        flows = torch.autograd.grad(leaf_values, [sources[name] for name in names], shares)
    full = {name: torch.zeros(shape, device=pc.device) for name, shape in em.flow_shapes(pc).items()}
    em.em_step(pc, full | dict(zip(names, flows, strict=True)), pseudocount=pseudocount)
