"""JSON files: written so that a reader never sees half of one, read as files that may be corrupt."""

from __future__ import annotations

import json
import os
from typing import Any

from circuits import reading
from circuits.files import replace_file


def write_json(path: str | os.PathLike[str], content: object) -> None:
    """Write ``content`` as JSON, in place of what is there."""
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def read_json(
    path: str | os.PathLike[str], *, limit: int = reading.MAX_SMALL_JSON, way_out: str = "delete it and start again"
) -> Any:
    """Return what a JSON file of at most ``limit`` bytes holds; raise CheckpointError if it cannot be read."""
    return reading.read_json(path, limit=limit, way_out=way_out)
