"""What decoding asks of a joint output layer: :class:`~diffusion.head.CoupledHead` is one, and so are the baselines."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from circuits import RowGenerators
from diffusion.decoding.config import MODES, DecodingConfig
from diffusion.decoding.constraints.coupled import check_chain
from diffusion.denoisers.base import DenoiserSpec
from diffusion.errors import ArgumentError
from diffusion.head import CoupledHead
from diffusion.prediction import Prediction


@runtime_checkable
class JointDistribution(Protocol):
    """The joint distribution of W windows of n tokens.

    A distribution of which only draws are to be had answers :meth:`posterior` with what its tokens are to be judged
    by, for instance the denoiser's own prediction, and its head leaves out the modes that need exact marginals. A
    distribution that decides itself how many of its tokens are kept has a method ``accepted()`` beside these, see
    :class:`SelfAccepting`.
    """

    @property
    def prediction(self) -> Prediction: ...  # noqa: D102
    @property
    def masked(self) -> Tensor: ...  # noqa: D102

    def draw(self, temperature: float, generator: RowGenerators) -> Tensor:
        """Draw all tokens together, int64 (W, n); at temperature 0 the best that can be found."""
        ...

    def posterior(self) -> Prediction:
        """Return what is believed about each position on its own: the exact marginals, where there are any."""
        ...

    def given(self, tokens: Tensor, observed: Tensor) -> JointDistribution:
        """Return the distribution given more tokens, int64 (W, n), where bool (W, n) ``observed`` is True."""
        ...


class LatentDistribution(JointDistribution, Protocol):
    """A distribution with latents, given which the tokens are independent: what the mode ``latent`` needs."""

    def given_latents(self, generator: RowGenerators | None = None, *, temperature: float = 1.0) -> Prediction:
        """Choose the latents; return ``log p(x_i = v | z)`` without the factor that :attr:`prediction` has in it."""
        ...


@runtime_checkable
class SelfAccepting(Protocol):
    """A distribution that decides itself how many of its drawn tokens are kept, in place of a strategy."""

    def draw_accepted(self, temperature: float, generator: RowGenerators) -> tuple[Tensor, Tensor]:
        """Draw all tokens, int64 (W, n); return also which of them are kept, bool (W, n).

        If these are fewer than a step has to commit, the leftmost of the others are committed too.
        """
        ...


@runtime_checkable
class JointHead(Protocol):
    """A joint output layer: from a denoiser's prediction of windows to the joint distribution of their tokens.

    Attributes:
        block_length: n, the greatest length of a window.
        vocab_size: V, the number of tokens.
        activation_threshold: it is used for windows whose share of masked positions is below this, for all at 1.
        temperature: tau that decoding takes if it is not 1 and nothing else is said.
        top_k: list the k best tokens of every position only; None: all.
        needs_features: whether the prediction has to bring the denoiser's hidden states.

    A head without exact draws or marginals names the ways of decoding that it has in ``modes``, a set of names of
    :data:`~diffusion.decoding.config.MODES`; one without that attribute has all.
    """

    @property
    def activation_threshold(self) -> float: ...  # noqa: D102
    @property
    def temperature(self) -> float: ...  # noqa: D102
    @property
    def top_k(self) -> int | None: ...  # noqa: D102
    @property
    def block_length(self) -> int: ...  # noqa: D102
    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def needs_features(self) -> bool: ...  # noqa: D102

    def distribution(
        self,
        prediction: Prediction,
        tokens: Tensor,  # shape: (W, n)
        masked: Tensor,  # shape: (W, n)
        *,
        absent: Tensor | None = None,  # shape: (W, n)
    ) -> Any:
        """Return the :class:`JointDistribution` of W windows.

        Args:
            prediction: what the denoiser says about their positions.
            tokens: int64; entries at masked positions are ignored.
            masked: bool, True where a token is to be predicted.
            absent: bool, positions that a shorter window does not have.
        """
        ...


@runtime_checkable
class ConstrainableHead(Protocol):
    """A head that decodes under a constraint: its distributions are coupled ones with a chain, or have ``under``.

    ``dist.under(automaton, start=, accept=, reads=)`` returns the :class:`JointDistribution` given that the automaton
    accepts, see :meth:`~diffusion.decoding.constraints.ConstrainedCoupledDistribution.under`.
    """

    def check_constraint(self) -> None:
        """Raise ArgumentError if that would not be exact."""
        ...

    def distribution(
        self,
        prediction: Prediction,
        tokens: Tensor,  # shape: (W, n)
        masked: Tensor,  # shape: (W, n)
        *,
        absent: Tensor | None = None,  # shape: (W, n)
        keeps_list: bool = False,
    ) -> Any:
        """Return what :meth:`JointHead.distribution` does of the same arguments.

        With ``keeps_list`` the prediction is listed as it should be, with no regard to ``top_k``.
        """
        ...


def check_constrained(head: JointHead, config: DecodingConfig) -> None:
    """Raise ArgumentError unless decoding with a head is exact under a constraint, or does not use the head."""
    if config.decode == "independent":
        return
    if isinstance(head, CoupledHead):
        check_chain(head.pc)
    elif isinstance(head, ConstrainableHead):
        head.check_constraint()
    else:
        raise ArgumentError(
            f"constraint: expected df.CoupledHead, another head with check_constraint, or no head, got "
            f"{type(head).__name__}; decode without a head"
        )


def check_head(head: JointHead, spec: DenoiserSpec, config: DecodingConfig) -> None:
    """Raise ArgumentError unless a head has the denoiser's tokens, and the way of decoding that is asked for."""
    if not isinstance(head, JointHead):
        raise ArgumentError(
            f"head: expected df.CoupledHead(pc), another df.JointHead or None, got {type(head).__name__}"
        )
    if isinstance(head, CoupledHead):
        head.spec_for(spec)
    elif head.vocab_size != spec.vocab_size:
        raise ArgumentError(
            f"head: expected one over the denoiser's {spec.vocab_size} tokens, got {head.vocab_size}; fit one on this "
            "denoiser's tokens"
        )
    modes = getattr(head, "modes", MODES)
    if config.decode != "independent" and config.decode not in modes:
        raise ArgumentError(
            f"decode: expected one of {', '.join(sorted(modes))} with {type(head).__name__}, got {config.decode!r}"
        )


def spec_with(head: JointHead | None, spec: DenoiserSpec, config: DecodingConfig) -> DenoiserSpec:
    """Return the spec that a canvas obeys: the denoiser's, and a circuit's tokens only where it is decoded with one."""
    if config.decode == "independent" or not isinstance(head, CoupledHead):
        return spec
    return head.spec_for(spec)
