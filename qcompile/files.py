"""Writing files so that a reader never sees half of one, the folder of cached work, and how memory is given back."""

from __future__ import annotations

import ctypes
import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from qcompile.errors import Refused

_MMAP_THRESHOLD = -3  # of glibc's mallopt


@contextmanager
def atomic_file(path: Path, *, flush: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path``; on success it is flushed to disk and renamed, on failure removed.

    Without ``flush`` it outlives a killed process, but after a power cut there may be half of it.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise Refused(f"cannot write here: {error.strerror}", node=str(path.parent)) from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            if flush:
                os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise Refused(f"cannot be written: {error.strerror}", node=str(path), way_out="free space or choose another folder") from error
        raise
    if not flush:
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


def write_atomic(path: Path, content: bytes, *, flush: bool = True) -> None:
    """Write a whole file or nothing; see ``atomic_file``."""
    with atomic_file(path, flush=flush) as file:
        file.write(content)


def remove_strays(path: Path) -> None:
    """Remove temporary files that a killed process left beside ``path``."""
    for stray in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        stray.unlink(missing_ok=True)


def map_large_blocks() -> None:
    """Have this process give memory of 512 KiB and more back when it is freed; where the C library has no such setting, nothing changes.

    glibc comes to place blocks of up to 32 MiB beside small ones once such a block was freed. Weights that come and go then leave gaps
    that small results keep open: a compile of a billion weights held twice of what it used. Packing them for kernels left 375 MiB of gaps
    where blocks from 4 MiB on were mapped, 1 MiB now.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, 512 << 10)


def cache_folder() -> Path:
    """Return the folder for cached work: ``$QCOMPILE_CACHE``, or ``qcompile`` in the user's cache folder; only the user can read it."""
    base = os.environ.get("QCOMPILE_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "qcompile")
    folder = Path(base)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid():
        raise Refused("the cache folder belongs to another user", node=str(folder), way_out="set QCOMPILE_CACHE to a folder of yours")
    return folder
