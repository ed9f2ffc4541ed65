"""The ways to move a circuit's weights, as objects: the EM family, and any ``torch.optim`` optimizer."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch

from circuits.arguments import checked_count
from circuits.engine.compile import CompiledCircuit
from circuits.errors import ArgumentError
from circuits.learning import learners
from circuits.learning.distributed import Processes, checked_processes
from circuits.learning.em import check_em_options
from circuits.learning.frozen import Frozen, frozen_parameters
from circuits.queries.flows import expected_flows, viterbi_flows

EMName = Literal["em", "minibatch_em", "anemone", "viterbi_em"]
OptimizerFactory: TypeAlias = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class Optimizer(ABC):
    """What all optimizers of circuits take.

    Args:
        frozen: nodes or names whose parameters stay as they are; a dict says which of them, for instance
            ``{"emission0": "mean"}`` of Gaussians: then their standard deviations are learnt around these means.
        seed: an integer >= 0, for the order of the samples, where it matters.
        process_group: the processes that learn together, see :func:`~circuits.learning.join_processes`: each calls
            :func:`~circuits.learning.fit` with the same arguments, computes its share of every batch, and ends with the
            same circuit, that of one process but for rounding. The first one's initial weights count, and it alone
            touches the checkpoint.
    """

    frozen: Frozen | None = None
    seed: int = 0
    process_group: torch.distributed.ProcessGroup | None = None

    def __post_init__(self) -> None:
        checked_count("seed", self.seed, 0)

    @property
    def processes(self) -> Processes:
        """Those of the group; ArgumentError unless it is one."""
        return checked_processes(self.process_group)

    @abstractmethod
    def learner(self, pc: CompiledCircuit) -> learners.Learner:
        """Return what moves the weights of a circuit."""


@dataclass(frozen=True, kw_only=True)
class _ByFlows(Optimizer):
    """The EM family: steps by expected flows. It moves all weights, also of parameters that require no gradient."""

    name: ClassVar[EMName]
    makes: ClassVar[Callable[..., learners.Learner]] = learners.FullBatchLearner
    step_size: float = 1.0
    pseudocount: float = 0.01
    entropy: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_em_options(**self._numbers())

    def _numbers(self) -> dict[str, float]:
        shared = {f.name for f in fields(Optimizer)} | {"checkpointed"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in shared}

    def learner(self, pc: CompiledCircuit) -> learners.Learner:
        """Return what moves the weights of a circuit."""
        return type(self).makes(*self._parts(pc))

    def _parts(self, pc: CompiledCircuit) -> tuple[CompiledCircuit, Processes, str, dict[str, Any]]:
        held = {} if self.frozen is None else frozen_parameters(pc, self.frozen, by_em=True)
        description = f"{self.name} {sorted(self._numbers().items())}{_described(held)}"
        return pc, self.processes, description, self._numbers() | {"frozen": self.frozen}


@dataclass(frozen=True, kw_only=True)
class EM(_ByFlows):
    """Full-batch EM: one step an epoch, from the flows of all data (Dempster, Laird, Rubin 1977).

    Args:
        step_size: s, 0 < s <= 1, see :func:`~circuits.learning.em_step`.
        pseudocount: a >= 0, in samples; greater than 0, it keeps values that were never seen possible.
        entropy: tau >= 0, spreads the weights out.
        checkpointed: whether memory for the square root of a chain's length is enough, see
            :func:`~circuits.learning.expected_flows`.
        frozen: see :class:`Optimizer`, like ``seed``, which does not matter, and ``process_group``.
    """

    name: ClassVar[EMName] = "em"
    checkpointed: bool = False

    def learner(self, pc: CompiledCircuit) -> learners.Learner:
        """Return what moves the weights of a circuit."""
        flows_of = functools.partial(expected_flows, checkpointed=self.checkpointed)
        return learners.FullBatchLearner(*self._parts(pc), flows_of=flows_of)


@dataclass(frozen=True, kw_only=True)
class ViterbiEM(_ByFlows):
    """Hard EM: one step an epoch, from the most probable explanations; :func:`~circuits.learning.viterbi_flows`.

    Options are those of :class:`EM`.
    """

    name: ClassVar[EMName] = "viterbi_em"
    makes = functools.partial(learners.FullBatchLearner, flows_of=viterbi_flows)


@dataclass(frozen=True, kw_only=True)
class MiniBatchEM(_ByFlows):
    """A step of EM a batch, of size s.

    Args:
        step_size: s, 0 < s <= 1.
        pseudocount: a >= 0, in samples of a batch.
        entropy: tau >= 0, spreads the weights out.
        frozen: see :class:`Optimizer`, like ``seed`` and ``process_group``.
    """

    name: ClassVar[EMName] = "minibatch_em"
    step_size: float = 0.1
    makes = learners.MiniBatchLearner


@dataclass(frozen=True, kw_only=True)
class Anemone(_ByFlows):
    """Mini-batch EM with momentum and flow-rescaled steps (Liu et al. 2025), :func:`~circuits.learning.anemone_step`.

    Args:
        step_size: s, 0 < s <= 1.
        momentum: mu, 0 <= mu < 1.
        pseudocount: a >= 0, relative to a batch.
        entropy: tau >= 0, spreads the weights out.
        frozen: see :class:`Optimizer`, like ``seed`` and ``process_group``.
    """

    name: ClassVar[EMName] = "anemone"
    step_size: float = 0.4
    momentum: float = 0.9
    pseudocount: float = 1e-6
    makes = learners.AnemoneLearner


@dataclass(frozen=True, kw_only=True)
class GradientDescent(Optimizer):
    """A step of a ``torch.optim`` optimizer a batch, down the mean negative log-likelihood.

    Args:
        build: an optimizer over ``pc.parameters()``, or a function from parameters to one, such as ``torch.optim.Adam``
            or ``lambda p: torch.optim.Adam(p, lr=0.1)``.
        frozen: see :class:`Optimizer`, like ``seed`` and ``process_group``.
    """

    build: torch.optim.Optimizer | OptimizerFactory

    def learner(self, pc: CompiledCircuit) -> learners.Learner:
        """Return what moves the weights of a circuit."""
        held = frozen_parameters(pc, self.frozen)
        built = self._built(pc)
        names = {id(p): f"{name}{'' if p.requires_grad else ' (fixed)'}" for name, p in pc.named_parameters()}
        groups = [group | {"params": [names[id(p)] for p in group["params"]]} for group in built.param_groups]
        description = f"{type(built).__name__} {groups}{_described(held)}"
        return learners.GradientLearner(pc, self.processes, description, built, held)

    def _built(self, pc: CompiledCircuit) -> torch.optim.Optimizer:
        built = self.build
        if not isinstance(built, torch.optim.Optimizer):
            built = built(pc.parameters()) if callable(built) else built
        if not isinstance(built, torch.optim.Optimizer):
            raise ArgumentError(
                f"optimizer: expected {', '.join(map(repr, get_args(EMName)))}, an object such as ct.learning.EM(), a "
                f"torch.optim.Optimizer, or a function from parameters to one, got {self.build!r:.80}"
            )
        moved = {id(parameter) for group in built.param_groups for parameter in group["params"]}
        if not moved or not moved <= {id(parameter) for parameter in pc.parameters()}:
            raise ArgumentError(
                f"optimizer: expected one over parameters of pc alone, got {type(built).__name__} over other tensors; "
                "build it with pc.parameters()"
            )
        if not any(parameter.requires_grad for group in built.param_groups for parameter in group["params"]):
            raise ArgumentError(
                f"optimizer: none of the parameters of {type(built).__name__} takes a gradient; call "
                "pc.requires_grad_()"
            )
        return built


def _described(held: dict[str, torch.Tensor]) -> str:
    return "" if not held else f" frozen {[(name, mask.nonzero().tolist()) for name, mask in held.items()]}"


_BY_NAME: dict[str, type[_ByFlows]] = {kind.name: kind for kind in (EM, MiniBatchEM, Anemone, ViterbiEM)}
OptimizerLike: TypeAlias = "EMName | Optimizer | torch.optim.Optimizer | OptimizerFactory"


def optimizer_of(given: OptimizerLike, options: dict[str, Any]) -> Optimizer:
    """Return an optimizer: given as such, by name, or as one of torch; with other options where they are given.

    Raises ArgumentError for what is no optimizer, and for an option that it does not have.
    """
    if isinstance(given, str):
        if given not in _BY_NAME:
            raise ArgumentError(f"optimizer: expected {', '.join(_BY_NAME)}, or one of torch.optim, got {given!r}")
        optimizer: Optimizer = _BY_NAME[given]()
    elif isinstance(given, type) and issubclass(given, Optimizer):
        raise ArgumentError(f"optimizer: expected an object, got the class {given.__name__}; call it first")
    else:
        optimizer = given if isinstance(given, Optimizer) else GradientDescent(build=given)  # type: ignore[arg-type]
    name = given if isinstance(given, str) else type(optimizer).__name__
    known = {f.name for f in fields(optimizer)} - {"build"}
    for option in sorted(options.keys() - known):
        raise ArgumentError(f"{option}: {name} has no such option; leave it out")
    return replace(optimizer, **options) if options else optimizer
