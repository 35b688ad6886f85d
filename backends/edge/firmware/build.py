"""Building the example of a folder with its own Makefile, for its processor or with sanitizers for this machine; sizes and stack."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from qcompile.backends.edge.processors import PACKAGES, Processor

from qcompile.errors import Refused

# One that finds something ends the program: nothing that is wrong can go unseen.
SANITIZE = "-g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"

CALLS = "-fcallgraph-info=su"  # of GCC 10 and later

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
    options = (f"MORE={SANITIZE}", "LINK=-no-pie") if sanitize else ()
    _make(folder, processor, to, str(to / program), *options)
    return to / program


def measure_objects(folder: Path, processor: Processor) -> tuple[Sizes, int]:
    """Compile a folder's model alone and return its sizes, and the bytes of stack that its deepest chain of calls takes.

    Stack is what the compiler says of each function, from ``NAME_run`` down; functions of the C library (``memcpy``) are not counted.

    Args:
        folder: that ``compile`` wrote; it is not changed.
        processor: that it was written for.

    Raises:
        Refused: as for ``build_example``.
    """
    with tempfile.TemporaryDirectory() as scratch:
        _make(folder, processor, Path(scratch), "objects", f"MORE={CALLS}")
        calls = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(scratch).glob("*.ci")))
        return read_sizes(Path(scratch), processor), _deepest(calls)


def _make(folder: Path, processor: Processor, to: Path, *words: str) -> None:
    if not (folder / "Makefile").is_file():
        raise Refused("there is no Makefile of an example", node=str(folder), way_out="name a folder that compile --target edge:.. wrote")
    check_tools("make", processor.tools[0])
    done = subprocess.run(["make", "-s", "-C", str(folder), f"BUILD={to}", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
        raise Refused(f"the example cannot be built: {said}", node=str(folder))


def _deepest(calls: str) -> int:
    """Return the stack of the deepest chain of calls in a text of GCC's ``-fcallgraph-info=su``."""
    own = {name: int(size) for name, size in re.findall(r'node: \{ title: "([^"]+)" label: "[^"]*?\\n(\d+) bytes', calls)}
    callees = defaultdict(set)
    for caller, callee in re.findall(r'edge: \{ sourcename: "([^"]+)" targetname: "([^"]+)"', calls):
        callees[caller].add(callee)

    def depth(name: str, above: tuple[str, ...]) -> int:
        if name in above:
            raise Refused(f"{name} calls itself", way_out="a model's functions may not")
        return own.get(name, 0) + max((depth(callee, (*above, name)) for callee in callees[name]), default=0)

    return max((depth(name, ()) for name in list(own)), default=0)


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
