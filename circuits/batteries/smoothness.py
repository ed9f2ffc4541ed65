"""A prior for values that are ordered: neighbouring values are about equally likely."""

from __future__ import annotations

import torch
from torch import Tensor

from circuits.engine.compile import CompiledCircuit
from circuits.engine.weights import CircuitWeights, check_compiled
from circuits.errors import ArgumentError, PropertyError
from circuits.families import Direct
from circuits.precision import own_precision


@own_precision
def roughness(pc: CompiledCircuit, *, weights: CircuitWeights | None = None, values: slice = slice(None)) -> Tensor:
    """Return ``sum_v (log p(v + 1) - log p(v))^2`` over all input units of finite families.

    Added to the negative log-likelihood of N samples with a strength ``s`` it is the prior of a random walk along the
    values whose steps have the variance ``1 / (2 s)``, a P-spline of degree 0 (Eilers and Marx 1996). With many values
    and units and few samples it says what the samples cannot: that pixel values 117 and 118 are about equally likely.
    Units of tied nodes count once.

    Args:
        pc: the compiled circuit.
        weights: of ``pc.weights()``, where the caller has them already; the result is differentiable in them.
        values: which values are ordered, for instance ``slice(1, None)`` where 0 is a value of its own kind. Pairs with
            a value that is impossible are left out.

    Returns:
        A number, shape ().

    Raises:
        ArgumentError: not a compiled circuit, or not a slice of step 1.
        PropertyError: no input has finitely many values.
    """
    check_compiled(pc)
    if not isinstance(values, slice) or values.step not in (None, 1):
        raise ArgumentError(f"values: expected a slice of step 1, for instance slice(1, None), got {values!r}")
    names = [name for name, family in pc.families.items() if not isinstance(family, Direct)]
    if not names:
        raise PropertyError("roughness: expected inputs with finitely many values, got a circuit without")
    own = (pc.weights() if weights is None else weights).own
    return torch.stack([_squared_steps(own[name].log[:, values]) for name in names]).sum()


def _squared_steps(log: Tensor) -> Tensor:
    """Return the sum of the squared differences along the values of log-tables (P, C, K)."""
    is_possible = log.detach() > -torch.inf
    if bool(is_possible.all()):
        return log.diff(dim=1).square().sum()
    both = is_possible[:, 1:] & is_possible[:, :-1]
    return torch.where(is_possible, log, 0.0).diff(dim=1)[both].square().sum()
