"""The diffusion transformer of MDLM and BD3-LM: pre-norm layers that the noise level scales, shifts and gates.

Peebles and Xie 2023 (arXiv 2212.09748), over tokens as in Sahoo et al. 2024 (arXiv 2406.07524).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.denoisers.layers import ROTARY_BASE, KeysValues

NUM_FREQUENCIES = 128
LONGEST_PERIOD = 10_000.0
EXPANSION = 4

_LAYER = re.compile(r"(?:backbone\.)?blocks\.(\d+)\.(\w+?)(\.\d)?\.(weight|bias)")
_IN_LAYER = {
    "norm1": "attention_norm.weight",
    "attn_qkv": "query_key_value",
    "attn_out": "attention_output",
    "norm2": "feed_forward_norm.weight",
    "mlp.0": "expand",
    "mlp.2": "contract",
    "adaLN_modulation": "modulation",
}
_OUTSIDE = {
    "vocab_embed.embedding": "backbone.embedding.weight",
    "sigma_map.mlp.0.weight": "backbone.noise.0.weight",
    "sigma_map.mlp.0.bias": "backbone.noise.0.bias",
    "sigma_map.mlp.2.weight": "backbone.noise.2.weight",
    "sigma_map.mlp.2.bias": "backbone.noise.2.bias",
    "output_layer.norm_final.weight": "backbone.norm.weight",
    "output_layer.adaLN_modulation.weight": "backbone.modulation.weight",
    "output_layer.adaLN_modulation.bias": "backbone.modulation.bias",
    "output_layer.linear.weight": "head.weight",
    "output_layer.linear.bias": "head.bias",
}


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Shape of a :class:`DiT`; where it is not modulated there is no noise level at all."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    noise_width: int
    modulated: bool = True


class ScaleNorm(nn.Module):
    """Layer normalisation in float32 with a weight and no bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., width) with mean 0 and variance 1, times the weight."""
        return F.layer_norm(x.float(), x.shape[-1:]).to(self.weight.dtype) * self.weight


class DiTLayer(nn.Module):
    """Attention and feed-forward, each modulated and gated by the noise level."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.attention_norm = ScaleNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_output = nn.Linear(width, width, bias=False)
        self.feed_forward_norm = ScaleNorm(width)
        self.expand = nn.Linear(width, EXPANSION * width)
        self.contract = nn.Linear(EXPANSION * width, width)
        self.modulation = nn.Linear(config.noise_width, 6 * width) if config.modulated else None

    def forward(
        self,
        x: Tensor,  # shape: (B, Q, width)
        noise: Tensor | None,  # shape: (B, noise_width)
        rotation: tuple[Tensor, Tensor],  # shapes: (B, 1, Q, width / num_heads / 2)
        attended: Tensor,  # shape: (B or 1, 1, Q, K)
        past: KeysValues | None,
    ) -> tuple[Tensor, KeysValues]:
        """Return the features above, (B, Q, width), and keys and values of all K positions."""
        shift, scale, gate, shift_after, scale_after, gate_after = (0.0, 0.0, 1.0, 0.0, 0.0, 1.0)
        if self.modulation is not None and noise is not None:
            shift, scale, gate, shift_after, scale_after, gate_after = self.modulation(noise).unsqueeze(1).chunk(6, -1)
        projected = self.query_key_value(self.attention_norm(x) * (1 + scale) + shift)
        queries, keys, values = projected.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys = _rotated(queries, rotation), _rotated(keys, rotation)
        if past is not None:
            keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=attended)
        x = x + gate * self.attention_output(mixed.transpose(1, 2).flatten(2))
        hidden = self.expand(self.feed_forward_norm(x) * (1 + scale_after) + shift_after)
        x = x + gate_after * self.contract(F.gelu(hidden, approximate="tanh"))
        return x, (keys, values)


class DiT(nn.Module):
    """Embedding, layers, and what the output layer reads; see ``BackboneDenoiser`` for the contract."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, noise = config.width, config.noise_width
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(DiTLayer(config) for _ in range(config.num_layers))
        self.norm = ScaleNorm(width)
        if config.modulated:
            self.noise = nn.Sequential(nn.Linear(2 * NUM_FREQUENCIES, noise), nn.SiLU(), nn.Linear(noise, noise))
            self.modulation = nn.Linear(noise, 2 * width)

    def forward(
        self,
        tokens: Tensor,  # shape: (B, Q)
        attended: Tensor,  # shape: (B or 1, 1, Q, K)
        positions: Tensor,  # shape: (B, Q)
        *,
        past: list[KeysValues] | None = None,
        keep: bool = False,
        sigma: Tensor | None = None,  # shape: (B,)
    ) -> tuple[Tensor, list[KeysValues]]:
        """Return features (B, Q, width), and the keys and values of all K positions, if they are to be kept.

        ``past`` are those of K - Q positions before these, ``sigma`` the total noise, ``-log(1 - p)`` with p the
        probability of a mask; None: 0.
        """
        x = self.embedding(tokens)
        noise, shift, scale = None, 0.0, 0.0
        if self.config.modulated:
            sigma = torch.zeros(len(tokens), device=tokens.device) if sigma is None else sigma
            noise = F.silu(self.noise(_waves(sigma).to(x.dtype)))
            shift, scale = self.modulation(noise).unsqueeze(1).chunk(2, -1)
        rotation = _rotation(positions, self.config.width // self.config.num_heads)
        found = []
        for index, layer in enumerate(self.layers):
            x, keys_values = layer(x, noise, rotation, attended, past[index] if past is not None else None)
            if keep:
                found.append(keys_values)
        return self.norm(x) * (1 + scale) + shift, found


def dit_names(name: str) -> str | None:
    """Return the name here of a weight as MDLM and BD3-LM publish it."""
    match = _LAYER.fullmatch(name)
    if match is not None and f"{match[2]}{match[3] or ''}" in _IN_LAYER:
        own = _IN_LAYER[f"{match[2]}{match[3] or ''}"]
        return f"backbone.layers.{match[1]}.{own if own.endswith('weight') else f'{own}.{match[4]}'}"
    name = name.removeprefix("backbone.")
    if name == "rotary_emb.inv_freq" or name.startswith("sampling_eps_"):
        return None  # constants
    return _OUTSIDE.get(name, name)


def _waves(sigma: Tensor) -> Tensor:
    """Return cosines and sines of a noise level at geometric frequencies, (B, 2 NUM_FREQUENCIES)."""
    steps = torch.arange(NUM_FREQUENCIES, dtype=torch.float32, device=sigma.device) / NUM_FREQUENCIES
    angles = sigma.float().unsqueeze(1) * torch.exp(-math.log(LONGEST_PERIOD) * steps)
    return torch.cat([angles.cos(), angles.sin()], -1)


def _rotation(positions: Tensor, head_width: int) -> tuple[Tensor, Tensor]:
    half = head_width // 2
    frequencies = ROTARY_BASE ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angles = positions.float()[:, None, :, None] * frequencies
    return angles.cos(), angles.sin()


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    left, right = x.chunk(2, -1)
    cos, sin = (table.to(x.dtype) for table in rotation)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], -1)
