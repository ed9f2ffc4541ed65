"""Pseudocounts are a prior: EM climbs the posterior, and what was never seen stays possible, but for zeros."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuits as ct
from circuits import learning


@torch.no_grad()
def log_prior(pc, pseudocount):
    """Log-density, up to a constant, of Dirichlet(1 + a / |ch|) on the positive weights of every finite unit."""
    total = 0.0
    for name, weights in pc.weights().own.items():
        is_possible = weights.log > -torch.inf
        share = pseudocount / is_possible.sum(-1 if name.startswith("sum") else -2, keepdim=True)
        total += float((torch.where(is_possible, weights.log, 0.0) * share).sum())
    return total


@settings(max_examples=50)
@given(st.data(), st.sampled_from([0.1, 1.0, 10.0]))
def test_em_with_pseudocounts_never_lowers_the_posterior_density(data, pseudocount):
    circuit = data.draw(ct.testing.circuits())
    pc = ct.compile(circuit, dtype=torch.float64, seed=data.draw(st.integers(0, 99), label="seed"))
    evidence = data.draw(ct.testing.evidence(circuit, batch_size=4))
    before = None
    for _ in range(3):
        flows, log_likelihood = learning.expected_flows(pc, evidence)
        possible = log_likelihood > -torch.inf
        posterior = float(log_likelihood[possible].sum()) + log_prior(pc, pseudocount)
        assert before is None or posterior >= before - 1e-9 * max(1.0, abs(before))
        before = posterior
        zeros = {name: weights.log == -torch.inf for name, weights in pc.weights().own.items()}
        learning.em_step(pc, flows, pseudocount=pseudocount)
        for name, weights in pc.weights().own.items():
            assert torch.equal(weights.log == -torch.inf, zeros[name])


@torch.no_grad()
@pytest.mark.parametrize(("pseudocount", "expected"), [(0.0, 1.0), (2.0, 4 / 5), (1.0, 3.5 / 4)])
def test_as_many_pseudocounts_as_values_are_laplaces_rule(pseudocount, expected):
    pc = ct.compile(ct.structures.fully_factorized(1, 2), dtype=torch.float64, seed=0)
    x = torch.zeros(3, 1, dtype=torch.int64)
    learning.fit(pc, x, num_epochs=1, pseudocount=pseudocount, progress=False)
    assert pc(x[:1]).exp().item() == pytest.approx(expected)
    assert bool((pc(1 - x[:1]) > -torch.inf).all()) == (pseudocount > 0)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_pseudo_observations_of_a_gaussian_have_the_spread_of_the_data(scale):
    """(n_k v_k + a v) / (n_k + a), with v_k the variance of what a unit explains and v that of all the data."""
    family = ct.Gaussian(min_std=1e-12)
    pc = ct.compile(ct.structures.mixture(1, family, 2), dtype=torch.float64)
    leaf = pc.circuit.inputs[0]
    pc.set_weights(leaf, torch.tensor([[-5.0, 5.0], [1.0, 1.0]], dtype=torch.float64) * scale)
    left, right = torch.tensor([-6.0, -4.5, -5.2]).double(), torch.tensor([4.0, 6.5]).double()
    x = torch.cat([left, right])
    learning.fit(pc, (x * scale).unsqueeze(1), optimizer="em", num_epochs=1, pseudocount=2.0, progress=False)
    variances = [
        (len(part) * part.var(correction=0) + 2 * x.var(correction=0)) / (len(part) + 2) for part in (left, right)
    ]
    torch.testing.assert_close(
        pc.parameters_of(leaf)[1].detach() / scale, torch.stack(variances).sqrt(), rtol=1e-6, atol=0
    )
