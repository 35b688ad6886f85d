"""Peak memory of a process that loads one prepared model and runs it: ``python -m qcompile.peers.memory NAME PATH THREADS INPUTS.npz``."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CALLS = 3


def peak_memory(name: str, path: Path, threads: int, inputs: Path) -> int | None:
    """Return the bytes that a process of its own held at most, its libraries included; None where it cannot be measured.

    Args:
        name: a peer that has a file, or ``qcompile``.
        path: the model as the peer's ``prepare`` wrote it, or an artifact.
        threads: worker threads.
        inputs: an ``.npz`` file with the inputs in order.
    """
    command = [sys.executable, "-m", __name__, name, str(path), str(threads), str(inputs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.split()
    return int(lines[-1]) if done.returncode == 0 and lines and lines[-1].isdigit() else None


def high_water_bytes() -> int:
    """Return the high-water mark of this process's memory; ``getrusage`` would begin with the parent's."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def _run(name: str, path: Path, threads: int, inputs: Path) -> None:
    import numpy as np

    from qcompile.peers import load_peer

    with np.load(inputs, allow_pickle=False) as file:
        values: Sequence[Any] = [file[key] for key in file.files]
    run = load_peer(name, path, threads)
    if name == "qcompile":
        import torch

        values = [torch.from_numpy(value) for value in values]
    for _ in range(CALLS):
        run(values)
    print(high_water_bytes())


if __name__ == "__main__":
    _run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
