"""Tensors whose values stay in a file: a graph of a model larger than memory holds them as its constants.

A ``FileTensor`` knows shape and dtype. An operator that takes it reads the values, so passes and the interpreter treat it as any other
tensor. It cannot be written to. Values are read, not mapped: mapped pages would count as memory of this process. Those read last are kept,
up to ``KEPT`` bytes, because a pass asks several things of one weight in turn, and a small model's weights are read once only.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from qcompile.errors import Refused

LARGE = 1 << 20  # bytes of a tensor that is left in a file rather than read at once
CHUNK = 16 << 20  # bytes that are read at a time where a tensor is walked through
KEPT = 128 << 20  # bytes of values that are kept once read; the tensor read last stays however large it is


@dataclass(frozen=True, eq=False)
class TensorFile:
    """A file that must not change while tensors lie in it.

    Attributes:
        path: where it is.
        state: its inode, size and time of change when it was first seen.
        handle: of the open file, for one that may be replaced or removed meanwhile.
    """

    path: Path
    state: tuple[int, int, int]
    handle: int | None = None

    @classmethod
    def of(cls, path: Path, *, hold: bool = False) -> TensorFile:
        """Return the file at a path; ``hold`` keeps it open, which counts towards the files that a process may open.

        Raises:
            OSError: it cannot be opened.
        """
        with open(path, "rb", buffering=0) as file:
            found = cls(path, _state(os.fstat(file.fileno())), os.dup(file.fileno()) if hold else None)
        if found.handle is not None:
            weakref.finalize(found, os.close, found.handle)
        return found

    @property
    def size(self) -> int:
        return self.state[1]

    def read(self, offset: int, count: int) -> bytearray:
        """Return ``count`` bytes from ``offset``.

        Raises:
            Refused: the file is gone, or no longer what it was.
        """
        data = bytearray(count)
        self.read_into(offset, memoryview(data))
        return data

    def read_into(self, offset: int, data: memoryview) -> None:
        """Fill ``data`` with the bytes from ``offset`` on; raises as ``read``."""
        try:
            if self.handle is not None:
                done = self._fill(self.handle, offset, data)
            else:
                with open(self.path, "rb", buffering=0) as file:
                    done = self._fill(file.fileno(), offset, data)
        except OSError as error:
            raise Refused(f"cannot be read: {error.strerror}", node=str(self.path)) from error
        if done < len(data):
            raise Refused("the file is cut short", node=str(self.path))

    def _fill(self, handle: int, offset: int, data: memoryview) -> int:
        found, done = _state(os.fstat(handle)), 0
        if found != self.state:
            raise Refused("the file has changed since it was opened", node=str(self.path), way_out="start again")
        while done < len(data) and (got := os.preadv(handle, [data[done:]], offset + done)):
            done += got
        return done


def _state(found: os.stat_result) -> tuple[int, int, int]:
    return (found.st_ino, found.st_size, found.st_mtime_ns)


class FileTensor(torch.Tensor):
    """A tensor in a file, in rows one behind another.

    Args:
        file: where it lies.
        offset: of its first byte.
        stored: the dtype it is stored in.
        shape: its sizes.
        dtype: the dtype that it has for those who read it; values are converted as they are read.
    """

    file: TensorFile
    offset: int
    stored: torch.dtype

    @staticmethod
    def __new__(cls, file: TensorFile, offset: int, stored: torch.dtype, shape: tuple[int, ...], dtype: torch.dtype) -> FileTensor:
        made: FileTensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device("cpu"))
        made.move_to(file, offset, stored)
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def move_to(self, file: TensorFile, offset: int, stored: torch.dtype) -> None:
        """Read from another place from now on, where the same values lie."""
        self.file, self.offset, self.stored = file, offset, stored

    def values(self) -> torch.Tensor:
        """Return the values, in memory."""
        return _kept.get(self)

    def read(self) -> torch.Tensor:
        """Read the values, whether they are kept or not."""
        return self._read(0, self.numel()).reshape(self.shape)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return the values of some rows, in memory; no others are read."""
        row = self.numel() // max(self.shape[0], 1)
        return self._read(start * row, (stop - start) * row).reshape(stop - start, *self.shape[1:])

    def chunks(self) -> Iterator[torch.Tensor]:
        """Yield the values in order, flat and a part at a time."""
        step = CHUNK // max(self.stored.itemsize, self.dtype.itemsize)
        for start in range(0, self.numel(), step):
            yield self._read(start, min(step, self.numel() - start))

    def _read(self, start: int, count: int) -> torch.Tensor:
        if not count:
            return torch.empty(0, dtype=self.dtype)
        data = self.file.read(self.offset + start * self.stored.itemsize, count * self.stored.itemsize)
        return torch.frombuffer(data, dtype=self.stored).to(self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FileTensor({self.file.path.name}+{self.offset}, {list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func in _WITHOUT_VALUES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if args and isinstance(args[0], FileTensor):
            if func in _SAME:
                return args[0]
            if _writes(func):
                raise Refused("the constant lies in a file and cannot be written to", operator=func.__name__)
            if func is torch.Tensor.__getitem__ and args[0].ndim and isinstance(args[1], slice) and args[1].step in (None, 1):
                start, stop, _ = args[1].indices(args[0].shape[0])
                return args[0].rows(start, max(stop, start))
        args, kwargs = pytree.tree_map(in_memory, (args, dict(kwargs or {})))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        if func._schema.is_mutable:
            raise Refused("the constant lies in a file and cannot be written to", operator=str(func))
        args, kwargs = pytree.tree_map(in_memory, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


class _Kept:
    """The values read last, up to ``KEPT`` bytes."""

    def __init__(self) -> None:
        self._values: OrderedDict[int, tuple[weakref.ref[FileTensor], torch.Tensor]] = OrderedDict()
        self._lock = threading.RLock()

    def get(self, tensor: FileTensor) -> torch.Tensor:
        with self._lock:
            known = self._values.pop(id(tensor), None)
            if known is None or known[0]() is not tensor:
                self._make_room(tensor.nbytes)
                known = weakref.ref(tensor), tensor.read()
            self._values[id(tensor)] = known
            return known[1]

    def clear(self) -> None:
        with self._lock:
            self._values.clear()

    def _make_room(self, size: int) -> None:
        """Drop values, those used longest ago first: before others are read, not after."""
        used = sum(values.nbytes for _, values in self._values.values())
        while self._values and used + size > KEPT:
            used -= self._values.popitem(last=False)[1][1].nbytes


_kept = _Kept()


def forget_values() -> None:
    """Drop the values that are kept: after a build nothing reads the weights again."""
    _kept.clear()


def in_memory(value: Any) -> Any:
    """Return a FileTensor's values, anything else as it is."""
    return value.values() if isinstance(value, FileTensor) else value


def read_if_small(tensor: FileTensor) -> torch.Tensor:
    """Return a tensor of less than ``LARGE`` bytes in memory, a larger one as it is."""
    return tensor if tensor.nbytes >= LARGE else tensor.read()


def parts_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a tensor's values in order and flat: of one in a file a part at a time, of others all."""
    if isinstance(tensor, FileTensor):
        yield from tensor.chunks()
    else:
        yield tensor.detach().contiguous().reshape(-1)


def _writes(func: Callable[..., Any]) -> bool:
    if isinstance(func, torch._ops.OpOverload):
        return func._schema.is_mutable
    name = getattr(func, "__name__", "")
    return name in _WRITING or (name.endswith("_") and not name.endswith("__"))


_Tensor: Any = torch.Tensor
_PROPERTIES = ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "nbytes", "itemsize", "_version", "is_leaf", "grad_fn",
               "is_meta", "is_sparse", "is_quantized")  # fmt: skip
_METHODS = ("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "is_floating_point", "is_complex", "is_contiguous",
            "__len__", "__hash__", "__repr__")  # fmt: skip
_WITHOUT_VALUES = frozenset(
    [*(getattr(_Tensor, name).__get__ for name in _PROPERTIES), *(getattr(_Tensor, name) for name in _METHODS),
     torch.is_floating_point, torch.numel]
)  # fmt: skip
_IN_PLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
_WRITING = frozenset(["__setitem__", *(f"__i{word}__" for word in _IN_PLACE)])
_SAME = frozenset([_Tensor.detach, _Tensor.contiguous])
