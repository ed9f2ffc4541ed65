"""JSON files: written so that a reader never sees half of one, read as files that may be corrupt."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from circuits.files import regular_size, replace_file
from diffusion.errors import CheckpointError


def write_json(path: str | os.PathLike[str], content: object) -> None:
    """Write ``content`` as JSON, in place of what is there."""
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return what a JSON file holds; raise CheckpointError if it cannot be read."""
    try:
        regular_size(path)
        return json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
