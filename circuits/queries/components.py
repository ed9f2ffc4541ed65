"""The components of a mixture, each asked on its own."""

from __future__ import annotations

from torch import Tensor

from circuits.algebra.semirings import Semiring
from circuits.engine.compile import CompiledCircuit
from circuits.engine.question import Question
from circuits.engine.weights import CircuitWeights
from circuits.errors import PropertyError
from circuits.evidence import Evidence
from circuits.queries.common import query
from circuits.symbolic import Sum


@query
def component_log_partition(
    pc: CompiledCircuit, evidence: Evidence, *, weights: CircuitWeights | None = None
) -> Tensor:
    """Return ``log Z_k(e)`` of each unit that the root mixes, so that ``Z(e) = sum_k w_k Z_k(e)``, in one pass.

    The components of a mixture, :func:`circuits.structures.mixture_of`, are such units; in an HMM they are the states
    of step 0. Factors on what the root chooses do not count.

    Args:
        pc: a circuit whose root is a sum.
        evidence: for B queries.
        weights: of ``pc.weights(external=...)``, in place of the circuit's own.

    Returns:
        (B, K), differentiable in evidence and weights; -inf where the evidence is impossible under a component.

    Raises:
        PropertyError: the root is no mixture, or has a unit per class.
    """
    root = pc.circuit.root
    if not isinstance(root, Sum) or pc.circuit.num_classes is not None or pc.schedule[-1].chain is not None:
        raise PropertyError(
            f"component_log_partition: expected a circuit with one root unit, a mixture, got {pc.circuit}; "
            "log_partition is that of a circuit, or of every class"
        )
    return _Components(pc, evidence, weights).log_z


class _Components(Question):
    """A question about each unit that the root mixes."""

    def __init__(self, pc: CompiledCircuit, evidence: Evidence, weights: CircuitWeights | None) -> None:
        super().__init__(pc, evidence, weights)
        self.tops = [pc.address(child) for child in pc.circuit.root.children]
        self.schedule = pc.schedule[:-1]

    def mixed(self, semiring: Semiring, root: Tensor) -> Tensor:
        """Return the values of all units that the root mixes, (B, K)."""
        node = self.pc.circuit.root
        assert isinstance(node, Sum)
        return node.mixed(root[0].split([child.num_units for child in node.children])).t()
