"""What this machine can do at most, measured by kernels that do nothing else: read memory, multiply bytes, multiply floats.

Each is a loop without a bottleneck but the one it measures: memory is streamed by every thread from a share of its own, larger
together than the caches; products go to more independent accumulators than the multiplier is deep, without a load.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import numpy as np
import tvm
from qcompile.backends.cpu.kernels import isa, tiles
from qcompile.backends.cpu.kernels.registers import LANES, argument, function, ramp
from qcompile.backends.cpu.kernels.vector import Expr, register, spread
from qcompile.backends.cpu.pages import allocate
from qcompile.backends.cpu.pipeline import compile_kernel
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcompile.target import Limits

READ_BYTES = 512 << 20  # beyond every cache: of 128 MiB, processors with a large third level still hold a part
_AHEAD = 16 * LANES  # words that are asked for before they are read: 1 KiB (measured: 37 GB/s; without asking 32)
ACCUMULATORS = 16  # latency of a multiply-add (4 or 5 cycles) times its ports (2), and some
ROUNDS = 1 << 18  # of all accumulators: about a millisecond, short beside a time slice, long beside waking a thread
TILE_ROUNDS = 1 << 14  # of four products
_TILE = tiles.ROWS * tiles.COLUMNS
SECONDS, FEWEST = 0.5, 20  # time for each limit, and runs at least
_DOT = "llvm.x86.avx512.vpdpbusd.512"


@functools.cache
def measure_limits(threads: int) -> Limits:
    """Return the limits of ``threads`` threads: of each the best of several runs, for whatever else runs only takes away."""
    memory = allocate(READ_BYTES).view(np.int32).reshape(threads, -1)
    memory[:] = 1  # memory that was never written is one page of zeros
    read = READ_BYTES / _seconds(read_kernel(threads), memory, threads) / 1e9
    products = threads * ROUNDS * ACCUMULATORS * LANES
    float32 = 2 * products / _seconds(float_kernel(threads), np.zeros((threads, LANES), np.float32), threads) / 1e9
    int8 = tiled = None
    if not isa.cannot_run(isa.AVX512_VNNI):
        int8 = 8 * products / _seconds(int8_kernel(threads), np.zeros((threads, LANES), np.int32), threads) / 1e9
    if not isa.cannot_run(isa.AMX):
        products = threads * TILE_ROUNDS * 4 * tiles.ROWS * tiles.COLUMNS * tiles.DEPTH
        tiled = 2 * products / _seconds(tile_kernel(threads), np.zeros((threads, _TILE), np.int32), threads, _TILE) / 1e9
    return Limits(threads, read, float32, int8, tiled)


def _seconds(kernel: tirx.PrimFunc, data: np.ndarray, threads: int, results: int = LANES) -> float:
    """Return the seconds of the fastest of some runs of ``kernel(data, out)``."""
    run = compile_kernel(kernel, threads)
    # What is read from memory is read where it lies, on large pages; what stays in registers may lie anywhere.
    first = tvm.runtime.from_dlpack(data) if data.nbytes == READ_BYTES else tvm.runtime.tensor(data)
    arguments = [first, tvm.runtime.tensor(np.zeros((threads, results), data.dtype))]
    times: list[float] = []
    stop = time.perf_counter() + SECONDS
    while len(times) < FEWEST or time.perf_counter() < stop:
        start = time.perf_counter()
        run(*arguments)
        times.append(time.perf_counter() - start)
    return min(times)


def read_kernel(threads: int) -> tirx.PrimFunc:
    """Build ``f(x int32 [threads, words], out int32 [threads, 16])``: every thread reads its row of x and writes a checksum."""
    words, step = READ_BYTES // 4 // threads, 8 * LANES
    with function("read_memory") as builder:
        x, out = argument("x", (threads, words), "int32"), argument("out", (threads, LANES), "int32")
        with T.parallel(threads) as thread:
            totals = register("int32", 8 * LANES)
            for slot in range(8):
                T.buffer_store(totals, spread(T.int32(0), LANES), [ramp(slot * LANES)])
            with T.serial(words // step) as i:
                for slot in range(8):
                    place = i * step + slot * LANES
                    tiles.prefetch(T.address_of(x[thread, place + _AHEAD]))
                    T.buffer_store(totals, totals[ramp(slot * LANES)] ^ x[thread, ramp(place)], [ramp(slot * LANES)])
            _store_sum(out, totals, 8, thread)
    return builder.get()


def int8_kernel(threads: int) -> tirx.PrimFunc:
    """Build ``f(x int32 [threads, 16], out int32 [threads, 16])``: ``vpdpbusd`` on registers, 64 products a time."""

    def multiply_add(total: Expr, value: Expr) -> Expr:
        left, right = (T.reinterpret(f"{dtype}x64", value) for dtype in ("uint8", "int8"))
        return T.call_llvm_pure_intrin("int32x16", T.llvm_lookup_intrinsic_id(_DOT), total, left, right)

    return _product_kernel("multiply_bytes", "int32", threads, multiply_add)


def tile_kernel(threads: int) -> tirx.PrimFunc:
    """Build ``f(x int32 [threads, 256], out int32 [threads, 256])``: products of x, as a tile of codes, with itself, as one of weights."""
    with function("multiply_tiles") as builder:
        x, out = argument("x", (threads, _TILE), "int32"), argument("out", (threads, _TILE), "int32")
        with T.parallel(threads) as thread:
            tiles.configure()
            block, start = tiles.Block(2, 2, "uint8"), T.address_of(x[thread, 0])
            block.multiply_add([start] * 2, tiles.DEPTH, [start] * 2, tiles.DEPTH)
            block.zero()
            with T.serial(TILE_ROUNDS):
                for i in range(2):
                    block.multiply(i)
            block.store([[T.address_of(out[thread, 0])] * 2] * 2, tiles.DEPTH)
            tiles.release()
    return builder.get()


def float_kernel(threads: int) -> tirx.PrimFunc:
    """Build ``f(x float32 [threads, 16], out float32 [threads, 16])``: fused multiply-adds on registers."""

    def multiply_add(total: Expr, value: Expr) -> Expr:
        return T.call_llvm_pure_intrin("float32x16", T.llvm_lookup_intrinsic_id("llvm.fma"), value, value, total)

    return _product_kernel("multiply_floats", "float32", threads, multiply_add)


def _product_kernel(name: str, dtype: str, threads: int, multiply_add: Callable[[Expr, Expr], Expr]) -> tirx.PrimFunc:
    with function(name) as builder:
        x, out = argument("x", (threads, LANES), dtype), argument("out", (threads, LANES), dtype)
        with T.parallel(threads) as thread:
            totals, value = register(dtype, ACCUMULATORS * LANES), register(dtype, LANES)
            T.buffer_store(value, x[thread, ramp(0)], [ramp(0)])
            for slot in range(ACCUMULATORS):
                T.buffer_store(totals, spread(T.cast(slot, dtype), LANES), [ramp(slot * LANES)])
            with T.serial(ROUNDS):
                for slot in range(ACCUMULATORS):
                    place = ramp(slot * LANES)
                    T.buffer_store(totals, multiply_add(totals[place], value[ramp(0)]), [place])
            _store_sum(out, totals, ACCUMULATORS, thread)
    return builder.get()


def _store_sum(out: Expr, totals: Expr, count: int, thread: Expr) -> None:
    """Emit a store that every accumulator reaches: none may be optimised away."""
    total = totals[ramp(0)]
    for slot in range(1, count):
        total = total + totals[ramp(slot * LANES)]
    T.buffer_store(out, total, [thread, ramp(0)])
