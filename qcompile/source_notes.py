"""Where the float model of an artifact lies, noted in the cache on the machine that compiled it.

The artifact must not name paths (equal compiles give equal bytes), but ``bench`` and ``evaluate`` compare with the float model.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from qcompile.files import cache_folder, write_atomic


def remember_source(artifact: Path, model: str) -> None:
    """Note the model that an artifact was compiled from."""
    text = model if model.startswith("python:") and not model.split(":")[1].endswith(".py") else _absolute(model)
    folder = cache_folder() / "sources"
    folder.mkdir(exist_ok=True, mode=0o700)
    write_atomic(folder / f"{_digest(artifact)}.json", json.dumps({"model": text}).encode())


def find_source(artifact: Path) -> str | None:
    """Return the model that this very file was compiled from on this machine, or None."""
    try:
        return str(json.loads((cache_folder() / "sources" / f"{_digest(artifact)}.json").read_text())["model"])
    except (OSError, ValueError, KeyError):
        return None


def _absolute(model: str) -> str:
    if not model.startswith("python:"):
        return str(Path(model).resolve())
    place, name = model.removeprefix("python:").rsplit(":", 1)
    return f"python:{Path(place).resolve()}:{name}"


def _digest(artifact: Path) -> str:
    return hashlib.sha256(artifact.read_bytes()).hexdigest()
