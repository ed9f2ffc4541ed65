"""Laws of the transformations: the tables of all assignments before and after one are related as it says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from circuits import queries, transforms
from circuits.engine.compile import CompiledCircuit, compile
from circuits.errors import ImpossibleEvidenceError, PropertyError
from circuits.evidence import Evidence
from circuits.testing.conformance._cases import Case, assert_close, law
from circuits.testing.conformance._structure_cases import StructureCases, scores_of
from circuits.testing.oracle import enumerate_joint

_NUM_SAMPLES = 6
_SHARE_PRUNED = 0.3


class TransformLaws(StructureCases):
    """Transformations of circuits with one root unit, or with one per class: then each holds for every class."""

    @law
    def test_conditioning_renormalises_the_joint(self, case: Case) -> None:
        """P(x | e) = p(x) prod_i e_i(x_i) / Z(e), as a circuit."""
        scores = scores_of(case, case.factors)
        for query in range(case.evidence.batch_size):
            evidence = case.evidence.rows(slice(query, query + 1))
            weighted = self.tables(case).flatten(1) + scores[query]
            log_z = torch.logsumexp(weighted, 1, keepdim=True)
            if bool((log_z == -torch.inf).any()):
                with pytest.raises(ImpossibleEvidenceError):
                    transforms.condition(case.pc, evidence, variables="all")
                continue
            posterior = transforms.condition(case.pc, evidence, variables="all")
            _assert_tables(posterior, weighted - log_z)

    @law
    def test_marginalizing_sums_out(self, case: Case) -> None:
        """P(rest) = sum over the other variables."""
        num_vars = case.circuit.num_vars
        order = torch.randperm(num_vars, generator=case.generator).tolist()
        removed = order[: num_vars // 2]
        expected = self.tables(case)
        if removed:
            expected = torch.logsumexp(expected, [1 + var for var in removed])
        _assert_tables(transforms.marginalize(case.pc, removed), expected)

    @law
    def test_permuting_renames_variables(self, case: Case) -> None:
        """Variable i of the result is variable order[i]."""
        order = torch.randperm(case.circuit.num_vars, generator=case.generator).tolist()
        _assert_tables(transforms.permute(case.pc, order), self.tables(case).permute(0, *(1 + var for var in order)))

    @law
    def test_other_circuits_of_the_same_distribution(self, case: Case) -> None:
        """Growing without noise, trimming, merging equal units and untying change no probability."""
        grown = transforms.grow(case.pc, noise=0.0)
        for same in (
            grown,
            transforms.merge_equal_units(grown),
            transforms.merge_equal_units(case.pc),
            transforms.trim(case.pc),
            transforms.untie_parameters(case.pc),
        ):
            assert same.circuit.num_classes == case.circuit.num_classes
            _assert_tables(same, self.tables(case))

    @law
    def test_pruning_loses_at_most_its_bound(self, case: Case) -> None:
        """Mean log p(x) - mean log p_pruned(x) <= the bound; with classes, under each sample's own class."""
        given = Evidence.nothing(_NUM_SAMPLES, case.circuit.num_vars)
        labels = None
        if case.circuit.num_classes is not None:
            labels = torch.arange(_NUM_SAMPLES) % case.circuit.num_classes
            given = given.with_class(labels)
        data = queries.sample(case.pc, 1, given, case.generator)[0]
        samples = Evidence.observe(data) if labels is None else Evidence.observe(data).with_class(labels)
        pruned, bound, _ = transforms.prune(case.pc, data, labels=labels, fraction=_SHARE_PRUNED)
        assert float((case.pc(samples) - pruned(samples)).detach().mean()) <= bound + 1e-9
        total = enumerate_joint(pruned).exp().sum()
        assert_close(total, torch.full_like(total, case.circuit.num_classes or 1))

    @law
    def test_the_product_of_two_circuits_multiplies_their_tables(self, case: Case) -> None:
        """P(x) q(x) / Z, where the structure is compatible with itself."""
        other = compile(case.circuit, dtype=torch.float64, seed=case.seed + 1)
        total = self.tables(case).flatten(1) + _tables(enumerate_joint(other), case).flatten(1)
        log_z = torch.logsumexp(total, 1)
        try:
            product, log_partition = transforms.multiply(case.pc, other)
        except PropertyError:
            assert not case.circuit.is_structured_decomposable
        except ImpossibleEvidenceError:
            assert bool((log_z == -torch.inf).any())
        else:
            assert_close(log_partition.reshape(-1), log_z)
            _assert_tables(product, total - log_z.unsqueeze(1))

    def tables(self, case: Case) -> Tensor:
        """Return the table of log p of every class, (R, C_0, ..., C_D-1); R = 1 without classes."""
        return _tables(self.log_joint(case.pc).detach(), case)


def _tables(joint: Tensor, case: Case) -> Tensor:
    return joint.reshape(-1, *case.circuit.num_categories)


def _assert_tables(pc: CompiledCircuit, expected: Tensor) -> None:
    """Assert that a circuit has these log-probabilities, (R, ...) with assignments in the order of a table."""
    assert_close(enumerate_joint(pc).flatten(), expected.flatten())
