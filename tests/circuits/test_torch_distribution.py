"""A circuit as a torch distribution agrees with the enumerated joint distribution."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuits as ct

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def posterior_of(pc, evidence):
    """Enumerate log p(x | e), (B, *categories)."""
    joint = ct.testing.enumerate_joint(pc)
    factors = evidence.dense(max(joint.shape), torch.float64)
    total = joint.unsqueeze(0)
    for var, count in enumerate(joint.shape):
        shape = [count if other == var else 1 for other in range(joint.dim())]
        total = total + factors[:, var, :count].reshape(-1, *shape)
    return total - ct.testing.enumerated_log_partition(joint, evidence).reshape(-1, *[1] * joint.dim())


def assignments(shape):
    return torch.cartesian_prod(*(torch.arange(count) for count in shape)).reshape(-1, len(shape))


@given(ct.testing.circuits(max_vars=4, max_categories=3), st.data())
def test_log_prob_and_moments_are_those_of_the_posterior(circuit, data):
    pc = ct.compile(circuit, dtype=torch.float64, seed=0)
    evidence = data.draw(ct.testing.evidence(circuit, largest=3.0))
    dist = ct.CircuitDistribution(pc, evidence)
    assert (dist.batch_shape, dist.event_shape) == ((2,), (circuit.num_vars,))
    x = assignments(circuit.num_categories)
    if bool((dist.log_partition == -torch.inf).any()):
        with pytest.raises(ct.ImpossibleEvidenceError):
            dist.log_prob(x.unsqueeze(1).expand(-1, 2, -1))
        return
    posterior = posterior_of(pc, evidence).flatten(1)  # (B, assignments)
    torch.testing.assert_close(dist.log_prob(x.unsqueeze(1).expand(-1, 2, -1)).exp(), posterior.t().exp(), **CLOSE)
    mean = posterior.exp() @ x.double()
    torch.testing.assert_close(dist.mean, mean, **CLOSE)
    torch.testing.assert_close(dist.variance, posterior.exp() @ x.double().square() - mean.square(), **CLOSE)


@given(ct.testing.circuits(max_vars=4, max_categories=3))
def test_without_evidence_it_is_the_circuit(circuit):
    pc = ct.compile(circuit, dtype=torch.float64, seed=0)
    dist = ct.CircuitDistribution(pc)
    x = assignments(circuit.num_categories)
    torch.testing.assert_close(dist.log_prob(x).exp(), ct.testing.enumerate_joint(pc).flatten().exp(), **CLOSE)
    assert dist.batch_shape == ()
    assert dist.sample([5, 2], generator=torch.Generator().manual_seed(0)).shape == (5, 2, circuit.num_vars)
    assert dist.sample(generator=torch.Generator().manual_seed(0)).shape == (circuit.num_vars,)
    assert dist.sample([0]).shape == (0, circuit.num_vars)
    assert bool(dist.support.check(dist.sample([3])).all())
    assert not bool(dist.support.check(torch.full((circuit.num_vars,), 9)))
    assert torch.equal(dist.mode, ct.queries.mpe(pc).assignment[0])


def test_entropy_where_it_is_exact():
    pc = ct.compile(ct.structures.fully_factorized(3, [2, 3, 4]), dtype=torch.float64, seed=0)
    joint = ct.testing.enumerate_joint(pc).flatten()
    torch.testing.assert_close(ct.CircuitDistribution(pc).entropy(), -(joint.exp() * joint).sum(), **CLOSE)
    evidence = ct.Evidence.observe(torch.tensor([[0, 1, 2]]), torch.tensor([[True, False, False]]))
    posterior = posterior_of(pc, evidence).flatten()
    expected = -torch.special.xlogy(posterior.exp(), posterior.exp()).sum()
    torch.testing.assert_close(ct.CircuitDistribution(pc, evidence).entropy(), expected.reshape(1), **CLOSE)
    one = ct.compile(ct.structures.mixture(1, 4, 3), dtype=torch.float64, seed=0)
    joint = ct.testing.enumerate_joint(one)
    torch.testing.assert_close(ct.CircuitDistribution(one).entropy(), -(joint.exp() * joint).sum(), **CLOSE)
    with pytest.raises(ct.PropertyError, match="intractable"):
        ct.CircuitDistribution(ct.compile(ct.structures.hmm(3, 2, 2), seed=0)).entropy()


def test_gradients_reach_weights_and_evidence():
    pc = ct.compile(ct.structures.hmm(3, 2, 3), dtype=torch.float64, seed=0)
    factors = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True, generator=None)
    x = torch.tensor([[0, 1, 2], [2, 1, 0]])
    assert torch.autograd.gradcheck(lambda f: ct.CircuitDistribution(pc, ct.Evidence.soft(f)).log_prob(x), factors)
    ct.CircuitDistribution(pc).log_prob(x).sum().backward()
    assert all(parameter.grad is not None for parameter in pc.parameters())


@pytest.mark.parametrize(
    ("families", "inside", "outside"),
    [
        ([ct.Gaussian(), ct.Gaussian()], [-0.5, 3.0], [torch.nan, 3.0]),
        ([ct.Poisson(), ct.Poisson()], [0.0, 30.0], [-1.0, 30.0]),
        ([ct.Gaussian(), ct.Categorical(3)], [-0.5, 2.0], [-0.5, 3.0]),
        ([ct.Categorical(2), ct.Categorical(3)], [1.0, 2.0], [2.0, 1.0]),
    ],
)
def test_the_support_is_one_of_whole_vectors(families, inside, outside):
    dist = ct.CircuitDistribution(ct.compile(ct.structures.mixture(2, families, 2), seed=0))
    assert dist.support.event_dim == 1
    assert dist.support.check(torch.tensor([inside, outside, inside])).tolist() == [True, False, True]


def test_a_batch_may_be_empty():
    pc = ct.compile(ct.structures.hmm(3, 2, 2), seed=0)
    dist = ct.CircuitDistribution(pc, ct.Evidence.nothing(0, 3))
    assert dist.log_prob(torch.zeros(5, 0, 3, dtype=torch.int64)).shape == (5, 0)
    assert ct.CircuitDistribution(pc).log_prob(torch.zeros(0, 3, dtype=torch.int64)).shape == (0,)
    some = ct.CircuitDistribution(pc, ct.Evidence.nothing(2, 3))
    assert some.log_prob(torch.zeros(0, 2, 3, dtype=torch.int64)).shape == (0, 2)


def test_missing_values_are_no_values():
    pc = ct.compile(ct.structures.hmm(3, 2, 2), seed=0)
    for evidence in (None, ct.Evidence.nothing(1, 3)):
        with pytest.raises(ct.ArgumentError, match="got NaN"):
            ct.CircuitDistribution(pc, evidence).log_prob(torch.tensor([[0.0, torch.nan, 1.0]]))


def test_bad_arguments_are_named():
    pc = ct.compile(ct.structures.hmm(3, 2, 2), seed=0)
    dist = ct.CircuitDistribution(pc, ct.Evidence.nothing(2, 3))
    with pytest.raises(ct.ArgumentError, match="pc"):
        ct.CircuitDistribution(pc.circuit)
    with pytest.raises(ct.ArgumentError, match="evidence"):
        ct.CircuitDistribution(pc, torch.zeros(2, 3))
    with pytest.raises(ct.ArgumentError, match="3 variables"):
        ct.CircuitDistribution(pc, ct.Evidence.nothing(2, 4))
    with pytest.raises(ct.ArgumentError, match="value"):
        dist.log_prob(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ct.ArgumentError, match="values from 0"):
        dist.log_prob(torch.full((2, 3), 7))
    with pytest.raises(ct.ArgumentError, match="expand"):
        dist.expand([3])
    assert "batch_shape=(2,)" in repr(dist)


@pytest.mark.parametrize("family", ["Gaussian", "Poisson", "Bernoulli"])
def test_a_mixture_is_torchs_mixture(family):
    """Log-probabilities, means and variances of the same mixture of independent variables in torch.distributions."""
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    a, b = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.2  # (K, D)
    theirs, ours, parameters, x = {
        "Gaussian": (torch.distributions.Normal(a, b), ct.Gaussian(), [a, b], torch.tensor([[0.1, 2.0], [-1.0, 0.4]])),
        "Poisson": (torch.distributions.Poisson(5 * a), ct.Poisson(), [5 * a], torch.tensor([[0, 3], [9, 1]])),
        "Bernoulli": (
            torch.distributions.Bernoulli(a / 2), ct.Bernoulli(), [1 - a / 2, a / 2], torch.tensor([[0, 1], [1, 1]])
        ),
    }[family]  # fmt: skip
    pc = ct.compile(ct.structures.mixture(2, ours, num_components=3), dtype=torch.float64, seed=0)
    for leaf in pc.circuit.inputs:
        pc.set_weights(leaf, torch.stack(parameters)[:, :, leaf.var])
    pc.set_weights(pc.circuit.root, weights.unsqueeze(0))
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(weights), torch.distributions.Independent(theirs, 1)
    )
    found, x = ct.CircuitDistribution(pc), x.double() if family == "Gaussian" else x
    assert found.batch_shape == mixture.batch_shape
    assert found.event_shape == mixture.event_shape
    torch.testing.assert_close(found.log_prob(x), mixture.log_prob(x.double()), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.mean, mixture.mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.variance, mixture.variance, rtol=1e-10, atol=1e-10)
