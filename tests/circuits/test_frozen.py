"""Frozen parameters stay to the last bit, and the others are learnt as if these were known."""

import math

import pytest
import torch
from learning_cases import CLOSE, adam, drawn, hmm, weights_of

import circuits as ct
from circuits import learning

X = drawn(hmm(7), 60)
OPTIMIZERS = {
    "em": learning.EM,
    "minibatch_em": learning.MiniBatchEM,
    "anemone": learning.Anemone,
    "viterbi_em": learning.ViterbiEM,
    "adam": lambda **options: learning.GradientDescent(build=adam, **options),
    "decay": lambda **options: learning.GradientDescent(
        build=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), **options
    ),
    "lbfgs": lambda **options: learning.GradientDescent(build=lambda p: torch.optim.LBFGS(p, max_iter=2), **options),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("frozen", ["emission0", "transition0", "initial"])
def test_frozen_nodes_stay_and_the_others_move(name, frozen):
    pc = hmm(1)
    nodes = {node: pc.bank_row(pc.circuit.node(node)).clone() for node in ("emission0", "transition0", "initial")}
    learning.fit(pc, X, optimizer=OPTIMIZERS[name](frozen={frozen}), num_epochs=3, batch_size=20, progress=False)
    for node, before in nodes.items():
        assert torch.equal(pc.bank_row(pc.circuit.node(node)), before) == (node == frozen)


def test_em_with_frozen_emissions_is_em_on_the_rest():
    """With known emissions B, one step is ``pi_i ~ gamma_0(i)`` and ``A_ij ~ sum_t xi_t(i, j)``, by enumeration."""
    pc = hmm(1, seq_length=3, num_states=2, num_categories=3)
    x = drawn(hmm(7, seq_length=3, num_states=2, num_categories=3), 30)
    initial, transition, emission = (
        pc.log_weights(pc.circuit.node(name)).exp().detach() for name in ("initial", "transition0", "emission0")
    )
    paths = torch.cartesian_prod(*[torch.arange(2)] * 3)
    joint = initial[0, paths[:, 0]] * transition[paths[:, :-1], paths[:, 1:]].prod(1)
    joint = joint * emission[x.unsqueeze(1), paths].prod(2)  # (N, paths)
    posterior = (joint / joint.sum(1, keepdim=True)).sum(0)
    states = torch.nn.functional.one_hot(paths, 2).double()
    first = posterior @ states[:, 0]
    moves = torch.einsum("p,pti,ptj->ij", posterior, states[:, :-1], states[:, 1:])
    learning.fit(pc, x, frozen={"emission0"}, pseudocount=0.0, num_epochs=1, progress=False)
    torch.testing.assert_close(pc.log_weights(pc.circuit.root).exp()[0], first / first.sum(), **CLOSE)
    learnt = pc.log_weights(pc.circuit.node("transition0")).exp()
    torch.testing.assert_close(learnt, moves / moves.sum(1, keepdim=True), **CLOSE)
    torch.testing.assert_close(pc.log_weights(pc.circuit.node("emission0")).exp(), emission, rtol=0, atol=0)


def gaussians(dtype=torch.float64):
    """A mixture of two Gaussians."""
    leaf = ct.inputs(0, 2, ct.Gaussian(), name="x", weights=torch.tensor([[-1.0, 2.0], [1.0, 0.5]]))
    circuit = ct.Circuit(ct.sum(leaf, num_units=1, weights=torch.tensor([[0.4, 0.6]])))
    return ct.compile(circuit, dtype=dtype)


@pytest.mark.parametrize("step_size", [1.0, 0.3])
@pytest.mark.parametrize("part", ["mean", "std", "all"])
def test_parts_of_gaussians_are_frozen(part, step_size):
    """Around a fixed mean m, ``s^2 = (1 - c) s^2 + c sum_b r_b (x_b - m)^2 / sum_b r_b``: EM by hand."""
    x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 0.5
    mean, std = torch.tensor([-1.0, 2.0]).double(), torch.tensor([1.0, 0.5]).double()
    density = torch.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi)) * torch.tensor([0.4, 0.6])
    share = density / density.sum(1, keepdim=True)

    def average(values):
        return (share * values).sum(0) / share.sum(0)

    mixed_mean = torch.lerp(mean, average(x), step_size)
    mixed_square = torch.lerp(mean**2 + std**2, average(x**2), step_size)
    expected = {
        "mean": (mean, torch.lerp(std**2, average((x - mean) ** 2), step_size).sqrt()),
        "std": (mixed_mean, std),
        "all": (mean, std),
        None: (mixed_mean, (mixed_square - mixed_mean**2).sqrt()),
    }
    for frozen, parameters in ((None, expected[None]), ({"x": part}, expected[part])):
        pc = gaussians()
        optimizer = learning.EM(frozen=frozen, step_size=step_size, pseudocount=0.0)
        learning.fit(pc, x, optimizer=optimizer, num_epochs=1, progress=False)
        torch.testing.assert_close(pc.parameters_of(pc.circuit.node("x")), torch.stack(parameters), **CLOSE)


@pytest.mark.parametrize("part", [0, 1])
def test_parts_are_frozen_for_gradients_too(part):
    pc = gaussians()
    before = pc.bank_row(pc.circuit.node("x")).clone()
    x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    optimizer = learning.GradientDescent(build=adam, frozen={"x": ("mean", "std")[part]})
    learning.fit(pc, x, optimizer=optimizer, num_epochs=3, progress=False)
    after = pc.bank_row(pc.circuit.node("x"))
    assert torch.equal(after[part], before[part])
    assert not bool((after[1 - part] == before[1 - part]).any())


def test_what_is_frozen_is_part_of_the_run(tmp_path):
    path = tmp_path / "run.safetensors"
    learning.fit(hmm(1), X, frozen={"emission0"}, num_epochs=1, checkpoint_path=path, progress=False)
    with pytest.raises(ct.CheckpointError, match="expected this run, got one with a different optimizer"):
        learning.fit(hmm(1), X, num_epochs=1, checkpoint_path=path, progress=False)


def test_what_cannot_be_frozen_is_refused_before_anything_is_learnt():
    leaf = ct.inputs(0, 2, ct.DiscretizedLogistic(5), name="x")
    pc = ct.compile(ct.Circuit(ct.sum(leaf, num_units=1, name="top")), seed=0)
    before = weights_of(pc)
    for frozen, message in [
        ("x", "frozen: expected a set of nodes or names"),
        ({"y"}, "y"),
        ({"x": "variance"}, "frozen: expected one of 'mean', 'scale', 'all' of .*, got 'variance'"),
        ({"top": "mean"}, "frozen: expected one of 'all'"),
        ({"x": "mean"}, "EM fits all parameters of .* or none; use a torch optimizer"),
        ({3}, "frozen: expected sum or input nodes"),
    ]:
        with pytest.raises(ct.ArgumentError, match=message):
            learning.fit(pc, torch.zeros(3, 1).long(), frozen=frozen, progress=False)
    assert all(torch.equal(weights, before[name]) for name, weights in weights_of(pc).items())
