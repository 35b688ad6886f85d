"""Tensors of a safetensors file, or of a folder's shards, read one at a time.

The package ``safetensors`` checks header and offsets against the file's size before it gives a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qcompile.capture.huggingface import read_object
from qcompile.errors import Refused

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Tensors:
    """The tensors of a folder by name.

    Raises:
        Refused: the folder has no safetensors, a shard is missing or damaged, or the index names files outside of the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._place: dict[str, str] = {}
        for name in self._file_names():
            self._files[name] = self._open(name)
            self._place |= dict.fromkeys(self._files[name].keys(), name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def read(self, name: str, *, dtypes: tuple[torch.dtype, ...] = (), ndim: int | None = None) -> torch.Tensor:
        """Return a tensor.

        Raises:
            Refused: there is none of this name, it is damaged, or not of these dtypes and this rank.
        """
        if name not in self._place:
            raise Refused("the checkpoint has no such tensor", node=f"{self.folder} {name}")
        try:
            tensor: torch.Tensor = self._files[self._place[name]].get_tensor(name)
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise Refused(f"the tensor cannot be read: {error}", node=f"{self.folder / self._place[name]} {name}") from error
        if (dtypes and tensor.dtype not in dtypes) or (ndim is not None and tensor.ndim != ndim):
            found = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            raise Refused(f"the tensor is {found}, which its format does not have here", node=f"{self.folder} {name}")
        return tensor

    def _file_names(self) -> list[str]:
        index = self.folder / _INDEX
        if not index.is_file():
            return [_SINGLE]
        names = read_object(index).get("weight_map")
        if not isinstance(names, dict) or not names or any(not isinstance(n, str) or Path(n).name != n for n in names.values()):
            raise Refused("the index does not map tensors to files of its folder", node=str(index))
        return sorted(set(names.values()))

    def _open(self, name: str) -> Any:
        path = self.folder / name
        if not path.is_file():
            raise Refused("the file with weights is missing", node=str(path))
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise Refused(f"no safetensors, or a damaged file: {error}", node=str(path)) from error
