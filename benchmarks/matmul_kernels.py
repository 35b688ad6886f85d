#!/usr/bin/env python
"""Speed of the linear kernels beside PyTorch float32 and ONNX Runtime MatMulInteger, in turn on the same shapes.

Run: TVM_NUM_THREADS=2 python benchmarks/matmul_kernels.py [--json FILE] [--seconds S] [--rows M]
With few rows (by default one) a layer takes the time to read its weight: each scheme's rate is printed as a share of what memory gives a
loop that only reads, measured in turn with it. Weights are used in turn from enough copies to leave the caches, as inside a network.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import onnx
import onnxruntime
import torch
import tvm
from onnx import TensorProto, helper
from qcompile.backends.cpu.kernels import isa
from qcompile.backends.cpu.kernels.matmul import linear
from qcompile.backends.cpu.kernels.matmul_spec import Linear
from qcompile.backends.cpu.kernels.matmul_stream import prefetch_turn
from qcompile.backends.cpu.kernels.pack import pack_linear
from qcompile.backends.cpu.kernels.vector import hold, register, spread
from qcompile.backends.cpu.pipeline import compile_kernel
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

SHAPES = ((128, 384, 384), (128, 384, 1536), (128, 1536, 384), (16, 384, 1536), (1024, 384, 1536), (128, 4096, 4096))
KERNELS = {
    "W8A8": {"x": "uint8"},
    "W4A8 g32": {"x": "int8", "x_per_token": True, "x_affine": False, "bits": 4, "group": 32},
    "W4A16 g32": {"x": "float32", "bits": 4, "group": 32},
    "W8A16": {"x": "float32", "bits": 8},
    "float32": {"x": "float32", "bits": 32},
}
TOKEN = {"x": "int8", "x_per_token": True, "x_affine": False}
FEW_ROWS_SHAPE = (4096, 4096)
FEW_ROWS = {
    "W8A8": {"x": "uint8"},
    **{f"W{bits}A8 g{group}": {**TOKEN, "bits": bits, "group": group} for bits, group in ((4, 32), (4, 128), (3, 128), (2, 128), (1, 128))},
    "W2A8 g128 static": {"bits": 2, "group": 128},
    "W8A16": {"x": "float32", "bits": 8},
    **{f"W{bits}A16 g{g}": {"x": "float32", "bits": bits, "group": g} for bits, g in ((4, 32), (4, 128), (3, 128), (2, 128), (1, 128))},
    "float32": {"x": "float32", "bits": 32},
}  # a ternary weight is one of 2 bits with codes -1, 0 and 1
PART = 32 << 20  # bytes that are only read in one call
CALLS = 20  # of one kernel before the next one's turn, each on memory of its own: what all kernels read in between passes every cache


def _kernel_call(spec: Linear, m: int, rng: np.random.Generator, copies: int = 1) -> Callable[[], None]:
    """Return a call of one of our kernels, each time with the next copy of the weights."""
    k, n = spec.in_features, spec.out_features
    kernel = compile_kernel(linear(spec), isa.thread_count())
    scale = np.full((n, spec.groups) if spec.group else (n,), 0.01, np.float32)
    codes = rng.integers(-(1 << min(spec.bits - 1, 7)), 1 << min(spec.bits - 1, 7), (n, k))
    constants = pack_linear(spec, codes.astype(np.float32 if spec.bits == 32 else np.int8), scale)
    weights = [[tvm.runtime.tensor(a.copy()) for a in constants] for _ in range(copies)]
    inputs = [rng.standard_normal((m, k)).astype(np.float32) if not spec.integer else rng.integers(0, 127, (m, k)).astype(spec.x)]
    if spec.integer:
        inputs += [np.full(m if spec.x_per_token else 1, 0.01, np.float32)] + ([np.array([3], np.int32)] if spec.x_affine else [])
    tensors, y = [tvm.runtime.tensor(a) for a in inputs], tvm.runtime.tensor(np.zeros((m, n), np.float32))
    turn = iter(range(1 << 60))
    return lambda: kernel(*tensors, *weights[next(turn) % copies], y)


def _weight_bytes(spec: Linear) -> int:
    """Return the bytes of a weight's codes and float32 scales, without what packing pads."""
    scales = 0 if spec.bits == 32 else spec.out_features * spec.groups * 4
    return spec.out_features * spec.in_features * spec.bits // 8 + scales


def _read_call(*, ahead: bool) -> Callable[[], None]:
    """Return a call that reads ``PART`` bytes on all threads, each time others; ``ahead``: with the kernels' requests."""
    threads, lines = isa.thread_count(), 8
    turns = PART // threads // (64 * lines)
    lanes = T.ramp(0, 1, 16)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("read")
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(T.arg("x", T.handle()), (threads * turns, lines, 16), "int32")
        y = T.match_buffer(T.arg("y", T.handle()), (threads, 16), "int32")
        with T.parallel(0, threads) as thread:
            total = register("int32", 16)
            T.buffer_store(total, spread(T.int32(0), 16), [lanes])
            with T.serial(0, turns) as i:
                turn = hold(thread * turns + i)
                if ahead:
                    prefetch_turn(x, turn, thread * turns + turns, lines)
                for line in range(lines):
                    T.buffer_store(total, total[lanes] + x[turn, line, lanes], [lanes])
            T.buffer_store(y, total[lanes], [thread, lanes])
    kernel = compile_kernel(builder.get(), threads)
    parts = [tvm.runtime.tensor(np.ones((threads * turns, lines, 16), np.int32)) for _ in range(CALLS)]
    result, order = tvm.runtime.tensor(np.zeros((threads, 16), np.int32)), iter(range(1 << 60))
    return lambda: kernel(parts[next(order) % len(parts)], result)


def _torch_call(m: int, k: int, n: int) -> Callable[[], object]:
    x, weight = torch.randn(m, k), torch.randn(n, k)
    return lambda: torch.nn.functional.linear(x, weight)


def _onnxruntime_call(m: int, k: int, n: int, rng: np.random.Generator) -> Callable[[], object]:
    """Return MatMulInteger of uint8 by constant int8 (to int32, without scales)."""
    weight = helper.make_tensor("w", TensorProto.INT8, [k, n], rng.integers(-127, 128, (k, n)).astype(np.int8).tobytes(), raw=True)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [m, k])], [helper.make_tensor_value_info("y", TensorProto.INT32, [m, n])],
        [weight],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=min(10, onnx.IR_VERSION))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = isa.thread_count()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    feed = {"x": rng.integers(0, 256, (m, k)).astype(np.uint8)}
    return lambda: session.run(None, feed)


def _medians(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Return the median seconds of each call; calls are interleaved, so that all see the same state of the machine."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in times.items()}


def _many_rows(seconds: float) -> list[dict[str, object]]:
    rng = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    for m, k, n in SHAPES:
        calls: dict[str, Callable[[], object]] = {"torch float32": _torch_call(m, k, n)}
        calls["ORT MatMulInteger"] = _onnxruntime_call(m, k, n, rng)
        calls |= {name: _kernel_call(Linear(k, n, **options), m, rng) for name, options in KERNELS.items()}
        medians = _medians(calls, seconds)
        for name, median in medians.items():
            gops, ratio = 2 * m * k * n / median / 1e9, medians["torch float32"] / median
            rows.append({"m": m, "k": k, "n": n, "kernel": name, "microseconds": median * 1e6, "gops": gops, "times_torch": ratio})
            click.echo(f"{m:5} x {k:4} x {n:4}  {name:18} {median * 1e6:9.1f} us {gops:7.0f} GOPS {ratio:6.2f} x torch")
    return rows


def _few_rows(m: int, seconds: float) -> list[dict[str, object]]:
    """Print and return each scheme's rate of reading its weight, and its share of the rate of only reading."""
    (k, n), rng = FEW_ROWS_SHAPE, np.random.default_rng(0)
    specs = {name: Linear(k, n, **options) for name, options in FEW_ROWS.items()}
    calls: dict[str, Callable[[], object]] = {"read": _read_call(ahead=False), "read ahead": _read_call(ahead=True)}
    sizes = dict.fromkeys(calls, PART)
    calls |= {name: _kernel_call(spec, m, rng, CALLS) for name, spec in specs.items()}
    sizes |= {name: _weight_bytes(spec) for name, spec in specs.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["read"]) < 3 * CALLS:
        for name, call in calls.items():
            for _ in range(CALLS):
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    # The smallest time shows the kernel, where other processes take time from both; the median shows the machine as it was.
    limits = [PART / min(rank(times[name]) for name in ("read", "read ahead")) / 1e9 for rank in (np.min, np.median)]
    rows: list[dict[str, object]] = []
    for name, taken in times.items():
        best, median = float(np.min(taken)), float(np.median(taken))
        shares = [sizes[name] / seconds / 1e9 / limit for seconds, limit in zip((best, median), limits, strict=True)]
        bits = sizes[name] * 8 / (k * n) if name in specs else None
        rows.append(
            {"m": m, "kernel": name, "microseconds": best * 1e6, "bits_per_weight": bits, "of_read": shares[0], "of_read_median": shares[1]}
        )
        text = f"{bits:5.2f} bits/weight" if bits else " " * 17
        click.echo(
            f"{m} row  {name:18} {text}  best {best * 1e6:7.0f} us {sizes[name] / best / 1e9:6.1f} GB/s {shares[0]:5.0%} of reading;"
            f"  median {median * 1e6:7.0f} us {shares[1]:5.0%}"
        )
    return rows


@click.command(help=__doc__)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows to this file too.")
@click.option("--seconds", default=1.0, help="Time for each shape; ten times this for few rows.")
@click.option("--rows", type=int, help="Only the table of this few rows.")
def main(json_file: Path | None, seconds: float, rows: int | None) -> None:
    """Print one line for each shape and kernel."""
    torch.set_num_threads(isa.thread_count())
    found: list[dict[str, object]] = [] if rows else _many_rows(seconds)
    found += _few_rows(rows or 1, 10 * seconds)
    if json_file:
        json_file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
