"""External weights, latent evidence and classes: each against the circuits, or the enumeration, that they stand for."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuits as ct
from circuits.symbolic import Input, Product, Sum
from circuits.testing.oracle import enumerate_explanations, enumerated_log_partition, enumerated_marginals

DOUBLE = torch.float64


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def tree(num_classes=1):
    """A small circuit with folded layers, siblings, two children of one sum, and tied weights."""
    leaves = [ct.inputs(var, 2, ct.Categorical(3), name=f"leaf{var}") for var in range(4)]
    first = [ct.sum(leaf, num_units=3, name=f"a{var}") for var, leaf in enumerate(leaves)]
    second = [ct.sum(leaf, num_units=3, name=f"b{var}") for var, leaf in enumerate(leaves)]
    left = ct.sum(
        ct.product(first[0], first[1]), ct.product(second[0], second[1], mode="outer"), num_units=2, name="left"
    )
    right = ct.sum(
        ct.product(first[2], first[3]),
        ct.product(second[2], second[3], mode="outer"),
        num_units=2,
        tied_to=left,
        name="right",
    )
    root = ct.sum(ct.product(left, right, mode="outer"), num_units=num_classes, name="root")
    return ct.Circuit(root, num_classes=None if num_classes == 1 else num_classes)


def rebuilt(pc, weights_of):
    """The same circuit with the weights ``weights_of(node)`` in linear space, nothing tied."""
    new = {}
    for node in pc.circuit.nodes:
        children = [new[child] for child in node.children]
        if isinstance(node, Input):
            new[node] = ct.inputs(node.var, node.num_units, node.distribution, weights=weights_of(node), name=node.name)
        elif isinstance(node, Product):
            new[node] = ct.product(*children, mode=node.mode)
        else:
            new[node] = ct.sum(
                *children, num_units=node.num_units, unit=node.unit, weights=weights_of(node), name=node.name
            )
    return ct.compile(ct.Circuit(new[pc.circuit.root]), dtype=DOUBLE)


def normalised(node, log_weights):
    return torch.softmax(log_weights, 1 if isinstance(node, Sum) else 0)


def per_query(pc, external, query):
    """The circuit that query number ``query`` sees."""

    def weights_of(node):
        if node in external:
            table = external[node]
            return normalised(node, table if table.dim() == 2 else table[query])
        return pc.log_weights(node).detach().exp()

    return rebuilt(pc, weights_of)


@st.composite
def external_weights(draw, circuit, batch_size):
    """Log-weights of some nodes, some of them with a batch dimension."""
    nodes = [node for node in circuit.nodes if isinstance(node, (Input, Sum))]
    chosen = draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=4, unique=True))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 100)))
    external = {}
    for node in chosen:
        shape = (batch_size, *node.parameter_shape) if draw(st.booleans()) else node.parameter_shape
        external[node] = 2 * torch.randn(shape, dtype=DOUBLE, generator=generator)
    return external


@settings(max_examples=40)
@given(st.data(), ct.testing.circuits(families="table", max_vars=3, zero_weights=False))
def test_external_weights_are_those_of_one_circuit_per_query(data, circuit):
    pc = ct.compile(circuit, dtype=DOUBLE, seed=data.draw(st.integers(0, 100)))
    external = data.draw(external_weights(circuit, 2))
    evidence = data.draw(ct.testing.evidence(circuit))
    weights = pc.weights(external=external)
    joints = [ct.testing.enumerate_joint(per_query(pc, external, query)) for query in range(2)]
    expected = torch.cat([enumerated_log_partition(j, evidence.rows(slice(q, q + 1))) for q, j in enumerate(joints)])
    close(ct.queries.log_partition(pc, evidence, weights=weights), expected)
    close(pc(evidence, weights=weights), expected)
    if bool((expected > -torch.inf).all()):
        marginals = [enumerated_marginals(j, evidence.rows(slice(q, q + 1))) for q, j in enumerate(joints)]
        close(ct.queries.marginals(pc, evidence, weights=weights), torch.cat(marginals))
        best = ct.queries.mpe(pc, evidence, weights=weights)
        for query in range(2):
            explanations = enumerate_explanations(per_query(pc, external, query))
            factors = evidence.rows(slice(query, query + 1)).dense(max(circuit.num_categories), DOUBLE)
            score = torch.stack(
                [
                    explanations[x] + sum(factors[0, var, value] for var, value in enumerate(x))
                    for x in itertools.product(*(range(count) for count in circuit.num_categories))
                ]
            )
            close(best.log_score[query], score.max())


def test_the_other_queries_take_external_weights(generator):
    pc = ct.compile(tree(), dtype=DOUBLE, seed=0)
    external = {
        pc.circuit.node("left"): torch.randn(5, 2, 12, dtype=DOUBLE, generator=generator),
        pc.circuit.node("leaf2"): torch.randn(5, 3, 2, dtype=DOUBLE, generator=generator),
    }
    by_name = {node.name: log_weights for node, log_weights in external.items()}
    weights = pc.weights(external=by_name)
    x = torch.randint(3, (5, 4), generator=generator)
    observed = torch.rand(5, 4, generator=generator) > 0.5
    peers = [per_query(pc, external, query) for query in range(5)]
    rows = [slice(query, query + 1) for query in range(5)]
    for query_of, arguments in (
        (ct.queries.log_likelihood, (x,)),
        (ct.queries.log_marginal, (x, observed)),
        (ct.queries.log_conditional, (x, observed)),
    ):
        expected = [query_of(peer, *(a[row] for a in arguments)) for peer, row in zip(peers, rows, strict=True)]
        close(query_of(pc, *arguments, weights=weights), torch.cat(expected))


def test_samples_under_external_weights_follow_each_query(generator):
    pc = ct.compile(tree(), dtype=DOUBLE, seed=0)
    external = {
        pc.circuit.node(name): 2 * torch.randn(2, *shape, dtype=DOUBLE, generator=generator)
        for name, shape in (("right", (2, 12)), ("left", (2, 12)), ("leaf3", (3, 2)), ("leaf1", (3, 2)))
    }
    samples = ct.queries.sample(pc, 20_000, generator=generator, weights=pc.weights(external=external))
    assert samples.shape == (20_000, 2, 4)
    for query in range(2):
        joint = ct.testing.enumerate_joint(per_query(pc, external, query)).exp().flatten()
        index = (samples[:, query] * torch.tensor([27, 9, 3, 1])).sum(-1)
        observed = torch.bincount(index, minlength=81) / 20_000
        assert float((observed - joint).abs().sum()) < 0.08  # total variation 0.04; the expected one is about 0.02


def test_shared_external_weights_have_no_batch(generator):
    pc = ct.compile(tree(), dtype=DOUBLE, seed=0)
    external = {pc.circuit.node("a1"): torch.randn(3, 2, dtype=DOUBLE, generator=generator)}
    weights = pc.weights(external=external)
    peer = per_query(pc, external, 0)
    for batch_size in (1, 6):
        x = torch.randint(3, (batch_size, 4), generator=generator)
        close(ct.queries.log_likelihood(pc, x, weights=weights), peer(x))
    assert ct.queries.sample(pc, 3, weights=weights).shape == (3, 4)


def test_an_override_is_for_the_named_node_not_for_its_ties(generator):
    pc = ct.compile(tree(), dtype=DOUBLE, seed=0)
    x = torch.randint(3, (4, 4), generator=generator)
    external = {pc.circuit.node("left"): torch.randn(2, 12, dtype=DOUBLE, generator=generator)}
    close(pc(x, weights=pc.weights(external=external)), per_query(pc, external, 0)(x))
    both = {**external, pc.circuit.node("right"): external[pc.circuit.node("left")]}
    assert not torch.allclose(pc(x, weights=pc.weights(external=external)), pc(x, weights=pc.weights(external=both)))


@pytest.mark.parametrize("name", ["left", "b1", "leaf0"])
def test_gradients_reach_external_weights(name, generator):
    pc = ct.compile(tree(), dtype=DOUBLE, seed=0)
    node = pc.circuit.node(name)
    given = torch.randn(2, *node.parameter_shape, dtype=DOUBLE, generator=generator, requires_grad=True)
    x = torch.randint(3, (2, 4), generator=generator)
    for normalize in (True, False):

        def log_z(table, normalize=normalize):
            return pc(x, weights=pc.weights(external={node: table}, normalize=normalize))

        assert torch.autograd.gradcheck(log_z, (given,))
    assert torch.autograd.gradgradcheck(log_z, (given,))
    evidence = ct.Evidence.soft(torch.zeros(2, 4, 3, dtype=DOUBLE))
    marginals = ct.queries.marginals(pc, evidence, weights=pc.weights(external={node: given}), differentiable=True)
    assert torch.autograd.grad(marginals[:, 0, 0].sum(), given)[0].isfinite().all()


def test_unnormalised_weights_scale_the_partition_function(generator):
    pc = ct.compile(tree(), dtype=DOUBLE, seed=0)
    nothing = ct.Evidence.nothing(2, 4)
    given = torch.randn(2, 1, 4, dtype=DOUBLE, generator=generator)
    raw = pc.weights(external={"root": given}, normalize=False)
    close(pc(nothing, weights=raw), torch.logsumexp(given[:, 0], 1))
    close(ct.queries.mpe(pc, nothing, weights=raw).log_score - torch.logsumexp(given[:, 0], 1),
          ct.queries.mpe(pc, nothing, weights=pc.weights(external={"root": given})).log_score)  # fmt: skip
    empty = pc.weights(external={"root": given.masked_fill(torch.tensor([True, False]).view(2, 1, 1), -torch.inf)},
                       normalize=False)  # fmt: skip
    assert pc(nothing, weights=empty)[0] == -torch.inf
    assert pc(nothing, weights=empty)[1].isfinite()


def test_flows_of_external_weights_leave_the_banks_alone(generator):
    pc = ct.compile(tree(), dtype=DOUBLE, seed=0)
    x = torch.randint(3, (6, 4), generator=generator)
    external = {"root": pc.log_weights(pc.circuit.node("root")).detach()}
    plain = ct.learning.expected_flows(pc, x)
    given = ct.learning.expected_flows(pc, x, weights=pc.weights(external=external))
    for name, flow in plain.flows.items():
        close(given.flows[name], torch.zeros_like(flow) if name == "sum_1x4" else flow)


def test_wrong_external_weights_are_explained():
    pc = ct.compile(tree(), seed=0)
    table = torch.zeros(2, 12)
    for external, message in (
        ({"nobody": table}, "one of the 15 names of nodes, got 'nobody'; some are a0, a1, a2"),
        ({"left": torch.zeros(2, 11)}, "expected floating-point log-weights"),
        ({"left": table, pc.circuit.node("left"): table}, "given twice"),
        ({"left": table.expand(3, -1, -1), "right": table.expand(2, -1, -1)}, "one batch size"),
        ({"left": table - torch.inf}, "a unit without any"),
        ({"left": table * torch.nan}, "NaN"),
        ({ct.inputs(0, 2, ct.Categorical(3)): torch.zeros(3, 2)}, "external: expected a node of"),
    ):
        with pytest.raises(ct.ArgumentError, match=message):
            pc.weights(external=external)
    with pytest.raises(ct.ArgumentError, match="a batch of 3 queries, the evidence has 2"):
        pc(torch.zeros(2, 4, dtype=torch.int64), weights=pc.weights(external={"left": table.expand(3, -1, -1)}))


def hmm_tables(num_states, num_categories, generator):
    shapes = ((num_states,), (num_states, num_states), (num_states, num_categories))
    return [torch.softmax(torch.randn(*shape, dtype=DOUBLE, generator=generator), -1) for shape in shapes]


def hmm_and_paths(generator, length=4, states=3):
    """An HMM, and the table of log p(z, x) over all paths z and texts x, (states,) * length + (2,) * length."""
    initial, transition, emission = hmm_tables(states, 2, generator)
    circuit = ct.structures.hmm(length, states, 2, initial=initial, transition=transition, emission=emission)
    joint = torch.zeros([states] * length + [2] * length, dtype=DOUBLE)
    for z in itertools.product(range(states), repeat=length):
        for x in itertools.product(range(2), repeat=length):
            score = initial[z[0]].log() + sum(emission[s, v].log() for s, v in zip(z, x, strict=True))
            joint[z + x] = score + sum(transition[a, b].log() for a, b in itertools.pairwise(z))
    return ct.compile(circuit, dtype=DOUBLE), joint


def state_name(step):
    return "initial" if step == 0 else f"transition{step - 1}"


@pytest.mark.parametrize("impossible", [False, True])
def test_latent_evidence_on_an_hmm_is_evidence_on_its_states(generator, impossible):
    pc, joint = hmm_and_paths(generator)
    batch = 3
    on_states = torch.randn(batch, 4, 3, dtype=DOUBLE, generator=generator)
    if impossible:
        on_states[:, 1, 0] = on_states[0, 3, 1] = -torch.inf
    on_values = torch.randn(batch, 4, 2, dtype=DOUBLE, generator=generator)
    factors = joint.unsqueeze(0)
    for step in range(4):
        factors = factors + on_states[:, step].reshape(batch, *[3 if i == step else 1 for i in range(8)])
        factors = factors + on_values[:, step].reshape(batch, *[2 if i == step + 4 else 1 for i in range(8)])
    latents = {state_name(step): on_states[:, step] for step in range(4)}
    evidence = ct.Evidence.soft(on_values).with_latents(latents)
    log_z = torch.logsumexp(factors.flatten(1), 1)
    close(ct.queries.log_partition(pc, evidence), log_z)
    posterior = (factors - log_z.reshape(-1, *[1] * 8)).exp()
    marginals, states = ct.queries.marginals(pc, evidence), ct.queries.latent_marginals(pc, evidence)
    for step in range(4):
        others = [1 + i for i in range(8)]
        close(states[pc.circuit.node(state_name(step))], posterior.sum([i for i in others if i != step + 1]))
        close(marginals[:, step], posterior.sum([i for i in others if i != step + 5]))
    best = ct.queries.mpe(pc, evidence)
    close(best.log_score, factors.flatten(1).amax(1))
    samples = ct.queries.sample(pc, 4000, evidence, generator=generator)
    frequency = torch.nn.functional.one_hot(samples, 2).double().mean(0)
    assert float((frequency - marginals).detach().abs().max()) < 0.04


def test_state_posteriors_are_hmmlearns(generator):
    hmmlearn = pytest.importorskip("hmmlearn.hmm")
    tables = hmm_tables(5, 4, generator)
    circuit = ct.structures.hmm(12, 5, 4, **dict(zip(("initial", "transition", "emission"), tables, strict=True)))
    pc = ct.compile(circuit, dtype=DOUBLE)
    x = torch.randint(4, (3, 12), generator=generator)
    posterior = ct.queries.latent_marginals(pc, ct.Evidence.observe(x), [state_name(step) for step in range(12)])
    peer = hmmlearn.CategoricalHMM(5, n_features=4)
    peer.startprob_, peer.transmat_, peer.emissionprob_ = (
        (table / table.sum(-1, keepdim=True)).numpy() for table in tables
    )
    for row, sequence in enumerate(x):
        expected = peer.predict_proba(sequence.reshape(-1, 1).numpy())
        ours = torch.stack([posterior[state_name(step)][row] for step in range(12)])
        np.testing.assert_allclose(ours.detach().numpy(), expected, rtol=1e-8, atol=1e-12)


@settings(max_examples=40)
@given(st.data(), ct.testing.circuits(families="table", max_vars=3, zero_weights=True))
def test_latent_factors_are_unnormalised_weights(data, circuit):
    """exp(f_i) w_ki: the same as external weights that are not normalised, on every kind of circuit."""
    pc = ct.compile(circuit, dtype=DOUBLE, seed=data.draw(st.integers(0, 100)))
    nodes = data.draw(st.lists(st.sampled_from(circuit.sums), min_size=1, max_size=3, unique=True))
    evidence = data.draw(ct.testing.evidence(circuit))
    generator = torch.Generator().manual_seed(0)
    factors = {node: torch.randn(2, node.parameter_shape[1], dtype=DOUBLE, generator=generator) for node in nodes}
    external = {node: pc.log_weights(node).detach() + factor.unsqueeze(1) for node, factor in factors.items()}
    weights = pc.weights(external=external, normalize=False)
    conditioned = evidence.with_latents(factors)
    log_z = pc(conditioned)
    close(log_z, pc(evidence, weights=weights))
    if bool((log_z > -torch.inf).all()):
        close(ct.queries.marginals(pc, conditioned), ct.queries.marginals(pc, evidence, weights=weights))
        close(ct.queries.mpe(pc, conditioned).log_score, ct.queries.mpe(pc, evidence, weights=weights).log_score)


@pytest.mark.parametrize("num_given", [5, 8])
def test_the_order_of_latents_does_not_matter(num_given, generator):
    pc = ct.compile(tree(), dtype=DOUBLE, seed=0)
    names = [f"{kind}{var}" for kind in "ba" for var in (2, 0, 3, 1)][:num_given]
    factors = {name: torch.randn(3, 2, dtype=DOUBLE, generator=generator) for name in names}
    weights = {name: pc.log_weights(pc.sum_node(name)).detach() + f.unsqueeze(1) for name, f in factors.items()}
    x = torch.randint(3, (3, 4), generator=generator)
    expected = pc(x, weights=pc.weights(external=weights, normalize=False))
    close(pc(ct.Evidence.observe(x).with_latents(factors)), expected)
    with torch.no_grad():
        close(pc(ct.Evidence.observe(x).with_latents(factors)), expected.detach())


@settings(max_examples=20)
@given(st.data(), ct.testing.circuits(families="table", max_vars=3, zero_weights=False))
def test_latent_marginals_are_flows_of_the_node(data, circuit):
    pc = ct.compile(circuit, dtype=DOUBLE, seed=0)
    evidence = data.draw(ct.testing.evidence(circuit, impossible_values=False))
    posterior = ct.queries.latent_marginals(pc, evidence)
    flows = ct.learning.expected_flows(pc, evidence).flows
    nothing = evidence.levelled(pc.num_categories)[0].says_nothing(pc.num_categories)
    for name in pc.sum_banks:
        nodes = [node for node in posterior if name == "sum_{}x{}".format(*node.parameter_shape)]
        # where nothing is known there is a posterior, and nothing to learn
        total = sum((posterior[n].sum(1) * ~nothing[:, sorted(n.scope)].all(1)).sum() for n in nodes)
        close(flows[name].sum(), total)
    if circuit.root in posterior:
        close(posterior[circuit.root].sum(1).detach(), torch.ones(2, dtype=DOUBLE))


def test_gradients_reach_latent_factors(generator):
    pc = ct.compile(tree(), dtype=DOUBLE, seed=0)
    x = torch.randint(3, (2, 4), generator=generator)
    names = ("left", "a1", "b1", "root")
    given = [
        torch.randn(2, pc.sum_node(name).parameter_shape[1], dtype=DOUBLE, generator=generator, requires_grad=True)
        for name in names
    ]

    def log_z(*factors):
        return pc(ct.Evidence.observe(x).with_latents(dict(zip(names, factors, strict=True))))

    assert torch.autograd.gradcheck(log_z, given)
    assert torch.autograd.gradgradcheck(log_z, given)
    evidence = ct.Evidence.observe(x, torch.zeros_like(x, dtype=torch.bool)).with_latents({"left": given[0]})
    posterior = ct.queries.latent_marginals(pc, evidence, ["right", "left"], differentiable=True)
    assert torch.autograd.grad(posterior["left"][:, 0].sum(), given[0])[0].abs().sum() > 0


def test_weight_gradients_under_latent_evidence(generator):
    pc = ct.compile(tree(), dtype=DOUBLE, seed=0)
    evidence = ct.Evidence.observe(torch.randint(3, (2, 4), generator=generator)).with_latents(
        {"b2": torch.randn(2, 2, dtype=DOUBLE, generator=generator)}
    )
    parameters = [parameter.detach().clone().requires_grad_() for parameter in pc.parameters()]
    names = [name for name, _ in pc.named_parameters()]

    def log_z(*tensors):
        return torch.func.functional_call(pc, dict(zip(names, tensors, strict=True)), (evidence,))

    assert torch.autograd.gradcheck(log_z, parameters)


def test_wrong_latent_evidence_is_explained():
    pc = ct.compile(tree(), seed=0)
    evidence = ct.Evidence.nothing(2, 4)
    for latents, message in (
        ({"left": torch.zeros(3, 12)}, r"expected floating point \(2, I\)"),
        ({"left": torch.full((2, 12), torch.inf)}, "below"),
        ({"left": torch.zeros(2, 3)}, "12"),
        ({"leaf0": torch.zeros(2, 3)}, "expected a sum node"),
        ({"nobody": torch.zeros(2, 3)}, "one of the 15 names of nodes, got 'nobody'"),
        ({"left": torch.zeros(2, 12), pc.circuit.node("left"): torch.zeros(2, 12)}, "given twice"),
    ):
        with pytest.raises(ct.ArgumentError, match=message):
            pc(evidence.with_latents(latents))


def class_models(pc):
    """One single-root circuit per class of a class-conditional one."""
    root = pc.circuit.root

    def of_class(unit):
        return rebuilt_root(pc, unit)

    return [of_class(unit) for unit in range(root.num_units)]


def rebuilt_root(pc, unit):
    one = ct.sum(pc.circuit.root, num_units=1, weights=torch.eye(pc.circuit.num_classes)[unit : unit + 1])
    single = ct.compile(ct.Circuit(one), dtype=DOUBLE)
    for node in pc.circuit.nodes:
        if isinstance(node, (Input, Sum)) and node.tied_to is None:
            single.set_weights(node, pc.log_weights(node).detach().exp())
    return single


def test_a_circuit_with_classes_is_one_circuit_per_class(generator, tmp_path):
    pc = ct.compile(tree(num_classes=3), dtype=DOUBLE, seed=0)
    models = class_models(pc)
    x = torch.randint(3, (5, 4), generator=generator)
    observed = torch.rand(5, 4, generator=generator) > 0.5
    each = torch.stack([model(x) for model in models], 1).detach()
    close(pc(x), each)
    close(ct.queries.log_likelihood(pc, x), each)
    for query_of in (ct.queries.log_marginal, ct.queries.log_conditional):
        close(query_of(pc, x, observed), torch.stack([query_of(model, x, observed) for model in models], 1))
    log_prior = torch.log_softmax(torch.randn(3, dtype=DOUBLE, generator=generator), 0)
    close(ct.queries.class_posterior(pc, ct.Evidence.observe(x), log_prior), torch.softmax(each + log_prior, 1))
    close(ct.queries.class_posterior(pc, ct.Evidence.observe(x)), torch.softmax(each, 1))
    close(pc(ct.Evidence.observe(x).with_class_prior(log_prior)), torch.logsumexp(each + log_prior, 1))
    labels = torch.randint(3, (5,), generator=generator)
    close(pc(ct.Evidence.observe(x).with_class(labels)), each.gather(1, labels.unsqueeze(1))[:, 0])
    ct.save(pc, tmp_path / "classes")
    again = ct.load(tmp_path / "classes")
    assert again.circuit.num_classes == 3
    close(again(x), each)
    assert "num_classes=3" in repr(pc.circuit)


def test_queries_for_one_distribution_ask_for_the_class(generator):
    pc = ct.compile(tree(num_classes=3), dtype=DOUBLE, seed=0)
    nothing = ct.Evidence.nothing(2, 4)
    for query in (
        lambda: ct.queries.marginals(pc, nothing),
        lambda: ct.queries.sample(pc, 2),
        lambda: ct.queries.mpe(pc, nothing),
        lambda: ct.queries.latent_marginals(pc, nothing),
    ):
        with pytest.raises(ct.PropertyError, match=r"root.*with_class"):
            query()
    with pytest.raises(ct.PropertyError, match="one root unit"):
        ct.queries.class_posterior(ct.compile(tree(), seed=0), nothing)
    with pytest.raises(ct.ArgumentError, match="from 0 to 2"):
        pc(nothing.with_class(3))
    with pytest.raises(ct.StructureError, match="no single root"):
        ct.Circuit(pc.circuit.root)
    with pytest.raises(ct.StructureError, match="one per class"):
        ct.Circuit(pc.circuit.root, num_classes=2)


def test_queries_given_a_class_or_a_prior(generator):
    pc = ct.compile(tree(num_classes=3), dtype=DOUBLE, seed=0)
    models = class_models(pc)
    labels = torch.tensor([2, 0])
    factors = torch.randn(2, 4, 3, dtype=DOUBLE, generator=generator)
    evidence = ct.Evidence.soft(factors)
    joints = torch.stack([ct.testing.enumerate_joint(model) for model in models])
    given_class = evidence.with_class(labels)
    expected = [enumerated_marginals(joints[label], evidence.rows(slice(q, q + 1))) for q, label in enumerate(labels)]
    close(ct.queries.marginals(pc, given_class), torch.cat(expected))
    best = [ct.queries.mpe(models[label], evidence.rows(slice(q, q + 1))) for q, label in enumerate(labels)]
    close(ct.queries.mpe(pc, given_class).log_score, torch.cat([b.log_score for b in best]))
    assert torch.equal(ct.queries.mpe(pc, given_class).assignment, torch.cat([b.assignment for b in best]))
    log_prior = torch.log_softmax(torch.randn(3, dtype=DOUBLE, generator=generator), 0)
    mixed = torch.logsumexp(joints + log_prior.reshape(3, 1, 1, 1, 1), 0)
    close(ct.queries.marginals(pc, evidence.with_class_prior(log_prior)), enumerated_marginals(mixed, evidence))
    samples = ct.queries.sample(pc, 20_000, given_class, generator=generator)
    frequency = torch.nn.functional.one_hot(samples, 3).double().mean(0)
    assert float((frequency - ct.queries.marginals(pc, given_class)).detach().abs().max()) < 0.02


@pytest.mark.parametrize("optimizer", ["em", "minibatch_em", "anemone", lambda p: torch.optim.Adam(p, lr=0.05)])
def test_class_conditional_fit_learns_each_class(optimizer, generator):
    """Class r has mostly the value r."""
    leaves = [ct.inputs(var, 4, ct.Categorical(3)) for var in range(4)]
    pc = ct.compile(ct.Circuit(ct.sum(ct.product(*leaves), num_units=3), num_classes=3), seed=0)
    labels = torch.randint(3, (300,), generator=generator)
    noise = torch.rand(300, 4, generator=generator) < 0.1
    x = torch.where(noise, torch.randint(3, (300, 4), generator=generator), labels.unsqueeze(1))
    result = ct.learning.fit(
        pc, x, labels=labels, optimizer=optimizer, num_epochs=30, batch_size=100, progress=False,
        validation_data=x, validation_labels=labels,
    )  # fmt: skip
    assert result.train_log_likelihood[-1] > result.train_log_likelihood[0]
    guess = ct.queries.class_posterior(pc, ct.Evidence.observe(x)).argmax(1)
    assert float((guess == labels).double().mean()) > 0.9
    conditional = pc(ct.Evidence.observe(x).with_class(labels)).mean()
    assert float(conditional.detach()) > result.train_log_likelihood[0]


def test_labels_and_classes_go_together():
    with_classes, without = ct.compile(tree(num_classes=3), seed=0), ct.compile(tree(), seed=0)
    x = torch.zeros(4, 4, dtype=torch.int64)
    with pytest.raises(ct.ArgumentError, match="give the class of every sample"):
        ct.learning.fit(with_classes, x, progress=False)
    with pytest.raises(ct.ArgumentError, match="has no classes"):
        ct.learning.fit(without, x, labels=torch.zeros(4, dtype=torch.int64), progress=False)
    with pytest.raises(ct.ArgumentError, match="from 0 to 2"):
        ct.learning.fit(with_classes, x, labels=torch.full((4,), 3), progress=False)
    with pytest.raises(ct.ArgumentError, match=r"shape \(4,\)"):
        ct.learning.fit(with_classes, x, labels=torch.zeros(3, dtype=torch.int64), progress=False)
