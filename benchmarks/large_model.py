#!/usr/bin/env python
"""Memory of compiling and running a language model of 1.1 billion random weights, each step in a process of its own.

    python benchmarks/large_model.py                         # TinyLlama's shape, 4 bits in groups of 128, rounded to nearest
    python benchmarks/large_model.py --layers 2 --kill --json

Writes a Hugging Face folder of that shape in float16, one shard for each block, compiles it, and generates a few tokens. Printed are the
high-water marks of the resident memory (VmHWM), sizes and bits per weight. The first generation has its code built by a process of its
own, whose mark is ``build_peak_mib``. With ``--kill`` the compile is killed while it solves weights,
then resumed: how many weights were solved before and after is printed, and whether the artifact has the bytes of the compile that was
not disturbed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from models.random_llama import write_folder

RECIPE = """name: {name}
summary: 4-bit weights in groups of 128, without data
needs_data: false
schemes: {{linear: W4A16, embedding: "weight=int8 channel=0 sym; activation=float"}}
pipeline: [canonicalize, fold-constants, fold-batch-norm, recognize-attention, recognize-rotary,
           assign-bits, insert-quantizers, "quantize-weights{{solver={solver}}}", materialize, fuse-epilogue]
"""


# ---- children ---------------------------------------------------------------------------------------------------------------

_CHILD = """
import json, re, resource, sys
from qcompile.cli import main
sys.argv = ["qcompile", *json.loads(sys.argv[1])]
try:
    main()
finally:
    status = open("/proc/self/status").read()
    print("VmHWM", re.search(r"VmHWM:\\s+(\\d+)", status)[1], file=sys.stderr)
    print("children", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
"""


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """Run a command in a process of its own."""
    command = [sys.executable, "-c", _CHILD, json.dumps([*arguments, "--json"])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(child: subprocess.Popen[str]) -> tuple[dict[str, Any], int, int]:
    """Return what the command printed, the bytes it held at most, and those of the largest process that it started."""
    out, error = child.communicate()
    found = [re.search(rf"^{word} (\d+)$", error, re.MULTILINE) for word in ("VmHWM", "children")]
    if child.returncode or not all(found):
        raise SystemExit(f"the command failed with status {child.returncode}:\n{error[-2000:]}")
    own, children = (int(match[1]) * 1024 for match in found if match)
    return json.loads(out), own, children


def solved(output: Path) -> int:
    """Return how many weights the unfinished pass has solved."""
    lines = [line for path in output.with_name(f"{output.name}.partial").glob("*.parts") for line in path.read_text().splitlines()]
    return sum(bool(line) for line in lines)


def kill_and_resume(arguments: list[str], output: Path, after: int) -> tuple[int, int]:
    """Kill a compile when it has solved so many weights, resume it; return how many were solved before, and that pass's missing ones."""
    child = start(arguments)
    while child.poll() is None and solved(output) < after:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    before = solved(output)
    again = start([*arguments, "--resume"])
    seen = before
    while again.poll() is None:
        seen = max(seen, solved(output))
        time.sleep(0.01)
    finish(again)
    return before, seen - before


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--solver", default="nearest", choices=("nearest", "mse"))
    parser.add_argument("--folder", type=Path, help="keep model and artifacts here; a model that is there is not written again")
    parser.add_argument("--kill", action="store_true", help="also kill a compile and resume it")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="large_model."))
    try:
        results = measure(folder, chosen)
    finally:
        if chosen.folder is None:
            shutil.rmtree(folder)
    if chosen.json:
        print(json.dumps(results))
        return
    for name, value in results.items():
        print(f"{name:28} {value}")


def measure(folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Write, compile and run the model; return the figures."""
    model, recipe, output = folder / "model", folder / "recipe.yaml", folder / "model.qc"
    marker = folder / f"{chosen.layers}_layers"
    if not marker.exists():
        marker.write_text(str(write_folder(model, chosen.layers)))
    weights = int(marker.read_text())
    recipe.write_text(RECIPE.format(name=f"w4-{chosen.solver}", solver=chosen.solver))
    arguments = ["compile", str(model), "--recipe", str(recipe), "-o", str(output)]
    done, peak, _ = finish(start(arguments))
    results: dict[str, Any] = {"weights": weights, "model_mib": mebibytes(2 * weights), "artifact_mib": mebibytes(done["bytes"]),
                               "bits_per_weight": done["bits_per_weight"], "compile_seconds": done["seconds"],
                               "compile_peak_mib": mebibytes(peak)}  # fmt: skip
    prompt = " ".join(f"<{i}>" for i in range(10, 26))
    told, peak, build = finish(start(["generate", str(output), "--prompt", prompt, "--max-tokens", "8", "--temperature", "0"]))
    again, warm, _ = finish(start(["generate", str(output), "--prompt", prompt, "--max-tokens", "8", "--temperature", "0"]))
    assert told["token_ids"] == again["token_ids"]
    results |= {"build_peak_mib": mebibytes(build), "generate_first_peak_mib": mebibytes(peak), "generate_peak_mib": mebibytes(warm),
                "generate_tokens": len(told["token_ids"]), "import_peak_mib": mebibytes(_import_peak())}  # fmt: skip
    if chosen.kill:
        digest = hashlib.file_digest(output.open("rb"), "sha256").hexdigest()
        before, after = kill_and_resume(arguments, output, after=7 * chosen.layers // 2)
        same = hashlib.file_digest(output.open("rb"), "sha256").hexdigest() == digest
        results |= {"solved_before_kill": before, "solved_after_resume": after, "same_bytes": same}
    return results


def _import_peak() -> int:
    """Return what a process holds that has loaded the compiler and no model."""
    return finish(start(["targets"]))[1]


def mebibytes(count: int) -> float:
    """Return bytes as MiB, to one digit."""
    return round(count / 2**20, 1)


if __name__ == "__main__":
    main()
