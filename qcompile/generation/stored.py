"""A decoder's code of the cache, run without building anything: no compiler, no graph, no PyTorch in the process.

Beside the cache of built code lies a note for each artifact that was built: which code is its entry ``prefill``, and what a caller must
know of it. The note is found by the digest that the artifact's comment holds (of its manifest, so of every member) and all that decides
the code. Where there is none, a process of its own builds the code; what building takes is not in the memory of the one that generates.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qcompile.artifact_file import CONSTANTS, parse_manifest, read_members
from qcompile.errors import Refused
from qcompile.files import cache_folder, write_atomic
from qcompile.generation.session import Array, CacheRow, check_model
from qcompile.registry import find_runtime

_BUILD = "from qcompile.generation.stored import build_here; build_here()"
_BEFORE_CACHES = 3  # inputs of the entry: tokens, past, counts


@dataclass(frozen=True)
class _Note:
    """What is known of an artifact's built entry.

    Attributes:
        code: the folder of the built code; empty where it can only run with the graph.
        context: the most tokens of a text.
        vocabulary: how many tokens there are.
        past_only: see ``session.Model``.
        checked: the code was compared with the artifact's golden text.
    """

    code: str
    context: int
    vocabulary: int
    past_only: bool
    checked: bool = False


class StoredModel:
    """A decoder; see ``session.Model``.

    Args:
        members: the artifact's, without its constants.
        end_tokens: of its manifest.
        note: of its code.
        run: the code.
    """

    def __init__(self, members: dict[str, bytes], end_tokens: Sequence[int], note: _Note, run: Any) -> None:
        self.context, self.vocabulary, self.past_only = note.context, note.vocabulary, note.past_only
        self.tokenizer, self.end_tokens = members.get("tokenizer.json"), end_tokens
        self.caches = [CacheRow(port.dtype, tuple(map(int, port.shape[2:]))) for port in run.interface.inputs[_BEFORE_CACHES:]]
        self._run = run

    def build(self) -> None:
        """Nothing is left to do."""

    def step(self, tokens: Array, past: Array, counts: Array, caches: Sequence[Array]) -> tuple[Array, list[Array]]:
        logits, *new = self._run([tokens, past, counts, *caches])
        return logits, new


def open_stored(path: Path, *, target: str | None, context: int | None, threads: int | None) -> StoredModel | None:
    """Return an artifact's decoder, its code built first where the cache has none; None where it cannot run so.

    Args:
        path: the artifact.
        target: run on another target than the one it was compiled for.
        context: the most tokens of a text, by default what the model was made for.
        threads: worker threads, by default every core this process may use.

    Raises:
        Refused: the file is missing or damaged, it is no decoder, or the context is longer than the model's.
    """
    members = read_members(path, leave=(CONSTANTS,))
    manifest = parse_manifest(path, members["manifest.json"])
    runtime = find_runtime(target or manifest.target)
    if runtime is None:
        return None
    place = _note_place(members["manifest.json"], runtime, context)
    note = _read_note(place)
    if note is None:
        _build_apart(path, target, context, threads)
        note = _read_note(place)
    if note is None or not note.code:
        return None
    try:
        run = runtime.StoredExecutable(Path(note.code), threads)
    except (Refused, OSError, ValueError, KeyError, TypeError, RuntimeError):
        place.unlink(missing_ok=True)  # incomplete, or code that needs more: the artifact's graph is always there
        return None
    model = StoredModel(members, manifest.end_tokens, note, run)
    if not note.checked:
        _check(model, members["golden.safetensors"])
        with suppress(Refused):  # where nothing can be written, the next process checks again
            _write_note(place, replace(note, checked=True))
    return model


def _check(model: StoredModel, golden: bytes) -> None:
    from safetensors.numpy import load

    held = load(golden)
    check_model(model, held["input.0"][:1], held["output.0"][0])


# ---- notes --------------------------------------------------------------------------------------------------------------------


def _note_place(manifest: bytes, runtime: Any, context: int | None) -> Path:
    key = {"manifest": hashlib.sha256(manifest).hexdigest(), "context": context, **runtime.machine_key()}
    return cache_folder() / "decoders" / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.json"


def _read_note(place: Path) -> _Note | None:
    try:
        note = _Note(**json.loads(place.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return note if not note.code or Path(note.code).is_dir() else None


def _write_note(place: Path, note: _Note) -> None:
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(place, json.dumps(vars(note)).encode(), flush=False)


# ---- building, in a process of its own ----------------------------------------------------------------------------------------


def _build_apart(path: Path, target: str | None, context: int | None, threads: int | None) -> None:
    """Build an artifact's code into the cache; it stays undone where building fails for a reason that is not the artifact's.

    Raises:
        Refused: as building does.
    """
    given = json.dumps({"path": os.fspath(path.absolute()), "target": target, "context": context, "threads": threads})
    done = subprocess.run([sys.executable, "-P", "-c", _BUILD, given], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    try:
        refused = json.loads(done.stdout.splitlines()[-1])["refused"]
    except (IndexError, ValueError, KeyError, TypeError):
        return
    if refused:
        raise Refused(**refused)


def build_here() -> None:
    """Build what the command line's JSON names, write its note, print one line of JSON: why it was refused, or nothing."""
    from qcompile.artifact import load
    from qcompile.files import map_large_blocks
    from qcompile.generation.artifact_model import ArtifactModel

    map_large_blocks()
    given = json.loads(sys.argv[1])
    path = Path(given["path"])
    refused: dict[str, Any] = {}
    try:
        artifact = load(path, target=given["target"], threads=given["threads"])
        runtime = find_runtime(artifact.target)
        model = ArtifactModel(artifact, given["context"])
        code = model.target.store(model.decoder.prefill, threads=artifact.threads)
        manifest = read_members(path, leave=(CONSTANTS,))["manifest.json"]
        place = _note_place(manifest, runtime, given["context"])
        _write_note(place, _Note(os.fspath(code or ""), model.context, model.vocabulary, model.past_only))
    except Refused as error:
        refused = dict(vars(error))
    print(json.dumps({"refused": refused}))
