"""The test case that whoever writes a new input family subclasses."""

from __future__ import annotations

from typing import ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from circuits import learning
from circuits.engine.compile import compile
from circuits.families import Distribution
from circuits.symbolic import Circuit, Node, inputs, product, sum
from circuits.testing.conformance._cases import Case, assert_close, law
from circuits.testing.conformance.structure import StructureTestCase


class FamilyTestCase(StructureTestCase):
    """Tests a family of finitely many values: its table, and everything that is asked of circuits over such inputs.

    Subclass it in a test module, under a name that pytest collects, and supply :meth:`distribution`::

        class TestBinomial(ct.testing.FamilyTestCase):
            def distribution(self, draw):
                return ct.Binomial(draw(st.integers(1, 5)))

            def log_prob(self, distribution, parameters, values):
                return torch.as_tensor(scipy.stats.binom.logpmf(values, distribution.num_trials, parameters[0]))

    Inherited are the tests of :class:`StructureTestCase`, on small mixtures of products of such inputs, and those of
    the family alone: its tables are normalised and are the oracle's, and a learning step finds the best fit.

    Attributes to override:
        has_exact_m_step: whether a step of EM finds the greatest likelihood of complete data at once; where it is False
            the likelihood must not fall.
    """

    has_exact_m_step: ClassVar[bool] = True

    def distribution(self, draw: st.DrawFn) -> Distribution:
        """Return a distribution of the family under test, of few values; its options come from ``draw(strategy)``."""
        raise NotImplementedError(
            f"{type(self).__name__}.distribution(self, draw): expected a method that returns an input family"
        )

    def log_prob(self, distribution: Distribution, parameters: Tensor, values: Tensor) -> Tensor | None:
        """Return the oracle's log p of values, float64 (N,), such as scipy's; None, the default: there is no oracle.

        Args:
            distribution: the distribution.
            parameters: of one unit, as the family defines them, (S,).
            values: int64 (N,).
        """
        return None

    def circuit(self, draw: st.DrawFn) -> Circuit:
        """Return a mixture of inputs of the family on one or two variables, with tied parameters now and then."""
        num_units = draw(st.integers(1, 2), label="num_units")
        first = inputs(0, num_units, self.distribution(draw))
        components: Node = first
        if draw(st.booleans(), label="two variables"):
            is_tied = draw(st.booleans(), label="tied")
            distribution = first.distribution if is_tied else self.distribution(draw)
            components = product(first, inputs(1, num_units, distribution, tied_to=first if is_tied else None))
        return Circuit(sum(components, num_units=1))

    @law
    def test_every_unit_is_normalised(self, case: Case) -> None:
        """Sum_v w_n(v) = 1 for every unit n."""
        for leaf in case.circuit.inputs:
            totals = case.pc.log_weights(leaf).exp().sum(0)
            assert_close(totals, torch.ones_like(totals))

    @law
    def test_the_table_is_that_of_the_oracle(self, case: Case) -> None:
        """Log w_n(v) is log p(v) under the unit's parameters."""
        for leaf in case.circuit.inputs:
            table, parameters = case.pc.log_weights(leaf), case.pc.parameters_of(leaf).detach()
            if parameters.shape[1] != leaf.num_units:
                continue  # units share parameters: there are none of a single one
            for unit in range(leaf.num_units):
                expected = self.log_prob(leaf.distribution, parameters[:, unit], torch.arange(len(table)))
                if expected is not None:
                    assert_close(table[:, unit], expected)

    @law
    def test_given_parameters_are_kept(self, case: Case) -> None:
        """A unit that is built with another's parameters has its table."""
        leaf = case.circuit.inputs[0]
        parameters = case.pc.parameters_of(leaf).detach()
        rebuilt = inputs(0, leaf.num_units, leaf.distribution, weights=parameters)
        pc = compile(Circuit(sum(rebuilt, num_units=1)), dtype=torch.float64, seed=case.seed + 1)
        assert_close(pc.parameters_of(rebuilt), parameters)
        assert_close(pc.log_weights(rebuilt), case.pc.log_weights(leaf))

    @law
    def test_a_learning_step_on_complete_data_finds_the_best_fit(self, case: Case) -> None:
        """One EM step of a single unit does not lower the likelihood, and no other parameters fit better."""
        circuit = Circuit(sum(inputs(0, 1, case.circuit.inputs[0].distribution), num_units=1))
        pc = compile(circuit, dtype=torch.float64, seed=case.seed)
        data = torch.randint(circuit.num_categories[0], (6, 1), generator=case.generator)
        possible = pc(data) > -torch.inf
        before = pc(data)[possible].sum()
        learning.em_step(pc, learning.expected_flows(pc, data).flows)
        after = pc(data)[possible].sum()
        assert bool(after >= before - 1e-9)
        if self.has_exact_m_step:
            for seed in range(5):
                other = compile(circuit, dtype=torch.float64, seed=seed)
                assert bool(after >= other(data)[possible].sum() - 1e-9)
