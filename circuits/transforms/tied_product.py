"""The product of a circuit and another one, or an automaton, that keeps the circuit's parameters and ties."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from circuits.arguments import shape_of
from circuits.constrained import ConstrainedDistribution
from circuits.engine.compile import CompiledCircuit
from circuits.engine.weights import check_compiled
from circuits.errors import ArgumentError, ImpossibleEvidenceError, PropertyError
from circuits.evidence import Evidence
from circuits.queries.automata import Automaton
from circuits.queries.deterministic import DeterministicAutomaton
from circuits.queries.divergences import log_inner_product
from circuits.queries.structural import require_compatible
from circuits.transforms.multiply import NormalizedProduct, multiply


class TiedProduct(nn.Module):
    """``p(x) q(x) / Z`` with the parameters of p, and no others: their number, their names and their ties stay.

    :func:`multiply` writes the product as a circuit, whose units are each normalised by what follows. That differs from
    position to position, and what was tied comes apart: a homogeneous model is homogeneous no more. Here p and q stay
    apart, and only Z is computed from both, exactly. ``log_prob`` is differentiable in the parameters of p, so any
    optimizer of PyTorch learns p *given* what q says, with p's ties.

    Args:
        pc: p; its parameters are this module's.
        other: q: a compatible circuit, of which a copy is kept constant; or an automaton, where q is 1 for what it
            accepts, or a weight, and p is a chain such as a hidden Markov model.

    Raises:
        ArgumentError: an argument has a wrong type, or the automaton reads too few values.
        PropertyError: the circuits are over other variables, not compatible, or have classes, or p is not a chain
            beside an automaton.
    """

    def __init__(self, pc: CompiledCircuit, other: CompiledCircuit | DeterministicAutomaton | Automaton) -> None:
        super().__init__()
        check_compiled(pc)
        if not isinstance(other, (CompiledCircuit, DeterministicAutomaton, Automaton)):
            raise ArgumentError(
                f"other: expected a compiled circuit or an automaton of ct.queries, got {type(other).__name__}"
            )
        if isinstance(other, CompiledCircuit):
            require_compatible(pc.circuit, other.circuit, "TiedProduct")
            other = copy.deepcopy(other).requires_grad_(False)
        for circuit in (pc, other):
            if isinstance(circuit, CompiledCircuit) and circuit.circuit.num_classes is not None:
                raise PropertyError("TiedProduct: expected circuits without classes; use multiply, class by class")
        self.pc = pc
        self.other = other
        if not isinstance(other, CompiledCircuit):
            self._under_automaton()  # which refuses what does not fit

    @property
    def num_parameters(self) -> int:
        """How many numbers p has, each tied one once."""
        return self.pc.circuit.num_parameters

    @property
    def log_partition(self) -> Tensor:
        """``log Z = log sum_x p(x) q(x)``, a scalar in nats, differentiable in the parameters of p."""
        if isinstance(self.other, CompiledCircuit):
            return log_inner_product(self.pc, self.other)[0]
        return self._under_automaton().log_partition[0]

    def log_prob(
        self,
        x: Tensor,  # shape: (B, D)
    ) -> Tensor:  # shape: (B,)
        """Return ``log p(x) q(x) / Z``, in nats; -inf where q rules x out.

        Args:
            x: int64 values.

        Raises:
            ArgumentError: a wrong shape or dtype.
            ImpossibleEvidenceError: Z = 0.
        """
        if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[1] != self.pc.circuit.num_vars:
            raise ArgumentError(f"x: expected int64 (B, {self.pc.circuit.num_vars}), got {shape_of(x)}")
        if not isinstance(self.other, CompiledCircuit):
            return self._under_automaton().log_prob(x.unsqueeze(1))[:, 0]
        log_partition = self.log_partition
        if float(log_partition.detach()) == -torch.inf:
            raise ImpossibleEvidenceError("other: no assignment is possible under both circuits, their product is zero")
        return self.pc(x) + self.other(x) - log_partition

    def forward(self, x: Tensor) -> Tensor:
        """Return :meth:`log_prob`."""
        return self.log_prob(x)

    def multiplied(self) -> NormalizedProduct:
        """Return the product as a circuit of its own, for queries; see :func:`multiply`.

        Raises PropertyError if q is an automaton: :class:`circuits.ConstrainedDistribution` answers queries about that.
        """
        if not isinstance(self.other, CompiledCircuit):
            raise PropertyError(
                "other: expected a circuit, got an automaton, whose product is not written as a circuit; ask "
                "ct.ConstrainedDistribution(pc, evidence, automaton)"
            )
        return multiply(self.pc, self.other)

    def _under_automaton(self) -> ConstrainedDistribution:
        assert not isinstance(self.other, CompiledCircuit)
        return ConstrainedDistribution(self.pc, Evidence.nothing(1, self.pc.circuit.num_vars), self.other)
