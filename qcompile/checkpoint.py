"""Checkpoints of a compile, so that a killed one goes on where it stopped.

Beside the artifact, in ``model.qc.partial/``: one ``NNN.txt`` for each finished pass, every constant once as ``<digest>.safetensors``, and
``journal.json``, which is replaced last: what it does not name does not exist. The journal's key covers everything that the result
depends on. Constants are not flushed to disk, which would take longer than many passes: one that a power cut left half written does not
have the digest that it is named by.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from qcompile.errors import Refused
from qcompile.files import write_atomic
from qcompile.graph import Graph, parse_graph, print_graph, tensor_digest
from qcompile.graph.text import DIGEST_LENGTH


class Checkpoints:
    """The folder of one compile's finished passes.

    Args:
        artifact: where the artifact will be.
        key: digest of everything the result depends on; a journal with another key is of another compile.
        resume: go on with what is there; otherwise it is removed.
    """

    def __init__(self, artifact: Path, key: str, *, resume: bool) -> None:
        self.folder = artifact.with_name(f"{artifact.name}.partial")
        self.key = key
        self.journal: dict[str, Any] = {"key": key, "passes": [], "state": {}}
        if resume and (found := self._read()) is not None:
            self.journal = found
        else:
            self.remove()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refused(f"cannot write here: {error.strerror}", node=str(self.folder)) from error

    @property
    def done(self) -> int:
        """Number of passes that are finished."""
        return len(self.journal["passes"])

    def save(self, graph: Graph, text: str, state: Mapping[str, Any]) -> None:
        """Record that one more pass (or the capture) is finished; ``state`` is kept for the one that resumes."""
        for tensor in graph.tensors:
            path = self._constant(tensor_digest(tensor)[:DIGEST_LENGTH])
            if not path.exists():
                write_atomic(path, safetensors.torch.save({"value": tensor.detach().clone().contiguous()}), flush=False)
        write_atomic(self._graph(self.done), print_graph(graph).encode())
        self.journal["passes"].append(text)
        self.journal["state"] = dict(state)
        write_atomic(self.folder / "journal.json", json.dumps(self.journal).encode())

    def load(self, number: int) -> Graph:
        """Return the graph after the pass of this number (0 is the capture).

        Raises:
            Refused: a file of it is damaged or gone.
        """
        try:
            return parse_graph(self._graph(number).read_text(), _Constants(self))
        except (OSError, UnicodeDecodeError, safetensors.SafetensorError) as error:
            raise Refused(f"a checkpoint is damaged: {error}", node=str(self.folder)) from error

    def restart(self) -> None:
        """Forget every finished pass."""
        self.remove()
        self.folder.mkdir(parents=True)
        self.journal = {"key": self.key, "passes": [], "state": {}}

    def remove(self) -> None:
        """Remove the folder and all in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def discard(artifact: Path) -> None:
        """Remove the checkpoints of an artifact that is written."""
        shutil.rmtree(artifact.with_name(f"{artifact.name}.partial"), ignore_errors=True)

    def _read(self) -> dict[str, Any] | None:
        try:
            journal = json.loads((self.folder / "journal.json").read_text())
            ours = isinstance(journal, dict) and set(journal) == {"key", "passes", "state"} and journal["key"] == self.key
            return journal if ours else None
        except (OSError, ValueError):
            return None

    def _graph(self, number: int) -> Path:
        return self.folder / f"{number:03}.txt"

    def _constant(self, digest: str) -> Path:
        return self.folder / f"{digest}.safetensors"


class _Constants(dict[str, torch.Tensor]):
    """Constants by digest, read when asked for."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        super().__init__()
        self.checkpoints = checkpoints

    def get(self, digest: str, default: Any = None) -> Any:
        if digest not in self:
            path = self.checkpoints._constant(digest)
            self[digest] = self._read(digest, path) if path.exists() else default
        return super().get(digest)

    def _read(self, digest: str, path: Path) -> torch.Tensor:
        tensor = safetensors.torch.load_file(path)["value"]
        if not tensor_digest(tensor).startswith(digest):
            raise Refused("a checkpoint is damaged: a constant is not what it is named by", node=str(path))
        return tensor

    def __missing__(self, digest: str) -> torch.Tensor:
        return self.get(digest)
