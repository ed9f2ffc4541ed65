"""The test case that whoever writes a structure with classes subclasses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from circuits import queries
from circuits.errors import ImpossibleEvidenceError
from circuits.evidence import Evidence
from circuits.testing.conformance._cases import (
    Case,
    assert_close,
    assert_code_rebuilds,
    assert_em_climbs,
    law,
    reloaded,
)
from circuits.testing.conformance._chi_square import assert_distributed
from circuits.testing.conformance._structure_cases import scores_of
from circuits.testing.conformance._transforms import TransformLaws
from circuits.testing.oracle import enumerated_log_partition, enumerated_marginals

_NUM_SAMPLES = 500


class ClassStructureTestCase(TransformLaws):
    """Tests a structure with ``num_classes`` against enumeration: queries, learning and transformations class by class.

    Like :class:`StructureTestCase`: supply :meth:`circuit`, which returns a circuit with classes. :meth:`log_joint`
    returns a table per class, (R, C_0, ..., C_D-1). To try all tests of :class:`StructureTestCase` too, give it the
    mixture of the classes, ``ct.Circuit(ct.sum(circuit.root, num_units=1))``.
    """

    @law
    def test_every_class_has_its_own_distribution(self, case: Case) -> None:
        """Log p(x | class) is the oracle's for all x, (N, R), and sums to one."""
        found = case.pc(case.assignments)
        assert_close(found.t(), self.tables(case).flatten(1))
        total = found.exp().sum(0)
        assert_close(total, torch.ones_like(total))

    @law
    def test_the_partition_function_is_one_per_class(self, case: Case) -> None:
        """Log Z(e | class) = log sum_x p(x | class) prod_i e_i(x_i), (B, R)."""
        assert_close(queries.log_partition(case.pc, case.evidence), self._log_z(case, case.evidence))

    @law
    def test_the_posterior_of_the_class_is_bayes_rule(self, case: Case) -> None:
        """P(class | e) = p(e | class) p(class) / p(e)."""
        log_prior = self._log_prior(case)
        joint = self._log_z(case, case.evidence) + log_prior
        is_possible = (joint > -torch.inf).any(1)
        if not bool(is_possible.all()):
            with pytest.raises(ImpossibleEvidenceError):
                queries.class_posterior(case.pc, case.evidence, log_prior)
        found = queries.class_posterior(case.pc, case.evidence.rows(is_possible), log_prior)
        assert_close(found, torch.softmax(joint[is_possible], 1))

    @law
    def test_evidence_that_names_the_class_asks_that_class(self, case: Case) -> None:
        """Log Z, marginals, samples and the most probable explanation of p(x | class)."""
        tables = self.tables(case)
        for label, table in enumerate(tables):
            possible = self._assert_asks(case, table, partial(Evidence.with_class, labels=label))
            if possible.batch_size:
                scores = self.log_best_explanation(case.pc)[label].flatten()
                best = (scores + scores_of(case, possible.dense(case.num_values, torch.float64))).amax(1)
                assert_close(queries.mpe(case.pc, possible.with_class(label)).log_score, best)

    @law
    def test_evidence_with_a_prior_asks_the_mixture(self, case: Case) -> None:
        """Log Z, marginals and samples of sum_r p(class r) p(x | class r)."""
        log_prior = self._log_prior(case)
        tables = self.tables(case)
        table = torch.logsumexp(tables + log_prior.reshape(-1, *[1] * case.circuit.num_vars), 0)
        self._assert_asks(case, table, partial(Evidence.with_class_prior, log_prior=log_prior))

    @law
    def test_em_never_lowers_the_likelihood_of_the_samples_classes(self, case: Case) -> None:
        """Sum_b log p(e_b | class b) climbs."""
        labels = torch.arange(case.evidence.batch_size) % len(self.tables(case))
        assert_em_climbs(case.pc, case.evidence.with_class(labels))

    @law
    def test_code_and_files_keep_the_classes(self, case: Case) -> None:
        """``repr`` is the code that builds the circuit, and a loaded circuit answers as the saved one."""
        assert_code_rebuilds(case)
        loaded = reloaded(case.pc)
        assert loaded.circuit.num_classes == case.circuit.num_classes
        assert torch.equal(loaded(case.assignments), case.pc(case.assignments))

    def _log_z(self, case: Case, evidence: Evidence) -> Tensor:
        return torch.stack([enumerated_log_partition(table, evidence) for table in self.tables(case)], 1)

    def _log_prior(self, case: Case) -> Tensor:
        num_classes = len(self.tables(case))
        return torch.log_softmax(torch.randn(num_classes, generator=case.generator, dtype=torch.float64), 0)

    def _assert_asks(self, case: Case, table: Tensor, on_classes: Callable[[Evidence], Evidence]) -> Evidence:
        """Assert that log Z, marginals and samples (chi-square) are those of ``table``, given evidence ``on_classes``.

        Returns the case's evidence, its possible queries only.
        """
        log_z = enumerated_log_partition(table, case.evidence)
        assert_close(queries.log_partition(case.pc, on_classes(case.evidence)), log_z)
        possible = case.evidence.rows(log_z > -torch.inf)
        given = on_classes(possible)
        assert_close(queries.marginals(case.pc, given), enumerated_marginals(table, possible))
        if not possible.batch_size:
            return possible
        scores = scores_of(case, possible.dense(case.num_values, torch.float64))
        posterior = torch.log_softmax(table.flatten() + scores, 1).reshape(-1, *table.shape)
        assert_distributed(lambda count: queries.sample(case.pc, count, given, case.generator), posterior, _NUM_SAMPLES)
        return possible
