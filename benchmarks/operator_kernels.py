#!/usr/bin/env python
"""Times the cpu target's operator kernels beside torch: attention, norms, quantization, convolution, depthwise, rotation.

    TVM_NUM_THREADS=2 python benchmarks/operator_kernels.py [--only conv] [--json]

Each pair runs in turn, in blocks with a pause between them (both libraries' threads spin for a while after work), and the medians are
compared. torch runs float32 on two threads: what a quantized operator replaces. GOPS counts two operations for each product; GB/s
counts every argument once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tvm
from qcompile.backends.cpu.kernels import isa, quantization
from qcompile.backends.cpu.kernels.attention import attention
from qcompile.backends.cpu.kernels.convolution import convolution, pack_convolution
from qcompile.backends.cpu.kernels.convolution_spec import Convolution
from qcompile.backends.cpu.kernels.depthwise import depthwise, pack_depthwise
from qcompile.backends.cpu.kernels.hadamard import hadamard
from qcompile.backends.cpu.kernels.matmul_epilogue import Epilogue
from qcompile.backends.cpu.kernels.normalization import layer_norm
from qcompile.backends.cpu.kernels.softmax import softmax
from qcompile.backends.cpu.pipeline import compile_kernel

from qcompile.formats import parse_scheme


@dataclass
class Case:
    """One kernel with its arguments, torch's way to the same result, and the operations of one call."""

    name: str
    function: Any
    arguments: list[np.ndarray[Any, Any]]
    torch_call: Callable[[], Any]
    operations: float = 0.0


def normal(*shape: int) -> np.ndarray[Any, Any]:
    """Return standard normal float32 values."""
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def attention_cases() -> Iterator[Case]:
    """Yield attention of an encoder, and of one decoded token over a long cache."""
    for batch, tokens, keys, heads, d in ((1, 16, 16, 12, 32), (1, 128, 128, 12, 32), (8, 128, 128, 12, 32), (1, 1, 1024, 16, 64)):
        q, k, v = normal(batch, tokens, heads * d), normal(batch, keys, heads * d), normal(batch, keys, heads * d)
        split = [torch.from_numpy(t).unflatten(-1, (heads, d)).transpose(1, 2) for t in (q, k, v)]
        yield Case(
            f"attention b{batch} t{tokens} s{keys} h{heads} d{d}",
            attention(heads, heads, d, d**-0.5, key_mask=False, causal=False),
            [q, k, v, np.zeros_like(q)],
            lambda split=split: F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2),
            4.0 * batch * heads * tokens * keys * d,
        )


def row_cases() -> Iterator[Case]:
    """Yield what works row by row: norms, quantization, softmax, rotation."""
    scale, zero = np.array([0.02], np.float32), np.array([128], np.int32)
    for rows, width in ((128, 384), (1024, 384), (128, 4096)):
        x, weight, bias, out = normal(rows, width), normal(width), normal(width), np.zeros((rows, width), np.float32)
        tensors = [torch.from_numpy(t) for t in (x, weight, bias)]
        codes = np.zeros((rows, width), np.uint8)
        yield Case(f"layer_norm {rows}x{width}", layer_norm(width, 1e-5), [x, weight, bias, out],
                   lambda t=tensors, width=width: F.layer_norm(t[0], (width,), t[1], t[2]))  # fmt: skip
        fused = layer_norm(width, 1e-5, residual=True, codes="uint8")
        yield Case(f"residual + layer_norm + codes {rows}x{width}", fused, [x, x, weight, bias, scale, zero, out, codes],
                   lambda t=tensors, width=width: F.layer_norm(t[0] + t[0], (width,), t[1], t[2]).div(0.02).round().add(128).clamp(0, 255)
                   .to(torch.uint8))  # fmt: skip
        scheme = parse_scheme("uint8 tensor affine")
        yield Case(f"quantize_static {rows}x{width}", quantization.quantize_static(scheme), [x.ravel(), scale, zero, codes.ravel()],
                   lambda t=tensors: t[0].div(0.02).round().add(128).clamp(0, 255).to(torch.uint8))  # fmt: skip
        token = quantization.quantize_dynamic(width, parse_scheme("int8 token sym dynamic"))
        yield Case(f"quantize_dynamic {rows}x{width}", token,
                   [x, codes.astype(np.int8), np.zeros(rows, np.float32), np.zeros(rows, np.int32)],
                   lambda t=tensors: (t[0] / (t[0].abs().amax(-1, keepdim=True) / 127)).round().to(torch.int8))  # fmt: skip
        yield Case(f"softmax {rows}x{width}", softmax(width), [x, out], lambda t=tensors: t[0].softmax(-1))
    x, matrix = normal(128, 4096), torch.from_numpy(normal(1024, 1024))
    yield Case("hadamard 128x4096 blocks of 1024", hadamard(4096, 1024), [x, np.zeros_like(x)],
               lambda: torch.from_numpy(x).view(-1, 1024) @ matrix, 128 * 4096 * 10.0)  # fmt: skip


# (channels, outputs, image, kernel, stride), layers of ResNet-50 and MobileNetV2 at 224 x 224
DENSE = ((3, 64, 224, 7, 2), (64, 64, 56, 3, 1), (64, 256, 56, 1, 1), (128, 128, 28, 3, 1), (256, 256, 14, 3, 1), (1024, 256, 14, 1, 1),
         (512, 512, 7, 3, 1), (3, 32, 224, 3, 2), (16, 96, 112, 1, 1), (144, 24, 56, 1, 1), (384, 64, 14, 1, 1),
         (320, 1280, 7, 1, 1))  # fmt: skip
DEPTHWISE = ((32, 112, 3, 1), (96, 112, 3, 2), (144, 56, 3, 1), (384, 14, 3, 1), (960, 7, 3, 1), (240, 28, 5, 1))


def convolution_case(channels: int, outputs: int, image: int, kernel: int, stride: int, groups: int, dtype: str) -> Case:
    """Return a convolution with bias and relu, from codes to codes or float to float, of a square image."""
    pair = (kernel // 2, kernel // 2)
    codes = dtype != "float32"
    spec = Convolution(channels, outputs, image, image, (kernel, kernel), (stride, stride), pair, groups=groups, x=dtype,
                       epilogue=Epilogue("float32", "relu", output="uint8" if codes else "float32"))  # fmt: skip
    build, pack = (depthwise, pack_depthwise) if groups > 1 else (convolution, pack_convolution)
    random = np.random.default_rng(0)
    x, weight, bias = normal(1, channels, image, image), normal(outputs, channels // groups, kernel, kernel), normal(outputs)
    out = np.zeros((1, spec.out_height, spec.out_width, outputs), np.uint8 if codes else np.float32)
    scale, zero = np.array([0.02], np.float32), np.array([128], np.int32)
    if codes:
        quantized = random.integers(-128, 128, weight.shape).astype(np.int8)
        constants = pack(spec, quantized, np.full(outputs, 0.001, np.float32), None, bias)
        arguments = [random.integers(0, 256, (1, image, image, channels)).astype(np.uint8), scale, zero, *constants, scale, zero, out]
    else:
        arguments = [np.ascontiguousarray(x.transpose(0, 2, 3, 1)), *pack(spec, weight, bias=bias), out]
    tensors = [torch.from_numpy(t) for t in (x, weight, bias)]
    kind = "depthwise" if groups > 1 else "conv"
    return Case(f"{kind} {dtype} {channels}->{outputs} {kernel}x{kernel}/{stride} @{image}", build(spec), arguments,
                lambda: torch.relu(F.conv2d(*tensors, stride, kernel // 2, 1, groups)),
                2.0 * spec.pixels * spec.depth * outputs)  # fmt: skip


def cases() -> Iterator[Case]:
    """Yield every case."""
    yield from attention_cases()
    yield from row_cases()
    for channels, outputs, image, kernel, stride in DENSE:
        yield convolution_case(channels, outputs, image, kernel, stride, 1, "uint8")
    yield convolution_case(64, 64, 56, 3, 1, 1, "float32")
    for channels, image, kernel, stride in DEPTHWISE:
        yield convolution_case(channels, channels, image, kernel, stride, channels, "uint8")
    yield convolution_case(144, 144, 56, 3, 1, 144, "float32")


def measure(calls: list[Callable[[], Any]], rounds: int = 4, repeats: int = 14, warm: int = 4) -> list[float]:
    """Return the median seconds of each call; blocks alternate so that a busy machine hurts all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for found, call in zip(times, calls, strict=True):
            time.sleep(0.02)
            for i in range(repeats):
                start = time.perf_counter()
                call()
                if i >= warm:
                    found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


def run(case: Case) -> dict[str, Any]:
    """Compile, time and describe one case."""
    kernel = compile_kernel(case.function, isa.thread_count())
    arguments = [tvm.runtime.tensor(a) for a in case.arguments]
    mine, theirs = measure([lambda: kernel(*arguments), case.torch_call])
    size = sum(a.nbytes for a in case.arguments)
    return {"case": case.name, "us": mine * 1e6, "torch_us": theirs * 1e6, "speedup": theirs / mine,
            "GOPS": case.operations / mine / 1e9, "GB_per_s": size / mine / 1e9}  # fmt: skip


def main() -> None:
    """Time the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the cases whose name contains this text")
    parser.add_argument("--json", action="store_true", help="one JSON object for each case")
    options = parser.parse_args()
    torch.set_num_threads(isa.thread_count())
    if not options.json:
        print(f"{'case':48} {'us':>9} {'torch us':>9} {'speedup':>8} {'GOPS':>7} {'GB/s':>6}")
    for case in cases():
        if options.only not in case.name:
            continue
        found = run(case)
        if options.json:
            print(json.dumps(found), flush=True)
        else:
            print("{case:48} {us:9.1f} {torch_us:9.1f} {speedup:8.2f} {GOPS:7.0f} {GB_per_s:6.1f}".format(**found), flush=True)


if __name__ == "__main__":
    main()
