"""The inner layers: siblings, long chains, and likelihoods that no floating-point probability can hold."""

import pytest
import torch

import circuits as ct
from circuits.engine.layers import SumLayer
from circuits.engine.question import Question
from circuits.queries import explanations


def siblings(num_categories=3, weights=None):
    """Two sums read each leaf, one read by every kind of product; ``weights`` are those of the leaves."""
    leaves = [ct.inputs(var, 2, ct.Categorical(num_categories), weights=weights) for var in range(2)]
    sums = [[ct.sum(leaf, num_units=3, name=f"{kind}{leaf.var}") for kind in "ab"] for leaf in leaves]
    pairs = [ct.product(*pair) for pair in zip(*sums, strict=True)]
    return ct.Circuit(ct.sum(*pairs, num_units=1))


def sum_layers(pc):
    return [layer for layer in pc.inner_layers if isinstance(layer, SumLayer)]


def test_sums_with_the_same_children_are_stacked():
    pc = ct.compile(siblings(), dtype=torch.float64, seed=0)
    first = sum_layers(pc)[0]
    assert first.num_siblings == 2
    assert first.gather(Question(pc).inputs(ct.semirings.LogSemiring())).shape == (4, 2, 1)
    everything = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    torch.testing.assert_close(pc(everything).reshape(3, 3), ct.testing.enumerate_joint(pc), rtol=1e-12, atol=1e-12)


def test_some_sums_are_siblings_and_others_are_not():
    leaves = [ct.inputs(var, 2, ct.Categorical(3)) for var in range(3)]
    two = [ct.sum(leaf, num_units=2) for leaf in leaves[:2]], [ct.sum(leaf, num_units=2) for leaf in leaves[:2]]
    alone = ct.sum(leaves[2], num_units=2)
    circuit = ct.Circuit(ct.sum(*(ct.product(*pair, alone) for pair in two), num_units=1))
    pc = ct.compile(circuit, dtype=torch.float64, seed=0)
    assert sorted(layer.num_siblings for layer in sum_layers(pc)) == [1, 1, 2]
    everything = torch.cartesian_prod(*[torch.arange(3)] * 3)
    joint = ct.testing.enumerate_joint(pc).flatten()
    torch.testing.assert_close(pc(everything), joint, rtol=1e-12, atol=1e-12)


def test_gradients_of_siblings_are_the_numeric_ones():
    pc = ct.compile(siblings(), dtype=torch.float64, seed=0)
    x = torch.tensor([[0, 2], [1, 1]])
    names, parameters = zip(*((name, p.detach().requires_grad_()) for name, p in pc.named_parameters()), strict=True)

    def log_z(*tensors):
        return torch.func.functional_call(pc, dict(zip(names, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(log_z, parameters)


def test_underflow_below_siblings_is_repaired():
    """One unit is exp(-200) times the other, and weight zero leaves only that one: float32 cannot add them up."""
    weights = torch.tensor([[1.0, 1e-38], [0.0, 1 - 1e-38]], dtype=torch.float64)
    circuit = siblings(2, weights)
    flows = {}
    for dtype in (torch.float32, torch.float64):
        pc = ct.compile(circuit, dtype=dtype, seed=3)
        for name in ("a0", "b1"):
            pc.set_weights(pc.circuit.node(name), torch.tensor([[0.0, 1.0]]).expand(3, -1))
        flows[dtype] = ct.learning.expected_flows(pc, torch.tensor([[0, 0], [0, 1]]))
    single, double = flows[torch.float32], flows[torch.float64]
    torch.testing.assert_close(single.log_likelihood.double(), double.log_likelihood, rtol=1e-5, atol=1e-5)
    for name, flow in double.flows.items():
        torch.testing.assert_close(single.flows[name].double(), flow, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_likelihoods_far_below_the_smallest_number(dtype, generator):
    """A thousand variables of a hundred categories: about -5000 nats, and exp(-745) is the least float64."""
    pc = ct.compile(ct.structures.mixture(1000, 100, 4), dtype=dtype, seed=0)
    x = torch.randint(100, (3, 1000), generator=generator)
    with torch.no_grad():
        log_tables = torch.stack([pc.log_weights(node).double() for node in pc.circuit.inputs])
        components = log_tables[torch.arange(1000), x].sum(1)  # (3, 4)
        expected = torch.logsumexp(components + pc.log_weights(pc.circuit.root).double(), 1)
    actual = pc(x)
    assert bool((actual < -4000).all())
    torch.testing.assert_close(actual.detach().double(), expected, rtol=1e-5, atol=0)
    actual.sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in pc.parameters())


@pytest.mark.parametrize("length", [1024, 10_000])
def test_em_on_long_chains_has_no_nan(length, generator):
    pc = ct.compile(ct.structures.hmm(length, 3, 2), seed=0)
    x = torch.randint(2, (2, length), generator=generator)
    flows, before = ct.learning.expected_flows(pc, x)
    ct.learning.em_step(pc, flows)
    after = pc(x).detach()
    assert bool(before.isfinite().all())
    assert float(after.sum()) > float(before.sum())
    assert all(bool((parameter < torch.inf).all()) for parameter in pc.parameters())
    torch.testing.assert_close(flows["input_2x3"].sum(), torch.tensor(2.0 * length), rtol=1e-3, atol=0)


def test_sampling_many_variables_takes_bounded_memory(monkeypatch):
    pc = ct.compile(ct.structures.mixture(16_384, 2, 2), seed=0)
    reached = []
    choose = Question.choose

    def recorded(question, *args, **options):
        choice = choose(question, *args, **options)
        reached.append(sum(unit.numel() for unit in choice.units))
        return choice

    monkeypatch.setattr(Question, "choose", recorded)
    monkeypatch.setattr(explanations, "_MAX_REACHED", 1 << 18)
    assert ct.queries.sample(pc, 24).shape == (24, 16_384)
    assert len(reached) > 1
    assert max(reached) <= 1 << 18


def test_moving_a_circuit_moves_its_rows():
    pc = ct.compile(siblings(), seed=0)
    meta = pc.to("meta")
    rows = [nodes for layer in meta.inner_layers for slot in layer.slots for _, nodes in slot.pieces]
    assert all(isinstance(nodes, slice) or nodes.device.type == "meta" for nodes in rows)
