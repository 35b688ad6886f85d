"""Types of graph values and their text: ``f32[batch,3,224,224]``, ``int batch*2``, ``(f32[2], i32[])``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

_SHORT = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32",
    torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip
_DTYPES = {short: dtype for dtype, short in _SHORT.items()}
# The largest size of a dynamic axis of which nothing else is known.
LARGEST_SIZE = 1 << 20

_TENSOR = re.compile(r"(\w+)\[([^\]]*)\]")

# Sizes that stand for the symbols while types are inferred: odd primes, all different and none of them a usual layer size, so
# that no broadcast or view is taken for legal by chance.
_HINTS = (1009, 1013, 1019, 1021, 1031, 1033, 509, 503, 499, 491, 251, 241, 239, 127, 113, 109, 61, 59, 53, 31, 29, 23, 13, 11, 7, 5, 3)


def short_dtype(dtype: torch.dtype) -> str:
    """Return the short name of a dtype, ``f32`` for torch.float32."""
    return _SHORT.get(dtype) or str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class TensorType:
    """The dtype and the shape of a graph input; a size is an int or the name of a symbol."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{short_dtype(self.dtype)}[{','.join(map(str, self.shape))}]"


def parse_tensor_type(text: str) -> TensorType:
    """Parse ``f32[batch,128]``.

    Raises:
        ValueError: the text is no tensor type.
    """
    match = _TENSOR.fullmatch(text.strip())
    if not match or match[1] not in _DTYPES:
        raise ValueError(f"'{text}' is no tensor type; write for example f32[batch,128]")
    sizes = [size.strip() for size in match[2].split(",") if size.strip()]
    return TensorType(_DTYPES[match[1]], tuple(int(size) if size.isdigit() else size for size in sizes))


class SymbolTable:
    """The symbolic sizes of one graph and the fake-tensor mode in which its types are inferred.

    Attributes:
        ranges: for each symbol's name, the smallest and the largest size it may take.
        mode: the FakeTensorMode that all ``meta["val"]`` of the graph belong to.
    """

    def __init__(self, ranges: Mapping[str, tuple[int, int]]) -> None:
        self.ranges = dict(ranges)
        self.mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)
        self._sizes: dict[str, torch.SymInt] = {}
        free = list(_HINTS)
        for name, (low, high) in self.ranges.items():
            hint = next((hint for hint in free if low <= hint <= high), high)
            free = [other for other in free if other != hint]
            self._sizes[name] = self._new_size(hint)
        self._names = {str(size.node.expr): name for name, size in self._sizes.items()}

    def _new_size(self, hint: int) -> torch.SymInt:
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        size: Any = self.mode.from_tensor(torch.empty(hint, dtype=torch.bool), symbolic_context=context).shape[0]
        return cast(torch.SymInt, size)

    def fake(self, type: TensorType) -> torch.Tensor:
        """Return a fake tensor of this type."""
        shape = [self._sizes[size] if isinstance(size, str) else size for size in type.shape]
        with self.mode:
            return torch.empty(shape, dtype=type.dtype)

    def text(self, value: object) -> str:
        """Return the text form of the type of a fake value: a tensor, a symbolic int, or a tuple of them."""
        if isinstance(value, torch.Tensor):
            return f"{short_dtype(value.dtype)}[{','.join(self._size_text(size) for size in value.shape)}]"
        if isinstance(value, (tuple, list)):
            return f"({', '.join(self.text(item) for item in value)})"
        if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
            return f"int {self._size_text(value)}"
        return type(value).__name__

    def _size_text(self, size: int | torch.SymInt) -> str:
        text = str(size.node.expr) if isinstance(size, torch.SymInt) else str(size)
        for symbol, name in self._names.items():
            text = re.sub(rf"\b{symbol}\b", name, text)
        return text.replace(" ", "")
