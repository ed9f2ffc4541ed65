"""The regularised M-step is where its derivatives are equal, and it interpolates between the flows and uniform."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuits as ct
from circuits.learning.entropy import entropic_maximum


def shares_of(seed, num_zeros):
    p = torch.rand(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 4
    p[:, :num_zeros] = 0
    return p / p.sum(1, keepdim=True)


@given(st.integers(0, 1000), st.integers(0, 4), st.floats(1e-3, 100))
@settings(max_examples=60)
def test_derivatives_are_equal_at_the_maximum(seed, num_zeros, strength):
    p = shares_of(seed, num_zeros)
    log_w = entropic_maximum(p.log(), torch.ones_like(p, dtype=torch.bool), strength, 1)
    derivative = p / log_w.exp() - strength * log_w
    derivative[p == 0] = (-strength * log_w)[p == 0]
    torch.testing.assert_close(log_w.exp().sum(1), torch.ones(4, dtype=torch.float64), rtol=1e-10, atol=0)
    torch.testing.assert_close(derivative, derivative[:, -1:].expand_as(derivative), rtol=1e-7, atol=1e-9)


def test_limits_are_the_flows_and_the_uniform_distribution():
    p, everywhere = shares_of(0, 0), torch.ones(4, 6, dtype=torch.bool)
    torch.testing.assert_close(entropic_maximum(p.log(), everywhere, 1e-9, 1).exp(), p, rtol=1e-4, atol=1e-7)
    uniform = torch.full_like(p, 1 / 6)
    torch.testing.assert_close(entropic_maximum(p.log(), everywhere, 1e6, 1).exp(), uniform, rtol=1e-4, atol=0)


def test_impossible_weights_stay_zero():
    p = shares_of(0, 2)
    log_w = entropic_maximum(p.log(), p > 0, 1.0, 1)
    assert torch.equal(log_w == -torch.inf, p == 0)


def test_transposed_axis():
    p, everywhere = shares_of(3, 1), torch.ones(4, 6, dtype=torch.bool)
    along_rows = entropic_maximum(p.log(), everywhere, 0.5, 1)
    torch.testing.assert_close(entropic_maximum(p.t().log(), everywhere.t(), 0.5, 0).t(), along_rows)


@pytest.mark.parametrize("optimizer", ["em", "minibatch_em", "anemone", "viterbi_em"])
def test_fit_with_entropy_spreads_the_weights(optimizer):
    x = torch.randint(0, 3, (60, 4), generator=torch.Generator().manual_seed(0))

    def entropy_after(strength):
        pc = ct.compile(ct.structures.hmm(4, 3, 3), dtype=torch.float64, seed=0)
        ct.learning.fit(pc, x, optimizer=optimizer, entropy=strength, num_epochs=5, batch_size=20, progress=False)
        log = pc.log_weights(pc.circuit.node("transition0")).detach()
        return float(-(log.exp() * log).sum())

    assert entropy_after(0.0) < entropy_after(0.3) < entropy_after(3.0)


def test_a_step_maximises_flows_and_entropy_together():
    x = torch.randint(0, 3, (60, 4), generator=torch.Generator().manual_seed(0))
    pc = ct.compile(ct.structures.hmm(4, 3, 3), dtype=torch.float64, seed=0)
    flows = ct.learning.expected_flows(pc, x).flows
    ct.learning.em_step(pc, flows, entropy=0.2)
    for name, weights in pc.weights().own.items():
        axis = -1 if name.startswith("sum") else -2
        mass = flows[name].sum(axis, keepdim=True)
        derivative = flows[name] / weights.log.exp() - 0.2 * mass * weights.log
        largest, least = derivative.amax(axis), derivative.amin(axis)
        torch.testing.assert_close(largest, least, rtol=1e-8, atol=1e-8)


def test_strength_is_checked():
    pc = ct.compile(ct.structures.hmm(3, 2, 2), seed=0)
    flows = ct.learning.expected_flows(pc, torch.zeros(1, 3, dtype=torch.int64)).flows
    with pytest.raises(ct.ArgumentError, match="entropy"):
        ct.learning.em_step(pc, flows, entropy=-1.0)
