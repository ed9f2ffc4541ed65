"""Published weights, safetensors in one file or in many, put into a module of ours or of another library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from circuits.reading import checked_tensor_file, regular_size, unreadable
from diffusion.errors import CheckpointError
from diffusion.hub import read_json

SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
FILE_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
FALLBACK_PATTERNS = ("pytorch_model*.bin", "pytorch_model*.bin.index.json")
_INDEX = ".index.json"
_NAMED = 5
_WAY_OUT = "download the model again"

Module = TypeVar("Module", bound=nn.Module)
Names = Callable[[str], "str | None"]
"""From the name of a tensor in a file to its name in a module; None: it is left out on purpose."""


def tensor_files(folder: Path) -> list[Path]:
    """Return the files that hold a model's weights: safetensors where there are any, else those of ``torch.save``.

    An index file says which they are; without one it is the single file. Raises CheckpointError if there are none, or
    one that the index names is missing or lies elsewhere.
    """
    for single in (SAFETENSORS, TORCH):
        index = folder / f"{single}{_INDEX}"
        if index.is_file():
            return _indexed(folder, index)
        if (folder / single).is_file():
            return [folder / single]
    raise CheckpointError(f"{folder}: expected {SAFETENSORS}, {SAFETENSORS}{_INDEX} or {TORCH}, got none; {_WAY_OUT}")


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the tensor of all weights, on the CPU, those of one file in memory at a time.

    Files of ``torch.save`` are read without executing what they say. Raises CheckpointError if one is missing or
    corrupt.
    """
    for path in tensor_files(folder):
        yield from _of_safetensors(path) if path.suffix == ".safetensors" else _of_torch(path)


def load_weights(
    module: Module,
    folder: Path,
    *,
    names: Names = lambda name: name,
    dtype: torch.dtype | None = None,
    device: torch.device | str | Callable[[str], torch.device] = "cpu",
    absent: Callable[[str], bool] = lambda name: False,
) -> Module:
    """Put all weights of a folder into a module, in which they replace what is there; return the module.

    Args:
        module: may have been made on the device "meta", so that no memory is taken twice. Tensors without a file of
            their own (buffers that are not part of its ``state_dict``) are the caller's task.
        folder: a local one.
        names: from names in the files to names in ``module.state_dict()``.
        dtype: of floating-point weights; None: as in the files.
        device: where they go; or a function of a weight's name.
        absent: names of the module that need not be in the files (tied weights, say); they stay as they are.

    Raises:
        CheckpointError: weights are missing, unexpected or twice there, have another shape, NaN or infinite numbers.
    """
    wanted = module.state_dict(keep_vars=True)
    found: dict[str, Tensor] = {}
    unexpected = []
    for stored, tensor in read_weights(folder):
        name = names(stored)
        if name is None:
            continue
        if name not in wanted:
            unexpected.append(stored)
            continue
        if name in found:
            raise CheckpointError(f"{folder}: expected {name} once, got it twice, the second time as {stored}")
        if tensor.shape != wanted[name].shape:
            expected, got = tuple(wanted[name].shape), tuple(tensor.shape)
            raise CheckpointError(f"{folder}: {stored}: expected shape {expected}, got {got}; {_WAY_OUT}")
        place = device(name) if callable(device) else device
        found[name] = _converted(folder, stored, tensor, dtype).to(place)
    missing = [name for name in wanted if name not in found and not absent(name)]
    for kind, listed in (("unexpected", unexpected), ("missing", missing)):
        if listed:
            shown = ", ".join(listed[:_NAMED]) + (", ..." if len(listed) > _NAMED else "")
            raise CheckpointError(
                f"{folder}: expected the weights of {type(module).__name__}, got {len(listed)} {kind}: {shown}; is "
                "config.json that of these weights?"
            )
    module.load_state_dict(found, strict=False, assign=True)
    return module


def _converted(folder: Path, name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(f"{folder}: {name}: expected finite numbers, got NaN or infinite ones; {_WAY_OUT}")
    return tensor if dtype is None else tensor.to(dtype)


def _indexed(folder: Path, index: Path) -> list[Path]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{index}: expected a weight_map from weights to files, got none; {_WAY_OUT}")
    files = sorted(set(table.values()))
    for name in files:
        if Path(name).name != name or Path(name).suffix not in (".safetensors", ".bin"):
            raise CheckpointError(f"{index}: expected files beside it, got {name!r:.80}; {_WAY_OUT}")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: expected a file, for {index.name} names it, got none; {_WAY_OUT}")
    return [folder / name for name in files]


def _of_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        checked_tensor_file(path)
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                # a copy is aligned like all tensors, and does not keep the file
                yield name, file.get_tensor(name).clone()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise unreadable(path, error, way_out=_WAY_OUT) from error


def _of_torch(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        regular_size(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises whatever it likes
        raise unreadable(path, error, way_out=_WAY_OUT) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: expected a table of tensors, got something else; {_WAY_OUT}")
    yield from content.items()
