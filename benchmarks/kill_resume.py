#!/usr/bin/env python
"""Kill a compile with SIGKILL at random moments and resume it: nothing may be torn, and the artifact must be the same to the byte.

    python benchmarks/kill_resume.py                                  # ResNet-20, target reference, 20 moments
    python benchmarks/kill_resume.py python:FILE:FUNCTION --recipe w4a8 --kills 5 --json

Every compile is a process of its own (forked from one that has only imported the compiler). After each kill: the artifact is absent,
or whole; then
``--resume`` must write the very bytes of a compile that nothing disturbed, and leave nothing beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a forked process must not inherit a pool of threads

import torch

import qcompile
from qcompile.artifact_file import read_members
from qcompile.cli import main as command_line

MODEL = f"python:{Path(__file__).parent / 'models' / 'resnet20.py'}:resnet20"


def start(arguments: list[str], log: Path) -> int:
    """Run the command line in a forked process and return its id."""
    child = os.fork()
    if child:
        return child
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["qcompile", *arguments]
    try:
        command_line()
    except SystemExit as end:
        os._exit(int(end.code or 0))
    os._exit(70)


def finish(child: int, log: Path) -> None:
    """Wait for a compile that must end well."""
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"a compile failed with status {status}:\n{log.read_text()}")


def kill_after(child: int, seconds: float) -> bool:
    """Kill the process after so many seconds; say whether it was still running."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def state_of(output: Path) -> str:
    """Return what a killed compile left of the artifact: ``absent`` or ``whole``; a torn one raises Refused."""
    if not output.exists():
        return "absent"
    read_members(output)
    return "whole"


def passes_done(output: Path) -> int:
    """Return how many passes the journal names."""
    journal = output.with_name(f"{output.name}.partial") / "journal.json"
    return len(json.loads(journal.read_text())["passes"]) if journal.exists() else 0


def clear(cache: Path) -> None:
    """Forget cached statistics, so that every compile does the whole work."""
    for file in cache.rglob("*"):
        if file.is_file():
            file.unlink()


def main() -> None:
    """Run the experiment and print its table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("model", nargs="?", default=MODEL)
    options.add_argument("--recipe", default="w8a8")
    options.add_argument("--target", default="reference")
    options.add_argument("--calibrate", default="random")
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json", action="store_true")
    chosen = options.parse_args()
    chance, rows = random.Random(chosen.seed), []
    # What a compile imports when it first needs it is imported here, once for all the forked processes.
    qcompile.compile(torch.nn.Linear(2, 2), (torch.zeros(1, 2),), recipe="w8a8-dynamic", target="reference")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["QCOMPILE_CACHE"] = str(folder / "cache")
        output, log = folder / "out" / "model.qc", folder / "log"
        output.parent.mkdir()
        arguments = [
            "compile",
            chosen.model,
            "--recipe",
            chosen.recipe,
            "--target",
            chosen.target,
            "--calibrate",
            chosen.calibrate,
            "-o",
            str(output),
        ]
        for _ in range(2):  # the second one is timed: files are in memory, as they are for those that are killed
            clear(folder / "cache")
            begin = time.monotonic()
            finish(start(arguments, log), log)
            whole_seconds = time.monotonic() - begin
        expected = output.read_bytes()
        for number in range(chosen.kills):
            clear(folder / "cache")
            output.unlink()
            seconds = chance.uniform(0, whole_seconds)
            killed = kill_after(start(arguments, log), seconds)
            row = {
                "kill": number + 1,
                "after_s": round(seconds, 3),
                "killed": killed,
                "passes_done": passes_done(output),
                "artifact": state_of(output),
            }
            finish(start([*arguments, "--resume"], log), log)
            row["identical"] = output.read_bytes() == expected
            row["strays"] = sorted(item.name for item in output.parent.iterdir() if item != output)
            rows.append(row)
    good = all(row["identical"] and not row["strays"] for row in rows)
    if chosen.json:
        print(json.dumps({"ok": good, "seconds": round(whole_seconds, 3), "bytes": len(expected), "kills": rows}, indent=1))
    else:
        print(f"{chosen.model} {chosen.recipe} {chosen.target}: {len(expected)} bytes, a compile takes {whole_seconds:.1f} s")
        print("kill   after s  killed  passes done  artifact  identical after resume  strays")
        for row in rows:
            print(
                f"{row['kill']:4} {row['after_s']:9.3f}  {row['killed']!s:6}  {row['passes_done']:11}  {row['artifact']:8}  "
                f"{row['identical']!s:22}  {', '.join(row['strays']) or '-'}"
            )
        print("ok" if good else "FAILED")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
