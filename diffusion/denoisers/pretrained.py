"""Denoisers by name: a folder, or a repository of the Hugging Face hub, and the adapter that its config asks for."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from diffusion.denoisers.base import Denoiser
from diffusion.denoisers.checkpoints import FALLBACK_PATTERNS, FILE_PATTERNS
from diffusion.errors import ArgumentError, CheckpointError
from diffusion.hub import CONFIG, SMALL_FILES, fetch, read_json


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a pretrained model comes from, and how it is wanted. Adapters get one and return a denoiser.

    Attributes:
        name: of the hub's repository, or the folder, as it was asked for.
        folder: local, with ``config.json``; the weights are there too when an adapter is called.
        config: the content of ``config.json``.
        device: where the weights go: a device; "auto", spread over all of them; or a table from modules to devices.
        dtype: of the weights; None: that of the files.
        revision: of the hub's repository.
        trust_remote_code: whether code of that repository may be executed.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    device: torch.device | str | Mapping[str, Any] = "cpu"
    dtype: torch.dtype | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def number(self, key: str, default: int | None = None) -> int:
        """Return a whole number of the config, ``default`` where it is absent or null; else raises CheckpointError."""
        value = self.config.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(f"{self.folder / CONFIG}: {key}: expected a whole number, got {value!r:.80}")
        return value

    @property
    def one_device(self) -> torch.device | str:
        """The device, where it is a single one; raises ArgumentError where the weights are to be spread."""
        if not isinstance(self.device, str | torch.device) or self.device == "auto":
            raise ArgumentError(f"device: expected one device for this model, got {self.device!r:.80}; name it")
        return self.device

    def check(self, expected: Mapping[str, Any]) -> None:
        """Refuse a config that asks for what an adapter does not do.

        Args:
            expected: by key, the only value that is implemented; a key may also be absent.

        Raises:
            ArgumentError: another value.
        """
        for key, value in expected.items():
            found = self.config.get(key, value)
            if found != value:
                raise ArgumentError(
                    f"{self.name}: {key}: expected {value!r}, got {found!r:.80}; write an adapter for this architecture"
                )


ADAPTERS: dict[str, str] = {
    "unfactor-transformer": "diffusion.denoisers.adapters.own:load",
    "llada": "diffusion.denoisers.adapters.llada:load",
    "illada": "diffusion.denoisers.adapters.llada:load_illada",
    "dream": "diffusion.denoisers.adapters.dream:load",
    "mdlm": "diffusion.denoisers.adapters.mdlm:load",
    "bd3lm": "diffusion.denoisers.adapters.bd3lm:load",
    "sdar": "diffusion.denoisers.adapters.sdar:load",
    "llada2_moe": "diffusion.denoisers.adapters.remote:load",
    "sdar_moe": "diffusion.denoisers.adapters.remote:load",
}
"""From ``model_type`` in a config, in lower case, to ``module:function``: from a :class:`Source` to a denoiser."""

MASKED_LM = "diffusion.denoisers.masked_lm:load"
"""The function for every architecture that is called ``...ForMaskedLM``."""

_UNIFORM = "it replaces tokens by random ones and has no mask, and a circuit couples the tokens of masked positions"
REFUSED: dict[str, str] = dict.fromkeys(("diffusion_gemma", "diffusion_gemma_text", "udlm"), _UNIFORM)
"""From ``model_type`` to the reason why there is no adapter, and can be none."""


def load_denoiser(
    name_or_path: str | os.PathLike[str],
    *,
    device: torch.device | str | Mapping[str, Any] = "cpu",
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Denoiser:
    """Load a pretrained denoiser: LLaDA, Dream, MDLM, BD3-LM, SDAR, a masked language model, or one of ours.

    The adapter is chosen by ``config.json``, before any weight is downloaded.

    Args:
        name_or_path: a local folder, or the name of a repository on the Hugging Face hub.
        device: of the weights; "auto", or a table from modules to devices, spreads them over several.
        dtype: of the weights, for example ``torch.bfloat16`` or "bfloat16"; None: that of the files.
        revision: a branch, tag or commit of the hub's repository.
        trust_remote_code: execute the modelling code that comes with the model. Only models whose architecture is not
            in transformers nor here need it (LLaDA2); others never use it.

    Raises:
        ArgumentError: there is no such folder or repository, or no adapter for this kind of model.
        CheckpointError: a file is missing or corrupt, or the weights do not fit the config.
    """
    source = _described(name_or_path, revision)
    adapter = _adapter_of(source)
    source = replace(
        source, device=device, dtype=_dtype_of(dtype), trust_remote_code=trust_remote_code, folder=_with_weights(source)
    )
    module, _, function = adapter.partition(":")
    return cast(Denoiser, getattr(importlib.import_module(module), function)(source))


def _described(name_or_path: str | os.PathLike[str], revision: str | None) -> Source:
    if not isinstance(name_or_path, str | os.PathLike):
        raise ArgumentError(f"name_or_path: expected a name or a path, got {type(name_or_path).__name__}")
    folder = fetch(name_or_path, SMALL_FILES, revision=revision)
    config = read_json(folder / CONFIG)
    return Source(name=os.fspath(name_or_path), folder=folder, config=config, revision=revision)


def _with_weights(source: Source) -> Path:
    """Return the folder once the weights are in it: safetensors, or what else there is."""
    folder = fetch(source.name, (*SMALL_FILES, *FILE_PATTERNS), revision=source.revision)
    if not any(folder.glob(FILE_PATTERNS[0])):
        folder = fetch(source.name, (*SMALL_FILES, *FALLBACK_PATTERNS), revision=source.revision)
    return folder


def _adapter_of(source: Source) -> str:
    config = source.config
    kind = str(config.get("model_type") or config.get("format") or "").lower()
    architectures = config.get("architectures")
    named = [str(name) for name in architectures] if isinstance(architectures, list) else []
    if kind in REFUSED:
        raise ArgumentError(f"{source.name}: a model of type {kind} cannot be a denoiser here: {REFUSED[kind]}")
    if kind in ADAPTERS:
        return ADAPTERS[kind]
    if any(name.endswith("ForMaskedLM") for name in named):
        return MASKED_LM
    raise ArgumentError(
        f"{source.name}: expected model_type to be one of {', '.join(sorted(ADAPTERS))}, or an architecture "
        f"...ForMaskedLM, got {kind or None!r:.80} and {', '.join(named) or None!s:.200}; write an adapter: a class "
        "with spec and logits (see Denoiser)"
    )


def _dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise ArgumentError(f"dtype: expected a floating-point dtype of torch, got {dtype!r:.80}")
    return dtype
