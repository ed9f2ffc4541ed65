"""A convex combination is one circuit, and its weights are the likeliest ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learning_cases import CLOSE, hmm

import circuits as ct
from circuits.batteries import convex_combination, convex_weights


@given(st.data())
@settings(max_examples=15)
def test_density_is_the_weighted_mean_of_the_members(data):
    circuit = data.draw(ct.testing.circuits())
    members = [ct.compile(circuit, dtype=torch.float64, seed=seed) for seed in range(data.draw(st.integers(1, 3)))]
    weights = torch.rand(len(members), dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    combined = convex_combination(members, 7 * weights)
    joint = torch.stack([ct.testing.enumerate_joint(member).exp() for member in members], -1)
    torch.testing.assert_close(ct.testing.enumerate_joint(combined).exp(), joint @ (weights / weights.sum()), **CLOSE)


def test_members_may_differ_in_structure_and_names_and_ties_are_kept():
    members = [hmm(0), hmm(1, num_states=5), hmm(2, homogeneous=False)]
    combined = convex_combination(members)
    joint = torch.stack([ct.testing.enumerate_joint(member).exp() for member in members]).mean(0)
    torch.testing.assert_close(ct.testing.enumerate_joint(combined).exp(), joint, **CLOSE)
    assert combined.circuit.num_parameters == 3 + sum(member.circuit.num_parameters for member in members)
    assert combined.circuit.node("member1.initial").parameter_shape == (1, 5)


def test_members_stay_as_they_are():
    members = [hmm(0), hmm(1)]
    before = ct.testing.enumerate_joint(members[0])
    combined = convex_combination(members)
    ct.learning.fit(combined, torch.zeros(5, 4, dtype=torch.int64), num_epochs=2, progress=False)
    torch.testing.assert_close(ct.testing.enumerate_joint(members[0]), before, rtol=0, atol=0)


def test_zero_weights_survive():
    leaf = ct.inputs(0, 1, ct.Categorical(2), weights=torch.tensor([[1.0], [0.0]]))
    member = ct.compile(ct.Circuit(ct.sum(leaf, num_units=1)), dtype=torch.float64, seed=0)
    combined = convex_combination([member, member], torch.tensor([1.0, 0.0]))
    assert ct.testing.enumerate_joint(combined).tolist() == [0.0, -torch.inf]


def test_members_with_classes_are_mixed_class_by_class():
    def conditional(seed, num_classes=3):
        leaves = [ct.inputs(var, 2, ct.Categorical(2)) for var in range(2)]
        root = ct.sum(ct.product(*leaves), num_units=num_classes)
        return ct.compile(ct.Circuit(root, num_classes=num_classes), dtype=torch.float64, seed=seed)

    members = [conditional(seed) for seed in range(2)]
    x = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    pc = convex_combination(members, torch.tensor([0.2, 0.8], dtype=torch.float64))
    assert pc.circuit.num_classes == 3
    torch.testing.assert_close(pc(x).exp(), 0.2 * members[0](x).exp() + 0.8 * members[1](x).exp(), **CLOSE)
    with pytest.raises(ct.StructureError, match="equally many classes"):
        convex_combination([members[0], conditional(0, num_classes=2)])


def test_weights_are_where_the_gradient_of_the_likelihood_is_equal():
    log_likelihoods = torch.randn(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    log_likelihoods[:, 3] -= 5
    counts = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = convex_weights(log_likelihoods, counts, max_steps=100_000, tolerance=1e-15)
    joint = log_likelihoods.exp()
    gradient = (counts / counts.sum()) @ (joint / (joint @ weights).unsqueeze(1))
    torch.testing.assert_close(weights.sum(), torch.ones((), dtype=torch.float64), **CLOSE)
    assert bool((gradient <= 1 + 1e-4).all())
    torch.testing.assert_close(gradient[weights > 1e-3], torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-4)


def test_samples_that_nobody_allows_count_for_nothing():
    scores = torch.tensor([[0.0, -1.0], [-1.0, -0.5], [-torch.inf, -torch.inf]])
    torch.testing.assert_close(convex_weights(scores), convex_weights(scores[:2]))
    assert convex_weights(torch.tensor([[0.0, -torch.inf]])).tolist() == [1.0, 0.0]


def test_arguments_are_checked():
    with pytest.raises(ct.ArgumentError, match="members"):
        convex_combination([])
    with pytest.raises(ct.ArgumentError, match="weights"):
        convex_combination([hmm(0)], torch.tensor([-1.0]))
    with pytest.raises(ct.ArgumentError, match="one device and of one dtype"):
        convex_combination([hmm(0), hmm(0).float()])
    with pytest.raises(ct.StructureError):
        convex_combination([hmm(0), hmm(0, seq_length=3)])
    with pytest.raises(ct.ArgumentError, match="log_likelihoods"):
        convex_weights(torch.zeros(3))
    with pytest.raises(ct.ArgumentError, match="got none"):
        convex_weights(torch.full((3, 2), -torch.inf))
    with pytest.raises(ct.ArgumentError, match="members: expected one or more compiled circuits"):
        convex_combination(hmm(0))
    with pytest.raises(ct.ArgumentError, match="weights: expected a tensor"):
        convex_combination([hmm(0)], [1.0])
    with pytest.raises(ct.ArgumentError, match="log_likelihoods: expected a tensor"):
        convex_weights([[0.0, 1.0]])
    with pytest.raises(ct.ArgumentError, match="sample_weights: expected finite numbers"):
        convex_weights(torch.zeros(2, 2), torch.tensor([1.0, torch.inf]))
