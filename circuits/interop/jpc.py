"""PyJuice's checkpoints, files that end in ``.jpc``: read without running the pickle that they are, and written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from circuits.arguments import checked_device, checked_dtype
from circuits.engine.compile import CompiledCircuit
from circuits.errors import ArgumentError, CheckpointError, StructureError
from circuits.families import Bernoulli, Categorical, Distribution
from circuits.files import replace_file
from circuits.interop._build import build_circuit
from circuits.interop._nodes import JuiceNode
from circuits.interop._pickle import Call, StoredArray, array_of, describe, integer_of, read_pickle
from circuits.interop.pyjuice import Reader, import_pyjuice, to_pyjuice
from circuits.reading import open_regular, unreadable

_KINDS: dict[str, Literal["input", "product", "sum"]] = {"Input": "input", "Product": "product", "Sum": "sum"}
_CATEGORICAL = ("Categorical", "ExternProductCategorical", "SoftEvidenceCategorical")
_EXTERNAL = ("BlockScaleSumParams", "LowRankSumParams")
_FILES = ("pc_model.jpc", "model.jpc")
_LEAST_LIMIT = 1 << 26
_NUMBERS_A_BYTE = 8
"""What tables may be as large as that are sparse in the file."""
_MAX_CATEGORIES = 1 << 24
_SIZE_NAMES = (("num_node_blocks", "block_size"), ("num_node_groups", "group_size"), ("num_nodes", None))


def find_jpc(path_or_repo: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Return the checkpoint that is meant: the file itself, or that of a folder or of a repository of the hub.

    Args:
        path_or_repo: a file; a folder with ``model.jpc`` or ``pc_model.jpc``, as CoDD has them, or another ``.jpc``
            file as its only one; or the name of a repository, of which these files are fetched.
        revision: branch, tag or commit of the repository.

    Raises:
        CheckpointError: there is none, or it is not clear which one is meant.
    """
    path = Path(path_or_repo)
    if path.suffix == ".jpc" or path.is_file():
        return path
    folder = path if path.is_dir() else _fetched(os.fspath(path_or_repo), revision)
    found = sorted(folder.glob("*.jpc"))
    named = [file for file in found if file.name in _FILES]
    if len(named or found) != 1:
        raise CheckpointError(
            f"{path}: expected one checkpoint, {' or '.join(_FILES)}, got {', '.join(file.name for file in found)!r}; "
            "name the file"
        )
    return (named or found)[0]


def _fetched(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.jpc"]))
    except (OSError, ValueError, HFValidationError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{name}: expected a file, a folder or a repository of the hub, got {reason}; look at the name"
        ) from error


def load_jpc(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int | None = None,
) -> CompiledCircuit:
    """Load a circuit from a checkpoint that ``pyjuice.save`` wrote. Nothing in the file is executed.

    A ``.jpc`` file is a pickle. Its instructions are read as data; what would be a call is never made. PyJuice does not
    need to be installed. Tables are read a part at a time: beside the circuit itself little memory is needed.

    Inputs that take soft evidence there (``ExternProductCategorical``, ``SoftEvidenceCategorical``) are categorical
    here, where any input takes it. Of sums with ``external_params`` the shared weights are read, the only ones that a
    file holds; what PyJuice is given at each call, ``pc.weights(external=)`` takes here.

    Args:
        path: the file.
        device: where the parameters go.
        dtype: torch.float32 or torch.float64.
        seed: for weights that the file lacks; fresh entropy when omitted.

    Raises:
        ArgumentError: a wrong ``dtype``, or a device that is not here.
        CheckpointError: the file is missing, corrupt, hostile, or describes what this library's circuits do not have.
    """
    checked_dtype("dtype", dtype)
    checked_device("device", device)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            nodes = _nodes_of(read_pickle(file))
            return build_circuit(
                nodes, device=device, dtype=dtype, seed=seed, limit=max(_LEAST_LIMIT, _NUMBERS_A_BYTE * size)
            )
    except OSError as error:
        raise unreadable(path, error, way_out="give a file that pyjuice.save wrote") from error
    except (CheckpointError, ArgumentError, StructureError) as error:
        raise CheckpointError(f"{path}: {error}; give a file that pyjuice.save wrote") from error


def save_jpc(
    pc: CompiledCircuit, path: str | os.PathLike[str], *, block_size: int | None = None, for_: Reader = "pyjuice"
) -> None:
    """Write a circuit as a checkpoint that ``pyjuice.load`` reads.

    A ``.jpc`` file is a pickle, which PyJuice executes when it loads it: exchange such files with people you trust, and
    use ``ct.save`` for everything else.

    Args:
        pc: the circuit; its inputs are categorical or Bernoulli.
        path: the file to write; its name ends in ``.jpc``, and its folder is made if it is not there.
        block_size: units per block, see ``to_pyjuice``.
        for_: who reads the file, "pyjuice" or "codd", see ``to_pyjuice``.

    Raises:
        ArgumentError: another ending, a wrong block size or reader, or PyJuice is not installed.
        PropertyError: another input family.
    """
    if Path(path).suffix != ".jpc":
        raise ArgumentError(f"path: expected a file name that ends in .jpc, got {os.fspath(path)!r}")
    nodes = to_pyjuice(pc, block_size=block_size, for_=for_)
    with replace_file(path) as temporary:
        import_pyjuice().save(os.fspath(temporary), nodes)


def _nodes_of(records: Any) -> list[JuiceNode]:
    if not isinstance(records, list) or not records:
        raise CheckpointError(f"nodes: expected a list, got {describe(records)}")
    if len(set(map(id, records))) != len(records):
        raise CheckpointError("nodes: expected each of them once, got one several times")
    return [_node_of(record, position, len(records)) for position, record in enumerate(records)]


def _node_of(record: Any, position: int, num_nodes: int) -> JuiceNode:
    try:
        if not isinstance(record, dict):
            raise CheckpointError(f"record: expected a dictionary, got {describe(record)}")
        kind = _KINDS.get(record["type"]) if isinstance(record.get("type"), str) else None
        if kind is None:
            raise CheckpointError(f"type: expected Input, Product or Sum, got {describe(record.get('type'))}")
        if "external_params" in record:
            _check_external(record["external_params"])
        num_blocks, block_size = _sizes_of(record)
        children = _positions(record.get("chs"), position)
        if bool(children) == (kind == "input"):
            raise CheckpointError(
                f"chs: expected some of a product or sum, none of an input, got {len(children)} of {record['type']}"
            )
        source = None
        if "source_node" in record:
            source = _integer(record, "source_node", 0, num_nodes - 1)
        parameters = None if "params" not in record else _Stored(_array_of(record["params"], "f"))
        if kind == "input":
            family = _family_of(record.get("dist"))
            var = _variable_of(record.get("scope"), num_nodes)
            return JuiceNode(
                kind, num_blocks, block_size, parameters=parameters, var=var, distribution=family, source=source
            )
        edges = torch.from_numpy(_array_of(record.get("edge_ids"), "iu").read().astype(np.int64))
        zeros = None
        if record.get("zero_param_mask") is not None:
            zeros = torch.from_numpy(_array_of(record["zero_param_mask"], "b").read().copy())
        return JuiceNode(kind, num_blocks, block_size, children, edges, parameters, zeros, source=source)
    except CheckpointError as error:
        raise CheckpointError(f"node {position}: {error}") from error


def _sizes_of(record: Mapping[str, Any]) -> tuple[int, int]:
    for blocks, size in _SIZE_NAMES:
        if blocks in record:
            limit = 1 << 20
            block_size = 1 if size is None else _integer(record, size, 1, limit)
            return _integer(record, blocks, 1, limit), block_size
    raise CheckpointError("num_node_blocks: expected an integer, got none")


def _integer(record: Mapping[str, Any], key: str, least: int, greatest: int) -> int:
    value = integer_of(record.get(key))
    if not least <= value <= greatest:
        raise CheckpointError(f"{key}: expected an integer from {least} to {greatest}, got {value}")
    return value


def _positions(value: Any, position: int) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        raise CheckpointError(f"chs: expected positions of earlier nodes, got {describe(value)}")
    positions = tuple(integer_of(child) for child in value)
    if not all(0 <= child < position for child in positions):
        raise CheckpointError(f"chs: expected positions of earlier nodes, 0 to {position - 1}, got {positions!r:.60}")
    return positions


@dataclass(frozen=True, eq=False)
class _Stored:
    """Parameters in the file."""

    array: StoredArray

    @property
    def shape(self) -> tuple[int, ...]:
        """Their sizes."""
        return self.array.shape

    def part(self, start: int, stop: int) -> Tensor:
        """Return the numbers from ``start`` to ``stop`` of all of them, by rows; half precision as float32."""
        part = self.array.part(start, stop)
        kind = np.float64 if part.dtype.itemsize == 8 else np.float32
        return torch.from_numpy(part.astype(kind))


def _array_of(value: Any, kinds: str) -> StoredArray:
    array = array_of(value)
    if array.dtype.kind not in kinds:
        raise CheckpointError(f"array: expected another kind of numbers, got {array.dtype}")
    return array


def _variable_of(value: Any, num_nodes: int) -> int:
    if not isinstance(value, (tuple, list)) or len(value) != 1:
        raise CheckpointError(f"scope: expected one variable, got {describe(value)}")
    return _integer({"scope": value[0]}, "scope", 0, num_nodes - 1)  # every variable has a node of its own


def _check_external(value: Any) -> None:
    """Check that sums are given external weights in one of the ways that leave the shared ones as they are."""
    pickled = read_pickle(value) if isinstance(value, bytes) else None
    if _name_in_pyjuice(pickled) not in _EXTERNAL:
        raise CheckpointError(f"external_params: expected {' or '.join(_EXTERNAL)}, got {describe(pickled)}")


def _name_in_pyjuice(pickled: Any) -> str:
    if isinstance(pickled, Call) and pickled.function.module.startswith("pyjuice."):
        return pickled.function.name
    return ""


def _family_of(value: Any) -> Distribution:
    """Read the family of an input node, a pickle inside the pickle: a class's name and its attributes."""
    if not isinstance(value, bytes):
        raise CheckpointError(f"dist: expected bytes, got {describe(value)}")
    pickled = read_pickle(value)
    name = _name_in_pyjuice(pickled)
    if name == "Bernoulli":
        return Bernoulli()
    if name in _CATEGORICAL:
        named = pickled.state if isinstance(pickled.state, dict) else {}
        if pickled.arguments:  # (num_cats,), and a flag of the backward pass with SoftEvidenceCategorical
            named = {"num_cats": pickled.arguments[0]}
        return Categorical(_integer(named, "num_cats", 1, _MAX_CATEGORIES))
    raise CheckpointError(f"dist: expected PyJuice's Bernoulli, {', '.join(_CATEGORICAL)}, got {describe(pickled)}")
