"""Forms of weights at run time: each is the tables that it stands for, written out, in every query."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import circuits as ct
from circuits.symbolic import Sum
from circuits.weights import Gates, LowRank

DOUBLE = torch.float64


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def written_out(pc, form, node):
    """log W_b of a form, from its definition: ([B,] K, I)."""
    own = pc.log_weights(node).detach().exp()
    if isinstance(form, Gates):
        tables = (form.tables + own.log() if form.relative else form.tables).softmax(-1)
        return torch.einsum("...t,tki->...ki", form.gates.softmax(-1), tables).log()
    moved = form.v @ form.u.mT
    return ((own + moved) / (1 + moved.sum(-1, keepdim=True))).log()


def tree():
    """A tree with folded layers, siblings, tied weights, and sums of two children."""
    leaves = [ct.inputs(var, 2, ct.Categorical(3)) for var in range(4)]
    first = [ct.sum(leaf, num_units=3, name=f"a{var}") for var, leaf in enumerate(leaves)]
    second = [ct.sum(leaf, num_units=3, name=f"b{var}") for var, leaf in enumerate(leaves)]
    left, right = (
        ct.sum(ct.product(first[i], first[j]), ct.product(second[i], second[j], mode="outer"), num_units=2, name=name)
        for i, j, name in ((0, 1, "left"), (2, 3, "right"))
    )
    return ct.Circuit(ct.sum(ct.product(left, right, mode="outer"), num_units=1, name="root"))


@st.composite
def forms(draw, pc, batch_size):
    """Forms of some sum nodes, some of them with shared tables, without a batch, with -inf, T = 1 or R = 0."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    shared, chosen = {}, {}

    def normal(*shape):
        return 2 * torch.randn(shape, dtype=DOUBLE, generator=generator)

    for node in [node for node in pc.circuit.nodes if isinstance(node, Sum)]:
        num_units, num_children = node.parameter_shape
        kind = draw(st.sampled_from(["gates", "relative", "low rank", "dense", "own"]))
        batch = draw(st.sampled_from([(), (batch_size,)]))
        if kind in ("gates", "relative"):
            key = (kind, num_units, num_children)
            num_tables = draw(st.integers(1, 3))
            if key not in shared or draw(st.booleans()):
                shared[key] = normal(num_tables, num_units, num_children)
                if num_children > 1 and kind == "gates":
                    shared[key][..., 0].masked_fill_(normal(num_tables, num_units) > 1.5, -torch.inf)
            gates = normal(*batch, len(shared[key]))
            if gates.shape[-1] > 1:
                gates[..., 0].masked_fill_(normal(*batch) > 1.5, -torch.inf)
            chosen[node] = Gates(gates, shared[key], relative=kind == "relative")
        elif kind == "low rank":
            rank = draw(st.integers(0, 2))
            u, v = normal(*batch, num_children, rank).clamp_min(0), normal(num_units, rank).exp()
            chosen[node] = LowRank(u, v.expand(*batch, -1, -1) if draw(st.booleans()) else v)
        elif kind == "dense":
            chosen[node] = normal(*batch, num_units, num_children)
    return chosen


QUERIES = {
    "log_partition": ct.queries.log_partition,
    "mpe": lambda pc, e, **o: ct.queries.mpe(pc, e, **o).log_score,
    "latent_entropy": ct.queries.latent_entropy,
    "k_best": lambda pc, e, **o: ct.queries.k_best(pc, 3, e, **o).log_score,
    "samples": lambda pc, e, **o: ct.queries.sample(pc, 3, e, ct.RowGenerators(torch.arange(2)), **o),
    "tempered samples": lambda pc, e, **o: ct.queries.sample(
        pc, 3, e, ct.RowGenerators(torch.arange(2)), temperature=0.5, **o
    ),
    "best latents": lambda pc, e, **o: ct.queries.best_latents(pc, e, **o).log_weights(),
    "marginals": ct.queries.marginals,
    "moments": lambda pc, e, **o: ct.queries.moments(pc, 2, e, **o),
    "latent_marginals": lambda pc, e, **o: list(ct.queries.latent_marginals(pc, e, **o).values()),
    "posterior": lambda pc, e, **o: ct.queries.posterior(pc, e, **o).probs_at(
        torch.tensor([0, 1]), torch.tensor([0, 0])
    ),
    "posterior of a query": lambda pc, e, **o: (
        ct.queries.posterior(pc, e, **o).rows(torch.tensor([1])).probs_at(torch.tensor([0]), torch.tensor([0]))
    ),
    "flows": lambda pc, e, **o: list(ct.learning.expected_flows(pc, e, **o).flows.values()),
}


def both(pc, given):
    """The weights in their forms, and written out."""
    external = {n: form if isinstance(form, torch.Tensor) else written_out(pc, form, n) for n, form in given.items()}
    return pc.weights(external=given), pc.weights(external=external)


@settings(max_examples=25)
@given(st.data(), ct.testing.circuits(families="table", max_vars=3, zero_weights=True))
def test_a_form_is_the_tables_that_it_stands_for(data, circuit):
    pc = ct.compile(circuit, dtype=DOUBLE, seed=data.draw(st.integers(0, 100)))
    weights, expected = both(pc, data.draw(forms(pc, 2)))
    evidence = data.draw(ct.testing.evidence(circuit, batch_size=2))
    with torch.no_grad():
        log_z = ct.queries.log_partition(pc, evidence, weights=expected)
        close(ct.queries.log_partition(pc, evidence, weights=weights), log_z)
        close(
            ct.queries.mpe(pc, evidence, weights=weights).log_score,
            ct.queries.mpe(pc, evidence, weights=expected).log_score,
        ) if bool((log_z > -torch.inf).all()) else None


@pytest.mark.parametrize("name", QUERIES)
@settings(max_examples=4)
@given(st.data())
def test_every_query_takes_every_form(name, data):
    circuit = data.draw(st.sampled_from([tree(), ct.structures.hmm(3, 3, 3), ct.structures.hmm(3, 2, 3, False)]))
    pc = ct.compile(circuit, dtype=DOUBLE, seed=0)
    weights, expected = both(pc, data.draw(forms(pc, 2)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    evidence = ct.Evidence.soft(torch.randn(2, circuit.num_vars, 3, dtype=DOUBLE, generator=generator))
    close(QUERIES[name](pc, evidence, weights=weights), QUERIES[name](pc, evidence, weights=expected))


@pytest.mark.parametrize("form", ["gates", "low rank"])
def test_constraints_take_forms(form, generator):
    pc = ct.compile(ct.structures.hmm(4, 3, 2), dtype=DOUBLE, seed=0)
    gates, tables = random_gates(generator, 3, 2, 3), torch.randn(3, 3, 3, dtype=DOUBLE, generator=generator)
    u, v = torch.rand(2, 3, 2, dtype=DOUBLE, generator=generator), torch.rand(3, 2, dtype=DOUBLE, generator=generator)
    made = {f"transition{t}": Gates(gates[t], tables) if form == "gates" else LowRank(u * t, v) for t in range(3)}
    weights, expected = both(pc, {pc.sum_node(name): form for name, form in made.items()})
    automaton = ct.queries.DeterministicAutomaton.from_table(torch.tensor([[0, 1], [1, 0]]), accepting=[0])
    evidence = ct.Evidence.soft(torch.randn(2, 4, 2, dtype=DOUBLE, generator=generator))
    dists = [ct.ConstrainedDistribution(pc, evidence, automaton, weights=one) for one in (weights, expected)]
    for ask in (lambda d: d.log_partition, lambda d: d.marginal_probs, lambda d: d.mode,
                lambda d: d.sample((20,), generator=torch.Generator().manual_seed(0))):  # fmt: skip
        close(*(ask(dist) for dist in dists))


def random_gates(generator, *shape):
    return torch.randn(shape, dtype=DOUBLE, generator=generator)


def same_twice(value, inputs):
    """Gradients are the same numbers whether or not they are differentiated again."""
    close(
        torch.autograd.grad(value, inputs, create_graph=True),
        torch.autograd.grad(value, inputs, retain_graph=True),
    )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("relative", [True, False])
def test_gradients_reach_gates_and_tables(normalize, relative, generator):
    pc = ct.compile(tree(), dtype=DOUBLE, seed=0)
    leaf = ct.Evidence.soft(torch.randn(2, 4, 3, dtype=DOUBLE, generator=generator))
    parts = random_gates(generator, 2, 2, 2), random_gates(generator, 2, 2, 12)
    parameters = [p for p in pc.parameters() if relative and p.shape[-1] == 12]

    def log_z(gates, tables, *_):
        given = {
            "left": Gates(gates[0], tables, relative=relative),
            "right": Gates(gates[1], tables, relative=relative),
        }
        return ct.queries.log_partition(pc, leaf, weights=pc.weights(external=given, normalize=normalize))

    inputs = [part.requires_grad_() for part in parts]
    assert torch.autograd.gradcheck(log_z, (*inputs, *parameters))
    assert torch.autograd.gradgradcheck(log_z, inputs)
    same_twice(log_z(*inputs).sum(), (*inputs, *parameters))


def test_gradients_reach_low_rank_factors_also_where_they_are_zero(generator):
    pc = ct.compile(tree(), dtype=DOUBLE, seed=0)
    leaf = ct.Evidence.soft(torch.randn(2, 4, 3, dtype=DOUBLE, generator=generator))
    u, v = (torch.rand(shape, dtype=DOUBLE, generator=generator) for shape in ((2, 12, 3), (2, 3)))
    parameters = [p for p in pc.parameters() if p.shape[-1] == 12]

    def log_z(u, v, *_):
        given = {"left": LowRank(u, v), "right": LowRank(u, v)}
        return ct.queries.log_partition(pc, leaf, weights=pc.weights(external=given))

    assert torch.autograd.gradcheck(log_z, (u.requires_grad_(), v.requires_grad_(), *parameters))
    assert torch.autograd.gradgradcheck(log_z, (u, v))
    same_twice(log_z(u, v).sum(), (u, v, *parameters))
    zero = torch.zeros(2, 12, 3, dtype=DOUBLE, requires_grad=True)
    (slope,) = torch.autograd.grad(log_z(zero, v).sum(), zero)
    step = torch.zeros_like(zero)
    step[1, 4, 2] = 1e-6
    torch.testing.assert_close(
        slope[1, 4, 2], (log_z(zero + step, v) - log_z(zero, v)).sum().detach() / 1e-6, rtol=1e-4, atol=1e-8
    )


def test_tiny_sums_are_exact_in_single_precision(generator):
    """Half of the children lie 200 nats below the others, which some units cannot reach: e^-200 is 0 in float32."""
    emission = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    reachable = torch.tensor([[False, False, True, True], [True] * 4, [False, False, True, True], [True] * 4])
    transition = torch.rand(4, 4, generator=generator) * reachable
    circuit = ct.structures.hmm(
        3,
        4,
        2,
        initial=torch.full((4,), 0.25),
        emission=emission,
        transition=transition / transition.sum(1, keepdim=True),
    )
    pc, double = ct.compile(circuit), ct.compile(circuit, dtype=DOUBLE)
    factors = torch.tensor([[[0.0, -200.0]], [[-200.0, 0.0]]]).expand(2, 3, 2)
    tables = torch.randn(2, 4, 4, generator=generator).masked_fill(~reachable, -torch.inf)
    gates = torch.randn(2, 2, generator=generator)
    u = torch.rand(2, 4, 2, generator=generator) * torch.tensor([0.0, 0.0, 1.0, 1.0]).unsqueeze(1)
    v = torch.rand(4, 2, generator=generator)
    for form, exact in (
        (Gates(gates, tables), Gates(gates.double(), tables.double())),
        (LowRank(u, v), LowRank(u.double(), v.double())),
    ):
        given = {"transition0": form, "transition1": form}
        table = written_out(double, exact, double.sum_node("transition0"))
        expected = double.weights(external={"transition0": table, "transition1": table})
        found = ct.queries.log_partition(pc, ct.Evidence.soft(factors), weights=pc.weights(external=given))
        exactly = ct.queries.log_partition(double, ct.Evidence.soft(factors.double()), weights=expected)
        torch.testing.assert_close(found.double(), exactly, rtol=1e-5, atol=1e-4)
        best = ct.queries.marginals(pc, ct.Evidence.soft(factors), weights=pc.weights(external=given))
        torch.testing.assert_close(
            best.double(), ct.queries.marginals(double, ct.Evidence.soft(factors.double()), weights=expected),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
        impossible = ct.Evidence.soft(torch.full((2, 3, 2), -torch.inf))
        assert ct.queries.log_partition(pc, impossible, weights=pc.weights(external=given)).tolist() == [-torch.inf] * 2


@pytest.mark.parametrize("name", ["gates", "low rank", "dense"])
def test_the_posterior_of_some_queries_keeps_their_weights(name, generator):
    pc = ct.compile(ct.structures.hmm(3, 3, 4), dtype=DOUBLE, seed=0)
    form = {
        "gates": Gates(random_gates(generator, 4, 2), random_gates(generator, 2, 3, 3)),
        "low rank": LowRank(random_gates(generator, 4, 3, 1).exp(), random_gates(generator, 4, 3, 1).exp()),
        "dense": random_gates(generator, 4, 3, 3),
    }[name]
    weights = pc.weights(external={"transition0": form, "transition1": form})
    posterior = ct.queries.posterior(pc, ct.Evidence.soft(random_gates(generator, 4, 3, 4)), weights=weights)
    some = torch.tensor([2, 1, 2])
    close(posterior.rows(some).log_partition, posterior.log_partition[some])


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor) and one.untyped_storage().nbytes() > 0:  # of views what they are views of
                self.numbers = max(self.numbers, one.untyped_storage().nbytes() // one.element_size())
        return out


@pytest.mark.parametrize("form", ["gates", "low rank"])
def test_no_tensor_holds_a_table_per_query(form, generator):
    length, states, batch = 4, 64, 200
    pc = ct.compile(ct.structures.hmm(length, states, 5), seed=0)
    tables = torch.randn(3, states, states, generator=generator, requires_grad=True)
    gates = torch.randn(length - 1, batch, 3, generator=generator, requires_grad=True)
    u = torch.rand(length - 1, batch, states, 4, generator=generator, requires_grad=True)
    v = torch.rand(states, 4, generator=generator, requires_grad=True)
    evidence = ct.Evidence.soft(torch.randn(batch, length, 5, generator=generator))
    with Largest() as largest:
        given = {
            f"transition{t}": Gates(gates[t], tables) if form == "gates" else LowRank(u[t], v)
            for t in range(length - 1)
        }
        weights = pc.weights(external=given)
        ct.queries.log_partition(pc, evidence, weights=weights).sum().backward()
        ct.queries.sample(pc, 2, evidence, weights=weights)
    assert largest.numbers < batch * states * states / 4


def test_where_weights_do_not_add_up_a_few_tables_are_written_out_at_a_time(generator, monkeypatch):
    states, batch = 64, 200
    pc = ct.compile(ct.structures.hmm(3, states, 5), seed=0)
    gates, tables = torch.randn(2, batch, 3, generator=generator), torch.randn(3, states, states, generator=generator)
    evidence = ct.Evidence.soft(torch.randn(batch, 3, 5, generator=generator))
    weights = pc.weights(external={f"transition{t}": Gates(gates[t], tables) for t in range(2)})
    expected = ct.queries.mpe(pc, evidence, weights=weights)
    monkeypatch.setattr("circuits.weights.implicit._NUMBERS_AT_ONCE", 1 << 14)
    with torch.no_grad(), Largest() as largest:
        found = ct.queries.mpe(pc, evidence, weights=weights)
    assert largest.numbers < batch * states * states / 2
    torch.testing.assert_close(found.log_score, expected.log_score)
    assert torch.equal(found.assignment, expected.assignment)


@pytest.mark.parametrize("relative", [True, False])
def test_unnormalised_gates_scale_the_partition_function(relative, generator):
    pc = ct.compile(tree(), dtype=DOUBLE, seed=0)
    evidence = ct.Evidence.soft(torch.randn(2, 4, 3, dtype=DOUBLE, generator=generator))
    gates, tables = random_gates(generator, 2, 2), random_gates(generator, 2, 2, 12)
    gates[0] = -torch.inf
    own = pc.log_weights(pc.sum_node("left")).detach() if relative else 0.0
    table = torch.logsumexp(gates[:, :, None, None] + tables + own, 1)
    for query in (ct.queries.log_partition, ct.learning.expected_flows):
        found, expected = (
            query(pc, evidence, weights=pc.weights(external={"left": form}, normalize=False))
            for form in (Gates(gates, tables, relative=relative), table)
        )
        if query is ct.queries.log_partition:
            assert found[0] == -torch.inf
            close(found, expected)
        else:
            close(list(found.flows.values()), list(expected.flows.values()))


def test_nodes_with_the_same_tables_are_one_product(generator):
    leaves = [ct.inputs(var, 8, ct.Categorical(3)) for var in range(6)]
    mixed = [ct.sum(leaf, num_units=8, name=f"mix{var}") for var, leaf in enumerate(leaves)]
    pc = ct.compile(ct.Circuit(ct.sum(ct.product(*mixed), num_units=1)), seed=0)
    tables = torch.randn(2, 8, 8, generator=generator)
    weights = pc.weights(
        external={f"mix{var}": Gates(torch.randn(5, 2, generator=generator), tables) for var in range(6)}
    )
    (given,) = weights.given.values()
    ((rows, joined),) = given.parts
    assert rows == list(range(6))
    assert joined.tables.shape == (1, 8, 2, 8)
    assert float(ct.queries.log_partition(pc, ct.Evidence.nothing(5, 6), weights=weights).detach().abs().max()) < 1e-5


def test_wrong_forms_are_explained():
    pc = ct.compile(ct.structures.hmm(3, 4, 2), seed=0)
    tables = torch.zeros(2, 4, 4)
    for form, message in (
        (Gates(torch.zeros(3), tables), r"log-gates \(2,\) or \(B, 2\)"),
        (Gates(torch.zeros(2), torch.zeros(2, 4, 3)), r"log-tables \(T, 4, 4\)"),
        (Gates(torch.zeros(2) / 0, tables), "gates below"),
        (Gates(torch.zeros(2), tables - torch.inf), "a unit without any"),
        (LowRank(torch.zeros(4, 2), torch.zeros(4, 3)), r"v \(4, 2\)"),
        (LowRank(-torch.ones(4, 2), torch.zeros(4, 2)), r"numbers >= 0.*from_logs"),
        ("table", "got str"),
    ):
        with pytest.raises(ct.ArgumentError, match=message):
            pc.weights(external={"transition0": form})
    leaf = pc.circuit.inputs[0]
    with pytest.raises(ct.ArgumentError, match="inputs take weights at run time as tables"):
        pc.weights(external={leaf: Gates(torch.zeros(2), tables)})
    with pytest.raises(ct.ArgumentError, match="one batch size"):
        pc.weights(
            external={"transition0": Gates(torch.zeros(2, 2), tables), "transition1": Gates(torch.zeros(3, 2), tables)}
        )
