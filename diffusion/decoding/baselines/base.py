"""What the heads have in common, and the distributions of those that only draw."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from diffusion.decoding.baselines.models import BlockModel, check_model
from diffusion.errors import ArgumentError
from diffusion.prediction import Prediction

D = TypeVar("D")
AnyDrawn = TypeVar("AnyDrawn", bound="DrawnDistribution")


class BlockHead(Generic[D]):
    """A head that is always used, at decoding's own temperature, on all tokens; see :class:`~..joint.JointHead`."""

    activation_threshold: ClassVar[float] = 1.0
    temperature: ClassVar[float] = 1.0
    needs_features: ClassVar[bool] = False
    modes: ClassVar[frozenset[str]] = frozenset({"joint"})
    top_k: int | None = None
    from_left: ClassVar[bool] = True
    """Whether it knows beginnings of blocks only, not blocks with a gap."""
    no_constraint: ClassVar[str | None] = None
    """Why it is not exact under a constraint; None: it is."""

    def distribution(
        self,
        prediction: Prediction,
        tokens: Tensor,  # shape: (W, L)
        masked: Tensor,  # shape: (W, L)
        *,
        absent: Tensor | None = None,  # shape: (W, L)
        keeps_list: bool = False,
    ) -> D:
        """Return the joint distribution of W blocks.

        Args:
            prediction: what the denoiser says about their positions.
            tokens: int64; entries at masked positions are ignored.
            masked: bool, True where a token is to be predicted.
            absent: bool, positions that a shorter block does not have: the last ones, if the head knows no others.
            keeps_list: whether the prediction is listed as it should be, with no regard to ``top_k``.

        Raises:
            ArgumentError: a position is absent before one that is there, and the head cannot leave it out.
        """
        if absent is not None:
            if self.from_left and bool((absent[:, :-1] & ~absent[:, 1:]).any()):
                raise ArgumentError(
                    "absent: expected missing positions at a window's end only; use plan=df.Blocks(length)"
                )
            tokens, masked = tokens.masked_fill(absent, 0), masked & ~absent
        if self.top_k is not None and not keeps_list:
            prediction = prediction.listed(self.top_k)
        return self._of_blocks(prediction, tokens.masked_fill(masked, 0), masked, absent)

    def _of_blocks(self, prediction: Prediction, tokens: Tensor, masked: Tensor, absent: Tensor | None) -> D:
        """Return the distribution; nothing is masked that is absent, and tokens of neither kind are 0."""
        raise NotImplementedError

    def check_constraint(self) -> None:
        """Raise ArgumentError unless its distributions are exact under a constraint too; says why."""
        if self.no_constraint is not None:
            raise ArgumentError(
                f"constraint: expected a head that is exact under one, got {type(self).__name__}, "
                f"{self.no_constraint}; decode without a head, or with another than AdaptiveHead and CausalHead"
            )


class ModelHead(BlockHead[D]):
    """A head around a model of blocks.

    Args:
        model: see :class:`~.models.BlockModel`.
    """

    def __init__(self, model: BlockModel) -> None:
        check_model(model)
        self.model = model

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens."""
        return self.model.vocab_size

    @property
    def block_length(self) -> int:
        """L, the number of positions of the model."""
        return self.model.block_length


@dataclass(frozen=True, eq=False)
class DrawnDistribution:
    """A distribution of which draws are to be had, and no marginals: positions are judged by the prediction.

    Attributes:
        head: whose distribution it is.
        prediction: the denoiser's.
        tokens: int64 (W, L), 0 at positions that are masked or absent.
        masked: bool (W, L).
        absent: bool (W, L), positions that a block does not have, or None.
    """

    head: Any
    prediction: Prediction
    tokens: Tensor
    masked: Tensor
    absent: Tensor | None = None

    @property
    def present(self) -> Tensor:
        """Which positions a block has, bool (W, L)."""
        return torch.ones_like(self.masked) if self.absent is None else ~self.absent

    def posterior(self) -> Prediction:
        """Return the denoiser's own prediction."""
        return self.prediction

    def given(self: AnyDrawn, tokens: Tensor, observed: Tensor) -> AnyDrawn:
        """Return the head's distribution given more tokens; see :class:`~..joint.JointDistribution`."""
        observed = observed & self.masked
        return replace(
            self,
            prediction=self.prediction.with_observed(tokens, observed),
            tokens=torch.where(observed, tokens, self.tokens),
            masked=self.masked & ~observed,
        )
