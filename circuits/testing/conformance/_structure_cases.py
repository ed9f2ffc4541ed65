"""What the laws of structures have in common: the hooks that a user fills in, and their oracles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from circuits.engine.compile import CompiledCircuit
from circuits.errors import ImpossibleEvidenceError
from circuits.evidence import Evidence
from circuits.symbolic import Circuit
from circuits.testing import strategies
from circuits.testing.conformance._cases import Case, ConformanceTestCase
from circuits.testing.oracle import enumerate_explanations, enumerate_joint, enumerated_log_partition


class StructureCases(ConformanceTestCase):
    """The hooks of a structure's test case."""

    def circuit(self, draw: st.DrawFn) -> Circuit:
        """Return a small circuit of the structure under test; sizes and options come from ``draw(strategy)``."""
        raise NotImplementedError(
            f"{type(self).__name__}.circuit(self, draw): expected a method that returns a ct.Circuit"
        )

    def log_joint(self, pc: CompiledCircuit) -> Tensor:
        """Return the dense oracle: log p of all assignments, float64, shape ``pc.circuit.num_categories``.

        With R classes, (R, ...): a table per class.

        By default it enumerates the circuit. Override it with the structure's own formula, written as plainly as
        possible, and the tests show that the circuit is that distribution. Laws that change the weights of a circuit
        enumerate it, so the formula may also use numbers that the structure was given.
        """
        return enumerate_joint(pc)

    def log_best_explanation(self, pc: CompiledCircuit) -> Tensor:
        """Return ``max_z log p(x, z)`` of all assignments, in the shape of :meth:`log_joint`, by enumeration."""
        return enumerate_explanations(pc)

    def cases(self) -> st.SearchStrategy[Case]:
        """Return the strategy of (circuit, seed, evidence) that all laws are tried on."""

        @st.composite
        def cases(draw: st.DrawFn) -> Case:
            circuit = self.circuit(draw)
            seed = draw(st.integers(0, 1000), label="seed")
            return Case(circuit, seed, draw(strategies.evidence(circuit)))

        return cases()

    def posterior(self, case: Case, evidence: Evidence | None = None) -> Tensor:
        """Return ``log p(x | e)`` of all assignments, (B, C_0, ..., C_D-1), under possible evidence."""
        given = case.evidence if evidence is None else evidence
        joint = self.log_joint(case.pc)
        scores = scores_of(case, given.dense(case.num_values, torch.float64))
        return torch.log_softmax(joint.flatten() + scores, 1).reshape(-1, *joint.shape)

    def possible(self, case: Case, query: Callable[[Evidence], Any] | None = None) -> Evidence:
        """Return the possible ones of the case's queries; ``query`` must refuse all of them if one is impossible."""
        log_z = enumerated_log_partition(self.log_joint(case.pc), case.evidence)
        is_possible = log_z > -torch.inf
        if query is not None and not bool(is_possible.all()):
            with pytest.raises(ImpossibleEvidenceError):
                query(case.evidence)
        return case.evidence.rows(is_possible)


def scores_of(case: Case, factors: Tensor) -> Tensor:
    """Return the sum of every assignment's log-factors, (B, N), from those of its values, (B, D, C)."""
    return factors[:, torch.arange(case.circuit.num_vars), case.assignments].sum(2)
