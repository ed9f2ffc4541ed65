"""Learning that starts at clusters of the data, or at given states of the latents."""

import pytest
import torch
from learning_cases import CLOSE, drawn

import circuits as ct
from circuits import learning
from circuits.learning import kmeans_start


def frequencies(counts, pseudocount):
    counts = counts.double() + pseudocount / counts.shape[-1]
    return counts / counts.sum(-1, keepdim=True)


def test_known_states_of_an_hmm_give_the_frequencies_of_its_tables():
    circuit = ct.structures.hmm(5, 3, 4)
    pc = ct.compile(circuit, dtype=torch.float64, seed=0)
    x = drawn(pc, 40)
    z = torch.randint(0, 3, (40, 5), generator=torch.Generator().manual_seed(1))
    ct.batteries.distill_latents(pc, x, {f"emission{t}": z[:, t] for t in range(5)}, pseudocount=0.5, batch_size=7)
    one_hot = torch.nn.functional.one_hot
    moved = torch.einsum("nti,ntj->ij", one_hot(z[:, :-1], 3), one_hot(z[:, 1:], 3))
    emitted = torch.einsum("nti,ntv->iv", one_hot(z, 3), one_hot(x, 4))
    torch.testing.assert_close(pc.log_weights(circuit.node("transition0")).exp(), frequencies(moved, 0.5), **CLOSE)
    torch.testing.assert_close(pc.log_weights(circuit.node("emission0")).exp(), frequencies(emitted, 0.5).t(), **CLOSE)
    torch.testing.assert_close(
        pc.log_weights(circuit.root).exp()[0], frequencies(one_hot(z[:, 0], 3).sum(0), 0.5), **CLOSE
    )


def test_states_that_are_unknown_are_inferred():
    pcs = [ct.compile(ct.structures.hmm(5, 3, 4), dtype=torch.float64, seed=0) for _ in range(2)]
    x = drawn(pcs[0], 40)
    counts = torch.arange(40.0) % 3
    observed = torch.rand(40, 5, generator=torch.Generator().manual_seed(2)) < 0.7
    unknown = {"emission1": torch.full((40,), -1)}
    ct.batteries.distill_latents(pcs[0], x, unknown, observed=observed, sample_weights=counts, pseudocount=0.1)
    flows, _ = learning.expected_flows(pcs[1], ct.Evidence.observe(x, observed), counts)
    learning.em_step(pcs[1], flows, pseudocount=0.1)
    torch.testing.assert_close(*(ct.testing.enumerate_joint(pc) for pc in pcs), **CLOSE)


def test_the_units_of_a_mixture_become_the_given_groups():
    leaves = [ct.inputs(0, 2, ct.Gaussian(), name="x"), ct.inputs(1, 2, ct.Poisson())]
    circuit = ct.Circuit(ct.sum(ct.product(*leaves), num_units=1))
    pc = ct.compile(circuit, dtype=torch.float64, seed=0)
    x = torch.tensor([[0.0, 3.0], [1.0, 5.0], [-6.0, 0.0], [-7.0, 2.0]], dtype=torch.float64)
    ct.batteries.distill_latents(pc, x, {leaves[0]: torch.tensor([1, 1, 0, 0])}, pseudocount=0)
    torch.testing.assert_close(pc.parameters_of(leaves[0])[0], torch.tensor([-6.5, 0.5]).double(), **CLOSE)
    torch.testing.assert_close(pc.parameters_of(leaves[1])[0], torch.tensor([1.0, 4.0]).double(), **CLOSE)


def sharp(circuit, seed):
    """A circuit whose latents have much to say: its weights are the cubes of random ones."""
    pc = ct.compile(circuit, dtype=torch.float64, seed=seed)
    with torch.no_grad():
        for parameter in pc.bank.values():
            parameter.mul_(3)
    return pc


def separated_mixture():
    """Eight components that differ in many of 20 variables."""
    generator = torch.Generator().manual_seed(4)
    centres = torch.randint(0, 3, (8, 20), generator=generator)
    component = torch.randint(0, 8, (600,), generator=generator)
    noise = torch.randint(0, 3, (600, 20), generator=generator)
    is_kept = torch.rand(600, 20, generator=generator) < 0.7
    return ct.structures.mixture(20, 3, num_components=8), torch.where(is_kept, centres[component], noise)


def gaussian_mixture():
    generator = torch.Generator().manual_seed(5)
    centres = 50 + 20 * torch.randn(5, 4, generator=generator)
    component = torch.randint(0, 5, (400,), generator=generator)
    x = centres[component] + torch.randn(400, 4, generator=generator)
    x[torch.rand(x.shape, generator=generator) < 0.1] = torch.nan
    return ct.structures.mixture(4, ct.Gaussian(), num_components=5), x


def hidden_markov():
    circuit = ct.structures.hmm(8, 4, 6)
    return circuit, drawn(sharp(circuit, seed=3), 800)


def hidden_chow_liu_tree():
    """A latent tree for data that are none."""
    _, x = separated_mixture()
    return ct.structures.hclt(x, 6, 3), x


@pytest.mark.parametrize("build", [separated_mixture, gaussian_mixture, hidden_markov, hidden_chow_liu_tree])
def test_em_from_clusters_reaches_at_least_what_it_reaches_from_random_weights(build):
    circuit, x = build()
    start, end = {"random": 0.0, "clusters": 0.0}, {"random": 0.0, "clusters": 0.0}
    for seed in range(3):
        for name in start:
            pc = ct.compile(circuit, dtype=torch.float64, seed=seed)
            if name == "clusters":
                learning.initialize_by_kmeans(pc, x, seed=seed)
            elif build is gaussian_mixture:
                learning.initialize_inputs(pc, x, seed=seed)
            history = learning.fit(pc, x, num_epochs=20, batch_size=800, progress=False).train_log_likelihood
            start[name] += history[0] / 3
            end[name] += history[-1] / 3
    assert start["clusters"] > start["random"] + 0.1
    assert end["clusters"] >= end["random"] - 1e-3


def test_one_seed_gives_one_start_and_zeros_stay():
    transition = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5]])
    circuit = ct.structures.hmm(4, 3, 4, transition=transition)
    x = drawn(ct.compile(circuit, seed=1), 100)
    joints = []
    for seed in (0, 0, 1):
        pc = ct.compile(circuit, dtype=torch.float64, seed=2)
        learning.initialize_by_kmeans(pc, x, seed=seed, max_samples=200)
        assert torch.equal(pc.log_weights(circuit.node("transition0")) == -torch.inf, transition == 0)
        joints.append(ct.testing.enumerate_joint(pc))
    assert torch.equal(joints[0], joints[1])
    assert not torch.equal(joints[0], joints[2])


def test_starts_that_cannot_be_are_refused():
    pc = ct.compile(ct.structures.hmm(4, 3, 4), seed=0)
    x = drawn(pc, 10)
    states = torch.zeros(10, dtype=torch.int64)
    for given, message in [
        ({"transition0": states + 3}, "from -1 .unknown. to 2"),
        ({"emission0": states[:9]}, r"latents: expected integers of shape \(10,\)"),
        ({"emission0": states + 3}, "from -1 .unknown. to 2"),
        ({ct.inputs(0, 3, ct.Categorical(4)): states}, "expected a node of"),
    ]:
        with pytest.raises(ct.ArgumentError, match=message):
            ct.batteries.distill_latents(pc, x, given)
    with pytest.raises(ct.ArgumentError, match="max_samples"):
        learning.initialize_by_kmeans(pc, x, max_samples=0)
    factorized = ct.compile(ct.structures.fully_factorized(4, 3), seed=0)
    with pytest.raises(ct.ArgumentError, match="no latent to cluster for"):
        learning.initialize_by_kmeans(factorized, x.clamp(max=2))
    initial = torch.tensor([1.0, 0.0, 0.0])
    stuck = ct.compile(ct.structures.hmm(4, 3, 4, initial=initial), seed=0)
    with pytest.raises(
        ct.ImpossibleEvidenceError, match=r"data: all 10 samples have probability zero .* with the given latents"
    ):
        ct.batteries.distill_latents(stuck, x, {"emission0": states + 1})


def classes_of_groups():
    """Class r has samples of its own two groups of four, and unit k of the leaves is a group."""
    leaves = [ct.inputs(var, 4, ct.Categorical(4), name=f"x{var}") for var in range(5)]
    circuit = ct.Circuit(ct.sum(ct.product(*leaves), num_units=2, name="root"), num_classes=2)
    labels = torch.arange(80) % 2
    group = 2 * labels + torch.arange(80) // 40
    noise = torch.rand(80, 5, generator=torch.Generator().manual_seed(0)) < 0.1
    return circuit, torch.where(noise, 3 - group.unsqueeze(1), group.unsqueeze(1)), labels, group


def test_states_of_classes_are_counted_class_by_class():
    circuit, x, labels, group = classes_of_groups()
    pc = ct.compile(circuit, dtype=torch.float64, seed=0)
    ct.batteries.distill_latents(pc, x, {"x0": group}, labels=labels, pseudocount=0.5, batch_size=7)
    one_hot = torch.nn.functional.one_hot
    counts = torch.einsum("nr,nk->rk", one_hot(labels, 2), one_hot(group, 4))
    torch.testing.assert_close(pc.log_weights(circuit.root).exp(), frequencies(counts, 0.5), **CLOSE)
    seen = torch.einsum("nk,nv->kv", one_hot(group, 4), one_hot(x[:, 3], 4))
    torch.testing.assert_close(pc.log_weights(circuit.node("x3")).exp(), frequencies(seen, 0.5).t(), **CLOSE)


def test_clusters_of_classes_are_counted_class_by_class():
    circuit, x, labels, _ = classes_of_groups()
    pc = ct.compile(circuit, dtype=torch.float64, seed=0)
    learning.initialize_by_kmeans(pc, x, labels=labels, max_samples=60, pseudocount=0.1)
    assert (pc.log_weights(circuit.root).exp() > 0.1).sum(1).tolist() == [2, 2]  # clusters of each class
    assert torch.equal(ct.queries.class_posterior(pc, ct.Evidence.observe(x)).argmax(1), labels)
    with pytest.raises(ct.ArgumentError, match=r"labels: .*give the class of every sample"):
        learning.initialize_by_kmeans(pc, x)


def test_fitting_inputs_to_samples_asks_no_class():
    circuit, x, _, _ = classes_of_groups()
    pc = ct.compile(circuit, dtype=torch.float64, seed=0)
    before = pc.log_weights(circuit.node("x0"))
    learning.initialize_inputs(pc, x)
    assert not torch.equal(pc.log_weights(circuit.node("x0")), before)


def test_flows_of_classes_ask_for_the_class():
    circuit, x, labels, _ = classes_of_groups()
    pc = ct.compile(circuit, dtype=torch.float64, seed=0)
    with pytest.raises(ct.PropertyError, match="with_class"):
        learning.expected_flows(pc, x)
    flows, _ = learning.expected_flows(pc, ct.Evidence.observe(x).with_class(labels))
    (name,) = pc.sum_banks
    torch.testing.assert_close(flows[name].sum((0, 2)), torch.tensor([40.0, 40.0]).double(), **CLOSE)


@pytest.mark.parametrize("families", [[ct.Categorical(3), ct.Bernoulli()], [4, 4], [3, ct.Gaussian()]])
def test_several_variables_of_one_latent_get_one_set_of_states(families):
    """Clustered apart they would contradict each other, and no sample would be possible."""
    for seed in range(10):
        pc = ct.compile(ct.structures.hmm(3, 2, families), dtype=torch.float64, seed=0)
        x = drawn(ct.compile(pc.circuit, dtype=torch.float64, seed=seed), 40, seed=seed)
        learning.initialize_by_kmeans(pc, x, seed=seed)
        assert all(bool(parameter.isfinite().all()) for parameter in pc.bank.values())


def test_the_states_of_steps_of_several_variables_are_counted(monkeypatch):
    """Whatever the clusters are, the tables are the frequencies of states and values together."""
    circuit = ct.structures.hmm(4, 3, [4, ct.Bernoulli()])
    pc = ct.compile(circuit, dtype=torch.float64, seed=0)
    x = drawn(pc, 30)
    z = torch.randint(0, 3, (30, 4), generator=torch.Generator().manual_seed(1))
    seen = []

    def clusters(rows, num_clusters, seed):
        seen.append((rows.shape, num_clusters))
        return z.t().flatten()

    monkeypatch.setattr(kmeans_start, "_best_clusters", clusters)
    learning.initialize_by_kmeans(pc, x, pseudocount=0.5, max_samples=1000)
    assert seen == [((4 * 30, 3 * (4 + 1)), 3)]  # one-hot values and a number, of each step and the two beside it
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    one_hot = torch.nn.functional.one_hot
    states, values = one_hot(z, 3), x[order].unflatten(1, (4, 2))
    moved = torch.einsum("nti,ntj->ij", states[:, :-1], states[:, 1:])
    torch.testing.assert_close(pc.log_weights("transition0").exp(), frequencies(moved, 0.5), **CLOSE)
    for position, num_values in enumerate((4, 2)):
        emitted = torch.einsum("nti,ntv->iv", states, one_hot(values[..., position], num_values))
        table = pc.log_weights(f"emission0_{position}").exp()
        torch.testing.assert_close(table, frequencies(emitted, 0.5).t(), **CLOSE)
