"""A model written by hand in the form that compile writes, small enough to be wrong in one chosen way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from qcompile.backends.edge.firmware.files import example_files, golden_header
from qcompile.backends.edge.processors import Processor

HEADER = """
#ifndef MODEL_H
#define MODEL_H
#include <stddef.h>
#include <stdint.h>
#define MODEL_ARENA_BYTES 64
#define MODEL_ARENA_ALIGNMENT @ALIGNMENT@
#define MODEL_INPUT_COUNT 2
#define MODEL_OUTPUT_COUNT 2
#define MODEL_INPUT_0_ELEMENTS 16
#define MODEL_INPUT_1_ELEMENTS 16
#define MODEL_OUTPUT_0_ELEMENTS 16
#define MODEL_OUTPUT_1_ELEMENTS 16
#ifdef __cplusplus
extern "C" {
#endif
typedef int8_t model_input_0_t;
typedef uint8_t model_input_1_t;
typedef int8_t model_output_0_t;
typedef int16_t model_output_1_t;
int32_t model_init(void *arena, size_t arena_bytes);
int32_t model_run(const void *const inputs[MODEL_INPUT_COUNT], void *const outputs[MODEL_OUTPUT_COUNT], void *arena);
#ifdef __cplusplus
}
#endif
#endif
"""
CODE = """
#include "model.h"

#include "runtime.h"

extern const int8_t model_weights[16];

int32_t model_init(void *arena, size_t arena_bytes) {
    return arena_bytes < MODEL_ARENA_BYTES || (uintptr_t)arena % MODEL_ARENA_ALIGNMENT != 0u;
}

/* Output 0: input 0 times the weights, divided by 16. Output 1: input 0 plus input 1. */
int32_t model_run(const void *const inputs[MODEL_INPUT_COUNT], void *const outputs[MODEL_OUTPUT_COUNT], void *arena) {
    const int8_t *x = inputs[0];
    const uint8_t *more = inputs[1];
    int8_t *y = outputs[0];
    int16_t *sum = outputs[1];
    int32_t *products = arena;
    @BEFORE@
    for (int32_t i = 0; i < 16; i++) {
        products[i] = (int32_t)x[i] * model_weights[i];
    }
    for (int32_t i = 0; i < 16; i++) {
        y[i] = (int8_t)(products[i] >> 4);
        sum[i] = (int16_t)(x[i] + more[i]);
    }
    @AFTER@
    return 0;
}
"""
WEIGHTS = np.arange(-8, 8, dtype=np.int8)

WriteFolder = Callable[..., Path]


@pytest.fixture
def cases() -> list[tuple[np.ndarray, ...]]:
    """Three sets of the two inputs."""
    generator = np.random.default_rng(5)
    return [(generator.integers(-128, 128, 16).astype(np.int8), generator.integers(0, 256, (2, 8)).astype(np.uint8)) for _ in range(3)]


@pytest.fixture
def expected(cases: list[tuple[np.ndarray, ...]]) -> list[tuple[np.ndarray, ...]]:
    """The two outputs of each."""
    return [
        ((x.astype(np.int32) * WEIGHTS >> 4).astype(np.int8), (x.astype(np.int16) + more.reshape(-1)).astype(np.int16)) for x, more in cases
    ]


@pytest.fixture
def write_folder(tmp_path: Path, cases: list[tuple[np.ndarray, ...]], expected: list[tuple[np.ndarray, ...]]) -> WriteFolder:
    """Return a function that writes the folder for a processor, with C of the test's own before or after the work of ``model_run``."""

    def write(processor: Processor, *, before: str = "", after: str = "", head: str = "", prefix: str = "model") -> Path:
        for tool in ("gcc", "make", *processor.tools):
            if shutil.which(tool) is None:
                pytest.skip(f"{tool} is not installed ('make edge-tools')")
        folder = tmp_path / "out"
        code = head + CODE.replace("@BEFORE@", before).replace("@AFTER@", after)
        numbers = ", ".join(map(str, WEIGHTS.tolist()))
        weights = f"#include <stdint.h>\nextern const int8_t model_weights[16];\nconst int8_t model_weights[16] = {{{numbers}}};\n"
        header = HEADER.replace("@ALIGNMENT@", str(processor.alignment))
        runtime = (resources.files("qcompile.backends.edge") / "runtime.h").read_text(encoding="utf-8")
        own = {"runtime.h": runtime, "model.h": header, "model.c": code, "model_weights.c": weights}
        if prefix != "model":
            renamed = {"model_": f"{prefix}_", "MODEL_": f"{prefix.upper()}_", "model.": f"{prefix}."}
            own = {_replaced(name, renamed): _replaced(text, renamed) for name, text in own.items()}
        sources = [name for name in own if name.endswith(".c")]
        files = {**own, "golden.h": golden_header(cases, expected, prefix), **example_files(processor, sources, prefix)}
        files["report.json"] = json.dumps({"target": f"edge:{processor.name}", "arena_bytes": 64})
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        return folder

    return write


def _replaced(text: str, names: dict[str, str]) -> str:
    for name, other in names.items():
        text = text.replace(name, other)
    return text
