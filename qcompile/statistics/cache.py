"""Statistics on disk: one safetensors file for each request, under (graph digest, data digest, request)."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from qcompile.graph.graph import tensor_digest
from qcompile.statistics.collectors import Result

_VERSION = 1  # of what the collectors compute: raise it when a result changes meaning


class Cache:
    """A folder of statistics that only its owner can read or write.

    Files are written to one side and moved in place, so that a killed run leaves no half file; a file that is damaged or
    belongs to another key counts as absent. A folder that is not ours, or that cannot be made, is not used.
    """

    def __init__(self, folder: str | os.PathLike[str], graph_digest: str, data_digest: str) -> None:
        self.key = f"qcompile statistics {_VERSION}; torch {torch.__version__}; graph {graph_digest}; data {data_digest}"
        self.folder = _private_folder(Path(folder) / "statistics")

    def _place(self, request: str) -> Path | None:
        name = hashlib.sha256(f"{self.key}; {request}".encode()).hexdigest()
        return self.folder / f"{name}.safetensors" if self.folder else None

    def load(self, request: str) -> Result | None:
        """Return the statistics of a request, or None if they are not there unharmed."""
        place = self._place(request)
        if place is None or not place.is_file():
            return None
        try:
            with safe_open(place, framework="pt") as file:
                result = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no mapping)
                described = file.metadata()
        except Exception:  # safetensors and the operating system raise many kinds; all mean that the file is damaged
            return None
        return result if described == self._description(request, result) else None

    def store(self, request: str, result: Result) -> None:
        """Write the statistics of a request; a disk that is full or read-only is no error."""
        place = self._place(request)
        if place is None:
            return
        result = {name: tensor.contiguous() for name, tensor in result.items()}
        data = save(result, self._description(request, result))
        temporary = ""
        try:
            handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, place)
        except OSError:
            if temporary and os.path.exists(temporary):
                os.unlink(temporary)

    def _description(self, request: str, result: Result) -> dict[str, str]:
        """Return the whole key, since names of files are only hashes of it, and a digest of the content."""
        content = "".join(f"{name}{tensor_digest(tensor)}" for name, tensor in sorted(result.items()))
        digest = hashlib.sha256(content.encode()).hexdigest()
        return {"statistics": f"{self.key}; {request}; content {digest}"}  # one entry: safetensors writes several in any order


def _private_folder(folder: Path) -> Path | None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.lstat()
        if not stat.S_ISDIR(state.st_mode) or (hasattr(os, "geteuid") and state.st_uid != os.geteuid()):
            return None
        folder.chmod(0o700)
    except OSError:
        return None
    return folder
