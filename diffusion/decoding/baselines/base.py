"""What the heads have in common, and the distributions of those that only draw."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from circuits.arguments import checked_count
from diffusion.decoding.baselines.models import AutoregressiveModel, BlockModel, CircuitModel, check_model
from diffusion.decoding.baselines.saving import KINDS, Content, load_content, module_of, save_content
from diffusion.errors import ArgumentError
from diffusion.prediction import Prediction

if TYPE_CHECKING:
    from typing_extensions import Self

D = TypeVar("D")
AnyDrawn = TypeVar("AnyDrawn", bound="DrawnDistribution")


class BlockHead(Generic[D]):
    """A head that is always used, at decoding's own temperature, on all tokens; see :class:`~..joint.JointHead`."""

    kind: ClassVar[str]
    """What its files call it; of a class of your own another one."""

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
        """Return the joint distribution of W blocks; see :class:`~..joint.ConstrainableHead`.

        Raises ArgumentError if a position is absent before one that is there, and the head cannot leave it out.
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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a folder: settings and weights in ``baseline.safetensors``, a circuit in ``circuit/``; no pickle.

        The folder is swapped in as a whole: whoever loads it, at any time, gets the version before or this one. Raises
        ArgumentError if ``path`` holds something else, a weight is NaN or infinite, or the head is one of your own, or
        around a model of your own.
        """
        save_content(path, self.kind, type(self), self._content())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Self:
        """Read what :meth:`save` wrote.

        Raises CheckpointError if a file is missing, corrupt, of a newer format, does not belong to the others, or holds
        another kind of head.
        """
        return load_content(path, cls, device)

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            KINDS[cls.kind] = cls

    def _content(self) -> Content:
        """Return what a file has to hold."""
        raise NotImplementedError

    @classmethod
    def from_content(cls, content: Content) -> Self:
        """Build a head of what a file holds."""
        raise NotImplementedError


class NetworkHead(BlockHead[D], nn.Module):
    """A head that is a network, built of its sizes, ``vocab_size`` and ``block_length`` among them."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        for name, value in sizes.items():
            checked_count(name, value)
        self.vocab_size, self.block_length = sizes["vocab_size"], sizes["block_length"]
        self._sizes = sizes

    def _content(self) -> Content:
        return Content(dict(self._sizes), self.state_dict())

    @classmethod
    def from_content(cls, content: Content) -> Self:
        """Build a head of what a file holds."""
        return module_of(cls, content.settings, content.tensors)


class ModelHead(BlockHead[D]):
    """A head around a model of blocks, a :class:`~.models.BlockModel`."""

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

    def _settings(self) -> dict[str, Any]:
        """Return the arguments beside the model."""
        raise NotImplementedError

    def _content(self) -> Content:
        model = self.model
        if isinstance(model, CircuitModel):
            return Content({**self._settings(), "model": None}, {}, model.pc)
        if isinstance(model, AutoregressiveModel):
            return Content({**self._settings(), "model": model.sizes()}, model.state_dict())
        raise ArgumentError(
            f"model: expected CircuitModel or AutoregressiveModel, got {type(model).__name__}; save "
            "your own model yourself, and build the head again around it"
        )

    @classmethod
    def from_content(cls, content: Content) -> Self:
        """Build a head of what a file holds."""
        settings = dict(content.settings)
        sizes = settings.pop("model")
        model: BlockModel
        if sizes is None:
            model = CircuitModel(content.needed_circuit())
        else:
            model = module_of(AutoregressiveModel, sizes, content.tensors)
        return cls(model, **settings)


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
