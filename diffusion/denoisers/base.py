"""What the library asks of a masked-token predictor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from diffusion.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class DenoiserSpec:
    """The facts about a denoiser that its callers need.

    Attributes:
        vocab_size: V, the length of a row of logits.
        mask_id: the token id that stands for a masked position.
        eos_ids: ids that end a text; may be empty.
        pad_id: the id to put at positions that are not valid.
        forbidden_ids: ids that must never be generated, ``mask_id`` among them.
        max_length: the largest number of positions of one sequence.
    """

    vocab_size: int
    mask_id: int
    eos_ids: tuple[int, ...]
    pad_id: int
    forbidden_ids: tuple[int, ...]
    max_length: int

    def __post_init__(self) -> None:
        named = {"mask_id": (self.mask_id,), "pad_id": (self.pad_id,), "eos_ids": self.eos_ids}
        for name, ids in {**named, "forbidden_ids": self.forbidden_ids}.items():
            if not all(0 <= id < self.vocab_size for id in ids):
                raise ArgumentError(f"{name}: expected 0 to {self.vocab_size - 1} (vocab_size - 1), got {ids}")
        if self.mask_id not in self.forbidden_ids:
            raise ArgumentError(f"forbidden_ids: expected mask_id {self.mask_id} among them, got {self.forbidden_ids}")
        if self.max_length < 1:
            raise ArgumentError(f"max_length: expected an integer >= 1, got {self.max_length}")


@runtime_checkable
class Denoiser(Protocol):
    """A masked-token predictor: noisy tokens in, one categorical distribution per position out.

    Shifted outputs, time inputs, shapes of attention masks, guidance: all of that stays inside the implementation.
    """

    @property
    def spec(self) -> DenoiserSpec:
        """The facts about this denoiser that its callers need."""
        ...

    def logits(
        self,
        tokens: Tensor,  # shape: (B, L)
        *,
        valid: Tensor | None = None,  # shape: (B, L)
        t: Tensor | None = None,  # shape: (B,)
        window: tuple[int, int] | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Return unnormalised log-probabilities of the clean token at each position, given the noisy sequence.

        Args:
            tokens: int64 token ids with ``spec.mask_id`` at the masked positions, shape (B, L).
            valid: bool, shape (B, L), False at padding, which stands at the left of shorter prompts; by default
                everything is valid.
            t: time of each sequence in the forward process, shape (B,), for denoisers that want it; if absent they
                derive it from the number of masks.
            window: ``(start, stop)``: only the logits of positions start..stop-1 are wanted, and the denoiser may
                choose what it looks at to find them; by default all positions.
            cache: what :meth:`CachingDenoiser.new_cache` returned, or None.

        Returns:
            float32, shape (B, L, V), or (B, stop - start, V) with a window; ``[:, i]`` predicts the token at position
            i (or start + i). Finite also at ``spec.forbidden_ids``, which the caller has to exclude, and at padding,
            where the values mean nothing. Differentiable in the denoiser's parameters.
        """
        ...


@runtime_checkable
class FeatureDenoiser(Denoiser, Protocol):
    """A denoiser that also gives its last hidden states, for conditioners that depend on the context."""

    def logits_and_features(
        self,
        tokens: Tensor,  # shape: (B, L)
        *,
        valid: Tensor | None = None,  # shape: (B, L)
        t: Tensor | None = None,  # shape: (B,)
        window: tuple[int, int] | None = None,
        cache: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Return what :meth:`Denoiser.logits` does, and beside it the last hidden states that they were read from.

        Returns:
            The logits, (B, L, V) or (B, stop - start, V), and floating-point features of the same positions, (B, L, H)
            or (B, stop - start, H).
        """
        ...


@runtime_checkable
class CachingDenoiser(Denoiser, Protocol):
    """A denoiser that can keep what it computed about the text before a window, and use it in its next call.

    It knows by itself when what it kept is of no use any more: the window or the text before it has changed.
    """

    def new_cache(self) -> Any:
        """Return an empty cache, to be handed to every call of ``logits`` about one batch of texts."""
        ...
