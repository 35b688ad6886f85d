"""The C of a compiled model: ``model.h``, ``model.c``, ``model_weights.c``, ``runtime.h``; and its report.

The same graph gives the same bytes.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import numpy as np
from qcompile.backends.edge.boundary import Port
from qcompile.backends.edge.lower import ALIGNMENT, Program, constant_bytes, place
from qcompile.backends.lowering.sequence import CONSTANT, INPUT, VALUE, View

_C = {
    "int8": "int8_t",
    "uint8": "uint8_t",
    "int16": "int16_t",
    "int32": "int32_t",
    "int64": "int64_t",
    "float32": "float",
    "bool": "uint8_t",
}
_PER_LINE = 16


def write_files(program: Program, name: str = "model") -> dict[str, bytes]:
    """Return the content of each file by its name.

    Args:
        program: what to write.
        name: prefix of files and of everything that C sees.
    """
    files = {
        f"{name}.h": _header(program, name),
        f"{name}.c": _source(program, name),
        f"{name}_weights.c": _weights(program, name),
        "runtime.h": resources.files("qcompile.backends.edge").joinpath("runtime.h").read_text(),
    }
    return {path: text.encode() for path, text in files.items()}


def report(program: Program) -> dict[str, Any]:
    """Return what ``report.json`` says of a program by itself."""
    layers = []
    for call, count, layer in zip(program.sequence.calls, program.results, program.layers, strict=True):
        result = call.arguments[-count]
        layers.append({"name": layer.name, "op": layer.op, "scheme": layer.scheme, "arena_at": place(program, result),
                       "flash": constant_bytes(program, call), "macs": layer.macs})  # fmt: skip
    return {"arena_bytes": program.arena_bytes, "weights_bytes": program.weights_bytes,
            "macs": sum(layer.macs for layer in program.layers), "layers": layers}  # fmt: skip


# ---- model.h --------------------------------------------------------------------------------------------------------------


def _header(program: Program, name: str) -> str:
    upper = name.upper()
    lines = [
        f"/* A compiled model: {name}_init once, {name}_run for each call. Generated; do not edit.",
        f"   The arena is all the memory it needs: {program.arena_bytes} bytes at an address that {ALIGNMENT} divides.",
        "   Calls with different arenas may run at the same time. */",
        f"#ifndef {upper}_H",
        f"#define {upper}_H",
        "",
        "#include <stddef.h>",
        "#include <stdint.h>",
        "",
        "#ifdef __cplusplus",
        'extern "C" {',
        "#endif",
        "",
        f"#define {upper}_ARENA_BYTES {max(program.arena_bytes, ALIGNMENT)}",
        f"#define {upper}_ARENA_ALIGNMENT {ALIGNMENT}",
        f"#define {upper}_WEIGHTS_BYTES {program.weights_bytes}",
        f"#define {upper}_ERROR_ARENA_BYTES 1",
        f"#define {upper}_ERROR_ARENA_ALIGNMENT 2",
        "",
        f"#define {upper}_INPUT_COUNT {len(program.inputs)}",
        f"#define {upper}_OUTPUT_COUNT {len(program.outputs)}",
    ]
    for kind, ports in (("input", program.inputs), ("output", program.outputs)):
        for number, port in enumerate(ports):
            lines += _port(name, f"{kind}_{number}", port, kind == "input" and number in program.updated)
    lines += [
        "",
        "/* Look at an arena once: 0, or an error above. It need not be cleared. */",
        f"int32_t {name}_init(void *arena, size_t arena_bytes);",
        "",
        "/* Run the model: reads each input, writes each output, 0. Inputs and outputs may not lie in the arena. */",
        f"int32_t {name}_run(const void *const inputs[{upper}_INPUT_COUNT], void *const outputs[{upper}_OUTPUT_COUNT], void *arena);",
        "",
        "#ifdef __cplusplus",
        "}",
        "#endif",
        "",
        "#endif",
    ]
    return "\n".join(lines) + "\n"


def _port(name: str, which: str, port: Port, updated: bool) -> list[str]:
    prefix = f"{name}_{which}".upper()
    shape = "x".join(map(str, port.shape)) or "one number"
    meaning = "" if port.scale is None else ": value = scale * (code - zero point)"
    meaning += "; a call writes it too: keep it for the next" * updated
    lines = [
        "",
        f"/* {port.name}: {port.dtype} {shape}{meaning} */",
        f"typedef {_C[port.dtype]} {name}_{which}_t;",
        f"#define {prefix}_ELEMENTS {port.elements}",
        f"#define {prefix}_BYTES {port.bytes}",
        f"#define {prefix}_RANK {len(port.shape)}",
        f"#define {prefix}_SHAPE {{{', '.join(map(str, port.shape))}}}",
    ]
    if port.scale is not None:
        lines += [f"#define {prefix}_SCALE {_float(port.scale)}", f"#define {prefix}_ZERO_POINT {port.zero_point}"]
    return lines


def _float(value: float) -> str:
    text = repr(float(np.float32(value)))
    return f"{text if '.' in text or 'e' in text else text + '.0'}f"


# ---- model.c --------------------------------------------------------------------------------------------------------------


def _source(program: Program, name: str) -> str:
    upper = name.upper()
    externs = [f"extern const {_C[str(c.array.dtype)]} {name}_{c.name}[{max(c.array.size, 1)}];" for c in program.constants]
    calls = []
    for call, layer in zip(program.sequence.calls, program.layers, strict=True):
        operands = [_operand(program, name, o) if isinstance(o, View) else str(o) for o in call.operands]
        calls += [f"  /* {layer.name}: {layer.op} */", f"  {call.kernel}({', '.join(operands)});"]
    read = {(o.kind, o.index) for call in program.sequence.calls for o in call.arguments}
    unread = ["  (void)inputs;"] * (not any(kind == INPUT for kind, _ in read)) + ["  (void)bytes;"] * (not program.arena.places)
    return "\n".join(
        [
            f"/* Kernels and schedule of {name}. Generated; do not edit. */",
            f'#include "{name}.h"',
            "",
            '#include "runtime.h"',
            "",
            *externs,
            "",
            *[program.functions[kernel].text for kernel in program.functions],
            f"int32_t {name}_init(void *arena, size_t arena_bytes) {{",
            f"  if (arena_bytes < {upper}_ARENA_BYTES) {{",
            f"    return {upper}_ERROR_ARENA_BYTES;",
            "  }",
            f"  return (uintptr_t)arena % {upper}_ARENA_ALIGNMENT ? {upper}_ERROR_ARENA_ALIGNMENT : 0;",
            "}",
            "",
            f"int32_t {name}_run(const void *const inputs[{upper}_INPUT_COUNT], void *const outputs[{upper}_OUTPUT_COUNT], void *arena) {{",
            "  uint8_t *const bytes = (uint8_t *)arena;",
            *unread,
            *calls,
            "  return 0;",
            "}",
            "",
        ]
    )


def _operand(program: Program, name: str, view: View) -> str:
    c = _C[view.dtype]
    if view.kind == INPUT and view.at:
        return f"(const {c} *)((const uint8_t *)inputs[{view.index}] + {view.at})"
    if view.kind == INPUT:
        return f"({'' if view.index in program.updated else 'const '}{c} *)inputs[{view.index}]"
    if view.kind == CONSTANT:
        constant = program.constants[view.index]
        own = f"{name}_{constant.name}"
        return own if str(constant.array.dtype) == view.dtype else f"(const {c} *)(const void *){own}"
    offset = place(program, view)
    if offset is not None:
        return f"({c} *)(void *)(bytes + {offset})"
    view = program.sequence.located(view)
    number = [output.index for output in program.sequence.outputs if output.kind == VALUE].index(view.index)
    return f"({c} *)((uint8_t *)outputs[{number}] + {view.at})" if view.at else f"({c} *)outputs[{number}]"


# ---- constants ------------------------------------------------------------------------------------------------------------


def _array(name: str, array: np.ndarray) -> str:
    flat = array.reshape(-1)
    if flat.dtype == np.float32:
        words = [_float(value) for value in flat]
    elif flat.dtype == np.int32:
        words = ["INT32_MIN" if value == -(2**31) else str(value) for value in flat.tolist()]
    else:
        words = [str(int(value)) for value in flat.tolist()]
    lines = [", ".join(words[i : i + _PER_LINE]) for i in range(0, len(words), _PER_LINE)] or ["0"]
    body = ",\n  ".join(lines)
    return f"{name}[{max(flat.size, 1)}] = {{\n  {body}}};\n"


def _weights(program: Program, name: str) -> str:
    parts = [f"/* Constants of {name}. Generated; do not edit. */", "#include <stdint.h>", ""]
    for constant in program.constants:
        declared = f"const {_C[str(constant.array.dtype)]} {name}_{constant.name}"
        parts += [f"extern {declared}[{max(constant.array.size, 1)}];", _array(declared, constant.array)]
    return "\n".join(parts)
