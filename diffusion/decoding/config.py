"""How to decode, in one frozen object; its options are described here, and read from here by the program's help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_args

from circuits.arguments import checked_temperature, is_number
from diffusion.errors import ArgumentError

Strategy = Literal[
    "low_confidence", "margin", "entropy", "random", "top_prob", "threshold", "entropy_bound", "joint_entropy"
]

DecodeMode = str
"""A name of :data:`MODES`."""


@dataclass(frozen=True)
class Mode:
    """A way of decoding: what a step does with the distribution of a window.

    Attributes:
        says: the mode in one sentence; at tau = 0 it takes the best.
        propose: from a distribution, the options and random numbers to a proposal.
        each_alone: every token is drawn from its own marginal, so that some may not fit together.
        one_by_one: a step's tokens are committed one after the other, each given those before.
        draws_latents: positions are judged given a draw of latents that is not part of the text.
    """

    says: str
    propose: Callable[..., Any]
    each_alone: bool = False
    one_by_one: bool = False
    draws_latents: bool = False


P = TypeVar("P", bound=Callable[..., Any])
MODES: dict[str, Mode] = {}
"""All ways of decoding, by name; :mod:`diffusion.decoding.proposers` has them."""


def mode(name: str, says: str, **properties: bool) -> Callable[[P], P]:
    """Return a decorator of proposers: the mode of this name is to decode by it, see :class:`Mode`."""

    def entered(propose: P) -> P:
        MODES[name] = Mode(says, propose, **properties)
        return propose

    return entered


STRATEGIES: dict[str, str] = {
    "low_confidence": "the most probable drawn tokens first (LLaDA); changes the law at temperatures above 0",
    "margin": "the greatest difference between best and second best probability first (Dream)",
    "entropy": "the lowest entropy first (Dream)",
    "random": "positions at random",
    "top_prob": "the most probable best tokens first, whatever was drawn",
    "threshold": "low_confidence, and all drawn tokens more probable than the threshold (Fast-dLLM)",
    "entropy_bound": "entropy, and as many positions as the sum of their entropies but the largest allows (EB-sampler)",
    "joint_entropy": "entropy, and as many as the joint entropy under the circuit allows: coupled tokens go together",
}
"""Which positions a step commits, by strategy."""

KEEPS_LAW = frozenset({"margin", "entropy", "random", "top_prob", "entropy_bound", "joint_entropy"})
"""Strategies whose scores do not look at what was drawn: the tokens keep the distribution that they come from."""


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How to decode.

    Attributes:
        decode: how the circuit is used, see :data:`MODES`; ignored without a head.
        strategy: which positions a step commits, see :data:`STRATEGIES`. None: ``low_confidence`` at temperature 0,
            as LLaDA has it, and ``entropy`` above, which keeps the law.
        temperature: tau >= 0; 0 is greedy. What is tempered is the explanation, latents and tokens together, so that
            the circuit does not fade as tau falls; confidence is that of the distribution that is not tempered.
        threshold: of the strategy ``threshold``, a probability.
        entropy_bound: of ``entropy_bound`` and ``joint_entropy``, in nats >= 0.
        activation_threshold: the circuit is used for windows whose share of masked positions is below it, and for all
            when it is 1 or more. None: the head's.
        reverse_activation: use it for windows whose share of masked positions is above the threshold instead.
        remask: ReMDM-like: the share of a block's tokens written so far that every step but the last takes back, the
            least certain first, from 0 to below 1.
    """

    decode: DecodeMode = "joint"
    strategy: Strategy | None = None
    temperature: float = 0.0
    threshold: float = 0.9
    entropy_bound: float = 0.1
    activation_threshold: float | None = None
    reverse_activation: bool = False
    remask: float = 0.0

    def __post_init__(self) -> None:
        if self.decode not in tuple(MODES):  # what cannot be hashed is no mode either
            raise ArgumentError(f"decode: expected one of {', '.join(MODES)}, got {self.decode!r}")
        if self.strategy is not None and self.strategy not in get_args(Strategy):
            raise ArgumentError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {self.strategy!r}")
        checked_temperature(self.temperature)
        _check("threshold", self.threshold, 0, 1, "a probability")
        _check("entropy_bound", self.entropy_bound, 0, 1e38, "a number of nats >= 0")
        _check("remask", self.remask, 0, 1, "a share from 0 to below 1")
        if self.remask == 1:
            raise ArgumentError("remask: expected a share below 1, got 1: nothing would stay written")
        if not isinstance(self.reverse_activation, bool):
            raise ArgumentError(f"reverse_activation: expected True or False, got {self.reverse_activation!r}")
        if self.activation_threshold is not None:
            _check("activation_threshold", self.activation_threshold, 0, 1e38, "a number >= 0, or None")

    @property
    def chosen_strategy(self) -> Strategy:
        """The strategy, with the default filled in."""
        if self.strategy is not None:
            return self.strategy
        return "low_confidence" if self.temperature == 0 else "entropy"

    @property
    def keeps_law(self) -> bool:
        """Whether positions are chosen without regard to what was drawn for them, so that the draws keep their law.

        Mode ``latent`` judges positions given its draw of the latents, and so only keeps it with ``random``.
        """
        if self.remask:
            return False
        judged_by_draw = MODES[self.decode].draws_latents
        return self.chosen_strategy == "random" or (self.chosen_strategy in KEEPS_LAW and not judged_by_draw)

    def changed(self, **changes: Any) -> DecodingConfig:
        """Return the same options but for what is not None in ``changes``; raises ArgumentError for unknown ones."""
        unknown = sorted(set(changes) - set(self.__dataclass_fields__))
        if unknown:
            raise ArgumentError(f"{unknown[0]}: expected one of {', '.join(self.__dataclass_fields__)}; no such option")
        return replace(self, **{name: value for name, value in changes.items() if value is not None})


def _check(name: str, value: object, least: float, most: float, expected: str) -> None:
    if not is_number(value) or not least <= value <= most:  # type: ignore[operator]
        raise ArgumentError(f"{name}: expected {expected}, got {value!r}")
