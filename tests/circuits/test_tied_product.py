"""The product that keeps parameters and ties, against all texts; learning it keeps them too."""

import itertools

import pytest
import torch

import circuits as ct
from circuits.queries import Automaton, DeterministicAutomaton
from circuits.transforms import TiedProduct

L, N, C = 3, 3, 6
CLOSE = {"rtol": 1e-9, "atol": 1e-10}
EVERY = torch.tensor(list(itertools.product(range(C), repeat=L)))


def hmm(seed, num_states=N, length=L):
    return ct.compile(ct.structures.hmm(length, num_states, C), dtype=torch.float64, seed=seed)


def three_states():
    """Accept an odd number of 0s, and no 5 after a 0 that made it odd."""
    table = torch.tensor([[1, 0, 0, 0, 0, 0], [2, 1, 1, 1, 1, -1], [1, 2, 2, 2, 2, 2]])
    return DeterministicAutomaton.from_table(table, [1])


def accepted(x):
    """The same in words."""
    result = []
    for text in x.tolist():
        state, ok = 0, True
        for v in text:
            if state == 1 and v == 5:
                ok = False
            state = {0: 1, 1: 2, 2: 1}[state] if v == 0 else state
        result.append(ok and state == 1)
    return torch.tensor(result)


def weighted():
    """An automaton whose runs have weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, C, 2), (2,), (2,))
    return Automaton(*(torch.rand(shape, generator=generator, dtype=torch.float64).log() for shape in shapes))


def weight_of(automaton, x):
    vector = automaton.log_start.exp()
    for v in x.tolist():
        vector = vector @ automaton.log_transition[:, v].exp()
    return float(vector @ automaton.log_accept.exp())


def q_of(other):
    if isinstance(other, DeterministicAutomaton):
        return accepted(EVERY).double()
    if isinstance(other, Automaton):
        return torch.tensor([weight_of(other, x) for x in EVERY], dtype=torch.float64)
    return other(EVERY).exp()


OTHERS = {"automaton": three_states, "weights": weighted, "circuit": lambda: hmm(7, 2)}


@pytest.mark.parametrize("name", OTHERS)
def test_its_law_is_that_of_the_enumerated_product(name):
    pc, other = hmm(0), OTHERS[name]()
    product = TiedProduct(pc, other)
    with torch.no_grad():
        joint = pc(EVERY).exp() * q_of(other)
        torch.testing.assert_close(product.log_partition, joint.sum().log(), **CLOSE)
        torch.testing.assert_close(product(EVERY).exp(), joint / joint.sum(), **CLOSE)
    assert product.num_parameters == pc.circuit.num_parameters == N + N * N + N * C
    assert sum(p.numel() for p in product.parameters() if p.requires_grad) == product.num_parameters
    assert {node.name for node in product.pc.circuit.sums} == {"initial", *(f"transition{t}" for t in range(L - 1))}


@pytest.mark.parametrize("name", OTHERS)
def test_gradients_are_those_of_the_enumerated_product(name):
    pc, other = hmm(1), OTHERS[name]()
    q, x = q_of(other), EVERY[q_of(other) > 0][[0, 3, 17]]
    row = [EVERY.tolist().index(text) for text in x.tolist()]
    parameters = list(pc.parameters())
    found = torch.autograd.grad(TiedProduct(pc, other)(x).sum(), parameters)
    joint = pc(EVERY).exp() * q
    expected = torch.autograd.grad((joint[row] / joint.sum()).log().sum(), parameters)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["automaton", "circuit"])
def test_learning_keeps_the_ties_and_finds_the_law(name):
    """Maximum likelihood on all texts, weighted by a known product: what is left is no divergence, and one table."""
    other = OTHERS[name]()
    with torch.no_grad():
        truth = TiedProduct(hmm(3), other)(EVERY).exp()
    product = TiedProduct(hmm(4), other)
    before = {id(parameter) for parameter in product.pc.parameters()}
    optimizer = torch.optim.LBFGS(product.parameters(), max_iter=20, line_search_fn="strong_wolfe")
    possible = truth > 0

    def divergence():
        return (truth[possible] * (truth[possible].log() - product(EVERY[possible]))).sum()

    def closure():
        optimizer.zero_grad()
        loss = divergence()
        loss.backward()
        return loss

    first = float(divergence().detach())
    optimizer.step(closure)
    assert float(divergence().detach()) < first / 4
    assert {id(parameter) for parameter in product.pc.parameters()} == before
    tables = [product.pc.log_weights(node) for node in product.pc.circuit.sums if node.name != "initial"]
    assert all(torch.equal(table, tables[0]) for table in tables)  # one transition, at every place
    assert product.num_parameters == N + N * N + N * C
    if name == "circuit":
        whole = product.multiplied()
        torch.testing.assert_close(whole.pc(EVERY), product(EVERY), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(whole.log_partition, product.log_partition.detach(), rtol=1e-8, atol=1e-8)
        assert whole.pc.circuit.num_parameters > 3 * product.num_parameters  # written out, the ties come apart


def test_the_other_circuit_stays_as_it_was():
    pc, other = hmm(0), hmm(1)
    product = TiedProduct(pc, other)
    with torch.no_grad():
        before = product(EVERY[:5])
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter))
        torch.testing.assert_close(product(EVERY[:5]), before)
    assert all(parameter.requires_grad for parameter in other.parameters())


def disjoint():
    return [
        ct.compile(ct.Circuit(ct.inputs(0, 1, ct.Categorical(2), weights=torch.tensor([[a], [1 - a]]))))
        for a in (0.0, 1.0)
    ]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TiedProduct(3, hmm(0)), ct.ArgumentError, "pc: expected"),
        (lambda: TiedProduct(hmm(0), "a*"), ct.ArgumentError, "other: expected a compiled circuit or an automaton"),
        (lambda: TiedProduct(hmm(0), hmm(0, length=2)), ct.PropertyError, "TiedProduct: expected compatible circuits"),
        (lambda: TiedProduct(hmm(0), hmm(1))(EVERY[:, :2]), ct.ArgumentError, r"x: expected int64 \(B, 3\), got"),
        (lambda: TiedProduct(hmm(0), three_states()).multiplied(), ct.PropertyError, "ask ct.ConstrainedDistribution"),
        (lambda: TiedProduct(*disjoint())(torch.tensor([[0]])), ct.ImpossibleEvidenceError, "their product is zero"),
    ],
)
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
