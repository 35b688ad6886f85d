"""Checkpoints of a compile, so that a killed one goes on where it stopped.

Beside the artifact, in ``model.qc.partial/``: one ``NNN.txt`` for each finished pass, every constant once as ``<digest>.safetensors``, and
``journal.json``, which is replaced last: what it does not name does not exist. A pass that takes long adds a line to ``NNN.parts`` for
each part of it that is finished. Weights that lie in the model's own files are not copied. Large constants that passes make are written as
soon as they are made and read from there (``keep``), so a compile holds few at a time.

The journal's key covers everything that the result depends on. Constants are not flushed to disk, which would take longer than many
passes: one that a power cut left half written does not have the digest that it is named by.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qcompile.errors import Refused
from qcompile.files import atomic_file, write_atomic
from qcompile.graph import Graph, parse_graph, print_graph, tensor_digest
from qcompile.graph.file_tensor import LARGE, FileTensor, read_if_small
from qcompile.graph.graph import set_digest
from qcompile.graph.text import DIGEST_LENGTH
from qcompile.safetensors_file import Content, open_path


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
        self._known: set[str] = set()  # constants that were written or checked by this process
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
            if not isinstance(tensor, FileTensor):
                self._write(tensor)
        write_atomic(self._graph(self.done), print_graph(graph).encode())
        finished = self._parts(self.done)
        self.journal["passes"].append(text)
        self.journal["state"] = dict(state)
        write_atomic(self.folder / "journal.json", json.dumps(self.journal).encode())
        finished.unlink(missing_ok=True)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor as it is written here, or the tensor itself where it is small or lies in a file already."""
        if isinstance(tensor, FileTensor) or tensor.nbytes < LARGE:
            return tensor
        kept = open_path(self._write(tensor))["value"]
        set_digest(kept, tensor_digest(tensor))
        return kept

    def parts(self) -> FinishedParts:
        """Return the parts of the pass that is not finished."""
        return FinishedParts(self, self._parts(self.done))

    def _write(self, tensor: torch.Tensor) -> Path:
        digest = tensor_digest(tensor)[:DIGEST_LENGTH]
        path = self._constant(digest)
        if digest not in self._known:
            self._known.add(digest)
            with atomic_file(path, flush=False) as file:
                for part in Content({"value": tensor}).parts():
                    file.write(part)
        return path

    def load(self, number: int, model: Graph | None = None) -> Graph:
        """Return the graph after the pass of this number (0 is the capture); ``model`` is the captured one, whose files may hold constants.

        Raises:
            Refused: a file of it is damaged or gone.
        """
        try:
            graph = parse_graph(self._graph(number).read_text(), _Constants(self, model))
        except (OSError, UnicodeDecodeError) as error:
            raise Refused(f"a checkpoint is damaged: {error}", node=str(self.folder)) from error
        graph.keep = self.keep
        return graph

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

    def _parts(self, number: int) -> Path:
        return self.folder / f"{number:03}.parts"

    def _graph(self, number: int) -> Path:
        return self.folder / f"{number:03}.txt"

    def _constant(self, digest: str) -> Path:
        return self.folder / f"{digest}.safetensors"


class FinishedParts:
    """Finished parts of one pass: a line of JSON for each, with its notes and the digests of its tensors."""

    def __init__(self, checkpoints: Checkpoints, path: Path) -> None:
        self.checkpoints, self.path = checkpoints, path
        self.found: dict[str, Any] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                record = json.loads(line)
                self.found[record["name"]] = record
            except (ValueError, KeyError, TypeError):
                continue  # cut short by the kill

    def load(self, name: str) -> tuple[dict[str, torch.Tensor], list[tuple[str, str]]] | None:
        """Return tensors and notes of a part, or None where it is not finished or its files are damaged."""
        try:
            record = self.found[name]
            tensors = {key: read_constant(self.checkpoints, digest) for key, digest in record["tensors"].items()}
            return tensors, [(str(node), str(text)) for node, text in record["notes"]]
        except (KeyError, TypeError, ValueError, AttributeError, Refused):
            return None

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], notes: Sequence[tuple[str, str]]) -> None:
        """Record that a part is finished."""
        for tensor in tensors.values():
            if not isinstance(tensor, FileTensor):
                self.checkpoints._write(tensor)
        digests = {key: tensor_digest(tensor)[:DIGEST_LENGTH] for key, tensor in tensors.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"name": name, "tensors": digests, "notes": list(notes)}))


def read_constant(checkpoints: Checkpoints, digest: str) -> torch.Tensor:
    """Return the constant of a digest, in its file if it is large.

    Raises:
        Refused: it is not there or damaged.
    """
    path = checkpoints._constant(digest)
    kept = open_path(path).get("value")
    tensor = None if kept is None else read_if_small(kept)
    if tensor is None or not tensor_digest(tensor).startswith(digest):
        raise Refused("a checkpoint is damaged: a constant is not what it is named by", node=str(path))
    checkpoints._known.add(digest)
    return tensor


class _Constants(dict[str, torch.Tensor]):
    """Constants by digest, read when asked for."""

    def __init__(self, checkpoints: Checkpoints, model: Graph | None) -> None:
        tensors = model.tensors if model else ()
        super().__init__({tensor_digest(t)[:DIGEST_LENGTH]: t for t in tensors if isinstance(t, FileTensor)})
        self.checkpoints = checkpoints

    def get(self, digest: str, default: Any = None) -> Any:
        if digest not in self:
            self[digest] = read_constant(self.checkpoints, digest) if self.checkpoints._constant(digest).exists() else default
        return super().get(digest)

    def __missing__(self, digest: str) -> torch.Tensor:
        return self.get(digest)
