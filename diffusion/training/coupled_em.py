"""Steps by flows for the coupled objective, in the place of gradient steps on a circuit's weights.

    F_nc = F+_nc - F-_nc                  what the true tokens use of a weight, less what the evidence does
    D_n = max(TD(n), F-_n / N)            how often the circuit, or the evidence, uses unit n
    G_nc = max(0, D_n w_nc + F_nc / N)    kept non-negative
    F~_nc = s G_nc + (1 - s) D_n w_nc     w'_nc = (F~_nc + a / |ch(n)|) / (F~_n + a)

The objective is a difference of two log-likelihoods, so plain EM does not apply. Growth transforms of rational
functions (Gopalakrishnan et al. 1991) add a constant times the old weights to the difference; here the constant of a
unit is how often it is used, as in Anemone (Liu et al. 2025). Where the evidence says nothing, F- = N TD(n) w_nc, and
the step is that of Anemone on F+. Where nothing is negative, a step of size s -> 0 goes down every unit's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import circuits as ct
from circuits import CircuitWeights, CompiledCircuit
from circuits.learning.distributed import Processes
from diffusion.errors import ArgumentError


class CoupledAnemone:
    """Moves the weights of a circuit by the flows of coupled batches; conditioners are none of its business.

    Args:
        pc: the circuit.
        momentum: mu, of the moving average of ``F`` over the batches.
        processes: those that learn together; their flows are summed.
    """

    def __init__(self, pc: CompiledCircuit, momentum: float, processes: Processes) -> None:
        self._pc, self._momentum, self._processes = pc, momentum, processes
        self._flows: dict[str, Tensor] | None = None
        self._mass = 0.0
        self._traced: dict[str, Tensor] = {}
        self._under_evidence: dict[str, Tensor] = {}

    def weights(self) -> CircuitWeights:
        """Return the circuit's weights, for one batch, as new leaves of automatic differentiation."""
        with torch.no_grad():
            traced = self._pc.weights().detached(requires_grad=True)
        self._traced = {name: own.log for name, own in traced.own.items()}
        return traced

    def count(self, log_partitions: Tensor) -> None:
        """Note the flows under the evidence; the graph of the batch stays.

        Args:
            log_partitions: the sum of the blocks' ``log Z``, each times the block's share in the objective.

        Raises:
            ArgumentError: the batch did not use the weights, for the head makes others of them at run time.
        """
        sources = list(self._traced.values())
        flows = torch.autograd.grad(log_partitions, sources, retain_graph=True, allow_unused=True)
        if any(flow is None for name, flow in zip(self._traced, flows, strict=True) if name in self._pc.sum_banks):
            raise ArgumentError(
                "optimizer: expected adam for a head whose transitions depend on the context, got anemone; their "
                "weights have no flows of their own"
            )
        own = {
            name: torch.zeros_like(source) if flow is None else flow.clamp_min(0)
            for (name, source), flow in zip(self._traced.items(), flows, strict=True)
        }
        self._under_evidence = self._processes.summed_all(own)

    @torch.no_grad()
    def step(self, mass: float, *, scale: float, step_size: float) -> None:
        """Do the step of a batch whose loss was differentiated.

        Args:
            mass: N, the sum of the blocks' shares in all processes; a batch of mass 0 moves nothing.
            scale: by how much the gradients are those of the sum of the blocks' losses.
            step_size: s, 0 < s <= 1.
        """
        if mass <= 0:
            return
        own = {
            name: torch.zeros_like(source) if source.grad is None else -scale * source.grad
            for name, source in self._traced.items()
        }
        net = self._processes.summed_all(own)
        if self._flows is None:
            self._flows = {name: torch.zeros_like(flow) for name, flow in net.items()}
        self._flows = {name: torch.lerp(old, net[name], 1 - self._momentum) for name, old in self._flows.items()}
        self._mass = self._momentum * self._mass + (1 - self._momentum) * mass
        kept = self._kept(mass)
        flows = {name: (old + self._flows[name] / self._mass).clamp_min(0) for name, old in kept.items()}
        ct.learning.anemone_step(self._pc, flows, 1.0, step_size=step_size, momentum=0.0, own_flows=kept)
        self._traced = {}

    def _kept(self, mass: float) -> dict[str, Tensor]:
        """Return ``D_n w_nc`` of every weight."""
        kept = {}
        for name, own in ct.learning.top_down_flows(self._pc).items():
            axis = -1 if name in self._pc.sum_banks else -2
            uses = own.sum(axis, keepdim=True)
            most = torch.maximum(uses, self._under_evidence[name].sum(axis, keepdim=True) / mass)
            kept[name] = self._traced[name].exp() * most
        return kept

    def state(self) -> Any:
        """Return the moving averages; None before the first step."""
        return None if self._flows is None else {"flows": self._flows, "mass": self._mass}

    def restore(self, state: Any) -> None:
        """Go on from moving averages."""
        if state is None:
            return
        shapes = {name: weights.log.shape for name, weights in self._pc.weights().own.items()}
        flows = {name: state["flows"][name].to(self._pc.device) for name in shapes}
        if {name: flow.shape for name, flow in flows.items()} != shapes:
            raise ValueError("its flows have other shapes than the weights")
        self._flows, self._mass = flows, float(state["mass"])
