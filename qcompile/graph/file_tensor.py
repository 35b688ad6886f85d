"""Tensors whose values stay in a file: a graph of a model larger than memory holds them as its constants.

A ``FileTensor`` knows shape and dtype. An operator that takes it reads the values and drops them afterwards, so passes and the interpreter
treat it as any other tensor. It cannot be written to. Values are read, not mapped: mapped pages would count as memory of this process.
The tensor read last is kept until another is read, because a pass asks several things of one weight in turn.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from qcompile.errors import Refused

CHUNK = 16 << 20  # bytes that are read at a time where a tensor is walked through


@dataclass(frozen=True)
class TensorFile:
    """A file that must not change while tensors lie in it.

    Attributes:
        path: where it is.
        state: its inode, size and time of change when it was first seen.
    """

    path: Path
    state: tuple[int, int, int]

    @classmethod
    def of(cls, path: Path) -> TensorFile:
        return cls(path, _state(os.stat(path)))

    def read(self, offset: int, count: int) -> bytearray:
        """Return ``count`` bytes from ``offset``.

        Raises:
            Refused: the file is gone, or no longer what it was.
        """
        data = bytearray(count)
        view, done = memoryview(data), 0
        try:
            with open(self.path, "rb", buffering=0) as file:
                if _state(os.fstat(file.fileno())) != self.state:
                    raise Refused("the file has changed since it was opened", node=str(self.path), way_out="start again")
                file.seek(offset)
                while done < count and (got := file.readinto(view[done:])):
                    done += got
        except OSError as error:
            raise Refused(f"cannot be read: {error.strerror}", node=str(self.path)) from error
        if done < count:
            raise Refused("the file is cut short", node=str(self.path))
        return data


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
        made: FileTensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device("cpu"))  # type: ignore[attr-defined]
        made.file, made.offset, made.stored = file, offset, stored
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def values(self) -> torch.Tensor:
        """Return the values, in memory."""
        global _last
        if _last is None or _last[0] is not self:
            _last = None  # before the next is made
            _last = self, self.rows(0, self.shape[0]) if self.ndim else self._read(0, 1).reshape(())
        return _last[1]

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

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"FileTensor({self.file.path.name}+{self.offset}, {list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func in _WITHOUT_VALUES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in _SAME and isinstance(args[0], FileTensor):
            return args[0]
        if _writes(func) and isinstance(args[0], FileTensor):
            raise Refused("the constant lies in a file and cannot be written to", operator=func.__name__)
        if func is torch.Tensor.__getitem__ and isinstance(args[0], FileTensor) and args[0].ndim and _is_run(args[1]):
            start, stop, _ = args[1].indices(args[0].shape[0])
            return args[0].rows(start, max(stop, start))
        args, kwargs = pytree.tree_map(in_memory, (args, dict(kwargs or {})))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        if func._schema.is_mutable and any(isinstance(value, FileTensor) for value in args[:1]):
            raise Refused("the constant lies in a file and cannot be written to", operator=str(func))
        args, kwargs = pytree.tree_map(in_memory, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


_last: tuple[FileTensor, torch.Tensor] | None = None  # the tensor read last, and its values


def forget_last() -> None:
    """Drop the values of the tensor read last."""
    global _last
    _last = None


def in_memory(value: Any) -> Any:
    """Return a FileTensor's values, anything else as it is."""
    return value.values() if isinstance(value, FileTensor) else value


def _writes(func: Callable[..., Any]) -> bool:
    if isinstance(func, torch._ops.OpOverload):
        return func._schema.is_mutable
    name = getattr(func, "__name__", "")
    return name in _WRITING or (name.endswith("_") and not name.endswith("__"))


def _is_run(index: Any) -> bool:
    return isinstance(index, slice) and index.step in (None, 1)


_Tensor: Any = torch.Tensor
_WITHOUT_VALUES = frozenset(
    [getattr(_Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "nbytes", "_version", "is_leaf",
                                                 "grad_fn", "is_meta", "is_sparse", "is_quantized", "itemsize")]
    + [getattr(_Tensor, name) for name in ("size", "dim", "numel", "nelement", "stride", "element_size", "is_floating_point", "is_complex",
                                           "is_contiguous", "__len__", "ndimension", "__hash__", "__repr__")]
    + [torch.is_floating_point, torch.numel]
)  # fmt: skip
_WRITING = frozenset(
    ["__setitem__", *(f"__i{word}__" for word in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"))]
)
_SAME = frozenset([_Tensor.detach, _Tensor.contiguous])
