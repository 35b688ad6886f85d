"""The weights of a Hugging Face folder as tensors that stay in its safetensors files.

One file, ``model.safetensors``, or several that ``model.safetensors.index.json`` names. Only the head of each file is read here.
"""

from __future__ import annotations

import json
from pathlib import Path

from qcompile.errors import Refused
from qcompile.graph.file_tensor import FileTensor
from qcompile.safetensors_file import open_path

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
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
            held = open_path(_shard(folder, shard), widen=True)
            if missing := [name for name in wanted if name not in held]:
                raise Refused(f"{shard} does not hold it, though {_INDEX} says so", node=missing[0], way_out=_DAMAGED)
            found |= {name: held[name] for name in wanted}
        return found
    return open_path(folder / _SINGLE, widen=True) if (folder / _SINGLE).is_file() else None


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
