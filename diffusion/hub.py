"""Files of pretrained models, from a folder or the Hugging Face hub."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from circuits import reading
from diffusion.errors import ArgumentError, CheckpointError

CONFIG = "config.json"
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
"""Patterns of all that is small: configs, tokenizers, chat templates."""
_WAY_OUT = "download the model again"


def fetch(name_or_path: str | os.PathLike[str], patterns: tuple[str, ...], *, revision: str | None = None) -> Path:
    """Return a local folder: the one that is named, or that of the hub's repository, with the files of some patterns.

    Raises ArgumentError if there is no such folder or repository.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    name = os.fspath(name_or_path)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (OSError, ValueError, HFValidationError) as error:
        raise ArgumentError(
            f"name_or_path: expected a folder or a repository of the hub, got {name!r}: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raises CheckpointError if it is missing, too large, or holds something else."""
    content = reading.read_json(path, way_out=_WAY_OUT)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}; {_WAY_OUT}")
    return content


def require(package: str) -> Any:
    """Return a package of the extra ``hf``; raise ArgumentError where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ArgumentError(
            f"name_or_path: expected the package {package} for this model, got none; pip install 'unfactor[hf]'"
        ) from error
