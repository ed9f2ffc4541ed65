"""The ways to move a circuit's weights that the fit loop knows: the EM family, and any ``torch.optim`` optimizer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from circuits.engine.compile import CompiledCircuit
from circuits.errors import ArgumentError
from circuits.learning import em
from circuits.learning.distributed import Processes
from circuits.learning.em_options import check_em_options
from circuits.learning.hard import viterbi_flows
from circuits.learning.samples import Batch

EMName = Literal["em", "minibatch_em", "anemone", "viterbi_em"]
OptimizerFactory = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]

_DEFAULTS: dict[str, dict[str, float]] = {
    "em": {"step_size": 1.0, "pseudocount": 0.01, "entropy": 0.0},
    "minibatch_em": {"step_size": 0.1, "pseudocount": 0.01, "entropy": 0.0},
    "anemone": {"step_size": 0.4, "momentum": 0.9, "pseudocount": 1e-6, "entropy": 0.0},
    "viterbi_em": {"step_size": 1.0, "pseudocount": 0.01, "entropy": 0.0},
}

_LEAST_MASS = 1e-300


class Learner(ABC):
    """Moves the weights of one circuit, batch by batch."""

    is_shuffled = True
    processes = Processes()
    """Those that learn together; the batches of each are its shares."""

    def __init__(self, pc: CompiledCircuit) -> None:
        self.pc = pc

    @abstractmethod
    def update(self, batch: Batch) -> Tensor:
        """Learn from a batch; return its log-likelihoods under the weights before, (B,)."""

    def end_epoch(self) -> None:  # noqa: B027  - most learners have nothing left to do
        """Do what is left to do when all batches were seen."""

    def state(self) -> Any:
        """Return all that the next epoch depends on, but the weights: nested dicts and lists of tensors and numbers."""
        return None

    def restore(self, state: Any) -> None:
        """Go on from a state."""
        if state is not None:
            raise ValueError("this optimizer keeps no state")


class FullBatchEM(Learner):
    """One EM step an epoch, from the flows of all batches."""

    is_shuffled = False
    flows_of: Callable[..., em.ExpectedFlows] = staticmethod(em.expected_flows)

    def __init__(self, pc: CompiledCircuit, **options: float) -> None:
        super().__init__(pc)
        self._options = options
        self._flows: em.BankFlows = {}

    def update(self, batch: Batch) -> Tensor:
        flows, log_likelihood = self.flows_of(self.pc, *batch)
        for name, flow in flows.items():
            self._flows[name] = self._flows[name].add_(flow) if name in self._flows else flow
        return log_likelihood

    def end_epoch(self) -> None:
        em.em_step(self.pc, self.processes.summed_all(self._flows), **self._options)
        self._flows = {}


class ViterbiEM(FullBatchEM):
    """One step of hard EM an epoch."""

    flows_of = staticmethod(viterbi_flows)


class MinibatchEM(Learner):
    """One EM step of size s a batch."""

    def __init__(self, pc: CompiledCircuit, **options: float) -> None:
        super().__init__(pc)
        self._options = options

    def update(self, batch: Batch) -> Tensor:
        flows, log_likelihood = em.expected_flows(self.pc, *batch)
        em.em_step(self.pc, self.processes.summed_all(flows), **self._options)
        return log_likelihood


class Anemone(Learner):
    """One step of Anemone a batch."""

    def __init__(self, pc: CompiledCircuit, **options: float) -> None:
        super().__init__(pc)
        self._options = options
        self._state: em.AnemoneState | None = None

    def update(self, batch: Batch) -> Tensor:
        flows, log_likelihood = em.expected_flows(self.pc, *batch)
        mass = float(self.processes.summed(possible_mass(log_likelihood, batch.weights)))
        own_flows = self._own_flows(batch, log_likelihood, mass)
        flows = self.processes.summed_all(flows)
        self._state = em.anemone_step(self.pc, flows, mass, self._state, own_flows=own_flows, **self._options)
        return log_likelihood

    def _own_flows(self, batch: Batch, log_likelihood: Tensor, mass: float) -> em.BankFlows | None:
        """Return the top-down flows of samples that lack what the batch lacks; None if that is nothing."""
        nothing = batch.evidence.says_nothing(self.pc.num_categories)
        if not bool(self.processes.summed(nothing.any().double())) or mass <= 0:
            return None
        counts = (log_likelihood != -torch.inf).double()
        counts = counts if batch.weights is None else counts * batch.weights
        own_flows = em.top_down_flows(self.pc, batch.evidence, counts)
        share = float(counts.sum()) / mass
        return self.processes.summed_all({name: flow * share for name, flow in own_flows.items()})

    def state(self) -> Any:
        return None if self._state is None else {"flows": self._state.flows, "mass": self._state.mass}

    def restore(self, state: Any) -> None:
        if state is None:
            self._state = None
            return
        flows = {name: state["flows"][name].to(self.pc.device) for name in self.pc.bank}
        if {name: tuple(flow.shape) for name, flow in flows.items()} != em.flow_shapes(self.pc):
            raise ValueError("the momentum has other shapes than the weights")
        self._state = em.AnemoneState(flows, float(state["mass"]))


class GradientLearner(Learner):
    """One step of a ``torch.optim`` optimizer a batch, down the mean negative log-likelihood."""

    def __init__(self, pc: CompiledCircuit, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(pc)
        self._optimizer = optimizer
        self._start = self._weights()

    def update(self, batch: Batch) -> Tensor:
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

        self._optimizer.step(loss_and_gradient)  # type: ignore[arg-type]
        return seen[0]

    def end_epoch(self) -> None:
        if not all(bool((parameter < torch.inf).all()) for parameter in self.pc.bank.values()):
            self._give_up()
        self._start = self._weights()
        self.pc.zero_grad()

    def state(self) -> Any:
        return self._optimizer.state_dict()

    def restore(self, state: Any) -> None:
        self._optimizer.load_state_dict(state)

    def _sum_gradients(self) -> None:
        for parameter in self.pc.bank.values():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
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


def build_learner(
    pc: CompiledCircuit, optimizer: EMName | torch.optim.Optimizer | OptimizerFactory, options: dict[str, float | None]
) -> tuple[Learner, str]:
    """Return the learner and a text that tells it from others; options that are None take their defaults."""
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(optimizer, str):
        if optimizer not in _DEFAULTS:
            raise ArgumentError(f"optimizer: expected {', '.join(_DEFAULTS)}, or one of torch.optim, got {optimizer!r}")
        _refuse(given.keys() - _DEFAULTS[optimizer].keys(), optimizer)
        chosen = _DEFAULTS[optimizer] | given
        check_em_options(**chosen)
        kinds: dict[str, Callable[..., Learner]] = {
            "em": FullBatchEM,
            "minibatch_em": MinibatchEM,
            "anemone": Anemone,
            "viterbi_em": ViterbiEM,
        }
        return kinds[optimizer](pc, **chosen), f"{optimizer} {sorted(chosen.items())}"
    built = optimizer if isinstance(optimizer, torch.optim.Optimizer) else _built_optimizer(pc, optimizer)
    _refuse(given.keys(), type(built).__name__)
    moved = {id(parameter) for group in built.param_groups for parameter in group["params"]}
    if not moved or not moved <= {id(parameter) for parameter in pc.parameters()}:
        raise ArgumentError(
            f"optimizer: expected one over parameters of pc alone, got {type(built).__name__} over other tensors; "
            "build it with pc.parameters()"
        )
    if not any(parameter.requires_grad for group in built.param_groups for parameter in group["params"]):
        raise ArgumentError(
            f"optimizer: none of the parameters of {type(built).__name__} takes a gradient; call pc.requires_grad_()"
        )
    names = {id(p): f"{name}{'' if p.requires_grad else ' (fixed)'}" for name, p in pc.named_parameters()}
    groups = [group | {"params": [names[id(p)] for p in group["params"]]} for group in built.param_groups]
    return GradientLearner(pc, built), f"{type(built).__name__} {groups}"


def _built_optimizer(pc: CompiledCircuit, factory: OptimizerFactory) -> torch.optim.Optimizer:
    built = factory(pc.parameters()) if callable(factory) else None
    if not isinstance(built, torch.optim.Optimizer):
        raise ArgumentError(
            "optimizer: expected 'em', 'minibatch_em', 'anemone', a torch.optim.Optimizer, or a function from "
            f"parameters to one, got {factory!r}"
        )
    return built


def _refuse(options: Iterable[str], optimizer: str) -> None:
    for name in sorted(options):
        raise ArgumentError(f"{name}: {optimizer} has no such option; leave it out")
