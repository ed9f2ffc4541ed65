"""A small bidirectional transformer, trained from scratch on windows of text with a noised block at their end."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from circuits.files import not_finite, read_folder, read_tensors, regular_size, replace_folder, write_tensors
from diffusion.denoisers.base import DenoiserSpec
from diffusion.errors import ArgumentError, CheckpointError

FORMAT = "unfactor-transformer"
FORMAT_VERSION = 2  # 1 had no hashes
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_WAY_OUT = "save the model again"
ROTARY_BASE = 10_000.0
EMBEDDING_STD = 0.02
"""Tied embeddings with a standard deviation near 1 keep training on the unigram plateau."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of a ``TransformerDenoiser``.

    Attributes:
        vocab_size: V, special tokens included.
        mask_id: id of the mask token.
        pad_id: id of the padding token.
        eos_id: id of the end-of-text token.
        forbidden_ids: ids that must never be generated, besides mask and padding: for example, the unknown character.
        context_length: visible tokens before the noised block, in training.
        block_length: tokens of the noised block, in training.
        max_length: the longest sequence that ``logits`` accepts.
        width: features per position.
        num_layers: attention and feed-forward pairs.
        num_heads: attention heads; ``width / num_heads`` must be an even integer.
        expansion: hidden features of a feed-forward layer, in multiples of ``width``.
    """

    vocab_size: int
    mask_id: int
    pad_id: int
    eos_id: int
    forbidden_ids: tuple[int, ...] = ()
    context_length: int = 32
    block_length: int = 32
    max_length: int = 4096
    width: int = 192
    num_layers: int = 4
    num_heads: int = 6
    expansion: int = 4

    def __post_init__(self) -> None:
        for name in ("block_length", "max_length", "width", "num_layers", "num_heads", "expansion"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.context_length < 0:
            raise ArgumentError(f"context_length must be at least 0, got {self.context_length}")
        if self.width % (2 * self.num_heads):
            raise ArgumentError(f"width must be a multiple of 2 * num_heads = {2 * self.num_heads}, got {self.width}")
        if self.max_length < self.span:
            raise ArgumentError(
                f"max_length must be at least context_length + block_length = {self.span}, got {self.max_length}"
            )

    @property
    def span(self) -> int:
        """Positions that the model sees at once in training: context and block."""
        return self.context_length + self.block_length


class TransformerDenoiser(nn.Module):
    """A pre-norm bidirectional transformer over tokens; see ``Denoiser`` for the contract of ``logits``.

    Positions enter by rotation of queries and keys only (Su et al. 2021, arXiv 2104.09864), so that only distances
    count and padding at the left changes nothing. The time is not an input: the masks show it (Sahoo et al. 2024).

    Args:
        config: the shape.
        seed: of the initial weights.
    """

    def __init__(self, config: TransformerConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.spec = DenoiserSpec(
            vocab_size=config.vocab_size,
            mask_id=config.mask_id,
            eos_ids=(config.eos_id,),
            pad_id=config.pad_id,
            forbidden_ids=tuple(sorted({config.mask_id, config.pad_id, *config.forbidden_ids})),
            max_length=config.max_length,
        )
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width)
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self._initialise(torch.Generator().manual_seed(seed))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.output_bias.device

    @property
    def num_parameters(self) -> int:
        """Number of trained scalars."""
        return sum(parameter.numel() for parameter in self.parameters())

    def logits(
        self,
        tokens: Tensor,  # shape: (B, L)
        *,
        valid: Tensor | None = None,  # shape: (B, L)
        t: Tensor | None = None,
        window: tuple[int, int] | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Return logits of the clean tokens, float32, shape (B, L, V) or (B, stop - start, V).

        With ``window=(start, stop)`` the model looks only at positions ``max(0, stop - span) .. stop - 1`` (from
        ``start``, if the window is longer than that), with ``span = context_length + block_length`` as in training: so
        texts up to ``max_length`` can be continued block by block. Without a window every position sees every other,
        which the model is trained for up to ``span`` positions. ``t`` and ``cache`` are not used.

        Raises:
            ArgumentError: a shape, dtype, id or the window does not fit, or L exceeds ``spec.max_length``.
        """
        return self.logits_and_features(tokens, valid=valid, t=t, window=window, cache=cache)[0]

    def logits_and_features(
        self,
        tokens: Tensor,  # shape: (B, L)
        *,
        valid: Tensor | None = None,  # shape: (B, L)
        t: Tensor | None = None,
        window: tuple[int, int] | None = None,
        cache: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the logits as :meth:`logits` does, and the normalised features of the last layer.

        Returns:
            float32 (B, L, V) and (B, L, width), or those of the window's positions.

        Raises:
            ArgumentError: a shape, dtype, id or the window does not fit, or L exceeds ``spec.max_length``.
        """
        self._check(tokens, valid, window)
        start, stop = window if window is not None else (0, tokens.shape[1])
        first = min(start, max(0, stop - self.config.span)) if window is not None else 0
        tokens = tokens[:, first:stop]
        valid = valid[:, first:stop] if valid is not None else None
        features = self._features(tokens, valid, wanted_from=start - first)
        return F.linear(features, self.embedding.weight, self.output_bias).float(), features.float()

    def _features(self, tokens: Tensor, valid: Tensor | None, *, wanted_from: int) -> Tensor:
        length = tokens.shape[1]
        rotation = _rotation(length, self.config.width // self.config.num_heads, tokens.device)
        attended = None
        if valid is not None and not bool(valid.all()):
            # A position always attends to itself, so that no row of the softmax is empty.
            itself = torch.eye(length, dtype=torch.bool, device=tokens.device)
            attended = (valid[:, None, :] | itself)[:, None]
        x = self.embedding(tokens)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            x = layer(x, rotation, attended, wanted_from=wanted_from if index == last else 0)
        return self.norm(x)

    def _check(self, tokens: Tensor, valid: Tensor | None, window: tuple[int, int] | None) -> None:
        if tokens.ndim != 2 or tokens.dtype != torch.int64:
            raise ArgumentError(
                f"tokens must be int64 of shape (B, L), got {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
        length = tokens.shape[1]
        if length > self.spec.max_length:
            raise ArgumentError(
                f"tokens must have at most max_length = {self.spec.max_length} positions, got {length}: "
                "shorten the prompt, or build the model with a larger max_length"
            )
        if tokens.numel():
            smallest, largest = (int(value) for value in torch.aminmax(tokens))
            if smallest < 0 or largest >= self.spec.vocab_size:
                raise ArgumentError(
                    f"tokens must be ids in 0..{self.spec.vocab_size - 1}, got ids from {smallest} to {largest}: "
                    "encode the text with the tokenizer that the model was trained with"
                )
        if valid is not None and (valid.dtype != torch.bool or valid.shape != tokens.shape):
            raise ArgumentError(
                f"valid must be bool of shape {tuple(tokens.shape)}, got {valid.dtype} of shape {tuple(valid.shape)}"
            )
        if window is not None and not 0 <= window[0] <= window[1] <= length:
            raise ArgumentError(f"window must satisfy 0 <= start <= stop <= {length}, got {window}")

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        self.embedding.weight.normal_(std=EMBEDDING_STD, generator=generator)
        for layer in self.layers:
            assert isinstance(layer, _Layer)
            layer.initialise(generator, num_layers=len(self.layers))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder with ``config.json`` and ``model.safetensors``; a ``tokenizer.json`` in it stays.

        It is swapped in as a whole: whoever loads it, at any time, gets the version before or this one.

        Raises:
            ArgumentError: the folder holds something else, or a weight is NaN or infinite.
        """
        weights, config = self.state_dict(), asdict(self.config)
        bad = not_finite(weights)
        if bad is not None:
            raise ArgumentError(f"model: {bad} has NaN or infinite numbers; such a denoiser cannot be saved")
        with replace_folder(folder, (_CONFIG, _WEIGHTS), kind="a saved denoiser", kept=("tokenizer.json",)) as new:
            write_tensors(
                new / _WEIGHTS, weights, format=FORMAT, version=FORMAT_VERSION, metadata={"config": json.dumps(config)}
            )
            text = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **config}, indent=2)
            (new / _CONFIG).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> TransformerDenoiser:
        """Read what ``save`` wrote.

        Raises:
            CheckpointError: a file is missing or corrupt, of a newer format, or the two do not fit together.
        """
        return read_folder(folder, cls._loaded).to(device)

    @classmethod
    def _loaded(cls, folder: Path) -> TransformerDenoiser:
        version, content = _read_config(folder / _CONFIG)
        path = folder / _WEIGHTS
        try:
            if version == 1:  # without a hash
                regular_size(path)
                weights = load_file(path)
            else:
                metadata, weights = read_tensors(path, format=FORMAT, versions=(version,), way_out=_WAY_OUT)
                if json.loads(metadata["config"]) != content:
                    raise CheckpointError(f"{folder / _CONFIG} does not belong to {_WEIGHTS}; {_WAY_OUT}")
            bad = not_finite(weights)
            if bad is not None:
                raise CheckpointError(f"{path}: {bad} has NaN or infinite numbers; {_WAY_OUT}")
            model = cls(_config_of(content, folder / _CONFIG))
            model.load_state_dict(weights)
        except CheckpointError:
            raise
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read the weights {path}: {error}; {_WAY_OUT}") from error
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} does not fit {_CONFIG}: {error}; {_WAY_OUT}") from error
        return model


class _Layer(nn.Module):
    """Attention and feed-forward, each on normalised input and added to what came in."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.expansion * config.width
        self.num_heads = config.num_heads
        self.attention_norm = nn.RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        # queries and keys of unit scale allow a learning rate three times as high (Henry et al. 2020, arXiv 2010.04245)
        self.query_norm = nn.RMSNorm(width // config.num_heads)
        self.key_norm = nn.RMSNorm(width // config.num_heads)
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
        rotation: tuple[Tensor, Tensor],  # shapes: (L, width / num_heads / 2)
        attended: Tensor | None,  # shape: (B, 1, L, L)
        *,
        wanted_from: int,
    ) -> Tensor:  # shape: (B, L - wanted_from, width)
        """Return the features of the positions from ``wanted_from`` on, which attend to all positions."""
        normalised = self.attention_norm(x)
        keys, values = self._heads(self.key_value(normalised), 2 * self.num_heads).chunk(2, dim=1)
        queries = self._heads(self.query(normalised[:, wanted_from:]), self.num_heads)
        mixed = _attention(
            _rotate(self.query_norm(queries.float()), rotation, first=wanted_from),
            _rotate(self.key_norm(keys.float()), rotation, first=0),
            values,
            attended[:, :, wanted_from:] if attended is not None else None,
        )
        x = x[:, wanted_from:] + self.attention_output(mixed.transpose(1, 2).flatten(2))
        hidden = F.relu(self.expand(self.feed_forward_norm(x))).square()
        output: Tensor = x + self.contract(hidden)
        return output

    @staticmethod
    def _heads(features: Tensor, num_heads: int) -> Tensor:
        return features.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _attention(queries: Tensor, keys: Tensor, values: Tensor, attended: Tensor | None) -> Tensor:
    if values.device.type == "cpu":
        # There the fused kernel is about four times slower in bfloat16 than in float32.
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(queries, keys, values.float(), attn_mask=attended)
    queries, keys = queries.to(values.dtype), keys.to(values.dtype)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=attended)


def _rotation(length: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    half = head_width // 2
    frequencies = ROTARY_BASE ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor], *, first: int) -> Tensor:
    cos, sin = (table[first : first + x.shape[-2]] for table in rotation)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


def _read_config(path: Path) -> tuple[int, dict[str, Any]]:
    """Return the format version of a saved denoiser, and the rest of its configuration as it stands there."""
    try:
        regular_size(path)
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read the model's {path}: {error}; {_WAY_OUT}") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path} does not describe a TransformerDenoiser: expected 'format': {FORMAT!r}")
    version = content.pop("format_version", None)
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version!r:.80}, this library reads up to {FORMAT_VERSION}: install a newer one"
        )
    return version, content


def _config_of(content: dict[str, Any], path: Path) -> TransformerConfig:
    known = {field.name for field in fields(TransformerConfig)}
    if set(content) != known or not all(_is_int_or_ints(value) for value in content.values()):
        raise CheckpointError(f"{path} must hold whole numbers for exactly: {', '.join(sorted(known))}")
    try:
        return TransformerConfig(**content | {"forbidden_ids": tuple(content["forbidden_ids"])})
    except (ArgumentError, TypeError) as error:
        raise CheckpointError(f"{path} is not valid: {error}; {_WAY_OUT}") from error


def _is_int_or_ints(value: object) -> bool:
    return all(type(item) is int for item in value) if isinstance(value, list) else type(value) is int
