"""How a circuit's weights are moved, batch by batch: by the EM family, or down the gradient."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from circuits.engine.compile import CompiledCircuit
from circuits.errors import ArgumentError
from circuits.learning import em
from circuits.learning.distributed import Processes
from circuits.learning.samples import Batch
from circuits.queries.flows import BankFlows, ExpectedFlows, expected_flows, flow_shapes, top_down_flows

_LEAST_MASS = 1e-300


class Learner(ABC):
    """Moves the weights of one circuit, batch by batch, of which each process gets its share.

    The description tells the learner from others.
    """

    is_shuffled = True

    def __init__(
        self, pc: CompiledCircuit, processes: Processes, description: str, options: dict[str, Any] | None = None
    ) -> None:
        self.pc = pc
        self.processes = processes
        self.description = description
        self._options = options or {}

    @abstractmethod
    def update(self, batch: Batch) -> Tensor:
        """Learn from a batch; return its log-likelihoods under the weights before, (B,)."""

    def end_epoch(self) -> None:  # noqa: B027  - most learners have nothing left to do
        """Do what is left to do when all batches were seen."""

    def state(self) -> Any:
        """Return all that the next batch depends on, but the weights: nested dicts and lists of tensors and numbers."""
        return None

    def restore(self, state: Any) -> None:
        """Go on from a state."""
        if state is not None:
            raise ValueError("this optimizer keeps no state")

    def _flows(self, state: Any) -> BankFlows:
        """Return flows that a state has, where the circuit is."""
        flows = {name: state[name].to(self.pc.device) for name in self.pc.bank}
        if {name: tuple(flow.shape) for name, flow in flows.items()} != flow_shapes(self.pc):
            raise ValueError("its flows have other shapes than the weights")
        return flows


class FullBatchLearner(Learner):
    """One EM step an epoch, from the flows of all batches."""

    is_shuffled = False

    def __init__(
        self,
        pc: CompiledCircuit,
        processes: Processes,
        description: str,
        options: dict[str, Any],
        flows_of: Callable[..., ExpectedFlows] = expected_flows,
    ) -> None:
        super().__init__(pc, processes, description, options)
        self._flows_of = flows_of
        self._total: BankFlows = {}

    def update(self, batch: Batch) -> Tensor:
        """Add the batch's flows to the epoch's."""
        flows, log_likelihood = self._flows_of(self.pc, *batch)
        for name, flow in flows.items():
            self._total[name] = self._total[name].add_(flow) if name in self._total else flow
        return log_likelihood

    def end_epoch(self) -> None:
        """Do the step."""
        em.em_step(self.pc, self.processes.summed_all(self._total), **self._options)
        self._total = {}

    def state(self) -> Any:
        """Return the flows of the epoch so far."""
        return self.processes.summed_all(self._total) or None

    def restore(self, state: Any) -> None:
        """Go on within an epoch; the first process has all flows."""
        self._total = {} if state is None else self._flows(state)
        if self.processes.rank:
            self._total = {name: torch.zeros_like(flow) for name, flow in self._total.items()}


class MiniBatchLearner(Learner):
    """One EM step of size s a batch."""

    def update(self, batch: Batch) -> Tensor:
        """Do a step."""
        flows, log_likelihood = expected_flows(self.pc, *batch)
        em.em_step(self.pc, self.processes.summed_all(flows), **self._options)
        return log_likelihood


class AnemoneLearner(Learner):
    """One step of Anemone a batch."""

    _state: em.AnemoneState | None = None

    def update(self, batch: Batch) -> Tensor:
        """Do a step."""
        flows, log_likelihood = expected_flows(self.pc, *batch)
        mass = float(self.processes.summed(possible_mass(log_likelihood, batch.weights)))
        own_flows = self._own_flows(batch, log_likelihood, mass)
        flows = self.processes.summed_all(flows)
        self._state = em.anemone_step(self.pc, flows, mass, self._state, own_flows=own_flows, **self._options)
        return log_likelihood

    def _own_flows(self, batch: Batch, log_likelihood: Tensor, mass: float) -> BankFlows | None:
        """Return the top-down flows of samples that lack what the batch lacks; None if that is nothing."""
        nothing = batch.evidence.says_nothing(self.pc.num_categories)
        if not bool(self.processes.summed(nothing.any().double())) or mass <= 0:
            return None
        counts = (log_likelihood != -torch.inf).double()
        counts = counts if batch.weights is None else counts * batch.weights
        own_flows = top_down_flows(self.pc, batch.evidence, counts)
        share = float(counts.sum()) / mass
        return self.processes.summed_all({name: flow * share for name, flow in own_flows.items()})

    def state(self) -> Any:
        """Return the moving averages."""
        return None if self._state is None else {"flows": self._state.flows, "mass": self._state.mass}

    def restore(self, state: Any) -> None:
        """Go on from moving averages."""
        self._state = None if state is None else em.AnemoneState(self._flows(state["flows"]), float(state["mass"]))


class GradientLearner(Learner):
    """One step of a ``torch.optim`` optimizer a batch, down the mean negative log-likelihood.

    Where the parameters of a bank are ``held``, bool (P, S, 1), they stay as they are.
    """

    def __init__(
        self,
        pc: CompiledCircuit,
        processes: Processes,
        description: str,
        optimizer: torch.optim.Optimizer,
        held: dict[str, Tensor],
    ) -> None:
        super().__init__(pc, processes, description)
        self._optimizer = optimizer
        self._held = held
        self._start = self._weights()

    def update(self, batch: Batch) -> Tensor:
        """Do a step."""
        seen: list[Tensor] = []

        def loss_and_gradient() -> Tensor:
            self.pc.zero_grad()
            log_z = self.pc.log_partition(batch.evidence)
            seen.append(log_z.detach())
            mass = self.processes.summed(possible_mass(log_z, batch.weights))
            share = -possible_total(log_z, batch.weights) / mass.clamp_min(_LEAST_MASS)
            loss = self.processes.summed(share.detach())
            if not math.isfinite(float(loss)):
                self._give_up()
            if len(log_z):
                share.backward()
            self._sum_gradients()
            return loss

        fixed = {name: self.pc.bank[name].detach().clone() for name in self._held}
        self._optimizer.step(loss_and_gradient)  # type: ignore[arg-type]
        with torch.no_grad():  # momentum and weight decay move what has no gradient
            for name, weights in fixed.items():
                self.pc.bank[name].copy_(torch.where(self._held[name], weights, self.pc.bank[name]))
        return seen[0]

    def end_epoch(self) -> None:
        """Make sure that the weights are numbers."""
        if not all(bool((parameter < torch.inf).all()) for parameter in self.pc.bank.values()):
            self._give_up()
        self._start = self._weights()
        self.pc.zero_grad()

    def state(self) -> Any:
        """Return that of the optimizer."""
        return self._optimizer.state_dict()

    def restore(self, state: Any) -> None:
        """Go on from a state of the optimizer."""
        self._optimizer.load_state_dict(state)
        self._start = self._weights()

    def _sum_gradients(self) -> None:
        for name, parameter in self.pc.bank.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if name in self._held:
                gradient = gradient.masked_fill(self._held[name], 0.0)
            parameter.grad = self.processes.summed(gradient)

    def _weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.pc.bank.values()]

    @torch.no_grad()
    def _give_up(self) -> None:
        for parameter, weights in zip(self.pc.bank.values(), self._start, strict=True):
            parameter.copy_(weights)
        has_zeros = any(bool((weights == -torch.inf).any()) for weights in self._start)
        hint = ", and take none that scales steps by the weights, -inf for those that are zero" if has_zeros else ""
        raise ArgumentError(
            f"optimizer: expected finite losses and weights, got others with {type(self._optimizer).__name__}; lower "
            f"its learning rate{hint}. The weights are those of the last complete epoch"
        )


def possible_mass(log_likelihood: Tensor, weights: Tensor | None) -> Tensor:
    """Return how many samples are possible, or the sum of their weights: a float64 scalar."""
    is_possible = (log_likelihood != -torch.inf).double()
    return is_possible.sum() if weights is None else (is_possible * weights).sum()


def possible_total(log_likelihood: Tensor, weights: Tensor | None) -> Tensor:
    """Return the weighted sum of the log-likelihoods of the possible samples: a float64 scalar."""
    is_possible = log_likelihood != -torch.inf
    possible = log_likelihood[is_possible].double()
    return possible.sum() if weights is None else (possible * weights[is_possible]).sum()
