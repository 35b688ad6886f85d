"""Building the example of a folder with its own Makefile, for its processor or with sanitizers for this machine, and its sizes."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from qcompile.backends.edge.processors import PACKAGES, Processor

from qcompile.errors import Refused

# One that finds something ends the program: nothing that is wrong can go unseen.
SANITIZE = "-g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"

_FLASH = (".text", ".rodata", ".ARM.exidx", ".srodata")
_VARIABLES = (".data", ".bss", ".sdata", ".sbss", ".tdata", ".tbss")


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's own object files.

    Attributes:
        code: instructions, and constants that the compiler put beside them; tables for unwinding, which nobody asks for, do not count.
        weights: what is only read.
        variables: that outlive a call; a model has none.
    """

    code: int
    weights: int
    variables: int


def check_tools(*tools: str) -> None:
    """Raise Refused naming the first tool that is not installed and the Debian package that brings it."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        packages = " ".join(dict.fromkeys(package for tool in missing for package in PACKAGES[tool]))
        raise Refused(f"{missing[0]} is not installed", way_out=f"apt-get install {packages}, or make edge-tools")


def build_example(folder: Path, processor: Processor, to: Path, *, program: str = "golden", sanitize: bool = False) -> Path:
    """Build a program of a folder's example and return its path.

    Args:
        folder: that ``compile`` wrote; it is not changed.
        processor: that it was written for.
        to: folder for what the build makes.
        program: ``golden`` or ``stream``.
        sanitize: stop at any undefined behaviour or access outside of memory; only where the processor has an operating system.

    Raises:
        Refused: the folder has no example, a tool is missing, or the compiler refuses a file.
    """
    if not (folder / "Makefile").is_file():
        raise Refused("there is no Makefile of an example", node=str(folder), way_out="name a folder that compile --target edge:.. wrote")
    check_tools("make", processor.tools[0])
    options = [f"BUILD={to}"]
    if sanitize:
        options += [f"MORE={SANITIZE}", "LINK=-no-pie"]
    done = subprocess.run(["make", "-s", "-C", str(folder), *options, str(to / program)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
        raise Refused(f"the example cannot be built: {said}", node=str(folder))
    return to / program


def read_sizes(built: Path, processor: Processor) -> Sizes:
    """Return the sizes of a model's object files in a folder that ``build_example`` built into."""
    code = weights = variables = 0
    for path in sorted(built.glob("*.o")):
        done = subprocess.run([f"{processor.prefix}size", "-A", str(path)], capture_output=True, text=True, check=True)
        for words in map(str.split, done.stdout.splitlines()):
            if len(words) != 3 or not words[0].startswith("."):
                continue
            size = int(words[1])
            if words[0].startswith(_VARIABLES):
                variables += size
            elif words[0].startswith(_FLASH):
                is_weights = path.stem.endswith("_weights")
                weights, code = weights + size * is_weights, code + size * (not is_weights)
    return Sizes(code, weights, variables)
