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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

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
        self._net: dict[str, Tensor] = {}
        self._under_evidence: dict[str, Tensor] = {}

    def weights(self) -> CircuitWeights:
        """Return the circuit's weights, for one batch, as new leaves of automatic differentiation."""
        with torch.no_grad():
            traced = self._pc.weights().detached(requires_grad=True)
        self._traced = {name: own.log for name, own in traced.own.items()}
        return traced

    def differentiate(
        self, log_joint: Tensor, log_partition: Tensor, others: Sequence[nn.Parameter], num_losses: float
    ) -> None:
        """Note the flows of a batch, and give the conditioners' parameters the gradients of its mean loss.

        The loss is the difference of two sums, and the step asks for both: each is differentiated once.

        Args:
            log_joint: the sum of the blocks' ``log p(x) prod_i e_i(x_i)``, each times the block's share.
            log_partition: the sum of the blocks' ``log Z``, likewise.
            others: parameters that are not the circuit's.
            num_losses: how many blocks of all processes the loss is the mean of.

        Raises:
            ArgumentError: the batch did not use the weights, for the head makes others of them at run time.
        """
        sources = [*self._traced.values(), *others]
        plus = torch.autograd.grad(log_joint, sources, retain_graph=True, allow_unused=True)
        minus = torch.autograd.grad(log_partition, sources, allow_unused=True)
        if any(flow is None for name, flow in zip(self._traced, minus, strict=False) if name in self._pc.sum_banks):
            raise ArgumentError(
                "optimizer: expected adam for a head whose transitions depend on the context, got anemone; their "
                "weights have no flows of their own"
            )
        found = [
            [torch.zeros_like(one) if f is None else f for one, f in zip(sources, p, strict=True)]
            for p in (plus, minus)
        ]
        difference = [one - other for one, other in zip(*found, strict=True)]
        self._net = self._processes.summed_all(dict(zip(self._traced, difference, strict=False)))
        under_evidence = {name: flow.clamp_min(0) for name, flow in zip(self._traced, found[1], strict=False)}
        self._under_evidence = self._processes.summed_all(under_evidence)
        for parameter, flow in zip(others, difference[len(self._traced) :], strict=True):
            parameter.grad = -flow / num_losses

    @torch.no_grad()
    def step(self, mass: float, *, step_size: float) -> None:
        """Do the step of a batch that was differentiated.

        Args:
            mass: N, the sum of the blocks' shares in all processes; a batch of mass 0 moves nothing.
            step_size: s, 0 < s <= 1.
        """
        if mass <= 0:
            return
        net = self._net
        if self._flows is None:
            self._flows = {name: torch.zeros_like(flow) for name, flow in net.items()}
        self._flows = {name: torch.lerp(old, net[name], 1 - self._momentum) for name, old in self._flows.items()}
        self._mass = self._momentum * self._mass + (1 - self._momentum) * mass
        kept = self._kept(mass)
        flows = {name: (old + self._flows[name] / self._mass).clamp_min(0) for name, old in kept.items()}
        ct.learning.anemone_step(self._pc, flows, 1.0, step_size=step_size, momentum=0.0, own_flows=kept)
        self._traced, self._net = {}, {}

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
