"""A small bidirectional transformer, trained from scratch on windows of text with a noised block at their end."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from circuits.files import check_finite, not_finite, read_tensors, write_tensors
from circuits.reading import MAX_SMALL_JSON, checked_tensor_file, read_json, record_of, unreadable
from circuits.store import Manifest, read_folder, replace_folder, write_manifest
from diffusion.denoisers.base import DenoiserSpec
from diffusion.denoisers.layers import KeysValues, Layer, PrefixCache, rotation_of
from diffusion.denoisers.questions import check_question
from diffusion.errors import ArgumentError, CheckpointError

FORMAT = "unfactor-transformer"
FORMAT_VERSION = 2  # 1 had no hashes
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_WAY_OUT = "save the model again"
EMBEDDING_STD = 0.02
"""Tied embeddings with a standard deviation near 1 keep training on the unigram plateau."""

Attention = Literal["bidirectional", "block_causal"]


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
        attention: what a position attends to: "bidirectional", everything; or "block_causal", blocks of
            ``block_length`` up to its own, counted from the window's beginning (Arriola et al. 2025, arXiv 2503.09573),
            so that a cache of what stands before a window is exact.
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
    attention: Attention = "bidirectional"

    def __post_init__(self) -> None:
        for name in ("block_length", "max_length", "width", "num_layers", "num_heads", "expansion"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}: expected an integer >= 1, got {getattr(self, name)}")
        if self.context_length < 0:
            raise ArgumentError(f"context_length: expected an integer >= 0, got {self.context_length}")
        if self.width % (2 * self.num_heads):
            raise ArgumentError(f"width: expected a multiple of 2 * num_heads = {2 * self.num_heads}, got {self.width}")
        if self.attention not in get_args(Attention):
            raise ArgumentError(
                f"attention: expected one of {', '.join(get_args(Attention))}, got {self.attention!r}; see the options"
            )
        if self.max_length < self.span:
            raise ArgumentError(
                f"max_length: expected at least context_length + block_length = {self.span}, got {self.max_length}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the options as they stand in a file; bidirectional attention goes unnamed, as it always did."""
        content = asdict(self)
        if self.attention == "bidirectional":
            del content["attention"]
        return content

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
        self.layers = nn.ModuleList(
            Layer(config.width, config.num_heads, config.expansion) for _ in range(config.num_layers)
        )
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
        which the model is trained for up to ``span`` positions. ``t`` is not used.

        With ``cache``, see :meth:`new_cache`, the positions before a window are computed when it is asked about first,
        and again when one of their tokens changes. That is exact with block-causal attention; with bidirectional
        attention they keep what they saw of the window then (Wu et al. 2025, arXiv 2505.22618). Where gradients are
        on, it is not used.

        Raises ArgumentError if a shape, dtype, id or the window does not fit, or L exceeds ``spec.max_length``.
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
        start, stop = check_question(self.spec, tokens, valid, window)
        if self.output_bias.dtype in (torch.bfloat16, torch.float16):
            raise ArgumentError(
                f"model: expected weights in float32, got {self.output_bias.dtype}; call model.float(), and "
                "torch.autocast for products in half precision"
            )
        first = min(start, max(0, stop - self.config.span)) if window is not None else 0
        tokens = tokens[:, first:stop]
        valid = valid[:, first:stop] if valid is not None else None
        if cache is not None and not isinstance(cache, PrefixCache):
            raise ArgumentError(f"cache: expected what new_cache() returned, got {type(cache).__name__}")
        if cache is None or start == first or torch.is_grad_enabled():
            features = self._features(tokens, valid, wanted_from=start - first)[0]
        else:
            features = self._cached_features(tokens, valid, (start, stop), start - first, cache)
        return F.linear(features, self.embedding.weight, self.output_bias).float(), features.float()

    def new_cache(self) -> PrefixCache:
        """Return an empty cache for the ``cache`` argument: of one text, asked about window by window."""
        return PrefixCache()

    def _cached_features(
        self, tokens: Tensor, valid: Tensor | None, window: tuple[int, int], wanted_from: int, cache: PrefixCache
    ) -> Tensor:
        valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
        prefix = tokens[:, :wanted_from], valid[:, :wanted_from]
        stale = cache.stale_rows(window, *prefix)
        if stale is None:
            features, layers = self._features(tokens, valid, wanted_from=wanted_from)
            cache.store(window, *prefix, [(k[:, :, :wanted_from], v[:, :, :wanted_from]) for k, v in layers])
            return features
        cache.num_reused += 1
        if len(stale):
            layers = self._features(tokens[stale], valid[stale], wanted_from=wanted_from)[1]
            parts = [(k[:, :, :wanted_from], v[:, :, :wanted_from]) for k, v in layers]
            cache.replace_rows(stale, prefix[0][stale], prefix[1][stale], parts)
        return self._features(tokens, valid, wanted_from=wanted_from, past=cache.layers)[0]

    def _features(
        self, tokens: Tensor, valid: Tensor | None, *, wanted_from: int, past: list[KeysValues] | None = None
    ) -> tuple[Tensor, list[KeysValues]]:
        """Return features of the wanted positions, and all keys and values; with ``past`` only those are computed."""
        length = tokens.shape[1]
        rotation = rotation_of(length, self.config.width // self.config.num_heads, tokens.device)
        attended = self._attended(tokens, valid, wanted_from)
        begins = wanted_from if past is not None else 0
        attended = attended[:, :, begins:] if attended is not None else None
        x = self.embedding(tokens[:, begins:])
        last, found = len(self.layers) - 1, []
        for index, layer in enumerate(self.layers):
            wanted = wanted_from - begins if index == last else 0
            before = past[index] if past is not None else None
            x, keys_values = layer(x, rotation, attended, wanted_from=wanted, past=before)
            found.append(keys_values)
        return self.norm(x), found

    def _attended(self, tokens: Tensor, valid: Tensor | None, start: int) -> Tensor | None:
        """Return which positions attend to which, bool (B or 1, 1, L, L); None: all to all."""
        length, device, attended = tokens.shape[1], tokens.device, None
        if self.config.attention == "block_causal":
            block = (torch.arange(length, device=device) - start).div(self.config.block_length, rounding_mode="floor")
            attended = (block.unsqueeze(1) >= block).unsqueeze(0)
        if valid is not None and not bool(valid.all()):
            # A position always attends to itself, so that no row of the softmax is empty.
            itself = torch.eye(length, dtype=torch.bool, device=device)
            seen = valid[:, None, :] | itself
            attended = seen if attended is None else seen & attended
        return attended.unsqueeze(1) if attended is not None else None

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        self.embedding.weight.normal_(std=EMBEDDING_STD, generator=generator)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.initialise(generator, num_layers=len(self.layers))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder with ``config.json`` and ``model.safetensors``; a ``tokenizer.json`` in it stays.

        It is swapped in as a whole: whoever loads it, at any time, gets the version before or this one.

        Raises:
            ArgumentError: the folder holds something else, or a weight is NaN or infinite.
            StorageError: it cannot be written: no space, no permission, ...
        """
        weights, config = self.state_dict(), self.config.to_dict()
        bad = not_finite(weights)
        if bad is not None:
            raise ArgumentError(f"model: {bad} has NaN or infinite numbers; such a denoiser cannot be saved")
        with replace_folder(folder, (_CONFIG, _WEIGHTS), kind="a saved denoiser", kept=("tokenizer.json",)) as new:
            write_tensors(
                new / _WEIGHTS, weights, format=FORMAT, version=FORMAT_VERSION, metadata={"config": json.dumps(config)}
            )
            text = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **config}, indent=2)
            (new / _CONFIG).write_text(text + "\n", encoding="utf-8")
            write_manifest(new, format=FORMAT, version=FORMAT_VERSION)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> TransformerDenoiser:
        """Read what ``save`` wrote.

        Raises CheckpointError if a file is missing or corrupt, of a newer format, or the two do not fit together.
        """
        return read_folder(folder, cls._loaded, format=FORMAT).to(device)

    @classmethod
    def _loaded(cls, folder: Path, manifest: Manifest) -> TransformerDenoiser:
        version, content = _read_config(folder / _CONFIG)
        path = folder / _WEIGHTS
        try:
            if version == 1:  # without a hash
                checked_tensor_file(path)
                weights = load_file(path)
            else:
                metadata, weights = read_tensors(
                    path, format=FORMAT, versions=(version,), way_out=_WAY_OUT, is_verified=_WEIGHTS in manifest.files
                )
                if json.loads(metadata["config"]) != content:
                    raise CheckpointError(
                        f"{folder / _CONFIG}: expected the one of {_WEIGHTS}, got another; {_WAY_OUT}"
                    )
            check_finite(weights, path, way_out=_WAY_OUT)
            model = cls(_config_of(content, weights, folder / _CONFIG))
            model.load_state_dict(weights)
        except CheckpointError:
            raise
        except (OSError, SafetensorError) as error:
            raise unreadable(path, error, way_out=_WAY_OUT) from error
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: expected the weights of {_CONFIG}, got {' '.join(str(error).split()):.500}; {_WAY_OUT}"
            ) from error
        return model


def _read_config(path: Path) -> tuple[int, dict[str, Any]]:
    """Return the format version of a saved denoiser, and the rest of its configuration as it stands there."""
    content = read_json(path, limit=MAX_SMALL_JSON, way_out=_WAY_OUT)
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path}: format: expected {FORMAT}, got another; {_WAY_OUT}")
    version = content.pop("format_version", None)
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version: expected 1 to {FORMAT_VERSION}, got {version!r:.80}; install a newer unfactor"
        )
    return version, content


def _config_of(content: dict[str, Any], weights: Mapping[str, Tensor], path: Path) -> TransformerConfig:
    """Return the configuration, once no part of the model that it describes is larger than its weights."""
    try:
        config = record_of(TransformerConfig, content, path.name, optional=["attention"])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; {_WAY_OUT}") from error
    total, width = sum(tensor.numel() for tensor in weights.values()), config.width
    parts = max(config.vocab_size, config.num_layers * width, config.expansion * width) * width
    if parts > total or config.num_layers > len(weights):
        raise CheckpointError(
            f"{path}: expected sizes of {total} weights, as {_WEIGHTS} has, got larger ones; {_WAY_OUT}"
        )
    return config
