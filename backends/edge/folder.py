"""The folder that ``compile --target edge:..`` writes: the model's C, its report, and an example that runs it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from qcompile.backends.edge.boundary import Port, in_memory
from qcompile.backends.edge.emit import report, write_files
from qcompile.backends.edge.firmware.files import example_files, golden_header
from qcompile.backends.edge.lower import Program, lower
from qcompile.backends.edge.processors import Processor

from qcompile.errors import Refused
from qcompile.files import write_atomic
from qcompile.formats import parse_scheme, quantize
from qcompile.graph import Graph
from qcompile.target import MemoryLimits


def write_folder(
    graph: Graph, golden: Sequence[torch.Tensor], folder: Path, processor: Processor, limits: MemoryLimits, target: str, name: str
) -> dict[str, Any]:
    """Write a graph for a processor; see ``Target.write_folder``."""
    program = lower(graph, processor.features)
    _check(program, limits)
    files = write_files(program, name)
    codes = [_codes(x, port) for x, port in zip(golden, program.inputs, strict=True)]
    results = program.graph(*codes)
    arrays = [[in_memory(value).numpy() for value in values] for values in (codes, results)]
    files["golden.h"] = golden_header([arrays[0]], [arrays[1]], name).encode()
    files |= {path: text.encode() for path, text in example_files(processor, (f"{name}.c", f"{name}_weights.c"), name).items()}
    told = {**report(program), "target": target, "board": limits.board, "limits": {"arena": limits.arena, "flash": limits.flash}}
    files["report.json"] = (json.dumps(told, indent=1) + "\n").encode()
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / path, data)
    return told


def _codes(x: torch.Tensor, port: Port) -> torch.Tensor:
    if port.scale is None:
        return x
    return quantize(x, torch.tensor(port.scale), torch.tensor(port.zero_point, dtype=torch.int32), parse_scheme(port.scheme))


def _check(program: Program, limits: MemoryLimits) -> None:
    """Raise Refused where the model does not fit."""
    if limits.arena is not None and program.arena_bytes > limits.arena:
        raise Refused(
            f"the arena takes {program.arena_bytes} bytes, the limit is {limits.arena}",
            way_out=f"--arena-limit {program.arena_bytes} fits",
        )
    if limits.flash is not None and program.weights_bytes > limits.flash:
        raise Refused(
            f"the weights alone take {program.weights_bytes} bytes of flash, the limit is {limits.flash}",
            way_out="fewer bits (--recipe w4a8-edge), or a board with more flash",
        )
