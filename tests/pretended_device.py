"""A second device for machines without one: tensors that say they are elsewhere, and compute on the CPU.

Such a tensor reports the device "meta", so that nothing mistakes it for one on the CPU, and keeps its numbers beside
it. Inside ``PretendedDevice()`` everything that is made on that device or moved to it is such a tensor, and what a CUDA
device refuses is refused here too: an operation on tensors of both devices, a generator of the other device, a
conversion to numpy. It counts how often the host waits for a number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")
_aten = torch.ops.aten
_MOVES = {_aten._to_copy.default, _aten.copy_.default}
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_WAITS = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.equal.default, _aten._unique2.default}

_RealGenerator = torch.Generator
_FIRST_SEED = 1 << 62
_seeds: set[int] = set()


class PretendedTensor(Tensor):
    """Numbers on the CPU that say they are elsewhere."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> PretendedTensor:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=DEVICE,
        )
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on the pretended device, outside of PretendedDevice()")

    def item(self) -> Any:
        return self.cpu().item()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert pretended device type tensor to numpy; use Tensor.cpu() first")
        return self.cpu().numpy()

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()


class Generator(torch.Generator):
    """``torch.Generator`` for the CPU and the pretended device; operations see of the latter its seed alone."""

    def __new__(cls, device: torch.device | str = "cpu") -> Any:
        is_here = torch.device(device).type == DEVICE.type
        return super().__new__(cls) if is_here else _RealGenerator(device)

    @property
    def device(self) -> torch.device:
        return DEVICE

    def manual_seed(self, seed: int) -> Generator:
        _seeds.add(_FIRST_SEED + seed)
        super().manual_seed(_FIRST_SEED + seed)
        return self


class Autocast(torch.autocast):
    """``torch.autocast``, for which the pretended device is the CPU."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)


class _FromNumbers(TorchFunctionMode):
    """Makes tensors of Python's numbers on the CPU first: on "meta" torch drops the numbers without asking anybody."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is torch.unravel_index:  # makes such tensors itself
            return tuple(part.to(args[0].device) for part in func(args[0].cpu(), *args[1:], **kwargs))
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], _without_lists(args[1]), *args[2:])
        return func(*args, **kwargs)


def _without_lists(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(map(_without_lists, index))
    return torch.tensor(index) if isinstance(index, list) else index


class PretendedDevice(TorchDispatchMode):
    """The device, as long as it is entered.

    Attributes:
        num_waits: how often the host had to wait for a number that the device computes.
        most_read: how many numbers it read at once at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_waits = self.most_read = 0
        self._from_numbers = _FromNumbers()

    def __enter__(self) -> PretendedDevice:
        self._from_numbers.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._from_numbers.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        target = kwargs.get("device")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        wrappers = {id(tensor.numbers): tensor for tensor in tensors if isinstance(tensor, PretendedTensor)}
        is_here = bool(wrappers) if target is None else torch.device(target).type == DEVICE.type
        if func not in _MOVES:
            _check_one_device(func, args, tensors, kwargs.get("generator"), is_here)
        if wrappers and (func in _WAITS or not is_here or _is_masked_index(func, args)):
            self.num_waits += 1
            self.most_read = max(self.most_read, 0 if is_here else max(tensor.numel() for tensor in tensors))
        if target is not None and is_here:
            kwargs["device"] = "cpu"
        unwrapped = tree_map_only(PretendedTensor, lambda tensor: tensor.numbers, (args, kwargs))
        out = func(*unwrapped[0], **unwrapped[1])
        if func is _aten.copy_.default:
            return args[0]
        if not is_here:
            return out
        return tree_map_only(
            Tensor, lambda made: wrappers[id(made)] if id(made) in wrappers else PretendedTensor(made), out
        )


def _check_one_device(func: Any, args: Any, tensors: list[Tensor], generator: Any, is_here: bool) -> None:
    """Refuse what CUDA refuses; numbers of no dimension on the CPU, and indices there, are taken."""
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, PretendedTensor)]
    if len(elsewhere) not in (0, len(tensors)):
        takes_scalars = torch.Tag.pointwise in func.tags or func in _INDEXING
        allowed = [tensor for tensor in elsewhere if takes_scalars and tensor.dim() == 0]
        if func in _INDEXING and isinstance(args[0], PretendedTensor):
            allowed += [index for index in args[1] if index is not None and not isinstance(index, PretendedTensor)]
        if len({id(tensor) for tensor in allowed} & {id(tensor) for tensor in elsewhere}) < len(elsewhere):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} found two")
    if generator is not None and (generator.initial_seed() in _seeds) != is_here:
        raise RuntimeError(f"{func} expected a generator of its own device")


def _is_masked_index(func: Any, args: Any) -> bool:
    return func in _INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
