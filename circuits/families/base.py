"""What every input family must say about itself, in two kinds: finite ones, and those evaluated directly.

Shapes: P parameter rows of one bank, S numbers per unit, K units, C values, T sufficient statistics. The *raw*
parameters of a family are unconstrained, so that any optimizer can move them; its *parameters* are what a textbook
calls them, such as probabilities, rates, means and standard deviations.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from circuits.errors import ArgumentError

FAMILIES: dict[str, type[Distribution]] = {}
"""Every family by the name that saved circuits call it."""

_FEW_TERMS = 256
"""So many float32 numbers can be added one by one with an error below 1e-6."""


class Distribution(ABC):
    """A family of univariate distributions: a frozen dataclass whose fields are integers, floats or tuples of integers.

    The class attribute ``family`` is its name in saved circuits.
    """

    family: ClassVar[str]
    parameter_names: ClassVar[tuple[str, ...]] = ()
    """Of the S parameters of a unit, where each has a name."""
    is_discrete: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "family" in cls.__dict__:
            FAMILIES[cls.family] = cls

    @property
    @abstractmethod
    def num_values(self) -> int:
        """C where the values are 0 .. C - 1; 0 where there are infinitely many."""

    @property
    @abstractmethod
    def domain(self) -> str:
        """Which values are possible, in words."""

    @property
    @abstractmethod
    def num_statistics(self) -> int:
        """T, how many sufficient statistics expectation-maximisation gathers."""

    @property
    def stored_as(self) -> Distribution:
        """The family whose banks hold this one's parameters; itself by default."""
        return self

    def parameter_shape(self, num_units: int) -> tuple[int, int]:
        """Return the shape of the parameters of K units, mostly (S, K)."""
        return len(self.parameter_names), num_units

    def num_free_parameters(self, num_units: int, raw: Tensor | None = None) -> int:
        """Return how many numbers the distributions of K units depend on: all parameters by default.

        Args:
            num_units: K.
            raw: parameters of one node; in a table, weights of 0 are no free numbers.
        """
        return math.prod(self.parameter_shape(num_units))

    @abstractmethod
    def initial(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draw raw parameters for P nodes, (P, *parameter_shape), in float32 on the CPU."""

    @abstractmethod
    def read(self, raw: Tensor) -> Tensor:
        """Return what queries read: the log-table (P, C, K) of a finite family, else numbers (P, S, K)."""

    def parameters(self, raw: Tensor) -> Tensor:
        """Return the parameters, in the shape of the raw ones: the same numbers by default."""
        return raw

    def raw(self, parameters: Tensor) -> Tensor:
        """Return the raw parameters that stand for given ones: the inverse of :meth:`parameters`."""
        return parameters

    def select_units(self, raw: Tensor, units: Tensor) -> tuple[Distribution, Tensor]:
        """Return the family and the raw parameters (..., of K' units) of some units of a node, which may repeat.

        Args:
            raw: of one node, in the :meth:`parameter_shape` of K units.
            units: int64 (K',).
        """
        return self, raw[..., units]

    def problem(self, parameters: Tensor) -> str | None:
        """Say what is wrong with the parameters of one node; None: nothing."""
        return None if bool(parameters.isfinite().all()) else "expected finite numbers"

    def is_sound(self, raw: Tensor) -> bool:
        """Whether raw parameters give a distribution to every unit."""
        return bool(raw.isfinite().all())

    @abstractmethod
    def outside(self, x: Tensor) -> Tensor:
        """Return where ``x``, of any dtype and shape, is not a possible value: bool."""


class Finite(Distribution):
    """A family over 0 .. C - 1 that turns its parameters into a normalised log-table, (P, C, K).

    Its flows, the expected number of times that every unit has every value, are all that learning needs.
    """

    num_categories: int

    @property
    def num_values(self) -> int:
        """C, the number of values: ``num_categories`` by default."""
        return self.num_categories

    @property
    def domain(self) -> str:
        """Which values are possible, in words."""
        return f"values from 0 to {self.num_values - 1}"

    @property
    def num_statistics(self) -> int:
        """C: one indicator per value."""
        return self.num_values

    def outside(self, x: Tensor) -> Tensor:
        """Return where ``x`` is not a whole number from 0 to C - 1."""
        limit = torch.tensor([self.num_values], device=x.device)  # a plain number may not fit into a small dtype
        outside = (x < 0) | (x >= limit)
        return outside | (x != x.round()) if x.is_floating_point() else outside

    @abstractmethod
    def fit(self, raw: Tensor, log_target: Tensor, mass: Tensor) -> Tensor:
        """Return raw parameters that fit given distributions at least as well as ``raw`` does.

        The fit is ``sum_v target_v log p(v)``, for every unit that has a mass, or of all units weighted by it.

        Args:
            raw: where to start, (P, *parameter_shape).
            log_target: logarithms of a distribution per unit, (P, C, K).
            mass: how often every unit is used, (P, 1, K); a unit of mass 0 stays as it is.
        """


class Direct(Distribution):
    """An exponential family that is evaluated at given values: ``log p(x) = <eta, T(x)> - A(eta) + log h(x)``.

    The first statistic is the constant 1, the second the value x: moments are derivatives with respect to its
    coefficient. All methods on single units are elementwise: ``parameters`` are S tensors, as :meth:`read` returns
    them, that broadcast with the values.
    """

    @property
    def num_values(self) -> int:
        """0: infinitely many."""
        return 0

    @property
    def num_statistics(self) -> int:
        """S + 1: the constant 1, x, and, with two of them, x^2."""
        return len(self.parameter_names) + 1

    def linear(self, read: Tensor) -> Tensor:
        """Return the logarithm of a factor on every unit, (P, 1, K): 0, but for the gradients that EM is made of."""
        return torch.zeros_like(read[:, :1], requires_grad=False)

    @abstractmethod
    def log_density(self, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        """Return log p(x)."""

    @abstractmethod
    def log_interval(self, parameters: Sequence[Tensor], lower: Tensor, upper: Tensor) -> Tensor:
        """Return ``log P(lower < X <= upper)``; the bounds may be infinite; -inf where nothing lies between them."""

    @abstractmethod
    def mode(self, parameters: Sequence[Tensor], lower: Tensor, upper: Tensor) -> Tensor:
        """Return the most probable value between bounds that may be infinite."""

    @abstractmethod
    def draw(
        self, parameters: Sequence[Tensor], lower: Tensor, upper: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Draw values of ``lower < X <= upper``; the bounds may be infinite."""

    def times_normal(
        self, parameters: Sequence[Tensor], mean: Tensor, std: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Write ``p(x) N(x; mean, std^2)`` as a unit of the family times a constant: its parameters, log of it."""
        raise ArgumentError(
            f"evidence: {self} times a normal density has no closed form; use hard or interval evidence on its variable"
        )

    @abstractmethod
    def tilt(self, read: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``p(x) exp(<coefficients, T(x)>)`` as a unit of the family times a constant.

        The gradient of log Z with respect to the coefficients, at 0, is the expected statistics, whatever the evidence.

        Args:
            read: see :meth:`read`, (P, S, K).
            coefficients: (P, T, K).

        Returns:
            The parameters like ``read``, and the logarithm of the constant, (P, 1, K).
        """

    @abstractmethod
    def mean_statistics(self, read: Tensor) -> Tensor:
        """Return E[T(X)] of every unit, (P, T, K)."""

    @abstractmethod
    def prior_statistics(self, flows: Tensor) -> Tensor:
        """Return the statistics of the pseudo-observation that EM adds to flows (P, T, K)."""

    def hold(self, statistics: Tensor, read: Tensor, held: Tensor) -> Tensor:
        """Return the mean statistics whose fit keeps some parameters, and is the likeliest in the others.

        Args:
            statistics: mean statistics that the free parameters are to fit, (P, T, K).
            read: the present parameters, as :meth:`read` returns them, (P, S, K).
            held: where parameters stay, bool (P, S, 1).
        """
        return torch.where(held.all(1, keepdim=True), self.mean_statistics(read), statistics)

    @abstractmethod
    def fit(self, statistics: Tensor) -> Tensor:
        """Return the raw parameters of the units with given mean statistics, (P, T, K): maximum likelihood."""


def ascend(
    objective: Callable[[Tensor], Tensor],
    raw: Tensor,
    *,
    num_steps: int,
    scale: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Climb every entry of ``objective`` by scaled gradient steps that are taken only where they do not go down.

    Args:
        objective: from raw parameters to values that broadcast with them; each depends on its own parameters alone.
        raw: where to start.
        num_steps: how many steps are tried; a step that fails is made smaller, one that succeeds larger.
        scale: from raw parameters to factors on the gradient, such as the inverse Fisher information.
    """

    def evaluated(at: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            at = at.clone().requires_grad_()
            value = objective(at)
            (gradient,) = torch.autograd.grad(value.sum(), at)
        return value.detach(), gradient if scale is None else gradient * scale(at.detach())

    best = raw.detach().clone()
    value, direction = evaluated(best)
    step = torch.ones_like(value)
    for _ in range(num_steps):
        candidate = best + step * direction
        new_value, new_direction = evaluated(candidate)
        is_better = new_value >= value  # False for NaN
        best, direction = torch.where(is_better, candidate, best), torch.where(is_better, new_direction, direction)
        value = torch.where(is_better, new_value, value)
        step = step * torch.where(is_better, 1.5, 0.3)
    return best


def log_normalized(log_weights: Tensor, dim: int) -> Tensor:
    """Return log-weights minus their log-sum-exp along ``dim``: their exponentials sum to 1.

    ``torch.log_softmax`` adds naively along a dimension that is not the innermost one in memory, on the CPU: with
    50,000 float32 weights the sum is off by 3e-4. ``logsumexp`` adds pairwise, and takes twice as long.
    """
    if log_weights.shape[dim] <= _FEW_TERMS:
        return torch.log_softmax(log_weights, dim)
    return log_weights - torch.logsumexp(log_weights, dim, keepdim=True)
