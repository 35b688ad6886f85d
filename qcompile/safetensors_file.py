"""Safetensors files of any size: read as tensors that stay in the file, written a part at a time.

Written bytes are those of the library, which would need every tensor in memory. The format:
https://github.com/huggingface/safetensors, a head in JSON that gives dtype, shape and place of each tensor, and the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qcompile.errors import Refused
from qcompile.graph.file_tensor import FileTensor, TensorFile, parts_of

LARGEST_HEAD = 100_000_000  # bytes, the format's own bound
# In the order in which the library puts the kinds of one file: by rank from last to first, then by name.
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32, "F64": torch.float64,
    "I64": torch.int64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_DTYPES.values())}
_DAMAGED = "copy the file again"


def open_path(path: Path, *, widen: bool = False) -> dict[str, FileTensor]:
    """Return every tensor of a file by name; ``widen`` gives floating point as float32.

    Raises:
        Refused: the file cannot be read, is cut short or damaged.
    """
    try:
        file = TensorFile.of(path)
    except OSError as error:
        raise Refused(f"cannot be read: {error.strerror}", node=str(path)) from error
    return open_tensors(file, 0, file.size, widen=widen)


def open_tensors(file: TensorFile, start: int, size: int, *, widen: bool = False) -> dict[str, FileTensor]:
    """Return every tensor of ``size`` bytes of a file that hold what a safetensors file does; see ``open_path``."""
    head_size = int.from_bytes(file.read(start, 8), "little") if size >= 8 else 0
    if not 2 <= head_size <= min(LARGEST_HEAD, size - 8):
        raise Refused("no safetensors file, or one that is cut short", node=str(file.path), way_out=_DAMAGED)
    try:
        head: dict[str, Any] = json.loads(file.read(start + 8, head_size))
        claims = {name: _checked(claim, size - 8 - head_size) for name, claim in head.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Refused(f"the head of the safetensors file is damaged: {reason}", node=str(file.path), way_out=_DAMAGED) from error
    first = start + 8 + head_size
    return {
        name: FileTensor(file, first + begin, stored, shape, torch.float32 if widen and stored.is_floating_point else stored)
        for name, (stored, shape, begin) in claims.items()
    }


def _checked(claim: dict[str, Any], available: int) -> tuple[torch.dtype, tuple[int, ...], int]:
    """Return dtype, shape and place of a tensor as the head claims them.

    Raises:
        ValueError: the claim cannot be true.
    """
    if claim["dtype"] not in _DTYPES:
        raise ValueError(f"unknown dtype {claim['dtype']!r}")
    stored, shape = _DTYPES[claim["dtype"]], tuple(claim["shape"])
    begin, end = claim["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError("a size or an offset is no number")
    if end - begin != math.prod(shape) * stored.itemsize:
        raise ValueError(f"{end - begin} bytes for a tensor of the shape {list(shape)}")
    if end > available:
        raise ValueError(f"a tensor ends at byte {end} of {available}: the file is cut short")
    return stored, shape, begin


class Content:
    """The bytes of a safetensors file, made as they are asked for.

    Args:
        tensors: by name.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = {name: tensors[name] for name in sorted(tensors, key=lambda name: (-_RANKS[tensors[name].dtype], name))}
        claims, end = {}, 0
        for name, tensor in self.tensors.items():
            begin, end = end, end + tensor.nbytes
            claims[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        head = json.dumps(claims, separators=(",", ":"), ensure_ascii=False).encode()
        head += b" " * (-len(head) % 8)
        self.head = len(head).to_bytes(8, "little") + head
        self.size = len(self.head) + end

    def __len__(self) -> int:
        return self.size

    def parts(self) -> Iterator[bytes | memoryview]:
        """Yield the bytes, a part at a time."""
        yield self.head
        for tensor in self.tensors.values():
            for part in parts_of(tensor):
                yield part.view(torch.uint8).numpy().data
