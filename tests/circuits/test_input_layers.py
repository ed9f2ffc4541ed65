"""Input units under factors that are values of a semiring, against sums written out."""

import numpy as np
import pytest
import torch
from torch import Tensor

import circuits as ct
from circuits.algebra.semirings import LogSemiring, MaxSemiring, Semiring
from circuits.queries.averages import EntropySemiring
from circuits.queries.expectations import SignedSemiring

_NUM_UNITS, _BATCH_SIZE = 3, 4


def _layers(tied: bool) -> list[tuple[ct.CompiledCircuit, torch.nn.Module, Tensor]]:
    """Return input layers, of 4 values on variables 0 and 2 and of 3 on variable 1, each with its tables (F, K, C)."""
    first = ct.inputs(0, _NUM_UNITS, ct.Categorical(4))
    others = (ct.inputs(1, _NUM_UNITS, ct.Categorical(3)), ct.inputs(2, _NUM_UNITS, ct.Categorical(4)))
    if tied:
        others = (others[0], ct.inputs(2, _NUM_UNITS, ct.Categorical(4), tied_to=first))
    pc = ct.compile(ct.Circuit(ct.sum(ct.product(first, *others), num_units=1)), seed=0, dtype=torch.float64)
    tables = {node.var: pc.parameters_of(node.tied_to or node).detach() for node in (first, *others)}
    return [(pc, layer, torch.stack([tables[v].T for v in layer.variables.tolist()])) for layer in pc.input_layers]


@pytest.mark.parametrize("tied", [False, True])
def test_of_values_signed(tied: bool) -> None:
    """Factors of both signs: the unit's value is ``sum_v f(v) p(v)``."""
    f = torch.randn(_BATCH_SIZE, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    f[0, 0, 1] = 0.0
    factors = torch.stack([f.clamp(min=0).log(), (-f).clamp(min=0).log()], -1)
    for pc, layer, tables in _layers(tied):
        out = layer.of_values(SignedSemiring(), factors, pc.weights().own[layer.parameter_rows.bank])
        expected = torch.einsum("fkc,bfc->fkb", tables, f[:, layer.variables, : tables.shape[2]])
        torch.testing.assert_close(out[..., 0].exp() - out[..., 1].exp(), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_of_values_entropy(tied: bool) -> None:
    """Values with finer outcomes: the entropy of the value and the outcome together, by enumerating both."""
    mass = torch.rand(_BATCH_SIZE, 3, 4, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    shares = mass / mass.sum(-1, keepdim=True)
    factors = torch.stack([mass.sum(-1).log(), -(shares * shares.log()).sum(-1)], -1)
    for pc, layer, tables in _layers(tied):
        out = layer.of_values(EntropySemiring(), factors, pc.weights().own[layer.parameter_rows.bank])
        joint = np.einsum("fkc,bfcs->fkbcs", tables.numpy(), mass[:, layer.variables, : tables.shape[2]].numpy())
        total = joint.sum((3, 4))
        p = joint / total[..., None, None]
        np.testing.assert_allclose(out.detach()[..., 0], np.log(total), rtol=1e-12)
        np.testing.assert_allclose(out.detach()[..., 1], -(p * np.log(p)).sum((3, 4)), rtol=1e-12)


@pytest.mark.parametrize("semiring", [LogSemiring(), MaxSemiring(), EntropySemiring(), SignedSemiring()])
@pytest.mark.parametrize("tied", [False, True])
def test_lifted_factors_are_soft_evidence(tied: bool, semiring: Semiring) -> None:
    log_factors = torch.randn(_BATCH_SIZE, 3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for pc, layer, _ in _layers(tied):
        weights = pc.weights().own[layer.parameter_rows.bank]
        out = layer.of_values(semiring, semiring.lift(log_factors), weights)
        torch.testing.assert_close(out, layer(semiring, ct.Evidence.soft(log_factors), weights), rtol=0, atol=0)


def test_of_values_refuses_too_few_values() -> None:
    pc, layer, _ = _layers(False)[0]
    with pytest.raises(ct.ArgumentError, match="factors: expected at least"):
        layer.of_values(LogSemiring(), torch.zeros(2, 3, 2).double(), pc.weights().own[layer.parameter_rows.bank])
