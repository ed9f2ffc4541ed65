"""PyJuice's CUDA kernels behind the likelihoods of a compiled circuit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from circuits.digests import same_bits
from circuits.engine.compile import CompiledCircuit
from circuits.engine.weights import CircuitWeights
from circuits.errors import ArgumentError
from circuits.evidence import Evidence
from circuits.interop.pyjuice import check_has_one_root, import_pyjuice, to_pyjuice
from circuits.symbolic import Circuit
from circuits.transforms.rebuild import check_is_table

_BATCH_MULTIPLE = 32


class JuiceCircuit(CompiledCircuit):
    """A compiled circuit that evaluates hard and missing evidence with PyJuice's kernels where no gradient is needed.

    That is ``pc(x)``, ``log_likelihood``, ``log_marginal`` and ``log_partition`` under ``torch.no_grad()``. Everything
    else, and all gradients, run on this library's own kernels with the same weights. PyJuice gives impossible evidence
    a very small likelihood where this library gives it none, -inf, and multiplies in reduced precision.
    """

    _compiled: tuple[list[Tensor], Any] | None = None
    """The parameters that PyJuice's circuit was compiled with, and that circuit."""

    def log_partition(self, evidence: Evidence, weights: CircuitWeights | None = None) -> Tensor:
        """Return ``log Z(e)``, shape (B,), see :meth:`CompiledCircuit.log_partition`."""
        is_hard = evidence.values is not None and evidence.log_factors is None and evidence.values.shape[-1] == 1
        is_hard = is_hard and not evidence.latents and evidence.classes is None
        is_hard = is_hard and evidence.reference is None and evidence.batch_size > 0
        if not is_hard or weights is not None or torch.is_grad_enabled() or self.device.type != "cuda":
            return super().log_partition(evidence, weights)
        evidence.check(self.num_categories)
        values, options = kernel_inputs(evidence)
        log_z = self._kernels()(values, **options)
        return log_z[: evidence.batch_size, 0].to(self.dtype)

    def _kernels(self) -> Any:
        """Return PyJuice's circuit of the present weights, compiled again after they changed."""
        raw = [parameter.detach() for parameter in self.bank.values()]
        if self._compiled is None or not all(map(same_bits, self._compiled[0], raw)):
            compiled = import_pyjuice().compile(to_pyjuice(self), device=self.device, verbose=False)
            copies = [parameter.clone() for parameter in raw]
            self._compiled = copies, compiled.to(self.device)  # in a tuple: not a submodule, so not in the state_dict
        return self._compiled[1]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the kernels out of copies and files too."""
        return {**super().__getstate__(), "_compiled": None}


def kernel_inputs(evidence: Evidence) -> tuple[Tensor, dict[str, Tensor]]:
    """Return hard evidence as the kernels take it, whole blocks of samples: int64 values, and which are missing."""
    assert evidence.values is not None
    rows = torch.arange(-(-evidence.batch_size // _BATCH_MULTIPLE) * _BATCH_MULTIPLE, device=evidence.device)
    rows = rows.masked_fill(rows >= evidence.batch_size, 0)
    options = {} if evidence.missing is None else {"missing_mask": evidence.missing[rows].contiguous()}
    return evidence.values[rows, :, 0].long().contiguous(), options


def compile_with_pyjuice(
    circuit: Circuit,
    *,
    device: torch.device | str = "cuda",
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> JuiceCircuit:
    """Compile a circuit, in float32, that evaluates hard and missing evidence with PyJuice's kernels.

    Args:
        circuit: of categorical inputs, without classes.
        device: a CUDA device.
        seed: for the initial weights, as in ``ct.compile``.
        generator: a CPU generator, instead of ``seed``.

    Raises:
        ArgumentError: there is no CUDA device or no PyJuice, or another device is asked for.
        PropertyError: an input family that PyJuice's exchange does not cover, or a circuit with classes.
    """
    import_pyjuice()
    if not torch.cuda.is_available():
        raise ArgumentError(
            "device: expected CUDA for PyJuice's kernels, and torch sees no such device; use ct.compile, which "
            "runs everywhere"
        )
    if torch.device(device).type != "cuda":
        raise ArgumentError(f"device: expected device='cuda' for PyJuice's kernels, got {device}")
    check_has_one_root(circuit)
    for node in circuit.inputs:
        check_is_table(node, "PyJuice")
    pc = JuiceCircuit(circuit)
    pc.randomize(seed=seed, generator=generator)
    return pc.to(device)
