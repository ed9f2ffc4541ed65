"""A circuit in any semiring: the sum over explanations of the products of what they use."""

import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from query_cases import compiled_with_evidence

import circuits as ct

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_semiring.py"


class Counting(ct.Semiring):
    """How many explanations are possible."""

    def lift(self, log_values):
        return (log_values > -torch.inf).double()

    def times(self, left, right):
        return left * right

    def contract(self, log_weights, x, *, weights=None):
        return torch.matmul(self.lift(log_weights), x)


class Polynomials(ct.Semiring):
    """Polynomials with coefficients along a trailing dimension, truncated after the third."""

    def lift(self, log_values):
        return torch.nn.functional.pad(log_values.exp().unsqueeze(-1), (0, 2))

    def times(self, left, right):
        shifted = [torch.nn.functional.pad(right, (power, 0))[..., :3] for power in range(3)]
        return sum(left[..., power, None] * shifted[power] for power in range(3))

    def contract(self, log_weights, x, *, weights=None):
        return torch.einsum("foi,fibe->fobe", log_weights.exp(), x)


def test_a_semiring_of_ones_own_counts_explanations():
    pc = ct.compile(ct.structures.hmm(4, 3, 4), seed=0)
    words = torch.zeros(2, 4, dtype=torch.int64)
    assert ct.evaluate(pc, Counting(), ct.Evidence.observe(words)).tolist() == [3.0**4] * 2
    assert ct.evaluate(pc, Counting(), ct.Evidence.soft(torch.zeros(1, 4, 4))).tolist() == [12.0**4]


@given(compiled_with_evidence())
def test_the_log_semiring_gives_the_enumerated_sum_and_the_max_semiring_the_best(case):
    pc, evidence = case
    log_z = ct.testing.enumerated_log_partition(ct.testing.enumerate_joint(pc), evidence)
    torch.testing.assert_close(ct.evaluate(pc, ct.semirings.LogSemiring(), evidence), log_z, rtol=1e-9, atol=1e-9)
    if bool((log_z > -torch.inf).all()):
        best = ct.queries.mpe(pc, evidence).log_score
        assert torch.equal(ct.evaluate(pc, ct.semirings.MaxSemiring(), evidence), best)


def test_values_may_have_trailing_dimensions():
    pc = ct.compile(ct.structures.hmm(3, 2, 3), seed=0, dtype=torch.float64)
    x = torch.tensor([[0, 1, 2], [2, 2, 0]])
    found = ct.evaluate(pc, Polynomials(), ct.Evidence.observe(x))
    expected = torch.nn.functional.pad(pc(x).exp().unsqueeze(-1), (0, 2))  # constants have no higher coefficients
    torch.testing.assert_close(found, expected)


def test_without_evidence_the_value_is_that_of_one_query():
    pc = ct.compile(ct.structures.hmm(3, 2, 3), seed=0)
    torch.testing.assert_close(ct.evaluate(pc, ct.semirings.LogSemiring()), torch.zeros(1))


def test_weights_at_run_time_count():
    pc = ct.compile(ct.structures.hmm(2, 2, 3), seed=0)
    given_weights = torch.tensor([[[0.0, -torch.inf]], [[0.0, 0.0]]])  # of the first state, for two queries
    weights = pc.weights(external={"initial": given_weights})
    x = ct.Evidence.observe(torch.zeros(2, 2, dtype=torch.int64))
    assert ct.evaluate(pc, Counting(), x, weights=weights).tolist() == [2.0, 4.0]


def test_mixed_classes_are_added_up_and_classes_must_be_named():
    leaf = ct.inputs(0, 2, ct.Categorical(3))
    pc = ct.compile(ct.Circuit(ct.sum(leaf, num_units=2), num_classes=2), seed=0, dtype=torch.float64)
    x = ct.Evidence.observe(torch.tensor([[0], [2]]))
    with pytest.raises(ct.PropertyError, match="with_class"):
        ct.evaluate(pc, ct.semirings.LogSemiring(), x)
    mixed = ct.evaluate(pc, ct.semirings.LogSemiring(), x.with_class_prior(torch.tensor([0.25, 0.75]).log()))
    torch.testing.assert_close(mixed.exp(), pc(x).exp() @ torch.tensor([0.25, 0.75], dtype=torch.float64))


def test_what_is_no_semiring_is_refused():
    with pytest.raises(ct.ArgumentError, match=r"semiring: expected a ct\.semirings\.Semiring, got str"):
        ct.evaluate(ct.compile(ct.structures.hmm(2, 2, 2)), "log")


class OneUnit(Counting):
    """Counts with the units of sums added up, which would be broadcast over those of the leaves."""

    def contract(self, log_weights, x, *, weights=None):
        out = super().contract(log_weights, x)
        return out.sum(1, keepdim=True) if log_weights.shape[1:] == (2, 2) else out


def test_values_of_a_wrong_shape_are_refused_in_place_of_a_wrong_number():
    pc = ct.compile(ct.structures.hmm(3, 2, 3), seed=0)
    x = ct.Evidence.observe(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ct.ArgumentError, match=r"semiring: expected OneUnit.contract to return .* \(1, 2, 1, \*E\)"):
        ct.evaluate(pc, OneUnit(), x)


PC = ct.compile(ct.structures.hmm(2, 2, 2), seed=0)
X = torch.zeros(1, 2, dtype=torch.int64)
WRONG = {
    "assignments as evidence": (lambda: ct.queries.marginals(PC, X), r"evidence: .* got Tensor; ct\.Evidence\.observe"),
    "no evidence where there must be some": (lambda: ct.queries.marginals(PC, None), "evidence: .* got None"),
    "evidence of a distance": (lambda: ct.queries.cross_entropy(PC, PC, X), "evidence: .* got Tensor"),
    "evidence of a method": (lambda: PC.log_partition(X), "evidence: .* got Tensor"),
    "a structure": (lambda: ct.queries.mpe(PC.circuit), r"pc: .* got Circuit; ct\.compile\(circuit\) makes one"),
    "a structure, by name": (lambda: ct.queries.mpe(pc=PC.circuit), "pc: .* got Circuit"),
    "the second structure": (lambda: ct.queries.kl_divergence(PC, PC.circuit), "q: .* got Circuit"),
    "weights": (lambda: ct.queries.mpe(PC, weights=3), r"weights: .* pc\.weights\(\.\.\.\) returns, got int"),
    "a seed as generator": (
        lambda: ct.queries.sample(PC, 1, generator=0),
        "generator: .* got int",
    ),
    "a table for no node": (lambda: PC.weights(external=torch.zeros(2, 2)), "external: .* by node or name, got Tensor"),
    "weights of no query": (
        lambda: PC.log_partition(ct.Evidence.observe(X), PC.weights(external={"initial": torch.zeros(0, 1, 2)})),
        "weights: they are for a batch of 0 queries, the evidence has 1",
    ),
    "no automaton": (lambda: ct.queries.automaton_log_probability(PC, X), "automaton: .* got Tensor"),
    "a number of nodes": (
        lambda: ct.queries.latent_marginals(PC, ct.Evidence.observe(X), nodes=3),
        "nodes: expected .* got int",
    ),
    "a class of optimizers": (
        lambda: ct.learning.fit(PC, X, optimizer=ct.learning.EM, progress=False),
        "optimizer: expected an object, got the class EM",
    ),
}


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_arguments_of_another_kind_are_named(case):
    call, said = WRONG[case]
    with pytest.raises(ct.ArgumentError, match=said):
        call()


def test_the_example_counts_what_enumeration_counts(capsys):
    found = runpy.run_path(str(EXAMPLE))["found"]
    assert found == [1792.0, 192.0]
    assert "1792" in capsys.readouterr().out
