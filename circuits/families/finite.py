"""Families over the values 0 .. C - 1.

Tables are category-major, (P, C, K), because hard and sparse evidence read whole rows of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from circuits.arguments import checked_count
from circuits.errors import ArgumentError
from circuits.families.base import Distribution, Finite, ascend, log_normalized
from circuits.precision import own_matmul

_GREATEST_LOGIT = 1e4
_FIT_STEPS = 8


class _Table(Finite):
    """A family whose parameters are the table itself."""

    def parameter_shape(self, num_units: int) -> tuple[int, int]:
        """Return (C, K)."""
        return self.num_values, num_units

    def num_free_parameters(self, num_units: int, raw: Tensor | None = None) -> int:
        """Return how many weights are not 0, less one per unit."""
        num_weights = self.num_values * num_units if raw is None else int((raw > -torch.inf).sum())
        return num_weights - num_units

    def initial(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draw every unit's probabilities from the uniform Dirichlet distribution; these are their logarithms."""
        draw = torch.empty(tuple(shape), dtype=torch.float32).exponential_(generator=generator)
        return draw.clamp_min_(torch.finfo(draw.dtype).tiny).log_()

    def read(self, raw: Tensor) -> Tensor:
        """Normalise the log-table."""
        return log_normalized(raw, -2)

    def parameters(self, raw: Tensor) -> Tensor:
        """Return the probabilities."""
        return self.read(raw).exp()

    def raw(self, parameters: Tensor) -> Tensor:
        """Return the logarithms of weights >= 0."""
        return parameters.log()

    def problem(self, parameters: Tensor) -> str | None:
        """Say whether a weight is negative or a unit has none."""
        is_valid = (parameters >= 0) & (parameters < torch.inf) & (parameters.sum(-2, keepdim=True) > 0)
        return None if bool(is_valid.all()) else "expected numbers >= 0, not all 0 for a unit"

    def is_sound(self, raw: Tensor) -> bool:
        """Whether a log-softmax has no NaN."""
        greatest = raw.amax(-2)  # hands NaN on
        return bool(((greatest > -torch.inf) & (greatest < torch.inf)).all())

    def fit(self, raw: Tensor, log_target: Tensor, mass: Tensor) -> Tensor:
        """Return the targets."""
        return torch.where(mass > 0, log_target, raw)


@dataclass(frozen=True)
class Categorical(_Table):
    """A categorical distribution over the values 0 .. ``num_categories`` - 1, each with its own weight.

    Parameters: probabilities, (C, K).

    Args:
        num_categories: number of values, C >= 1.

    Raises:
        ArgumentError: if ``num_categories`` is not a positive integer.
    """

    family: ClassVar[str] = "categorical"
    num_categories: int

    def __post_init__(self) -> None:
        checked_count("num_categories", self.num_categories)


@dataclass(frozen=True)
class Bernoulli(_Table):
    """A Bernoulli distribution: the values 0 and 1, with one weight each (C = 2). Parameters: probabilities, (2, K)."""

    family: ClassVar[str] = "bernoulli"
    num_categories: ClassVar[int] = 2  # type: ignore[misc]  # no field

    @property
    def stored_as(self) -> Distribution:
        """A categorical distribution with two values."""
        return Categorical(2)


@dataclass(frozen=True)
class Binomial(Finite):
    """How many of ``num_trials`` independent trials succeed: ``p(v) = C(n, v) q^v (1 - q)^(n - v)``.

    Parameters: the probability of success q, (1, K). A learning step of size s < 1 interpolates q, the mean over n.

    Args:
        num_trials: n >= 1; the values are 0 .. n.

    Raises:
        ArgumentError: if ``num_trials`` is not a positive integer.
    """

    family: ClassVar[str] = "binomial"
    parameter_names: ClassVar[tuple[str, ...]] = ("probability",)
    num_trials: int

    def __post_init__(self) -> None:
        checked_count("num_trials", self.num_trials)

    @property
    def num_values(self) -> int:
        """C = n + 1."""
        return self.num_trials + 1

    def initial(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draw the probability of success uniformly."""
        draw = torch.empty(tuple(shape), dtype=torch.float32).uniform_(1e-3, 1 - 1e-3, generator=generator)
        return draw.logit_()

    def read(self, raw: Tensor) -> Tensor:
        """Return the log-table."""
        n = self.num_trials
        v = torch.arange(n + 1, dtype=raw.dtype, device=raw.device).reshape(-1, 1)
        log_ways = math.lgamma(n + 1) - torch.lgamma(v + 1) - torch.lgamma(n - v + 1)
        logit = raw.clamp(-_GREATEST_LOGIT, _GREATEST_LOGIT)
        log_success, log_failure = (torch.nn.functional.logsigmoid(part) for part in (logit, -logit))
        return log_ways + v * log_success + (n - v) * log_failure

    def parameters(self, raw: Tensor) -> Tensor:
        """Return the probabilities of success."""
        return torch.sigmoid(raw)

    def raw(self, parameters: Tensor) -> Tensor:
        """Return the logits."""
        return torch.logit(parameters).clamp(-_GREATEST_LOGIT, _GREATEST_LOGIT)

    def problem(self, parameters: Tensor) -> str | None:
        """Say whether a number is not a probability."""
        return None if bool(((parameters >= 0) & (parameters <= 1)).all()) else "expected probabilities from 0 to 1"

    def fit(self, raw: Tensor, log_target: Tensor, mass: Tensor) -> Tensor:
        """Match the mean."""
        target = log_target.double().exp()
        v = torch.arange(self.num_values, dtype=target.dtype, device=raw.device).reshape(-1, 1)
        mean = [(target * count).sum(-2, keepdim=True) for count in (v, self.num_trials - v)]
        logit = (mean[0].log() - mean[1].log()).clamp(-_GREATEST_LOGIT, _GREATEST_LOGIT)
        return torch.where(mass > 0, logit.to(raw.dtype), raw)


@dataclass(frozen=True)
class DiscretizedLogistic(Finite):
    """A logistic distribution rounded to 0 .. C - 1, its tails in the outermost values (Salimans et al. 2017).

        p(v) = sigmoid((v + 1/2 - m) / b) - sigmoid((v - 1/2 - m) / b),  from -inf at v = 0, to +inf at v = C - 1

    For ordered values such as the brightness of a pixel. Parameters: the mean m and the scale b > 0.01, in units of the
    values, (2, K). EM takes some natural-gradient steps on them that never lower the likelihood; one of size s < 1 fits
    the distribution to ``(1 - s) p + s p_new``.

    Args:
        num_categories: number of values, C >= 1.

    Raises:
        ArgumentError: if ``num_categories`` is not a positive integer.
    """

    family: ClassVar[str] = "discretized_logistic"
    parameter_names: ClassVar[tuple[str, ...]] = ("mean", "scale")
    num_categories: int
    _least_scale: ClassVar[float] = 0.01

    def __post_init__(self) -> None:
        checked_count("num_categories", self.num_categories)

    def num_free_parameters(self, num_units: int, raw: Tensor | None = None) -> int:
        """Return 2 K; fewer than three values have less freedom."""
        return min(2, self.num_categories - 1) * num_units

    def initial(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draw means between the values, and scales of about a tenth of their number."""
        draw = torch.empty(tuple(shape), dtype=torch.float32).uniform_(-1, 1, generator=generator)
        draw[:, 1] = 0.5 * draw[:, 1] - 1.5
        return draw

    def read(self, raw: Tensor) -> Tensor:
        """Return the log-table."""
        count = self.num_categories
        if count == 1:
            return 0.0 * raw[..., :1, :]
        mean, scale = self.parameters(raw).split(1, -2)
        edges = torch.arange(count - 1, dtype=raw.dtype, device=raw.device).reshape(-1, 1) + 0.5
        scaled = (edges - mean) / scale  # (P, C - 1, K)
        below, above = (torch.nn.functional.logsigmoid(part) for part in (scaled, -scaled))
        # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b))
        inner = below[..., 1:, :] + above[..., :-1, :] + torch.log(-torch.expm1(-1 / scale))
        return torch.cat([below[..., :1, :], inner, above[..., -1:, :]], -2)

    def parameters(self, raw: Tensor) -> Tensor:
        """Return means and scales."""
        location, log_scale = raw.split(1, -2)
        half = self.num_categories / 2
        mean = half - 0.5 + half * location
        return torch.cat([mean, self._least_scale + half * log_scale.clamp(max=50).exp()], -2)

    def raw(self, parameters: Tensor) -> Tensor:
        """Return the means in units of the range, and the logarithms of the scales."""
        mean, scale = parameters.split(1, -2)
        half = self.num_categories / 2
        log_scale = ((scale - self._least_scale).clamp_min(1e-6) / half).log()
        return torch.cat([(mean - half + 0.5) / half, log_scale], -2)

    def problem(self, parameters: Tensor) -> str | None:
        """Say whether a number is not finite or a scale not large enough."""
        is_valid = parameters.isfinite().all() & (parameters[1] > self._least_scale).all()
        return None if bool(is_valid) else f"expected finite means, and scales > {self._least_scale}"

    def fit(self, raw: Tensor, log_target: Tensor, mass: Tensor) -> Tensor:
        """Climb towards the target, unit by unit."""
        target, half = log_target.exp(), self.num_categories / 2

        def inverse_information(raw: Tensor) -> Tensor:
            scale = self.parameters(raw)[..., 1:, :]
            return torch.cat([3 * (scale / half) ** 2, torch.full_like(scale, 9 / (3 + math.pi**2))], -2)

        fitted = ascend(
            lambda raw: (target * self.read(raw)).sum(-2, keepdim=True),
            raw,
            num_steps=_FIT_STEPS,
            scale=inverse_information,
        )
        return torch.where(mass > 0, fitted, raw)


@dataclass(frozen=True)
class Literal(Finite):
    """Indicators: unit k has the value ``values[k]`` with probability 1. There are no parameters.

    Args:
        num_categories: number of values of the variable, C >= 1.
        values: one value per unit.

    Raises:
        ArgumentError: an argument has a wrong type or value.
    """

    family: ClassVar[str] = "literal"
    num_categories: int
    values: tuple[int, ...]

    def __post_init__(self) -> None:
        checked_count("num_categories", self.num_categories)
        if not isinstance(self.values, (tuple, list)) or not self.values:
            raise ArgumentError(f"values: expected a tuple with one value per unit, got {self.values!r}")
        object.__setattr__(self, "values", tuple(self.values))
        for value in self.values:
            checked_count("values", value, 0)
            if value >= self.num_categories:
                raise ArgumentError(f"values: expected values from 0 to {self.num_categories - 1}, got {value}")

    def parameter_shape(self, num_units: int) -> tuple[int, int]:
        """Return (0, K)."""
        if num_units != len(self.values):
            raise ArgumentError(f"num_units: expected {len(self.values)}, one per value, got {num_units}")
        return 0, num_units

    def initial(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Return no numbers."""
        return torch.empty(tuple(shape), dtype=torch.float32)

    def read(self, raw: Tensor) -> Tensor:
        """Return the logarithms of the indicators."""
        table = raw.new_full((len(raw), self.num_categories, len(self.values)), -torch.inf)
        index = torch.tensor(self.values, device=raw.device).expand(len(raw), 1, -1)
        return table.scatter(1, index, 0.0) + raw.sum(1, keepdim=True)  # 0, but known to autograd

    def select_units(self, raw: Tensor, units: Tensor) -> tuple[Distribution, Tensor]:
        """Return the literals of the units' values."""
        return Literal(self.num_categories, tuple(self.values[unit] for unit in units.tolist())), raw[..., units]

    def fit(self, raw: Tensor, log_target: Tensor, mass: Tensor) -> Tensor:
        """Return no numbers."""
        return raw


@dataclass(frozen=True)
class EmbeddingCategorical(Finite):
    """A categorical distribution with a low-rank table of logits: ``p(v | unit k) = softmax_v <E_v, U_k>``.

    For large vocabularies: a node has (C + K) R parameters in place of C K. Parameters: the C rows of E, then the K
    rows of U, (C + K, R). Queries read the normalised table, which is as large as that of :class:`Categorical`. EM
    takes some gradient steps that never lower the likelihood; one of size s < 1 fits ``(1 - s) p + s p_new``.

    Args:
        num_categories: number of values, C >= 1.
        rank: R >= 1.

    Raises:
        ArgumentError: an argument is not a positive integer.
    """

    family: ClassVar[str] = "embedding_categorical"
    num_categories: int
    rank: int

    def __post_init__(self) -> None:
        checked_count("num_categories", self.num_categories)
        checked_count("rank", self.rank)

    def parameter_shape(self, num_units: int) -> tuple[int, int]:
        """Return (C + K, R)."""
        return self.num_categories + num_units, self.rank

    def num_free_parameters(self, num_units: int, raw: Tensor | None = None) -> int:
        """Return the dimension of the logit tables of rank R, each unit up to a constant: R (C - 1 + K - R)."""
        rank = min(self.rank, self.num_categories - 1, num_units)
        return rank * (self.num_categories - 1 + num_units - rank)

    def initial(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draw normal numbers such that the logits have variance 1."""
        draw = torch.empty(tuple(shape), dtype=torch.float32).normal_(generator=generator)
        return draw * self.rank**-0.25

    def read(self, raw: Tensor) -> Tensor:
        """Return the log-table."""
        values, units = raw.split([self.num_categories, raw.shape[-2] - self.num_categories], -2)
        return log_normalized(own_matmul(values, units.transpose(-1, -2)), -2)

    def select_units(self, raw: Tensor, units: Tensor) -> tuple[Distribution, Tensor]:
        """Return E with the units' rows of U."""
        return self, torch.cat([raw[: self.num_categories], raw[self.num_categories + units]])

    def fit(self, raw: Tensor, log_target: Tensor, mass: Tensor) -> Tensor:
        """Climb towards the targets of all units together, weighted by how often each is used."""
        weights = log_target.exp() * mass
        weights = weights / mass.sum((-2, -1), keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        return ascend(lambda raw: (weights * self.read(raw)).sum((-2, -1), keepdim=True), raw, num_steps=_FIT_STEPS)
