"""The folder that ``compile --target edge:..`` writes: the model's C, its report, an example that runs it, and a library for Arduino."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from qcompile.backends.edge.boundary import Port, in_memory
from qcompile.backends.edge.emit import report, write_files
from qcompile.backends.edge.firmware.arduino import arduino_library
from qcompile.backends.edge.firmware.build import measure_objects
from qcompile.backends.edge.firmware.files import decoder_header, example_files, golden_header
from qcompile.backends.edge.fit import lower_within
from qcompile.backends.edge.lower import Program
from qcompile.backends.edge.processors import Processor

from qcompile.errors import Refused
from qcompile.files import write_atomic
from qcompile.formats import parse_scheme, quantize
from qcompile.graph import Graph
from qcompile.target import MemoryLimits

PROMPT_TOKENS = 4  # of a decoder's example
GOLDEN_TOKENS = 24


def write_folder(
    graph: Graph, golden: Sequence[torch.Tensor], folder: Path, processor: Processor, limits: MemoryLimits, target: str, name: str
) -> dict[str, Any]:
    """Write a graph for a processor; see ``Target.write_folder``."""
    from qcompile.backends.edge.target import EdgeTarget

    program = lower_within(graph, EdgeTarget(processor.name), limits.arena, processor.features)
    _check(program, limits)
    files = write_files(program, name)
    decoder = bool(program.updated)
    files["golden.h"] = (_decoder_header(program, golden[0], name) if decoder else _golden_header(program, golden, name)).encode()
    example = example_files(processor, (f"{name}.c", f"{name}_weights.c"), name, decoder=decoder)
    files |= {path: text.encode() for path, text in example.items()}
    texts = {path: data.decode() for path, data in files.items()}
    files |= {f"arduino/{path}": text.encode() for path, text in arduino_library(texts, name).items()}
    with tempfile.TemporaryDirectory() as scratch:
        _write(files, Path(scratch))
        told = {**report(program), **_measured(Path(scratch), processor)}
    told |= {"target": target, "board": limits.board, "limits": {"arena": limits.arena, "flash": limits.flash}}
    _check_flash(told, limits)
    files["report.json"] = (json.dumps(told, indent=1) + "\n").encode()
    _write(files, folder)
    return told


def _write(files: Mapping[str, bytes], folder: Path) -> None:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / path, data)


def _measured(folder: Path, processor: Processor) -> dict[str, int | None]:
    """Return what the processor's compiler makes of the C; nothing is known without the compiler."""
    if shutil.which("make") is None or shutil.which(processor.tools[0]) is None:
        return {"code_bytes": None, "flash_bytes": None, "stack_bytes": None}
    sizes, stack = measure_objects(folder, processor)
    return {"code_bytes": sizes.code, "flash_bytes": sizes.code + sizes.weights, "stack_bytes": stack}


def _check_flash(told: dict[str, Any], limits: MemoryLimits) -> None:
    """Raise Refused where code and weights together do not fit."""
    if limits.flash is not None and (told["flash_bytes"] or 0) > limits.flash:
        raise Refused(
            f"code takes {told['code_bytes']} and weights take {told['flash_bytes'] - told['code_bytes']} bytes of flash, "
            f"the limit is {limits.flash}",
            way_out="fewer bits (--recipe w4a8-edge), or a board with more flash",
        )


def _golden_header(program: Program, golden: Sequence[torch.Tensor], name: str) -> str:
    codes = [_codes(x, port) for x, port in zip(golden, program.inputs, strict=True)]
    arrays = [[in_memory(value).numpy() for value in values] for values in (codes, program.graph(*codes))]
    return golden_header([arrays[0]], [arrays[1]], name)


def _decoder_header(program: Program, text: torch.Tensor, name: str) -> str:
    """Continue the beginning of a text by the meaning of the graph, one token a call, always by the likeliest."""
    prompt = [int(token) for token in text.reshape(-1)[:PROMPT_TOKENS]]
    caches = [torch.zeros(port.shape, dtype=getattr(torch, port.dtype)) for port in program.inputs[2:]]
    tokens: list[int] = []
    context = program.inputs[2].shape[1]
    while len(tokens) < GOLDEN_TOKENS and len(prompt) + len(tokens) < context:
        past = len(prompt) + len(tokens) - 1 if tokens else 0
        for number, token in enumerate(tokens[-1:] or prompt):
            logits, *caches = program.graph(torch.tensor([[token]]), torch.tensor([past + number]), *caches)
        tokens.append(int(logits.reshape(-1).argmax()))
    return decoder_header(prompt, tokens, [port.bytes for port in program.inputs], name)


def _codes(x: torch.Tensor, port: Port) -> torch.Tensor:
    if port.scale is None:
        return x
    return quantize(x, torch.tensor(port.scale), torch.tensor(port.zero_point, dtype=torch.int32), parse_scheme(port.scheme))


def _check(program: Program, limits: MemoryLimits) -> None:
    """Raise Refused where the model's weights do not fit."""
    if limits.flash is not None and program.weights_bytes > limits.flash:
        raise Refused(
            f"the weights alone take {program.weights_bytes} bytes of flash, the limit is {limits.flash}",
            way_out="fewer bits (--recipe w4a8-edge), or a board with more flash",
        )
