"""How the kit turns a law into a Hypothesis test of every subclass, and how a failing case is printed."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

from circuits import learning
from circuits.digests import tensor_code
from circuits.engine.compile import CompiledCircuit, compile
from circuits.evidence import Evidence
from circuits.io import load, save
from circuits.symbolic import Circuit, ParametricNode, parameter_owner

_SUPPRESSED = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.differing_executors,  # an instance of a test case has no state
]

Law = TypeVar("Law", bound=Callable[..., None])


def law(method: Law) -> Law:
    """Mark a method ``test_...(self, case)`` as a law: in every subclass it becomes a test for all cases."""
    vars(method)["law"] = method
    return method


class ConformanceTestCase:
    """Base of the test cases: makes a Hypothesis test of every law, anew for each subclass."""

    max_examples: ClassVar[int | None] = None
    """How many cases a law is tried on; None: as many as the Hypothesis profile says."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in dir(cls):
            inherited = getattr(getattr(cls, name), "law", None)
            if inherited is not None:
                setattr(cls, name, _for_all_cases(cls, inherited))

    def cases(self) -> st.SearchStrategy[Any]:
        """Return the strategy that draws what the laws are tried on."""
        raise NotImplementedError


def _for_all_cases(cls: type[ConformanceTestCase], inherited: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(inherited)
    def test(self: ConformanceTestCase, case: Any) -> None:
        note(f"This code rebuilds the case:\n\n{case.code()}\n")
        inherited(self, case)

    count = settings().max_examples if cls.max_examples is None else cls.max_examples
    configured = settings(max_examples=count, deadline=None, suppress_health_check=_SUPPRESSED)
    decorated: Callable[..., None] = configured(given(case=st.deferred(lambda: cls().cases()))(test))
    vars(decorated)["law"] = inherited
    return decorated


@dataclass(frozen=True, eq=False)
class Case:
    """A circuit, evidence on it for two queries, and a seed of its weights and of all else that a law draws."""

    circuit: Circuit
    seed: int
    evidence: Evidence

    @cached_property
    def pc(self) -> CompiledCircuit:
        """The circuit compiled on the CPU in float64. A law that changes its weights changes them for nobody else."""
        return compile(self.circuit, dtype=torch.float64, seed=self.seed)

    @property
    def generator(self) -> torch.Generator:
        """A new generator, always in the same state."""
        return torch.Generator().manual_seed(self.seed)

    @property
    def num_values(self) -> int:
        """C, the largest number of categories."""
        return max(self.circuit.num_categories)

    @property
    def assignments(self) -> Tensor:
        """All complete assignments in the order of a flattened table, int64 (N, D)."""
        values = [torch.arange(count) for count in self.circuit.num_categories]
        return torch.cartesian_prod(*values).reshape(-1, self.circuit.num_vars)

    @property
    def nothing(self) -> Evidence:
        """Evidence that says nothing, B = 1."""
        return Evidence.nothing(1, self.circuit.num_vars)

    @property
    def factors(self) -> Tensor:
        """The evidence as dense log-factors, float64 (B, D, C)."""
        return self.evidence.dense(self.num_values, torch.float64)

    def code(self) -> str:
        """Return Python code that rebuilds the case: ``circuit``, ``pc`` and ``evidence``."""
        lines = ["import torch", repr(self.circuit)]
        lines.append(f"pc = ct.compile(circuit, dtype=torch.float64, seed={self.seed})")
        for position, node in enumerate(self.circuit.nodes):
            if isinstance(node, ParametricNode) and (weights := parameter_owner(node).weights) is not None:
                lines.append(f"pc.set_weights(n{position}, {tensor_code(weights)})")
        lines.append(f"evidence = {self.evidence!r}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(circuit, seed={self.seed}, evidence=evidence)"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


def assert_close(actual: Tensor, expected: Tensor, *, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    """Assert that two tensors agree to 1e-9; -inf equals -inf, and NaN equals nothing."""
    torch.testing.assert_close(actual.detach().cpu(), expected.detach().cpu(), rtol=rtol, atol=atol)


def assert_em_climbs(
    pc: CompiledCircuit, samples: Evidence | Tensor, *, num_steps: int = 3, rounding: float = 1e-9
) -> None:
    """Assert that no step of EM lowers the likelihood of samples, those left out that are impossible."""
    before = None
    for _ in range(num_steps):
        flows, log_likelihood = learning.expected_flows(pc, samples)
        total = log_likelihood[log_likelihood > -torch.inf].sum()
        assert before is None or bool(total >= before - rounding)
        before = total
        learning.em_step(pc, flows)


def reloaded(pc: CompiledCircuit) -> CompiledCircuit:
    """Return a circuit that was saved, and loaded again."""
    with tempfile.TemporaryDirectory() as folder:
        save(pc, Path(folder) / "circuit")
        return load(Path(folder) / "circuit")


def assert_code_rebuilds(case: Case) -> None:
    """Assert that the case's code, executed, gives the same structure and the same answer."""
    names: dict[str, object] = {}
    exec(case.code(), names)
    rebuilt, evidence = names["pc"], names["evidence"]
    assert isinstance(rebuilt, CompiledCircuit)
    assert isinstance(evidence, Evidence)
    assert repr(rebuilt.circuit) == repr(case.circuit)
    assert torch.equal(rebuilt(evidence), case.pc(case.evidence))
