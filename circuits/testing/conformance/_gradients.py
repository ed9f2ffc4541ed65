"""Laws of differentiation: gradients of log Z in weights and evidence, first and second order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from circuits.engine.compile import CompiledCircuit, compile
from circuits.evidence import Evidence
from circuits.testing.conformance._cases import Case, assert_close, law
from circuits.testing.conformance._structure_cases import StructureCases
from circuits.testing.oracle import enumerate_joint, enumerated_log_partition

_STEP = 1e-5


class GradientLaws(StructureCases):
    """Gradients of the partition function."""

    @law
    def test_gradients_are_those_of_the_enumerated_sum(self, case: Case) -> None:
        """Along a random direction, d log Z is the slope of the enumeration: in log-factors and in parameters."""
        evidence = self.possible(case)
        pc = case.pc
        factors = evidence.dense(case.num_values, torch.float64).requires_grad_()
        gradients = torch.autograd.grad(pc(Evidence.soft(factors)).sum(), [factors, *pc.parameters()])
        generator = case.generator
        directions = [torch.randn(g.shape, generator=generator, dtype=g.dtype) for g in gradients]
        slope = sum(((g * d).sum() for g, d in zip(gradients, directions, strict=True)), torch.zeros(()).double())

        def shifted(step: float) -> Tensor:
            moved = compile(case.circuit, dtype=torch.float64, seed=case.seed)
            with torch.no_grad():
                for parameter, direction in zip(moved.parameters(), directions[1:], strict=True):
                    parameter.add_(step * direction)
            given = Evidence.soft(factors.detach() + step * directions[0])
            return enumerated_log_partition(enumerate_joint(moved), given).sum()

        expected = (shifted(_STEP) - shifted(-_STEP)) / (2 * _STEP)
        assert_close(slope, expected, rtol=1e-5, atol=1e-5)

    @law
    def test_gradients_pass_gradcheck(self, case: Case) -> None:
        """The gradients of log Z are the slopes of the function that is computed."""
        function, tensors = _log_z_of_tensors(case.pc, self.possible(case), case.num_values)
        torch.autograd.gradcheck(function, tensors, fast_mode=True, rtol=1e-4, atol=1e-6)

    @law
    def test_second_derivatives_pass_gradgradcheck(self, case: Case) -> None:
        """Gradients can be differentiated again, as Fisher information and meta-learning do."""
        function, tensors = _log_z_of_tensors(case.pc, self.possible(case), case.num_values)
        cotangent = torch.linspace(0.5, 1.5, len(tensors[0]), dtype=torch.float64).requires_grad_()
        torch.autograd.gradgradcheck(function, tensors, (cotangent,), fast_mode=True, rtol=1e-4, atol=1e-6)

    @law
    def test_impossible_evidence_has_gradient_zero(self, case: Case) -> None:
        """Where log Z = -inf for a query, no gradient of any query becomes NaN, and its own is zero."""
        factors = case.factors
        factors[0, -1] = -torch.inf
        factors.requires_grad_()
        log_z = case.pc(Evidence.soft(factors))
        assert log_z[0] == -torch.inf
        gradients = torch.autograd.grad(log_z.sum(), [factors, *case.pc.parameters()])
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)
        assert_close(gradients[0][0], torch.zeros_like(gradients[0][0]))


def _log_z_of_tensors(
    pc: CompiledCircuit, evidence: Evidence, num_values: int
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Return log Z as a function of log-factors and parameters, and where it is differentiated."""
    names = [name for name, _ in pc.named_parameters()]

    def log_z(factors: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True))
        found: Tensor = torch.func.functional_call(pc, state, (Evidence.soft(factors),))
        return found

    factors = evidence.dense(num_values, torch.float64)
    tensors = (factors, *(parameter.detach() for parameter in pc.parameters()))
    return log_z, tuple(tensor.clone().requires_grad_() for tensor in tensors)
