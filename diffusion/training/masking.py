"""The absorbing-state forward process: how many tokens are masked at a time, and which.

A schedule gives ``alpha(t)``, the probability that a token is still visible at time ``t`` in [0, 1]; it falls from
about 1 to about 0. Tokens are masked independently. The negative evidence lower bound of a sequence (Sahoo et al. 2024,
arXiv 2406.07524; Shi et al. 2024, arXiv 2406.04329) is

    E_{t ~ U(0,1)} [ w(t) * sum_{i masked at t} -log q_i(x_i | visible tokens) ],   w(t) = -alpha'(t) / (1 - alpha(t))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from diffusion.errors import ArgumentError

ScheduleName = Literal["linear", "cosine", "geometric"]
Masks = Literal["random", "suffix"]
TimeSampling = Literal["antithetic", "low_discrepancy", "uniform"]

EARLIEST_TIME = 1e-3
"""Weights like 1/t are unbounded at t = 0, where nothing is masked: times are kept at or above this one."""


class Schedule(Protocol):
    """How the probability of being masked grows with time; ``t`` is a tensor of any shape with values in [0, 1]."""

    def mask_probability(self, t: Tensor) -> Tensor:
        """Return 1 - alpha(t), in the shape of ``t``."""
        ...

    def elbo_weight(self, t: Tensor) -> Tensor:
        """Return w(t) = -alpha'(t) / (1 - alpha(t)), in the shape of ``t`` and finite everywhere."""
        ...


@dataclass(frozen=True)
class LinearSchedule:
    """alpha(t) = 1 - t, w(t) = 1 / t, constant below ``EARLIEST_TIME``: the masked fraction is uniform."""

    def mask_probability(self, t: Tensor) -> Tensor:
        """Return t."""
        return t

    def elbo_weight(self, t: Tensor) -> Tensor:
        """Return 1 / t, with t raised to ``EARLIEST_TIME``."""
        return 1 / t.clamp(min=EARLIEST_TIME)


@dataclass(frozen=True)
class CosineSchedule:
    """alpha(t) = 1 - sin(pi t / 2), w(t) = (pi / 2) / tan(pi t / 2), constant below ``EARLIEST_TIME``.

    Shi et al. 2024, table 1. Few tokens stay visible for long: it dwells on dense masks.
    """

    def mask_probability(self, t: Tensor) -> Tensor:
        """Return sin(pi t / 2)."""
        return torch.sin(math.pi / 2 * t)

    def elbo_weight(self, t: Tensor) -> Tensor:
        """Return (pi / 2) / tan(pi t / 2), with t raised to ``EARLIEST_TIME``."""
        angle = math.pi / 2 * t.clamp(min=EARLIEST_TIME)
        return math.pi / 2 * torch.cos(angle) / torch.sin(angle)


@dataclass(frozen=True)
class GeometricSchedule:
    """alpha(t) = exp(-s(t)), s(t) = least^(1-t) most^t, w(t) = s'(t) / (exp(s(t)) - 1).

    Shi et al. 2024, table 1. The weight is finite at t = 0, where it is about log(most / least).
    """

    least: float = 1e-5
    most: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.least < self.most:
            raise ArgumentError(f"least, most: expected 0 < least < most, got {self.least} and {self.most}")

    def mask_probability(self, t: Tensor) -> Tensor:
        """Return 1 - exp(-s(t))."""
        return -torch.expm1(-self._total_noise(t))

    def elbo_weight(self, t: Tensor) -> Tensor:
        """Return s'(t) / (exp(s(t)) - 1)."""
        noise = self._total_noise(t)
        return math.log(self.most / self.least) * noise / torch.expm1(noise)

    def _total_noise(self, t: Tensor) -> Tensor:
        return self.least * (self.most / self.least) ** t


def schedule(name: ScheduleName) -> Schedule:
    """Return the schedule of this name with its default parameters.

    Raises:
        ArgumentError: the name is not one of ``linear``, ``cosine``, ``geometric``.
    """
    schedules: dict[str, Schedule] = {
        "linear": LinearSchedule(),
        "cosine": CosineSchedule(),
        "geometric": GeometricSchedule(),
    }
    if name not in schedules:
        raise ArgumentError(f"schedule: expected one of {', '.join(schedules)}, got {name!r}")
    return schedules[name]


def sample_times(
    batch: int,
    *,
    method: TimeSampling = "low_discrepancy",
    generator: torch.Generator | None = None,
    earliest: float = EARLIEST_TIME,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw one time per sequence; each is uniform on [earliest, 1], only their dependence differs.

    Args:
        batch: number of times.
        method: ``uniform``: independent; ``antithetic``: pairs u, 1 - u; ``low_discrepancy``: one shift of an even
            grid, so that every batch covers all noise levels (Kingma et al. 2021, arXiv 2107.00630, appendix I.1).
        generator: source of randomness, on ``device``.
        earliest: the smallest time, in [0, 1).
        device: where the times go; by default the generator's device, or else the CPU.

    Returns:
        Times, float32, shape (batch,).

    Raises:
        ArgumentError: ``batch`` is negative, ``earliest`` outside [0, 1), or ``method`` unknown.
    """
    if batch < 0:
        raise ArgumentError(f"batch: expected an integer >= 0, got {batch}")
    if not 0 <= earliest < 1:
        raise ArgumentError(f"earliest: expected a time from 0 to below 1, got {earliest}")
    if method not in get_args(TimeSampling):
        raise ArgumentError(f"method: expected one of {', '.join(get_args(TimeSampling))}, got {method!r}")
    if device is None:
        device = generator.device if generator is not None else "cpu"

    def uniform(count: int) -> Tensor:
        return torch.rand(count, generator=generator, device=device)

    if method == "uniform":
        unit = uniform(batch)
    elif method == "antithetic":
        half = uniform((batch + 1) // 2)
        unit = torch.stack([half, 1 - half], dim=1).flatten()[:batch]
    else:
        unit = (uniform(1) + torch.arange(batch, device=device) / max(batch, 1)) % 1
    return earliest + (1 - earliest) * unit


def mask_tokens(
    tokens: Tensor,  # shape: (B, L)
    t: Tensor,  # shape: (B,)
    *,
    mask_id: int,
    schedule: Schedule | None = None,
    maskable: Tensor | None = None,  # shape: (B, L)
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Mask every token independently with probability 1 - alpha(t) of its sequence.

    Args:
        tokens: int64 token ids, shape (B, L).
        t: time of each sequence in [0, 1], shape (B,).
        mask_id: the id that replaces a masked token.
        schedule: by default ``LinearSchedule()``.
        maskable: bool, shape (B, L): only these positions may be masked; by default all.
        generator: source of randomness, on the tokens' device.

    Returns:
        The tokens with masks in them, shape (B, L), and bool, shape (B, L), True where a token was masked.

    Raises:
        ArgumentError: a shape or dtype does not fit, or a time lies outside [0, 1].
    """
    _check_token_batch(tokens)
    if t.shape != tokens.shape[:1]:
        raise ArgumentError(f"t: expected shape ({tokens.shape[0]},), one time per sequence, got {tuple(t.shape)}")
    if t.numel() and not bool(((t >= 0) & (t <= 1)).all()):
        raise ArgumentError(f"t: expected times from 0 to 1, got {t.min().item()} to {t.max().item()}")
    probability = (schedule or LinearSchedule()).mask_probability(t)
    # rand draws from [0, 1), so that probability 1 masks everything and probability 0 nothing
    masked = torch.rand(tokens.shape, generator=generator, device=tokens.device) < probability[:, None]
    if maskable is not None:
        _check_maskable(maskable)
        if maskable.shape != tokens.shape:
            raise ArgumentError(
                f"maskable: expected the tokens' shape {tuple(tokens.shape)}, got {tuple(maskable.shape)}"
            )
        masked = masked & maskable
    return tokens.masked_fill(masked, mask_id), masked


def masked_at_end(masked: Tensor) -> Tensor:
    """Return masks of the same numbers at the end of each sequence, as writing from left to right leaves them.

    Args:
        masked: bool, shape (B, L).

    Returns:
        bool, shape (B, L).
    """
    _check_maskable(masked)
    return masked.sort(dim=1, stable=True).values


def count_masked(num_maskable: int, ratio: float) -> int:
    """Return how many of n maskable positions a ratio stands for: round(ratio * n), at least one if there is any.

    Everything that turns a mask ratio into a number of masks asks here: rounded in another place or another precision,
    45 positions at 0.7 are once 31 and once 32.

    Args:
        num_maskable: n >= 0.
        ratio: fraction to mask, in (0, 1].

    Raises:
        ArgumentError: ``ratio`` lies outside (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ArgumentError(f"ratio: expected a share above 0, up to 1, got {ratio}")
    return min(num_maskable, max(1, round(ratio * num_maskable)))


def mask_fixed_ratio(
    maskable: Tensor,  # shape: (B, L)
    ratio: float,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose exactly ``count_masked(n, ratio)`` of each sequence's n maskable positions.

    Args:
        maskable: bool, shape (B, L).
        ratio: fraction to mask, in (0, 1].
        generator: source of randomness, on the device of ``maskable``.

    Returns:
        bool, shape (B, L), True at the chosen positions. ``tokens.masked_fill(chosen, mask_id)`` applies them.

    Raises:
        ArgumentError: ``maskable`` is not a bool matrix, or ``ratio`` outside (0, 1].
    """
    _check_maskable(maskable)
    counts = torch.tensor([count_masked(n, ratio) for n in range(maskable.shape[1] + 1)], device=maskable.device)
    keys = torch.rand(maskable.shape, generator=generator, device=maskable.device)
    rank = keys.masked_fill(~maskable, math.inf).argsort(dim=1).argsort(dim=1)
    return rank < counts[maskable.sum(dim=1, keepdim=True)]


def _check_token_batch(tokens: Tensor) -> None:
    if tokens.ndim != 2 or tokens.dtype != torch.int64:
        raise ArgumentError(
            f"tokens: expected int64 of shape (B, L), got {tokens.dtype} of shape {tuple(tokens.shape)}"
        )


def _check_maskable(maskable: Tensor) -> None:
    if maskable.ndim != 2 or maskable.dtype != torch.bool:
        raise ArgumentError(
            f"maskable: expected bool of shape (B, L), got {maskable.dtype} of shape {tuple(maskable.shape)}"
        )
