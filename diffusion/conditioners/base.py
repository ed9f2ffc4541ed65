"""What a head asks of a conditioner: whatever makes a circuit depend on the noise level and on the context."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

import circuits as ct
from circuits import CompiledCircuit
from circuits.reading import arguments_of, parsed_json, record_of, short
from diffusion.coupling import CoupledDistribution
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.prediction import Prediction


@dataclass(frozen=True, eq=False)
class Conditioned:
    """What conditioners make of a prediction.

    Attributes:
        prediction: what the circuit is multiplied with; its factors need not sum to 1.
        latents: log-factors on latents, by sum node or its name, (B, I) each, see
            :meth:`circuits.Evidence.with_latents`.
        weights: weights at run time, by node or its name: log-weights, (B, K, I) for sums, or a form that needs no
            table per query, such as ``circuits.weights.Gates``, see :meth:`circuits.CompiledCircuit.weights`.
    """

    prediction: Prediction
    latents: Mapping[Any, Tensor] = field(default_factory=dict)
    weights: Mapping[Any, Tensor | ct.weights.Form] = field(default_factory=dict)

    def then(self, other: Conditioned) -> Conditioned:
        """Return this followed by what another conditioner made: its prediction, and the factors of both.

        Raises:
            ArgumentError: both give weights to one node.
        """
        twice = sorted(set(self.weights) & set(other.weights))
        if twice:
            raise ArgumentError(f"conditioners: two of them give weights to {twice[0]!r}; leave one of them out")
        latents = {**self.latents, **other.latents}
        for name in set(self.latents) & set(other.latents):
            latents[name] = self.latents[name] + other.latents[name]
        return Conditioned(other.prediction, latents, {**self.weights, **other.weights})


class Conditioner(nn.Module, ABC):
    """A module from a prediction and the mask of its block to what a circuit is conditioned on.

    A subclass that heads are to be saved with is registered under a name, :func:`register`, and says what builds it
    again, :meth:`settings`.
    """

    name: ClassVar[str] = ""
    needs_features: bool = False
    """Whether it looks at the denoiser's hidden states, ``prediction.features``."""
    needs_observed: bool = True
    """Whether it looks at what is said of observed positions: if none of a head's does, training leaves that out, and
    the prediction is of the masked ones alone, see :attr:`~diffusion.prediction.Prediction.where`."""

    @abstractmethod
    def condition(
        self,
        prediction: Prediction,
        masked: Tensor,  # shape: (B, L)
    ) -> Conditioned:
        """Return the prediction, changed or not, with log-factors on latents or weights at run time.

        Args:
            prediction: of all tokens, or of listed ones.
            masked: bool, True where a token is to be predicted.
        """

    def refined(self, dist: CoupledDistribution) -> CoupledDistribution:
        """Return the distribution that all conditioners made, changed by what depends on it; by default as it is.

        Args:
            dist: of B blocks; what conditioners before this one refine is in it.
        """
        return dist

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the arguments that build a module of the same shapes, as JSON can hold them."""

    def feature_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that multiply features: the fit moves them by smaller steps; by default all or none."""
        return list(self.parameters()) if self.needs_features else []

    def check(self, pc: CompiledCircuit) -> None:
        """Raise ArgumentError unless the module fits a circuit; any does by default."""


def check_told(prediction: Prediction, conditioners: Iterable[Conditioner]) -> None:
    """Raise ArgumentError if a conditioner looks at observed positions, and the prediction is of others alone."""
    for one in conditioners:
        if one.needs_observed and prediction.where is not None:
            raise ArgumentError(
                f"prediction: expected one of all positions, at which {type(one).__name__} looks, got one of some "
                "alone; read the batch without masked_only, or set needs_observed = False if it looks at no others"
            )


C = TypeVar("C", bound=type[Conditioner])
_registry: dict[str, type[Conditioner]] = {}


def register(name: str) -> Callable[[C], C]:
    """Return a class decorator: files of heads name the class so."""

    def registered(cls: C) -> C:
        if _registry.get(name, cls) is not cls:
            raise ArgumentError(f"name: {name!r} names {_registry[name].__name__} already; choose another")
        cls.name = name
        _registry[name] = cls
        return cls

    return registered


def conditioner_class(name: str) -> type[Conditioner]:
    """Return the class that is registered under a name.

    Raises:
        ArgumentError: none is.
    """
    if name not in _registry:
        raise ArgumentError(
            f"name: expected one of {', '.join(sorted(_registry))}, got {name!r}; import the module that registers it"
        )
    return _registry[name]


def described(conditioner: Conditioner) -> dict[str, Any]:
    """Return the name and settings that build a conditioner again."""
    conditioner_class(conditioner.name)
    return {"name": conditioner.name, "settings": conditioner.settings()}


def built(text: str | None, tensors: dict[str, Tensor]) -> list[Conditioner]:
    """Build conditioners of JSON and their tensors; None: of the first format, which knew a calibration only.

    Raises:
        CheckpointError: the JSON is no list of conditioners, a setting is none of its constructor's, or has another
            type or value, or the tensors are not those of modules that are built so.
    """
    if text is not None:
        records = parsed_json(text.encode())
        if not isinstance(records, list):
            raise CheckpointError(f"conditioners: expected a list, got {short(records)}")
    elif tensors:
        num_knots, num_tokens = tensors["bias"].shape
        records = [{"name": "noise_calibration", "settings": {"num_tokens": num_tokens, "num_knots": num_knots}}]
        tensors = {f"0.{name}": tensor for name, tensor in tensors.items()}
    else:
        records = []
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        with torch.device("meta"):  # without memory, whatever sizes the settings have
            expected = {name: tuple(tensor.shape) for name, tensor in _modules(records).state_dict().items()}
    except (NotImplementedError, RuntimeError):  # a constructor that looks at the numbers
        expected = found
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"conditioners: tensor {name}: expected {expected.get(name, 'none')}, as the settings say, got "
                f"{found.get(name, 'none')}"
            )
    made = _modules(records)
    for number, module in enumerate(made):
        own = [tensor for name, tensor in tensors.items() if name.startswith(f"{number}.")]
        if any(tensor.dtype == torch.float64 for tensor in own):
            module.double()
    made.load_state_dict(tensors)
    return list(made)  # type: ignore[arg-type]


def _modules(records: list[Any]) -> nn.ModuleList:
    return nn.ModuleList(_module(record, f"conditioners[{position}]") for position, record in enumerate(records))


def _module(record: Any, name: str) -> Conditioner:
    one = record_of(_Record, record, name)
    try:
        kind = conditioner_class(one.name)
        return kind(**arguments_of(kind, one.settings, "settings"))
    except (ArgumentError, CheckpointError, TypeError) as error:
        raise CheckpointError(f"{name}: {one.name}: {error}") from error


@dataclass(frozen=True)
class _Record:
    """What a file says of a conditioner."""

    name: str
    settings: Any
