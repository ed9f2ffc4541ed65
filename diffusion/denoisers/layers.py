"""The layers of :class:`~diffusion.denoisers.transformer.TransformerDenoiser`, and a cache of what they attend to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROTARY_BASE = 10_000.0

KeysValues = tuple[Tensor, Tensor]
"""Rotated keys and values of some positions, (B, heads, P, width of a head) each."""


@dataclass(eq=False)
class PrefixCache:
    """Keys and values of the positions before a window, while the same window is asked about.

    Attributes:
        window: ``(start, stop)`` that it is for; None: it is empty.
        tokens: the prefix, int64 (B, P).
        valid: which of it is no padding, bool (B, P).
        layers: of every layer.
        num_reused: how many calls found their window in it.
    """

    window: tuple[int, int] | None = None
    tokens: Tensor | None = None
    valid: Tensor | None = None
    layers: list[KeysValues] = field(default_factory=list)
    num_reused: int = 0

    def stale_rows(self, window: tuple[int, int], tokens: Tensor, valid: Tensor) -> Tensor | None:
        """Return the rows whose prefix is another one, int64 (n,); None: all are, for the window is another one."""
        if window != self.window or self.tokens is None or self.valid is None or self.tokens.shape != tokens.shape:
            return None
        return ((tokens != self.tokens) | (valid != self.valid)).any(1).nonzero().flatten()

    def store(self, window: tuple[int, int], tokens: Tensor, valid: Tensor, layers: list[KeysValues]) -> None:
        """Keep the prefix of all rows, (B, P), and its keys and values."""
        self.window, self.tokens, self.valid, self.layers = window, tokens.clone(), valid.clone(), layers

    def replace_rows(self, rows: Tensor, tokens: Tensor, valid: Tensor, layers: list[KeysValues]) -> None:
        """Exchange the prefix of some rows, (n, P), and its keys and values."""
        assert self.tokens is not None
        assert self.valid is not None
        self.tokens[rows], self.valid[rows] = tokens, valid
        for own, new in zip(self.layers, layers, strict=True):
            for kept, part in zip(own, new, strict=True):
                kept[rows] = part


class Layer(nn.Module):
    """Attention and feed-forward, each on normalised input and added to what came in."""

    def __init__(self, width: int, num_heads: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * width
        self.num_heads = num_heads
        self.attention_norm = nn.RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        # queries and keys of unit scale allow a learning rate three times as high (Henry et al. 2020, arXiv 2010.04245)
        self.query_norm = nn.RMSNorm(width // num_heads)
        self.key_norm = nn.RMSNorm(width // num_heads)
        self.attention_output = nn.Linear(width, width, bias=False)
        self.feed_forward_norm = nn.RMSNorm(width)
        self.expand = nn.Linear(width, hidden, bias=False)
        self.contract = nn.Linear(hidden, width, bias=False)

    def initialise(self, generator: torch.Generator, *, num_layers: int) -> None:
        """Keep the variance of the residual stream independent of depth (Radford et al. 2019)."""
        for linear in (self.query, self.key_value, self.expand):
            linear.weight.normal_(std=0.7 / math.sqrt(linear.in_features), generator=generator)
        for linear in (self.attention_output, self.contract):
            std = 0.7 / math.sqrt(2 * num_layers * linear.in_features)
            linear.weight.normal_(std=std, generator=generator)

    def forward(
        self,
        x: Tensor,  # shape: (B, L, width)
        rotation: tuple[Tensor, Tensor],  # shapes: (P + L, width / num_heads / 2)
        attended: Tensor | None,  # shape: (B or 1, 1, L, P + L)
        *,
        wanted_from: int,
        past: KeysValues | None = None,
    ) -> tuple[Tensor, KeysValues]:  # shape: (B, L - wanted_from, width)
        """Return the features of the positions from ``wanted_from`` on, and the keys and values that they attend to.

        ``past`` are keys and values of P positions before these. With ``attended`` None all positions attend to all.
        """
        normalised = self.attention_norm(x)
        keys, values = self._heads(self.key_value(normalised), 2 * self.num_heads).chunk(2, dim=1)
        queries = self._heads(self.query(normalised[:, wanted_from:]), self.num_heads)
        before = 0 if past is None else past[0].shape[2]
        keys = rotate(self.key_norm(keys.float()), rotation, first=before)
        if past is not None:
            keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        mixed = attend(
            rotate(self.query_norm(queries.float()), rotation, first=before + wanted_from),
            keys,
            values,
            attended[:, :, wanted_from:] if attended is not None else None,
        )
        x = x[:, wanted_from:] + self.attention_output(mixed.transpose(1, 2).flatten(2))
        hidden = F.relu(self.expand(self.feed_forward_norm(x))).square()
        output: Tensor = x + self.contract(hidden)
        return output, (keys, values)

    @staticmethod
    def _heads(features: Tensor, num_heads: int) -> Tensor:
        return features.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend(queries: Tensor, keys: Tensor, values: Tensor, attended: Tensor | None) -> Tensor:
    """Return what queries find among keys, (B, heads, L, width of a head)."""
    if values.device.type == "cpu":
        # There the fused kernel is about four times slower in bfloat16 than in float32.
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(queries, keys, values.float(), attn_mask=attended)
    queries, keys = queries.to(values.dtype), keys.to(values.dtype)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=attended)


def rotation_of(length: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the rotary angles of the first positions, (length, head_width / 2) each."""
    half = head_width // 2
    frequencies = ROTARY_BASE ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor], *, first: int) -> Tensor:
    """Rotate the features of positions that begin at ``first``."""
    cos, sin = (table[first : first + x.shape[-2]] for table in rotation)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)
