#!/usr/bin/env python
"""Speed of the linear kernels beside PyTorch float32 and ONNX Runtime MatMulInteger, in turn on the same shapes.

Run: TVM_NUM_THREADS=2 python benchmarks/matmul_kernels.py [--json FILE] [--seconds S]
Weights are used in turn from enough copies to leave the caches where a layer is large, as they are inside a network.
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
from qcompile.backends.cpu.kernels.pack import pack_linear

SHAPES = ((128, 384, 384), (128, 384, 1536), (128, 1536, 384), (16, 384, 1536), (1024, 384, 1536), (128, 4096, 4096), (1, 4096, 4096))
KERNELS = {
    "W8A8": {"x": "uint8"},
    "W4A8 g32": {"x": "int8", "x_per_token": True, "x_affine": False, "bits": 4, "group": 32},
    "W4A16 g32": {"x": "float32", "bits": 4, "group": 32},
    "W8A16": {"x": "float32", "bits": 8},
    "float32": {"x": "float32", "bits": 32},
}
CACHES = 48 << 20  # copies of the weights together exceed this


def _kernel_call(name: str, m: int, k: int, n: int, rng: np.random.Generator) -> tuple[Callable[[], None], int]:
    """Return a call of one of our kernels, each time with the next copy of the weights, and the bytes of one copy."""
    spec = Linear(k, n, **KERNELS[name])
    target = tvm.target.Target(isa.target_description())
    kernel = tvm.compile(tvm.IRModule({"linear": linear(spec)}), target)["linear"]
    scale = np.full((n, spec.groups) if spec.group else (n,), 0.01, np.float32)
    codes = rng.integers(-(1 << min(spec.bits - 1, 7)), 1 << min(spec.bits - 1, 7), (n, k))
    constants = pack_linear(spec, codes.astype(np.float32 if spec.bits == 32 else np.int8), scale)
    size = sum(a.nbytes for a in constants)
    copies = [[tvm.runtime.tensor(a.copy()) for a in constants] for _ in range(min(12, 1 + CACHES // size) if m < 16 else 1)]
    inputs = [rng.standard_normal((m, k)).astype(np.float32) if not spec.integer else rng.integers(0, 127, (m, k)).astype(spec.x)]
    if spec.integer:
        inputs += [np.full(m if spec.x_per_token else 1, 0.01, np.float32)] + ([np.array([3], np.int32)] if spec.x_affine else [])
    tensors, y = [tvm.runtime.tensor(a) for a in inputs], tvm.runtime.tensor(np.zeros((m, n), np.float32))
    turn = iter(range(1 << 60))
    return lambda: kernel(*tensors, *copies[next(turn) % len(copies)], y), size


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


@click.command(help=__doc__)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows to this file too.")
@click.option("--seconds", default=1.0, help="Time for each shape.")
def main(json_file: Path | None, seconds: float) -> None:
    """Print one line for each shape and kernel."""
    torch.set_num_threads(isa.thread_count())
    rng, rows = np.random.default_rng(0), []
    for m, k, n in SHAPES:
        calls: dict[str, Callable[[], object]] = {"torch float32": _torch_call(m, k, n)}
        calls["ORT MatMulInteger"] = _onnxruntime_call(m, k, n, rng)
        sizes = {}
        for name in KERNELS:
            calls[name], sizes[name] = _kernel_call(name, m, k, n, rng)
        medians = _medians(calls, seconds)
        for name, median in medians.items():
            gops, ratio = 2 * m * k * n / median / 1e9, medians["torch float32"] / median
            bandwidth = sizes.get(name, 0) / median / 1e9
            row = {"m": m, "k": k, "n": n, "kernel": name, "microseconds": median * 1e6, "gops": gops, "times_torch": ratio}
            rows.append(row | {"weight_gb_per_s": bandwidth or None})
            read = f"{bandwidth:7.1f} GB/s" if bandwidth else " " * 12
            click.echo(f"{m:5} x {k:4} x {n:4}  {name:18} {median * 1e6:9.1f} us {gops:7.0f} GOPS {read} {ratio:6.2f} x torch")
    if json_file:
        json_file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
