"""Circuits with classes learn from clusters and known latents, join ensembles and are drawn, each class by itself."""

import pytest
import torch

import circuits as ct
from circuits import learning

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
LABELS = torch.tensor([0, 1, 2] * 20)


def mixtures(family, seed=0, num_classes=3):
    """A mixture of two components per class; classes share the components."""
    leaves = [ct.inputs(var, 2, family, name=f"x{var}") for var in range(2)]
    root = ct.sum(ct.product(*leaves), num_units=num_classes, name="root")
    return ct.compile(ct.Circuit(root, num_classes=num_classes), dtype=torch.float64, seed=seed)


def test_flows_need_the_class():
    pc = mixtures(ct.Categorical(2))
    x = torch.randint(2, (4, 2), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ct.PropertyError, match="with_class"):
        learning.expected_flows(pc, x)
    with pytest.raises(ct.PropertyError, match="with_class"):
        learning.expected_flows(pc, x[:0])
    flows, log_likelihood = learning.expected_flows(pc, ct.Evidence.observe(x).with_class(1))
    torch.testing.assert_close(log_likelihood, pc(x)[:, 1].detach(), **CLOSE)
    assert flows["sum_3x2"][0, [0, 2]].count_nonzero() == 0


def test_inputs_start_at_the_scale_of_the_data():
    pc = mixtures(ct.Gaussian())
    x = 1000 + torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for by in ("random", "quantiles"):
        learning.initialize_inputs(pc, x, by=by)
        means = pc.parameters_of(pc.circuit.node("x0"))[0]
        assert bool(((means > 997) & (means < 1003)).all())


def test_known_latents_give_the_frequencies_of_every_class():
    pc = mixtures(ct.Categorical(2))
    generator = torch.Generator().manual_seed(0)
    state = torch.randint(2, (60,), generator=generator)
    x = state.unsqueeze(1).expand(-1, 2)
    learning.distill_latents(pc, x, {"x0": state}, labels=LABELS, pseudocount=0.0)
    root = pc.log_weights(pc.circuit.node("root")).exp()
    for label in range(3):
        expected = (state[label == LABELS] == 1).double().mean()
        torch.testing.assert_close(root[label, 1], expected, **CLOSE)
    with pytest.raises(ct.ArgumentError, match=r"labels: .* has 3 classes"):
        learning.distill_latents(pc, x, {"x0": state})


def test_clusters_tell_the_components_apart():
    generator = torch.Generator().manual_seed(0)
    state = torch.randint(2, (60,), generator=generator)
    x = 10.0 * state.unsqueeze(1) + torch.randn(60, 2, generator=generator, dtype=torch.float64)
    pc = mixtures(ct.Gaussian())
    learning.initialize_by_kmeans(pc, x, labels=LABELS, pseudocount=0.0)
    means = pc.parameters_of(pc.circuit.node("x0"))[0].sort().values
    torch.testing.assert_close(means, torch.stack([x[state == k, 0].mean() for k in (0, 1)]), **CLOSE)


def test_an_ensemble_mixes_class_by_class():
    members = [mixtures(ct.Categorical(2), seed) for seed in range(2)]
    x = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    pc = learning.convex_combination(members, torch.tensor([0.2, 0.8]))
    assert pc.circuit.num_classes == 3
    torch.testing.assert_close(pc(x).exp(), 0.2 * members[0](x).exp() + 0.8 * members[1](x).exp(), rtol=1e-6, atol=1e-6)
    with pytest.raises(ct.StructureError, match="equally many classes"):
        learning.convex_combination([members[0], mixtures(ct.Categorical(2), num_classes=2)])


def test_flows_are_drawn_by_class(tmp_path):
    pc = mixtures(ct.Categorical(2))
    x = torch.zeros(60, 2, dtype=torch.int64)
    ct.plot.flows(pc, x, tmp_path / "flows.png", labels=LABELS)
    assert (tmp_path / "flows.png").stat().st_size > 0
    with pytest.raises(ct.ArgumentError, match=r"labels: .* has 3 classes"):
        ct.plot.flows(pc, x, tmp_path / "flows.png")
