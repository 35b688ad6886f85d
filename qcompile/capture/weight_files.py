"""The weights of a Hugging Face folder as tensors that stay in its safetensors files.

One file, ``model.safetensors``, or several that ``model.safetensors.index.json`` names. Only the head of each file is read here, and every
claim in it is checked against the file: https://github.com/huggingface/safetensors says what a head may hold.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from qcompile.errors import Refused
from qcompile.graph.file_tensor import FileTensor, TensorFile

LARGEST_HEAD = 100_000_000  # bytes, the format's own bound
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_DAMAGED = "copy the file again"


def open_weights(folder: Path) -> dict[str, FileTensor] | None:
    """Return every tensor of a folder by its name there, floating point as float32; None where it has no safetensors file.

    Raises:
        Refused: a shard is missing or lies outside the folder, or a file is cut short or damaged.
    """
    if (folder / _INDEX).is_file():
        places = _index(folder / _INDEX)
        found: dict[str, FileTensor] = {}
        for shard in dict.fromkeys(places.values()):
            wanted = [name for name, place in places.items() if place == shard]
            held = open_file(_shard(folder, shard))
            if missing := [name for name in wanted if name not in held]:
                raise Refused(f"{shard} does not hold it, though {_INDEX} says so", node=missing[0], way_out=_DAMAGED)
            found |= {name: held[name] for name in wanted}
        return found
    return open_file(folder / _SINGLE) if (folder / _SINGLE).is_file() else None


def _index(path: Path) -> dict[str, str]:
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if isinstance(places, dict) and all(isinstance(place, str) for place in places.values()):
            return places
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise Refused("the index of the weights holds no weight_map", node=str(path), way_out=_DAMAGED)


def _shard(folder: Path, name: str) -> Path:
    if not name or name != Path(name).name or name in (".", "..") or "\\" in name or "\0" in name:
        raise Refused(f"the index of the weights names a file outside the folder: {name!r}", node=str(folder / _INDEX))
    if not (folder / name).is_file():
        raise Refused("a shard of the weights is missing", node=str(folder / name), way_out="download the model again")
    return folder / name


def open_file(path: Path) -> dict[str, FileTensor]:
    """Return every tensor of one safetensors file, floating point as float32.

    Raises:
        Refused: the file is cut short or damaged.
    """
    try:
        file = TensorFile.of(path)
    except OSError as error:
        raise Refused(f"cannot be read: {error.strerror}", node=str(path)) from error
    size = file.state[1]
    head_size = int.from_bytes(file.read(0, 8), "little") if size >= 8 else 0
    if not 2 <= head_size <= min(LARGEST_HEAD, size - 8):
        raise Refused("no safetensors file, or one that is cut short", node=str(path), way_out=_DAMAGED)
    try:
        head: dict[str, Any] = json.loads(file.read(8, head_size))
        return {name: _tensor(file, 8 + head_size, claim) for name, claim in head.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Refused(f"the head of the safetensors file is damaged: {reason}", node=str(path), way_out=_DAMAGED) from error


def _tensor(file: TensorFile, start: int, claim: dict[str, Any]) -> FileTensor:
    if claim["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {claim['dtype']!r}")
    stored, shape = DTYPES[claim["dtype"]], tuple(claim["shape"])
    begin, end = claim["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError("a size or an offset is no number")
    if end - begin != math.prod(shape) * stored.itemsize:
        raise ValueError(f"{end - begin} bytes for a tensor of the shape {list(shape)}")
    if start + end > file.state[1]:
        raise ValueError(f"a tensor ends at byte {start + end}, the file at {file.state[1]}: it is cut short")
    return FileTensor(file, start + begin, stored, shape, torch.float32 if stored.is_floating_point else stored)
