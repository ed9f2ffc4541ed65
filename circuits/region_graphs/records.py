"""Region graphs as JSON files. A file that is read is not trusted."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from circuits.errors import ArgumentError, CheckpointError, StructureError
from circuits.files import replace_file
from circuits.reading import check_keys, read_json, short
from circuits.region_graphs.builder import Partition, bits_of

if TYPE_CHECKING:
    from circuits.region_graphs.graph import RegionGraph

FORMAT = "unfactor-region-graph"
FORMAT_VERSION = 1

_MAX_BYTES = 1 << 28
_WAY_OUT = "give a file that RegionGraph.save wrote, or save the region graph again"
_MAX_SCOPE_BYTES = 1 << 32


def write(
    path: str | os.PathLike[str],
    scopes: Sequence[Sequence[int]],
    partitions: Sequence[tuple[int, Sequence[int]]],
    shape: Sequence[int] | None,
) -> None:
    """Write a region graph; the file appears at once or not at all."""
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "regions": [list(scope) for scope in scopes],
        "partitions": [[region, list(parts)] for region, parts in partitions],
        "shape": None if shape is None else list(shape),
    }
    text = json.dumps(record, separators=(",", ":"))
    if len(text) > _MAX_BYTES:
        raise ArgumentError(f"region graph: it takes {len(text)} bytes as JSON; the limit is {_MAX_BYTES}")
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="ascii")


def read(path: str | os.PathLike[str], kind: type[RegionGraph]) -> RegionGraph:
    """Read a region graph."""
    content = read_json(path, limit=_MAX_BYTES, way_out=_WAY_OUT)
    try:
        return _graph_of(_checked(content), kind)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; {_WAY_OUT}") from error


def _checked(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CheckpointError(f"format: expected {FORMAT}, got another")
    version = record.get("format_version")
    if isinstance(version, bool) or version != FORMAT_VERSION:
        raise CheckpointError(
            f"format version: expected {FORMAT_VERSION}, got {short(version)}; install a newer unfactor"
        )
    check_keys(record, {"format", "format_version", "regions", "partitions", "shape"})
    return record


def _graph_of(record: dict[str, Any], kind: type[RegionGraph]) -> RegionGraph:
    regions = _list("regions", record["regions"])
    num_vars = max((len(_list("a region", region)) for region in regions), default=0)
    if num_vars * len(regions) // 8 > _MAX_SCOPE_BYTES:
        raise CheckpointError(
            f"regions: expected at most {_MAX_SCOPE_BYTES} bytes of scopes, got {len(regions)} over {num_vars}"
        )
    for region in regions:  # the root has all variables, so their number bounds the bit sets
        for var in region:
            _check_integer("a region", var, num_vars - 1)
    partitions = []
    for entry in _list("partitions", record["partitions"]):
        if len(_list("a partition", entry)) != 2:
            raise CheckpointError(f"a partition: expected a region and its parts, got {short(entry)}")
        region, parts = entry
        for position in (region, *_list("parts", parts)):
            _check_integer("a partition", position, len(regions) - 1)
        partitions.append(Partition(region, tuple(parts)))
    shape = record["shape"]
    if shape is not None:
        for length in _list("shape", shape):
            _check_integer("shape", length, num_vars)
        shape = tuple(shape)
    try:
        return kind(tuple(bits_of(region) for region in regions), tuple(partitions), shape)
    except (StructureError, ArgumentError) as error:
        raise CheckpointError(f"region graph: {error}") from error


def _list(what: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise CheckpointError(f"{what}: expected a list, got {short(value)}")
    return value


def _check_integer(what: str, value: Any, greatest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= greatest:
        raise CheckpointError(f"{what}: expected integers from 0 to {greatest}, got {short(value)}")
