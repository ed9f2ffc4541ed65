"""Laws of representation: precision, extreme numbers, saving and loading, devices, and torch.compile."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from circuits import queries
from circuits.engine.compile import CompiledCircuit, compile
from circuits.errors import ImpossibleEvidenceError
from circuits.evidence import Evidence
from circuits.testing.conformance._cases import Case, assert_close, assert_code_rebuilds, law, reloaded
from circuits.testing.conformance._structure_cases import StructureCases
from circuits.testing.oracle import enumerate_joint, enumerated_log_partition, enumerated_marginals

_EXTREME = 1e4


class NumericLaws(StructureCases):
    """What must not depend on number formats, files, devices or compilers."""

    checks_torch_compile: ClassVar[bool] = False
    """Whether the circuit is also traced by ``torch.compile``, which takes seconds a case."""

    @law
    def test_the_repr_is_the_code_that_builds_the_circuit(self, case: Case) -> None:
        """Executing it gives the same structure again, and the same circuit from the same seed."""
        assert_code_rebuilds(case)

    @law
    def test_the_same_seed_gives_the_same_weights(self, case: Case) -> None:
        """Also in another dtype: weights are drawn in float32."""
        for dtype in (torch.float64, torch.float32):
            again = compile(case.circuit, dtype=dtype, seed=case.seed)
            for parameter, expected in zip(again.parameters(), case.pc.parameters(), strict=True):
                assert torch.equal(parameter, expected.to(dtype))

    @law
    def test_saving_and_loading_keeps_every_bit(self, case: Case) -> None:
        """The loaded circuit has the same structure, parameters and answers."""
        _use_all_digits(case.pc)
        loaded = reloaded(case.pc)
        assert repr(loaded.circuit) == repr(case.circuit)
        _assert_same_bits(loaded, case)

    @law
    def test_a_state_dict_is_all_there_is_to_know(self, case: Case) -> None:
        """Loaded into another compilation of the circuit, it gives the same answers."""
        _use_all_digits(case.pc)
        other = compile(case.circuit, dtype=torch.float64, seed=case.seed + 1)
        other.load_state_dict(case.pc.state_dict())
        _assert_same_bits(other, case)

    @law
    def test_float32_is_close_to_float64(self, case: Case) -> None:
        """To four digits, in log Z and in the marginals."""
        evidence = self.possible(case)
        single = compile(case.circuit, seed=case.seed)
        loose = {"rtol": 1e-4, "atol": 1e-4}
        assert_close(single(evidence).double(), case.pc(evidence), **loose)
        expected = queries.marginals(case.pc, evidence)
        assert_close(queries.marginals(single, evidence).double(), expected, **loose)

    @law
    def test_extreme_weights_give_exact_values_and_finite_gradients(self, case: Case) -> None:
        """With about half of the log-weights at -1e4."""
        pc, generator = case.pc, case.generator
        with torch.no_grad():
            for parameter in pc.parameters():
                is_tiny = torch.rand(parameter.shape, generator=generator) < 0.5
                parameter.copy_(torch.where(is_tiny & (parameter > -torch.inf), -_EXTREME, parameter))
        log_p = pc(case.assignments)
        assert_close(log_p, enumerate_joint(pc).flatten())
        _assert_finite_gradients(log_p, list(pc.parameters()))

    @law
    def test_extreme_evidence_gives_exact_values_and_finite_gradients(self, case: Case) -> None:
        """With log-factors of +1e4 and -1e4."""
        signs = torch.randn(case.factors.shape, generator=case.generator, dtype=torch.float64).sign()
        factors = (_EXTREME * signs).requires_grad_()
        evidence = Evidence.soft(factors)
        joint = self.log_joint(case.pc)
        log_z = case.pc(evidence)
        assert_close(log_z, enumerated_log_partition(joint, Evidence.soft(factors.detach())))
        _assert_finite_gradients(log_z, [factors, *case.pc.parameters()])
        if bool((log_z > -torch.inf).all()):
            with torch.no_grad():
                expected = enumerated_marginals(joint, evidence)
                assert_close(queries.marginals(case.pc, evidence), expected)
                assert bool(queries.mpe(case.pc, evidence).log_score.isfinite().all())

    @law
    def test_impossible_evidence_is_minus_infinity_or_refused(self, case: Case) -> None:
        """Log Z = -inf, and queries that condition on the evidence raise ImpossibleEvidenceError; never NaN."""
        factors = case.factors
        factors[:, 0] = -torch.inf
        impossible = Evidence.soft(factors)
        log_z = queries.log_partition(case.pc, impossible)
        assert bool((log_z == -torch.inf).all())
        for query in (queries.marginals, queries.mpe, lambda pc, given: queries.sample(pc, 1, given)):
            with pytest.raises(ImpossibleEvidenceError):
                query(case.pc, impossible)

    @law
    def test_no_evidence_leaves_the_prior(self, case: Case) -> None:
        """Missing everywhere, or log-factor 0 everywhere: marginals are those of the joint, and log Z = 0."""
        zeros = Evidence.soft(torch.zeros(1, case.circuit.num_vars, case.num_values, dtype=torch.float64))
        prior = enumerated_marginals(self.log_joint(case.pc), zeros)
        for nothing in (case.nothing, zeros):
            log_z = queries.log_partition(case.pc, nothing)
            assert_close(log_z, torch.zeros_like(log_z))
            assert_close(queries.marginals(case.pc, nothing), prior)

    @law
    def test_a_gpu_agrees_with_the_cpu(self, case: Case) -> None:
        """Values and gradients, in float64."""
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        evidence = self.possible(case)
        on_gpu = compile(case.circuit, device="cuda", dtype=torch.float64, seed=case.seed)
        found = []
        for pc, given in ((on_gpu, evidence.to("cuda")), (case.pc, evidence)):
            log_z = pc(given)
            gradients = torch.autograd.grad(log_z.sum(), list(pc.parameters()))
            found.append([log_z, queries.marginals(pc, given), *gradients])
        for one, other in zip(*found, strict=True):
            assert_close(one, other)

    @law
    def test_torch_compile_gives_the_same_values_and_gradients(self, case: Case) -> None:
        """Traced by dynamo and AOT autograd, run eagerly."""
        if not self.checks_torch_compile:
            pytest.skip("set checks_torch_compile = True to trace the circuits (seconds a case)")
        torch.compiler.reset()
        compiled = torch.compile(case.pc, backend="aot_eager")
        x = case.assignments[self.log_joint(case.pc).flatten() > -torch.inf]
        found = []
        for call in (compiled, case.pc):
            log_p = call(x)
            found.append([log_p, *torch.autograd.grad(log_p.sum(), list(case.pc.parameters()))])
        for one, other in zip(*found, strict=True):
            assert_close(one, other)


@torch.no_grad()
def _use_all_digits(pc: CompiledCircuit) -> None:
    """Change the parameters so that float32, in which weights are drawn, cannot hold them."""
    for parameter in pc.parameters():
        parameter.div_(3)


def _assert_same_bits(other: CompiledCircuit, case: Case) -> None:
    expected = case.pc.state_dict()
    assert other.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in other.state_dict().items())
    assert torch.equal(other(case.evidence), case.pc(case.evidence))


def _assert_finite_gradients(log_z: Tensor, tensors: list[Tensor]) -> None:
    gradients = torch.autograd.grad(log_z[log_z > -torch.inf].sum(), tensors)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
