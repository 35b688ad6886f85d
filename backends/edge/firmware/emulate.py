"""Running a folder's example under QEMU: are the codes right, how much memory was touched, how many instructions did it take.

Instructions are exact: a plugin of QEMU (``sources/count_instructions.c``) counts every one from the first of ``model_run`` to the first
after it, a store and a call of the example included, on every processor in the same way. They are no cycles: QEMU knows nothing of
pipelines, caches and memories.
"""

from __future__ import annotations

import bisect
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path

from qcompile.backends.edge.firmware.build import Sizes, build_example, check_tools, read_sizes
from qcompile.backends.edge.processors import Processor

from qcompile.errors import Refused

SECONDS = 1800
STACK_OVERFLOW = 1000  # in main.c


@dataclass(frozen=True)
class Measured:
    """What the example said and what was counted.

    Attributes:
        ok: all codes of all cases are those of the reference, and nothing outside of the arena was written.
        cases: golden inputs; this and what follows is None where the program did not come to its end.
        equal: those of them whose output codes are right.
        arena_high_water: bytes of the arena that a run touched.
        stack_high_water: bytes of stack from the frame that calls ``model_run`` down, that included; None under sanitizers, which use
            stack of their own.
        instructions: of the first run; None where they were not counted.
        functions: the same by function.
        sizes: of the model's object files; None under sanitizers.
        mismatch: the first code that is wrong, or how the program ended, in words; None where all is well.
    """

    ok: bool
    cases: int | None
    equal: int | None
    arena_high_water: int | None
    stack_high_water: int | None
    sizes: Sizes | None
    mismatch: str | None = None
    instructions: int | None = None
    functions: Mapping[str, int] = field(default_factory=dict)


def measure(folder: Path, processor: Processor, *, sanitize: bool = False) -> Measured:
    """Build a folder's example, run its golden inputs, and return what came of it.

    Args:
        folder: that ``compile`` wrote.
        processor: that it was written for.
        sanitize: build with sanitizers and run on this machine, without an emulator; a report of theirs is a failure.

    Raises:
        Refused: it cannot be built, or a tool is missing.
    """
    check_tools("gcc", *([] if sanitize else processor.tools))
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch)
        program = build_example(folder, processor, built, sanitize=sanitize)
        functions: Mapping[str, int] = {}
        if sanitize:
            output = _run([str(program)], built, folder)
        else:
            symbols = _functions(program, processor)
            options = _counting(symbols, built)
            output = _run([*processor.emulator[:1], *options, *processor.emulator[1:], str(program)], built, folder)
            functions = _count(built / "blocks.txt", symbols)
        sizes = None if sanitize else read_sizes(built, processor)
        return _measured(output, sizes, functions, sanitize)


def _measured(output: str, sizes: Sizes | None, functions: Mapping[str, int], sanitize: bool) -> Measured:
    words = [line.split() for line in reversed(output.splitlines())]  # of a name that comes again, the first counts
    values = {pair[0]: int(pair[1]) for pair in words if len(pair) == 2 and pair[1].isdigit()}
    return Measured(
        ok=["ok"] in words,
        cases=values.get("cases"),
        equal=values.get("equal"),
        arena_high_water=values.get("arena_high_water"),
        stack_high_water=None if sanitize else values.get("stack_high_water"),
        sizes=sizes,
        mismatch=_mismatch(values, output),
        instructions=sum(functions.values()) or None,
        functions=functions,
    )


def _mismatch(values: Mapping[str, int], output: str) -> str | None:
    if "failed_case" in values:
        status = values.get("status")
        said = "the stack was used up" if status == STACK_OVERFLOW else f"model_init or model_run returned {status}"
        return f"case {values['failed_case']}: {said}"
    if "mismatch_case" in values:
        return f"case {values['mismatch_case']}, output {values['mismatch_output']}, byte {values['mismatch_byte']}"
    if "equal" not in values:
        said = next((line for line in output.splitlines() if "ERROR: " in line or "runtime error" in line), output[-300:])
        return f"the example did not come to its end: {' '.join(said.split()) or 'it printed nothing'}"
    return None


def run_inputs(folder: Path, processor: Processor, data: bytes, *, sanitize: bool = False) -> bytes:
    """Run a folder's model on input codes and return its output codes.

    Args:
        folder: that ``compile`` wrote.
        processor: that it was written for.
        data: the codes of all inputs of the first case, then of the next, as the model's C takes them.
        sanitize: as for ``measure``.

    Raises:
        Refused: as for ``measure``, or the program did not come to its end.
    """
    check_tools(*([] if sanitize else processor.tools))
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch)
        program = build_example(folder, processor, built, program="stream", sanitize=sanitize)
        (built / "inputs.bin").write_bytes(data)
        done = subprocess.run(
            [*([] if sanitize else processor.emulator), str(program)], capture_output=True, cwd=built, timeout=SECONDS, check=False
        )
        if done.returncode:
            raise Refused(f"the program ended with {done.returncode}: {done.stderr.decode(errors='replace')[-500:]}", node=str(folder))
        return (built / "outputs.bin").read_bytes()


def _run(command: list[str], within: Path, folder: Path) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=within, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise Refused(f"the example did not end within {SECONDS} seconds", node=str(folder)) from None
    return done.stdout + done.stderr  # semihosting prints to the second


def _functions(program: Path, processor: Processor) -> list[tuple[int, str]]:
    """Return address and name of every function, in order."""
    done = subprocess.run([f"{processor.prefix}nm", "-n", str(program)], capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    return [(int(row[0], 16), row[2]) for row in rows if len(row) == 3 and row[1] in "tTwW" and not row[2].startswith("$")]


def _counting(symbols: list[tuple[int, str]], built: Path) -> list[str]:
    """Build the plugin and return the options of QEMU that count from ``PREFIX_run`` to ``PREFIX_run_ended``."""
    address = {name: at for at, name in symbols}
    ended = next(name for name in address if name.endswith("_run_ended"))
    plugin = built / "count_instructions.so"
    with as_file(files(__package__) / "sources" / "count_instructions.c") as source:
        subprocess.run(["gcc", "-O2", "-fPIC", "-shared", "-o", str(plugin), str(source)], capture_output=True, check=True)
    start, stop = address[ended.removesuffix("_ended")], address[ended]
    return ["-plugin", f"{plugin},start={start:x},stop={stop:x},out={built / 'blocks.txt'}"]


def _count(blocks: Path, symbols: list[tuple[int, str]]) -> dict[str, int]:
    """Return instructions by function, the largest first; what the compiler made of one function counts for that function."""
    addresses = [at for at, _ in symbols]
    found: Counter[str] = Counter()
    for line in blocks.read_text().splitlines() if blocks.is_file() else []:
        address, instructions, executions = line.split()
        name = symbols[bisect.bisect_right(addresses, int(address, 16)) - 1][1]
        found[name.partition(".")[0]] += int(instructions) * int(executions)
    return dict(found.most_common())
