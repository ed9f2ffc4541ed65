"""The test case that whoever writes a new semiring subclasses."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from circuits import queries
from circuits.algebra.semirings import Semiring
from circuits.digests import tensor_code
from circuits.evidence import Evidence
from circuits.testing import strategies
from circuits.testing.conformance._cases import Case, ConformanceTestCase, assert_close, law
from circuits.testing.conformance._configurations import configurations

_NUM_ELEMENTS = 3


@dataclass(frozen=True, eq=False, repr=False)
class SemiringCase(Case):
    """A circuit with evidence, and the log-values that the elements under test are made of, float64 (5, n)."""

    log_values: Tensor

    def code(self) -> str:
        """Return Python code that rebuilds the case: ``circuit``, ``pc``, ``evidence`` and ``log_values``."""
        return f"{super().code()}\nlog_values = {tensor_code(self.log_values)}"


class SemiringTestCase(ConformanceTestCase):
    """Tests a semiring: its laws, its fast operations against its scalar ones, and the upward pass of random circuits.

    Subclass it and supply :meth:`semiring`, :meth:`plus` and :meth:`times`::

        class TestMaxSemiring(ct.testing.SemiringTestCase):
            def semiring(self):
                return MaxSemiring()

            def plus(self, left, right):
                return torch.maximum(left, right)

            def times(self, left, right):
                return left + right

    The scalar operations are the oracle: write them plainly, for single values of shape (*E). The upward pass is
    compared with the sum, in these operations, over all latent configurations of a random circuit.
    """

    has_distributivity: ClassVar[bool] = True
    """Whether times distributes over plus, which makes the upward pass the sum over configurations."""

    def semiring(self) -> Semiring:
        """Return the semiring under test."""
        raise NotImplementedError(f"{type(self).__name__}.semiring(self): expected a method that returns a Semiring")

    def plus(self, left: Tensor, right: Tensor) -> Tensor:
        """Add two values of shape (*E)."""
        raise NotImplementedError(
            f"{type(self).__name__}.plus(self, left, right): expected a method that adds two values"
        )

    def times(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply two values of shape (*E)."""
        raise NotImplementedError(
            f"{type(self).__name__}.times(self, left, right): expected a method that multiplies two values"
        )

    def weigh(self, log_weight: Tensor, value: Tensor) -> Tensor:
        """Multiply a value (*E) by a weight, ``log_weight`` (); by default :meth:`times` of the lifted weight."""
        return self.times(self.lifted(log_weight), value)

    def assert_equal(self, actual: Tensor, expected: Tensor) -> None:
        """Assert that two tensors of values are equal up to rounding; override it where values have several forms."""
        assert_close(actual, expected)

    def lifted(self, log_value: Tensor) -> Tensor:
        """Return the value (*E) of one log-value ()."""
        return self.semiring().lift(log_value.reshape(1, 1, 1))[0, 0, 0]

    def cases(self) -> st.SearchStrategy[SemiringCase]:
        """Return the strategy that all laws are tried on."""

        @st.composite
        def cases(draw: st.DrawFn) -> SemiringCase:
            circuit = draw(strategies.circuits(max_vars=3, max_units=2, max_categories=3))
            evidence = draw(strategies.evidence(circuit))
            logs = st.one_of(st.floats(-8, 8, allow_subnormal=False), st.sampled_from([0.0, -torch.inf, -1e4]))
            count = 5 * _NUM_ELEMENTS
            drawn = draw(st.lists(logs, min_size=count, max_size=count), label="log-values")
            log_values = torch.tensor(drawn, dtype=torch.float64).reshape(5, _NUM_ELEMENTS)
            return SemiringCase(circuit, draw(st.integers(0, 1000), label="seed"), evidence, log_values)

        return cases()

    def elements(self, case: SemiringCase) -> list[Tensor]:
        """Return three elements to test the laws on, (1, 1, n, *E) each: lifted values, sums and products of such."""
        semiring = self.semiring()
        a, b, c, d, e = (semiring.lift(row.reshape(1, 1, -1)) for row in case.log_values)
        return [a, self._added(b, c), semiring.times(d, e)]

    @law
    def test_times_is_associative_and_commutative(self, case: SemiringCase) -> None:
        """(a b) c = a (b c), and a b = b a."""
        times = self.semiring().times
        a, b, c = self.elements(case)
        self.assert_equal(times(times(a, b), c), times(a, times(b, c)))
        self.assert_equal(times(a, b), times(b, a))

    @law
    def test_plus_is_associative_and_commutative(self, case: SemiringCase) -> None:
        """(a + b) + c = a + (b + c), and a + b = b + a; plus is a contraction with weights 1."""
        a, b, c = self.elements(case)
        self.assert_equal(self._added(self._added(a, b), c), self._added(a, self._added(b, c)))
        self.assert_equal(self._added(a, b, c), self._added(self._added(a, b), c))
        self.assert_equal(self._added(a, b), self._added(b, a))

    @law
    def test_one_and_zero_are_neutral(self, case: SemiringCase) -> None:
        """1 a = a and 0 + a = a, where 1 is lift(0) and 0 is lift(-inf)."""
        for a in self.elements(case):
            self.assert_equal(self.semiring().times(self._constant(case, 0.0), a), a)
            self.assert_equal(self._added(self._constant(case, -torch.inf), a), a)

    @law
    def test_zero_annihilates(self, case: SemiringCase) -> None:
        """0 a = 0."""
        zero = self._constant(case, -torch.inf)
        for a in self.elements(case):
            self.assert_equal(self.semiring().times(zero, a), zero)

    @law
    def test_times_distributes_over_plus(self, case: SemiringCase) -> None:
        """A (b + c) = a b + a c."""
        if self.has_distributivity:
            times = self.semiring().times
            a, b, c = self.elements(case)
            self.assert_equal(times(a, self._added(b, c)), self._added(times(a, b), times(a, c)))

    @law
    def test_products_are_repeated_times(self, case: SemiringCase) -> None:
        """Product(a, b, c) = (a b) c, and times is the scalar one."""
        semiring = self.semiring()
        a, b, c = self.elements(case)
        self.assert_equal(semiring.product(torch.stack([a, b, c], 1)), semiring.times(semiring.times(a, b), c))
        scalars = [self.times(left, right) for left, right in zip(a[0, 0], b[0, 0], strict=True)]
        self.assert_equal(semiring.times(a, b)[0, 0], torch.stack(scalars))

    @law
    def test_contractions_are_weighted_sums(self, case: SemiringCase) -> None:
        """Contract(w, x)_o = sum_i w_oi x_i, in scalar operations, with and without the linear weights."""
        x = torch.cat(self.elements(case), 1)  # (1, I, n, *E)
        log_weights = torch.log_softmax(case.log_values[:2, :_NUM_ELEMENTS].clamp_min(-1e4), 1)
        log_weights[0, 0] = -torch.inf  # a zero weight
        log_weights = torch.log_softmax(log_weights, 1).unsqueeze(0)
        expected = [
            torch.stack(
                [
                    self._sum([self.weigh(w, v) for w, v in zip(row, x[0, :, column], strict=True)])
                    for row in log_weights[0]
                ]
            )
            for column in range(x.shape[2])
        ]
        for weights in (None, log_weights.exp()):
            found = self.semiring().contract(log_weights, x, weights=weights)
            self.assert_equal(found[0], torch.stack(expected, 1))

    @law
    def test_mixing_is_contracting_the_listed_rows(self, case: SemiringCase) -> None:
        """Mix(table, values, factors) = sum_j factor_j table[values_j], with and without the linear table."""
        semiring = self.semiring()
        log_table = torch.log_softmax(case.log_values[:4, :2].clamp_min(-1e4), 0)  # (V, K)
        values = torch.tensor([[0, 1, 2], [3, 0, 1]])
        factors = case.log_values[3:, :3]
        expected = Semiring.mix(semiring, log_table, values, factors)
        for table in (None, log_table.exp()):
            self.assert_equal(semiring.mix(log_table, values, factors, table=table), expected)

    @law
    def test_the_upward_pass_is_the_sum_over_configurations(self, case: SemiringCase) -> None:
        """Root = sum_z prod (weights and input units that z uses), in scalar operations, for a random circuit."""
        if not self.has_distributivity:
            return
        pc, semiring = case.pc, self.semiring()
        evidence = case.evidence if case.evidence.missing is None else Evidence.soft(case.factors)
        with torch.no_grad():
            root = queries.evaluate(pc, semiring, evidence)
            self.assert_equal(root, torch.stack([self._enumerated(case, row) for row in case.factors]))

    def _enumerated(self, case: SemiringCase, factors: Tensor) -> Tensor:
        """Return the sum over all configurations under one query's log-factors (D, C)."""
        units = {}
        for leaf in case.circuit.inputs:
            for unit in range(leaf.num_units):
                log_weights = case.pc.log_weights(leaf)[:, unit]
                terms = [
                    self.weigh(weight, self.lifted(factor))
                    for weight, factor in zip(log_weights, factors[leaf.var, : len(log_weights)], strict=True)
                ]
                units[leaf, unit] = self._sum(terms)
        log_weights_of = {node: case.pc.log_weights(node) for node in case.circuit.sums}
        products = []
        for edges, leaves in configurations(case.circuit):
            value = functools.reduce(self.times, [units[leaf] for leaf in leaves])
            for node, unit, index in edges:
                value = self.weigh(log_weights_of[node][unit, index], value)
            products.append(value)
        return self._sum(products)

    def _sum(self, values: Sequence[Tensor]) -> Tensor:
        return functools.reduce(self.plus, values)

    def _added(self, *values: Tensor) -> Tensor:
        """Add values (1, 1, n, *E) as the semiring does: by a contraction with weights 1."""
        stacked = torch.cat(values, 1)
        return self.semiring().contract(torch.zeros(1, 1, len(values), dtype=torch.float64), stacked)

    def _constant(self, case: SemiringCase, log_value: float) -> Tensor:
        return self.semiring().lift(torch.full((1, 1, _NUM_ELEMENTS), log_value, dtype=torch.float64))
