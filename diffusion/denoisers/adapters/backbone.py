"""A pretrained network as a denoiser: masks, positions, shifted outputs, windows, and a cache for block-causal ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.denoisers.base import CachingDenoiser, DenoiserSpec
from diffusion.denoisers.layers import KeysValues
from diffusion.denoisers.questions import check_question
from diffusion.errors import ArgumentError


class BackboneDenoiser(nn.Module):
    """A bidirectional network and its output layer.

    Args:
        spec: the facts.
        backbone: ``backbone(tokens (B, Q), attended (B or 1, 1, Q, K), positions (B, Q), past=None, keep=False)``
            returns features (B, Q, H) and, if they are to be kept, the keys and values of all layers; K = P + Q, with P
            the positions of ``past``.
        head: from features to logits.
        shifted: whether the network's output at a position predicts the token of the next one, as in networks that
            were autoregressive once; the first position then has its own.

    Attributes:
        tokenizer_fingerprint: of the tokenizer whose ids these are, see
            :func:`~diffusion.fingerprint.tokenizer_fingerprint`; None: unknown.
    """

    tokenizer_fingerprint: str | None = None

    def __init__(self, spec: DenoiserSpec, backbone: nn.Module, head: nn.Module, *, shifted: bool = False) -> None:
        super().__init__()
        self.spec, self.backbone, self.head, self.shifted = spec, backbone, head, shifted

    @property
    def device(self) -> torch.device:
        """Where tokens go: the device of the first weights."""
        return next(self.parameters()).device

    def logits(
        self,
        tokens: Tensor,  # shape: (B, L)
        *,
        valid: Tensor | None = None,  # shape: (B, L)
        t: Tensor | None = None,  # shape: (B,)
        window: tuple[int, int] | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Return logits of the clean tokens, float32, shape (B, L, V) or (B, stop - start, V).

        Raises ArgumentError if a shape, dtype, id or the window does not fit, or L exceeds ``spec.max_length``.
        """
        return self.logits_and_features(tokens, valid=valid, t=t, window=window, cache=cache)[0]

    def logits_and_features(
        self,
        tokens: Tensor,  # shape: (B, L)
        *,
        valid: Tensor | None = None,  # shape: (B, L)
        t: Tensor | None = None,  # shape: (B,)
        window: tuple[int, int] | None = None,
        cache: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the logits as :meth:`logits` does, and the hidden states that the output layer read them from.

        They are float32 (B, L, V) and (B, L, H), or those of the window's positions.
        """
        check_question(self.spec, tokens, valid, window)
        if cache is not None and not (isinstance(cache, BlockCache) and isinstance(self, CachingDenoiser)):
            raise ArgumentError(
                f"cache: expected what this denoiser's new_cache() returned, got {type(cache).__name__}"
            )
        valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
        start, stop = window if window is not None else (0, tokens.shape[1])
        features = self._features(tokens, valid, (start, stop), cache, **self._conditions(tokens, valid, t))
        logits = self._finished(self.head(features).float().to(tokens.device), tokens[:, start:stop])
        return logits, features.float().to(tokens.device)

    def _features(
        self, tokens: Tensor, valid: Tensor, window: tuple[int, int], cache: BlockCache | None, **conditions: Any
    ) -> Tensor:
        """Return the hidden states that the window's logits are read from, (B, stop - start, H)."""
        features, _ = self.backbone(tokens, self._attended(valid), positions_of(valid), **conditions)
        read = torch.arange(*window, device=tokens.device).expand(len(tokens), -1)
        if self.shifted:
            first = (~valid).int().cumprod(1).sum(1, keepdim=True)
            read = torch.where(read > first, read - 1, read)
        rows = torch.arange(len(tokens), device=tokens.device).unsqueeze(1)
        read, rows = read.to(features.device), rows.to(features.device)
        chosen: Tensor = features[rows, read]
        return chosen

    def _attended(self, valid: Tensor) -> Tensor:
        """Return which positions attend to which, bool (B or 1, 1, L, L): all to all that is valid, and to itself."""
        length = valid.shape[1]
        if bool(valid.all()):
            return torch.ones(1, 1, length, length, dtype=torch.bool, device=valid.device)
        itself = torch.eye(length, dtype=torch.bool, device=valid.device)
        return (valid[:, None, :] | itself).unsqueeze(1)

    def _conditions(self, tokens: Tensor, valid: Tensor, t: Tensor | None) -> dict[str, Any]:
        """Return what else the backbone is told."""
        return {}

    def _finished(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits as they are published, given those of the output layer."""
        return logits


@dataclass(eq=False)
class BlockCache:
    """Keys and values of whole blocks before a window, of all rows of one batch.

    Attributes:
        tokens: what they depend on, int64 (B, D).
        valid: bool (B, D).
        layers: of every layer, for the first m <= D positions.
        num_reused: how many calls found something in it.
    """

    tokens: Tensor | None = None
    valid: Tensor | None = None
    layers: list[KeysValues] = field(default_factory=list)
    num_reused: int = 0

    def reusable(self, tokens: Tensor, valid: Tensor, blocks: Tensor, at_most: int) -> int:
        """Return how many of the first positions are what they were, with all that they depend on."""
        if self.tokens is None or self.valid is None or len(self.tokens) != len(tokens):
            return 0
        depth = self.tokens.shape[1]
        if tokens.shape[1] < depth:
            return 0
        changed = ((tokens[:, :depth] != self.tokens) | (valid[:, :depth] != self.valid)).any(0).nonzero().flatten()
        kept = min(at_most, self.layers[0][0].shape[2])
        return min(kept, first_of_block(blocks, int(changed[0]))) if len(changed) else kept

    def store(self, tokens: Tensor, valid: Tensor, layers: list[KeysValues], kept: int) -> None:
        """Keep the first positions of all layers, and what they depend on."""
        self.tokens, self.valid = tokens.clone(), valid.clone()
        self.layers = [(keys[:, :, :kept], values[:, :, :kept]) for keys, values in layers]


class BlockCausalDenoiser(BackboneDenoiser):
    """A network whose positions attend to their own block and those before it (Arriola et al. 2025, arXiv 2503.09573).

    Blocks are counted from the beginning of each text, where its padding ends, as in training. So what stands before a
    block does not depend on it, and a cache of keys and values changes nothing. Decode with a ``block_length`` that is
    a multiple of ``block_size``.

    Args:
        block_size: positions of a block.
        others: as in :class:`BackboneDenoiser`.
    """

    def __init__(self, *others: Any, block_size: int) -> None:
        super().__init__(*others)
        if block_size < 1:
            raise ArgumentError(f"block_size: expected at least 1, got {block_size}")
        self.block_size = block_size

    def _features(
        self, tokens: Tensor, valid: Tensor, window: tuple[int, int], cache: BlockCache | None, **conditions: Any
    ) -> Tensor:
        start, stop = window
        positions = positions_of(valid)
        blocks = positions.div(self.block_size, rounding_mode="floor")
        last = blocks[:, max(0, stop - 1) :][:, :1]
        end = int((blocks <= last).sum(1).max())  # nothing after the last block is seen
        attended = ((blocks.unsqueeze(2) >= blocks.unsqueeze(1)) & self._attended(valid)[:, 0]).unsqueeze(1)
        tokens, valid = tokens[:, :end], valid[:, :end]
        kept, past = 0, None
        used = cache if not torch.is_grad_enabled() and start < stop else None
        if used is not None:
            whole = first_of_block(blocks, start)
            kept = used.reusable(tokens, valid, blocks, whole)
        if used is not None and kept:
            used.num_reused += 1
            past = [(keys[:, :, :kept], values[:, :, :kept]) for keys, values in used.layers]
        seen = attended[:, :, kept:end, :end]
        features, layers = self.backbone(
            tokens[:, kept:], seen, positions[:, kept:end], past=past, keep=used is not None, **conditions
        )
        if used is not None:
            used.store(tokens[:, :start], valid[:, :start], layers, whole)
        wanted: Tensor = features[:, start - kept : stop - kept]
        return wanted


class CachedBlockDenoiser(BlockCausalDenoiser):
    """A block-causal network that keeps keys and values of the blocks before a window."""

    def new_cache(self) -> BlockCache:
        """Return an empty cache for the ``cache`` argument, of one batch of texts; with gradients it is not used."""
        return BlockCache()


def positions_of(valid: Tensor) -> Tensor:
    """Return each position's place in its text, int64 (B, L); 0 at padding."""
    return (valid.long().cumsum(1) - 1).clamp_min(0)


def first_of_block(blocks: Tensor, position: int) -> int:
    """Return where the block that a position lies in begins, in the row where it begins first."""
    return int((blocks < blocks[:, position : position + 1]).sum(1).min())
