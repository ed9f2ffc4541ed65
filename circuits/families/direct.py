"""Families with infinitely many values, evaluated where they are asked: counts and real numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from circuits.errors import ArgumentError
from circuits.families.base import Direct

_LEAST_LOG_RATE = -1e4
_FARTHEST = 1e8
_NARROW = 1e-6
_VISIBLE_TAIL = -37.0  # standard deviations beyond which float64 has no probability for the normal tail
_TAIL_TERMS = 100
_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Poisson(Direct):
    """A Poisson distribution over 0, 1, 2, ...: ``p(v) = r^v e^-r / v!``.

    Parameters: the rate r > 0, (1, K). The pseudo-observation of EM has the value 1; a learning step of size s < 1
    interpolates the rate. Soft evidence are log-factors on 0 .. C - 1; larger values are ruled out.
    """

    family: ClassVar[str] = "poisson"
    parameter_names: ClassVar[tuple[str, ...]] = ("rate",)

    @property
    def domain(self) -> str:
        """Which values are possible, in words."""
        return "whole numbers >= 0"

    def initial(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draw the logarithms of rates between 1/2 and 8."""
        return torch.empty(tuple(shape), dtype=torch.float32).uniform_(-0.7, 2.1, generator=generator)

    def read(self, raw: Tensor) -> Tensor:
        """Return the log-rates."""
        return raw.clamp_min(_LEAST_LOG_RATE)

    def parameters(self, raw: Tensor) -> Tensor:
        """Return the rates."""
        return raw.exp()

    def raw(self, parameters: Tensor) -> Tensor:
        """Return the log-rates."""
        return parameters.log().clamp_min(_LEAST_LOG_RATE)

    def problem(self, parameters: Tensor) -> str | None:
        """Say whether a number is no rate."""
        return None if bool(((parameters > 0) & (parameters < torch.inf)).all()) else "expected finite rates > 0"

    def outside(self, x: Tensor) -> Tensor:
        """Return where ``x`` is not a whole number >= 0."""
        if not x.is_floating_point():
            return x < 0
        return ~((x >= 0) & (x < torch.inf) & (x == x.round()))

    def log_density(self, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        """Return log p(x)."""
        (log_rate,) = parameters
        return x * log_rate - log_rate.exp() - torch.lgamma(x + 1)

    def log_interval(self, parameters: Sequence[Tensor], lower: Tensor, upper: Tensor) -> Tensor:
        """Return ``log P(lower < X <= upper)`` from incomplete gamma functions.

        The difference is taken of the smaller tails; where even it all but underflows in float64, its greatest terms
        are added up.
        """
        (log_rate,) = parameters
        rate = log_rate.double().exp()
        first, last = _whole(lower, upper)  # F(v) = Q(v + 1, r), and F(v) = 0 below 0, 1 at infinity
        is_upper_tail = first > rate
        shape = torch.broadcast_shapes(rate.shape, first.shape)
        rate, first, last = (part.expand(shape) for part in (rate, first, last))
        has_top, has_bottom = last < torch.inf, first > 0
        top, bottom = torch.where(has_top, last + 1, 1.0), torch.where(has_bottom, first, 1.0)
        below = torch.where(has_top, torch.special.gammaincc(top, rate), 1.0)
        below = below - torch.where(has_bottom, torch.special.gammaincc(bottom, rate), 0.0)
        above = torch.where(has_bottom, torch.special.gammainc(bottom, rate), 1.0)
        above = above - torch.where(has_top, torch.special.gammainc(top, rate), 0.0)
        total = torch.where(is_upper_tail, above, below)
        is_visible = total > 1e-140  # its square, in second derivatives, must not underflow
        log_total = torch.where(is_visible, total, 1.0).log()
        # the maximum itself has no gradient with respect to where it lies
        peak = self.log_density((log_rate.double(),), self.mode((log_rate.detach().double(),), lower, upper))
        if not torch.compiler.is_compiling() and not bool((is_visible | (first > last)).all()):
            peak = peak + _log_tail_terms(rate, first, last, is_upper_tail.expand(shape), is_visible)
        out = torch.where(is_visible, log_total, peak)
        return torch.where(first <= last, out, -torch.inf).to(log_rate.dtype)

    def mode(self, parameters: Sequence[Tensor], lower: Tensor, upper: Tensor) -> Tensor:
        """Return the greatest whole number up to the rate, moved between the bounds."""
        (log_rate,) = parameters
        first, last = _whole(lower, upper)
        return log_rate.exp().floor().clamp_min(first).clamp_max(last.clamp_min(first)).to(log_rate.dtype)

    def draw(
        self, parameters: Sequence[Tensor], lower: Tensor, upper: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Draw by bisection of the cumulative probabilities where there are bounds."""
        (log_rate,) = parameters
        rate = log_rate.double().exp()
        free = torch.poisson(rate, generator=generator)
        first, last = _whole(lower, upper)
        if not bool(((first > 0) | (last < torch.inf)).any()):
            return free.to(log_rate.dtype)
        below = torch.where(first > 0, torch.special.gammaincc(first.clamp_min(1.0), rate), 0.0)
        up_to = torch.where(last < torch.inf, torch.special.gammaincc(last.clamp(0, 1e300) + 1, rate), 1.0)
        share = torch.rand(rate.shape, dtype=rate.dtype, device=rate.device, generator=generator)
        wanted = below + share * (up_to - below)
        low = first.expand_as(rate).clone()
        high = torch.minimum(last.expand_as(rate), torch.maximum(low, rate) + 40 * rate.sqrt() + 200).ceil()
        for _ in range(int(math.log2(float((high - low).max().clamp_min(1)))) + 2 if len(rate) else 0):
            middle = ((low + high) / 2).floor()
            is_enough = torch.special.gammaincc(middle + 1, rate) >= wanted
            low, high = torch.where(is_enough, low, middle + 1), torch.where(is_enough, middle, high)
        return torch.minimum(low, torch.maximum(last, first)).to(log_rate.dtype)

    def tilt(self, read: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Shift the log-rate."""
        constant, linear = coefficients.split(1, -2)
        return read + linear, constant + (read + linear).exp() - read.exp()

    def mean_statistics(self, read: Tensor) -> Tensor:
        """Return 1 and the rate."""
        return torch.cat([torch.ones_like(read), read.exp()], -2)

    def prior_statistics(self, flows: Tensor) -> Tensor:
        """Return those of the value 1."""
        return torch.ones_like(flows)

    def fit(self, statistics: Tensor) -> Tensor:
        """Return the logarithm of the mean."""
        return self.raw(statistics[..., 1:, :])


@dataclass(frozen=True)
class Gaussian(Direct):
    """A normal distribution over the real numbers. Parameters: mean and standard deviation, (2, K).

    Values of log p are densities. Initial means are drawn from N(0, 1), so standardise the data, or start with
    :func:`~circuits.learning.initialize_inputs`. The pseudo-observations of EM have the unit's own mean, and the
    variance of all that the units together explain; a learning step of size s < 1 interpolates the mean parameters
    E[x] and E[x^2].

    EM gathers sums of x and x^2 in float64, and means are kept in the circuit's dtype. So spreads below 1e-7 of the
    mean, 1e-6 in float32, are lost: subtract an offset, such as that of points in time, from the data.

    Args:
        min_std: the least standard deviation, > 0: a likelihood is unbounded without one.

    Raises:
        ArgumentError: ``min_std`` is not a positive number.
    """

    family: ClassVar[str] = "gaussian"
    parameter_names: ClassVar[tuple[str, ...]] = ("mean", "std")
    is_discrete: ClassVar[bool] = False
    min_std: float = 1e-3

    def __post_init__(self) -> None:
        is_number = isinstance(self.min_std, (int, float)) and not isinstance(self.min_std, bool)
        if not is_number or not 1e-30 <= self.min_std <= 1e30:
            raise ArgumentError(f"min_std: expected a number from 1e-30 to 1e30, got {self.min_std!r}")

    @property
    def domain(self) -> str:
        """Which values are possible, in words."""
        return "finite numbers"

    def initial(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draw means from N(0, 1); standard deviations are 1."""
        draw = torch.empty(tuple(shape), dtype=torch.float32).normal_(generator=generator)
        draw[:, 1] = math.log(max(1.0 - self.min_std, 1e-6 * self.min_std))
        return draw

    def read(self, raw: Tensor) -> Tensor:
        """Return means and standard deviations."""
        mean, log_excess = raw.split(1, -2)
        return torch.cat([mean, self.min_std + log_excess.exp()], -2)

    def parameters(self, raw: Tensor) -> Tensor:
        """Return means and standard deviations."""
        return self.read(raw)

    def raw(self, parameters: Tensor) -> Tensor:
        """Return means, and the logarithms of what the standard deviations exceed their minimum by."""
        mean, std = parameters.split(1, -2)
        return torch.cat([mean, (std - self.min_std).clamp_min(1e-6 * self.min_std).log()], -2)

    def problem(self, parameters: Tensor) -> str | None:
        """Say whether a number is not finite or a standard deviation too small."""
        is_valid = parameters.isfinite().all() & (parameters[1] >= self.min_std).all()
        return None if bool(is_valid) else f"expected finite means, and standard deviations >= {self.min_std}"

    def outside(self, x: Tensor) -> Tensor:
        """Return where ``x`` is not finite."""
        return ~x.isfinite()

    def log_density(self, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        """Return log p(x)."""
        mean, std = parameters
        return -0.5 * ((x - mean) / std).square() - std.log() - _HALF_LOG_TWO_PI

    def log_interval(self, parameters: Sequence[Tensor], lower: Tensor, upper: Tensor) -> Tensor:
        """Return ``log P(lower < X <= upper)``, in the lower tail by symmetry, so that no digits cancel."""
        a, b = _standardised(parameters, lower, upper)
        width = b - a
        is_narrow = width < _NARROW  # then the density in the middle, times the width, has more digits
        log_above = torch.special.log_ndtr(torch.where(is_narrow, a + 1, b))
        log_share = torch.log(-torch.expm1(torch.special.log_ndtr(a) - log_above))
        middle = -0.125 * (a + b).square() - _HALF_LOG_TWO_PI + torch.where(width > 0, width, 1.0).log()
        out = torch.where(is_narrow, middle, log_above + log_share)
        return torch.where(width > 0, out, -torch.inf).to(parameters[0].dtype)

    def mode(self, parameters: Sequence[Tensor], lower: Tensor, upper: Tensor) -> Tensor:
        """Return the mean, moved between the bounds."""
        return parameters[0].clamp_min(lower).clamp_max(upper)

    def draw(
        self, parameters: Sequence[Tensor], lower: Tensor, upper: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Draw by inversion of the cumulative probabilities where there are bounds."""
        mean, std = parameters
        free = mean + std * torch.empty_like(mean).normal_(generator=generator)
        if bool(((lower == -torch.inf) & (upper == torch.inf)).all()):
            return free
        a, b = _standardised(parameters, lower, upper)
        share = torch.rand(a.shape, dtype=a.dtype, device=a.device, generator=generator)
        below, above = torch.special.ndtr(a), torch.special.ndtr(b)
        z = torch.special.ndtri(below + share * (above - below))
        is_far = b < _VISIBLE_TAIL  # there the tail is an exponential one
        z = torch.where(is_far, b + share.log() / b.abs().clamp_min(1), z).clamp_min(a).clamp_max(b)
        is_mirrored = _is_mirrored(parameters, lower, upper)
        return (mean + std * torch.where(is_mirrored, -z, z)).clamp_min(lower).clamp_max(upper).to(mean.dtype)

    def times_normal(
        self, parameters: Sequence[Tensor], mean: Tensor, std: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Multiply two normal densities."""
        own_mean, own_std = parameters
        spread = torch.hypot(own_std, std)
        gain = (own_std / spread).square()
        product = (own_mean + gain * (mean - own_mean), own_std * std / spread)
        return product, self.log_density((own_mean, spread), mean)

    def tilt(self, read: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Add the coefficients to the natural parameters."""
        mean, std = read.split(1, -2)
        constant, linear, quadratic = coefficients.split(1, -2)
        precision = std**-2 - 2 * quadratic
        tilted = (mean * std**-2 + linear) / precision
        log_constant = 0.5 * (tilted.square() * precision - mean.square() * std**-2) - 0.5 * precision.log() - std.log()
        return torch.cat([tilted, precision.rsqrt()], -2), constant + log_constant

    def mean_statistics(self, read: Tensor) -> Tensor:
        """Return 1, the mean, and the mean square."""
        mean, std = read.split(1, -2)
        return torch.cat([torch.ones_like(mean), mean, mean.square() + std.square()], -2)

    def prior_statistics(self, flows: Tensor) -> Tensor:
        """Return those of observations with the mean of each unit's flows and the variance of those of all units."""
        mean = flows[..., 1:2, :] / flows[..., :1, :]
        _, centre, square = (flows.sum(-1, keepdim=True) / flows[..., :1, :].sum(-1, keepdim=True)).split(1, -2)
        spread = (square - centre.square()).clamp_min(0)
        return torch.cat([torch.ones_like(mean), mean, mean.square() + spread], -2)

    def hold(self, statistics: Tensor, read: Tensor, held: Tensor) -> Tensor:
        """Keep means, around which the mean square distance is the variance, or standard deviations."""
        one, mean, square = statistics.split(1, -2)
        own_mean, own_std = read.split(1, -2)
        keeps_mean, keeps_std = held.split(1, 1)
        centre = torch.where(keeps_mean, own_mean, mean)
        variance = square - 2 * centre * mean + centre.square()
        variance = torch.where(keeps_std, own_std.square(), variance)
        return torch.cat([one, centre, centre.square() + variance], -2)

    def fit(self, statistics: Tensor) -> Tensor:
        """Match mean and variance, but for the least standard deviation."""
        mean = statistics[..., 1:2, :]
        variance = (statistics[..., 2:, :] - mean.square()).clamp_min(self.min_std**2)
        return self.raw(torch.cat([mean, variance.sqrt()], -2))


def _whole(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and the last whole number >= 0 of ``lower < v <= upper``, in float64."""
    return (lower.double().floor() + 1).clamp(0.0, 1e15), upper.double().floor()


def _log_tail_terms(rate: Tensor, first: Tensor, last: Tensor, is_upper: Tensor, is_visible: Tensor) -> Tensor:
    """Return the logarithm of the sum of p(v), first <= v <= last, over its greatest term, far from the rate."""
    rate = torch.where(is_visible, 1.0, rate)
    start = torch.where(is_visible, 0.0, torch.where(is_upper, first, last))
    term = total = torch.ones_like(rate)
    for step in range(1, _TAIL_TERMS + 1):
        is_inside = torch.where(is_upper, first + step <= last, last - step >= first)
        ratio = torch.where(is_upper, rate / (start + step), (start - step + 1) / rate)
        term = torch.where(is_inside & ~is_visible, term * ratio, 0.0)
        total = total + term
    return total.log()


def _is_mirrored(parameters: Sequence[Tensor], lower: Tensor, upper: Tensor) -> Tensor:
    """Whether most of the interval lies above the mean."""
    far = 1e30
    return lower.clamp(-far, far) + upper.clamp(-far, far) > 2 * parameters[0]


def _standardised(parameters: Sequence[Tensor], lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bounds in standard deviations from the mean, in float64, mirrored into the lower tail."""
    mean, std = (part.double() for part in parameters)
    # finite numbers in place of infinite ones, whose gradients are NaN
    z = [((bound.double().clamp(-1e30, 1e30) - mean) / std).clamp(-_FARTHEST, _FARTHEST) for bound in (lower, upper)]
    mirrored = _is_mirrored(parameters, lower, upper)
    return torch.where(mirrored, -z[1], z[0]), torch.where(mirrored, -z[0], z[1])
