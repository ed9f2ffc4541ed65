"""Roughness is the squared steps of log-probabilities along ordered values, and takes the noise out of a fit."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuits as ct


@given(st.data())
def test_roughness_is_the_sum_of_squared_steps_of_every_unit(data):
    circuit = data.draw(ct.testing.circuits())
    pc = ct.compile(circuit, dtype=torch.float64, seed=data.draw(st.integers(0, 99)))
    first = data.draw(st.integers(0, 2))
    expected, seen = 0.0, set()
    for node in circuit.nodes:
        if not isinstance(node, ct.Input) or pc.bank_address(node) in seen:
            continue
        seen.add(pc.bank_address(node))
        for unit in pc.log_weights(node)[first:].t().tolist():
            for before, after in itertools.pairwise(unit):
                if before > -math.inf and after > -math.inf:
                    expected += (after - before) ** 2
    assert ct.batteries.roughness(pc, values=slice(first, None)).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_gradient_is_right_beside_impossible_values():
    pc = ct.compile(ct.structures.mixture(2, 5, num_components=3), dtype=torch.float64, seed=0)
    node = next(node for node in pc.circuit.nodes if isinstance(node, ct.Input))
    table = pc.log_weights(node).exp()
    table[2, 1] = 0.0
    pc.set_weights(node, table)
    (name,) = pc.families
    bank = pc.bank[name]
    before = ct.batteries.roughness(pc)
    before.backward()
    assert bool(bank.grad.isfinite().all())
    direction = torch.randn(bank.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = 1e-6
    with torch.no_grad():
        bank.add_(step * direction)
        ahead = ct.batteries.roughness(pc).item()
        bank.sub_(2 * step * direction)
        behind = ct.batteries.roughness(pc).item()
    expected = (ahead - behind) / (2 * step)
    assert float((bank.grad * direction).sum()) == pytest.approx(expected, rel=1e-5)


def test_a_smooth_fit_of_few_samples_is_nearer_to_a_smooth_truth():
    generator = torch.Generator().manual_seed(0)
    values = torch.arange(64.0)
    truth = torch.softmax(-(((values - 30) / 12) ** 2), 0)
    train = torch.multinomial(truth, 200, replacement=True, generator=generator).unsqueeze(1)
    scores = {}
    for strength in (0.0, 20.0):
        pc = ct.compile(ct.structures.fully_factorized(1, 64), seed=0)
        optimizer = torch.optim.Adam(pc.parameters(), lr=0.1)
        for _ in range(200):
            weights = pc.weights()
            loss = -pc(train, weights=weights).sum() + strength * ct.batteries.roughness(pc, weights=weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            scores[strength] = float((truth * pc(values.long().unsqueeze(1))).sum())
    assert scores[20.0] > scores[0.0] + 0.1


@pytest.mark.parametrize("values", [3, slice(None, None, 2), slice(None, None, -1)])
def test_other_than_a_slice_of_step_1_is_refused(values):
    pc = ct.compile(ct.structures.fully_factorized(2, 4), seed=0)
    with pytest.raises(ct.ArgumentError, match="values: expected a slice"):
        ct.batteries.roughness(pc, values=values)


def test_a_circuit_without_finite_inputs_is_refused():
    pc = ct.compile(ct.structures.fully_factorized(2, ct.Gaussian()), seed=0)
    with pytest.raises(ct.PropertyError, match="finitely many values"):
        ct.batteries.roughness(pc)
