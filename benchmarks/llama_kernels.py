#!/usr/bin/env python
"""One linear layer 4096 x 4096 beside llama.cpp's and ONNX Runtime's kernels, in turn; weights come from memory.

Run: TVM_NUM_THREADS=2 python benchmarks/llama_kernels.py [--library FOLDER] [--rows M] [--only TEXT]..
FOLDER holds libggml-base.so and libggml-cpu.so; by default that of the installed package llama-cpp-python. Every contender has a graph of
so many equal layers that their weights are larger together than the caches, and computes them one after another; printed is the
median time of one layer.
llama.cpp's weights lie in each of its places that has a kernel for them: AMX, CPU_REPACK (what its loader would choose), CPU.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import tvm
from qcompile.backends.cpu.kernels import isa
from qcompile.backends.cpu.kernels.matmul import linear
from qcompile.backends.cpu.kernels.matmul_spec import Linear
from qcompile.backends.cpu.kernels.pack import pack_linear
from qcompile.backends.cpu.memory import place
from qcompile.backends.cpu.pipeline import compile_kernel

from qcompile.registry import find_target

SIZE = 4096
MEMORY = 288 << 20  # bytes of all layers of one contender: beyond the caches, and a dozen contenders fit into 8 GB
TYPES = {"Q4_0": 2, "Q4_K": 12, "Q8_0": 8, "Q2_K": 10, "TQ2_0": 35}  # enum ggml_type
_TOKEN = {"x": "int8", "x_per_token": True, "x_affine": False}
OURS = {"W8A8": {"x": "uint8"}, **{f"W{b}A8 g{g}": {**_TOKEN, "bits": b, "group": g} for b, g in ((4, 32), (4, 128), (2, 128))}}
Call = Callable[[], object]


class _Parameters(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """The few functions of ggml that a matrix product needs.

    Raises:
        OSError: the libraries are not in the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), ctypes.RTLD_GLOBAL)
        self.backend = self.call(self.cpu, "ggml_backend_cpu_init", ctypes.c_void_p)
        self.registry = self.call(self.cpu, "ggml_backend_cpu_reg", ctypes.c_void_p)
        self.device = self.call(self.base, "ggml_backend_reg_dev_get", ctypes.c_void_p, ctypes.c_void_p(self.registry), ctypes.c_size_t(0))
        self.call(self.cpu, "ggml_backend_cpu_set_n_threads", None, ctypes.c_void_p(self.backend), isa.thread_count())

    def call(self, library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
        function = getattr(library, name)
        function.restype = result
        return function(*arguments)

    def buffer_types(self) -> dict[str, int]:
        """Return where weights may lie, by name: places that repack them for this processor first, ordinary memory last."""
        name = b"ggml_backend_dev_get_extra_bufts"
        address = self.call(self.base, "ggml_backend_reg_get_proc_address", ctypes.c_void_p, ctypes.c_void_p(self.registry), name)
        listing = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(self.device)
        found = []
        while listing and listing[len(found)]:
            found.append(listing[len(found)])
        found.append(self.call(self.base, "ggml_backend_cpu_buffer_type", ctypes.c_void_p))
        return {self.call(self.base, "ggml_backend_buft_name", ctypes.c_char_p, ctypes.c_void_p(place)).decode(): place for place in found}

    def supports(self, kind: int, rows: int, place: int) -> bool:
        """Say whether there is a kernel for weights of a type in a place."""
        weights, work = self.context(), self.context()
        matrix = self.tensor(weights, kind, SIZE)
        self.place(weights, place)
        product = ctypes.c_void_p(self.call(self.base, "ggml_mul_mat", ctypes.c_void_p, work, matrix, self.tensor(work, 0, rows)))
        return bool(self.call(self.base, "ggml_backend_dev_supports_op", ctypes.c_bool, ctypes.c_void_p(self.device), product))

    def context(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.call(self.base, "ggml_init", ctypes.c_void_p, _Parameters(16 << 20, None, True)))

    def tensor(self, context: ctypes.c_void_p, kind: int, rows: int) -> ctypes.c_void_p:
        sizes = ctypes.c_int64(SIZE), ctypes.c_int64(rows)
        return ctypes.c_void_p(self.call(self.base, "ggml_new_tensor_2d", ctypes.c_void_p, context, ctypes.c_int(kind), *sizes))

    def place(self, context: ctypes.c_void_p, buffer_type: int) -> None:
        self.call(self.base, "ggml_backend_alloc_ctx_tensors_from_buft", ctypes.c_void_p, context, ctypes.c_void_p(buffer_type))

    def write(self, tensor: ctypes.c_void_p, data: np.ndarray) -> None:
        address, size = ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.nbytes)
        self.call(self.base, "ggml_backend_tensor_set", None, tensor, address, ctypes.c_size_t(0), size)

    def quantize(self, kind: int, weight: np.ndarray) -> np.ndarray:
        """Return float32 rows as bytes of a type."""
        row = self.call(self.base, "ggml_row_size", ctypes.c_size_t, ctypes.c_int(kind), ctypes.c_int64(SIZE))
        data = np.empty((SIZE, row), np.uint8)
        source, result = ctypes.c_void_p(weight.ctypes.data), ctypes.c_void_p(data.ctypes.data)
        counts = ctypes.c_int64(0), ctypes.c_int64(SIZE), ctypes.c_int64(SIZE)
        self.call(self.base, "ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int(kind), source, result, *counts, None)
        return data


def llama_call(ggml: Ggml, kind: int, rows: int, weight: np.ndarray, buffer_type: int) -> tuple[Call, int, int]:
    """Return a call of all layers, their number and the bytes of one."""
    data = ggml.quantize(kind, weight)
    layers = -(-MEMORY // data.nbytes)
    weights, values, work = ggml.context(), ggml.context(), ggml.context()
    matrices = [ggml.tensor(weights, kind, SIZE) for _ in range(layers)]
    ggml.place(weights, buffer_type)
    for matrix in matrices:
        ggml.write(matrix, data)
    x = ggml.tensor(values, 0, rows)
    ordinary = list(ggml.buffer_types().values())[-1]
    ggml.place(values, ordinary)
    ggml.write(x, np.random.default_rng(1).standard_normal((rows, SIZE)).astype(np.float32))
    graph = ctypes.c_void_p(ggml.call(ggml.base, "ggml_new_graph", ctypes.c_void_p, work))
    for matrix in matrices:
        product = ctypes.c_void_p(ggml.call(ggml.base, "ggml_mul_mat", ctypes.c_void_p, work, matrix, x))
        ggml.call(ggml.base, "ggml_build_forward_expand", None, graph, product)
    ggml.place(work, ordinary)
    return (
        lambda: ggml.call(ggml.base, "ggml_backend_graph_compute", ctypes.c_int, ctypes.c_void_p(ggml.backend), graph),
        layers,
        data.nbytes,
    )


def onnxruntime_call(bits: int, rows: int, rng: np.random.Generator) -> tuple[Call, int, int]:
    """Return a call of a session of MatMulNBits layers with groups of 32 and int8 arithmetic, their number and the bytes of one."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    codes, scales = (SIZE, SIZE // 32, 4 * bits), (SIZE, SIZE // 32)
    size = math.prod(codes) + 4 * math.prod(scales)
    layers = -(-MEMORY // size)
    # Weights of its own for every layer: a session shares equal ones, and reads them from the cache (measured: 2.2 times as fast).
    weights = [{"w": rng.integers(0, 256, codes, np.uint8), "s": rng.random(scales, np.float32)} for _ in range(layers)]
    options = {"domain": "com.microsoft", "K": SIZE, "N": SIZE, "bits": bits, "block_size": 32, "accuracy_level": 4}
    nodes = [helper.make_node("MatMulNBits", ["x", f"w{i}", f"s{i}"], [f"y{i}"], **options) for i in range(layers)]
    constants = [numpy_helper.from_array(array, f"{name}{i}") for i, layer in enumerate(weights) for name, array in layer.items()]
    x, ys = ("x", TensorProto.FLOAT, [rows, SIZE]), [(f"y{i}", TensorProto.FLOAT, [rows, SIZE]) for i in range(layers)]
    graph = helper.make_graph(
        nodes, "layers", [helper.make_tensor_value_info(*x)], [helper.make_tensor_value_info(*y) for y in ys], constants
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = isa.thread_count()
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    del constants, graph, weights
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, ["CPUExecutionProvider"])
    feed = {"x": rng.standard_normal((rows, SIZE)).astype(np.float32)}
    return lambda: session.run(None, feed), layers, size


def our_call(name: str, rows: int, rng: np.random.Generator) -> tuple[Call, int, int]:
    """Return a call of as many of our layers in turn, their number and the bytes of one."""
    spec = Linear(SIZE, SIZE, **OURS[name])
    kernel = compile_kernel(linear(spec), isa.thread_count())
    highest = 1 << (spec.bits - 1)
    codes = rng.integers(-highest, highest, (SIZE, SIZE)).astype(np.int8)
    constants = pack_linear(spec, codes, np.full((SIZE, spec.groups) if spec.group else (SIZE,), 0.01, np.float32))
    size = sum(array.nbytes for array in constants)
    layers = -(-MEMORY // size)
    placed = [tvm.runtime.from_dlpack(tensor) for tensor in place([torch.from_numpy(array) for array in constants] * layers)]
    copies = [placed[i : i + len(constants)] for i in range(0, len(placed), len(constants))]
    x = [rng.integers(0, 127, (rows, SIZE)).astype(spec.x), np.full(rows if spec.x_per_token else 1, 0.01, np.float32)]
    x += [np.array([3], np.int32)] if spec.x_affine else []
    inputs, y = [tvm.runtime.tensor(array) for array in x], tvm.runtime.tensor(np.zeros((rows, SIZE), np.float32))

    def call() -> None:
        for weight in copies:
            kernel(*inputs, *weight, y)

    return call, layers, size


def contenders(folder: Path | None, rows: int, only: tuple[str, ...], without: tuple[str, ...]) -> dict[str, tuple[Call, int, int]]:
    """Return what is installed and wanted, by name."""
    rng = np.random.default_rng(0)
    makers: dict[str, Callable[[], tuple[Call, int, int]]] = {}
    for name in OURS:
        makers[f"qcompile {name}"] = functools.partial(our_call, name, rows, rng)
    for bits in (4, 2):
        makers[f"ORT MatMulNBits {bits}-bit g32"] = functools.partial(onnxruntime_call, bits, rows, rng)
    if folder is None:
        click.echo("llama.cpp: no libraries; pip install llama-cpp-python, or --library FOLDER", err=True)
    else:
        ggml, weight = Ggml(folder), (rng.standard_normal((SIZE, SIZE)) * 0.02).astype(np.float32)
        for (name, kind), (place, buffer_type) in itertools.product(TYPES.items(), ggml.buffer_types().items()):
            if ggml.supports(kind, rows, buffer_type):
                makers[f"llama.cpp {name} {place}"] = functools.partial(llama_call, ggml, kind, rows, weight, buffer_type)
    return {
        name: make()
        for name, make in makers.items()
        if (not only or any(text in name for text in only)) and not any(text in name for text in without)
    }


def _installed() -> Path | None:
    package = importlib.util.find_spec("llama_cpp")
    folder = Path(package.origin).parent / "lib" if package and package.origin else None
    return folder if folder and (folder / "libggml-base.so").exists() else None


@click.command(help=__doc__)
@click.option("--library", type=click.Path(path_type=Path, exists=True), help="Folder of libggml-base.so and libggml-cpu.so.")
@click.option("--rows", default=1, help="Rows of x.")
@click.option("--only", multiple=True, help="Contenders whose name contains this text; may be given several times.")
@click.option("--without", multiple=True, help="Leave out contenders whose name contains this text.")
@click.option("--rounds", default=15, help="Turns of each contender.")
def main(library: Path | None, rows: int, only: tuple[str, ...], without: tuple[str, ...], rounds: int) -> None:
    """Print one line for each contender, fastest first, with the share of what memory gives."""
    limits = find_target("cpu").limits(isa.thread_count())
    assert limits is not None
    calls = contenders(library or _installed(), rows, only, without)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, (call, layers, _) in calls.items():
            start = time.perf_counter()
            call()
            if turn:  # the first turn settles memory and threads
                times[name].append((time.perf_counter() - start) / layers)
    click.echo(f"{SIZE} x {SIZE}, {rows} row(s), {limits.threads} threads; memory reads {limits.read_gb_per_s:.1f} GB/s")
    for name, spent in sorted(times.items(), key=lambda item: statistics.median(item[1])):
        median, size = statistics.median(spent), calls[name][2]
        rate, gops = size / median / 1e9, 2 * rows * SIZE * SIZE / median / 1e9
        bits = 8 * size / SIZE**2
        click.echo(
            f"{name:28} {bits:5.2f} bits/weight  median {median * 1e6:8.1f} us  min {min(spent) * 1e6:8.1f} us  "
            f"{rate:6.1f} GB/s ({100 * rate / limits.read_gb_per_s:3.0f} %)  {gops:6.0f} GOPS"
        )


if __name__ == "__main__":
    main()
