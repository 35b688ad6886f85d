"""Vector registers of sixteen lanes, as TIR expressions: loads, stores, tails, reductions, transposes.

Sixteen float32 fill one AVX-512 register; narrower machines get the same code split by LLVM. Everything here builds expressions or
statements inside an open ``tvm.script.ir_builder.IRBuilder``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from qcompile.backends.cpu.kernels.vector import rounded
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

LANES = 16
SERIAL_WORK = 1 << 20  # multiply-adds below which waking the other threads costs more than it saves

Expression = Any  # TIR expressions carry no useful static types
Index = Any


@contextmanager
def function(name: str) -> Iterator[IRBuilder]:
    """Open a PrimFunc of this name; the builder's ``get()`` returns it after the block."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True})
        yield builder


def size(name: str) -> Index:
    """Return a symbolic int64 size, bound by the shape of the arguments that mention it."""
    return tirx.Var(name, "int64")


def argument(name: str, shape: tuple[Index, ...], dtype: str = "float32") -> Any:
    """Declare the next buffer argument of the open function."""
    return T.arg(name, T.buffer(shape, dtype, buffer_name=name))


def local(elements: int, dtype: str = "float32") -> Any:
    """Allocate a flat stack buffer; constant indices let LLVM keep it in registers."""
    return T.alloc_buffer((elements,), dtype, scope="local")


def long(value: Index) -> Index:
    """Return the value as an int64 expression."""
    return T.int64(value) if isinstance(value, int) else T.cast(value, "int64")


def ramp(start: Index, lanes: int = LANES) -> Expression:
    """Return the indices from ``start`` on, one for each lane."""
    return T.ramp(start, 1, lanes)


def splat(value: Expression, lanes: int = LANES) -> Expression:
    """Copy a scalar to all lanes; a Python float becomes float32."""
    return T.broadcast(T.float32(value) if isinstance(value, float) else value, lanes)


def store(buffer: Any, value: Expression, *index: Index) -> None:
    """Emit a store; a vector takes a ramp as its last index."""
    T.buffer_store(buffer, value, list(index))


def below(limit: Index, start: Index = 0, lanes: int = LANES) -> Expression:
    """Return the lane mask ``start + lane < limit``."""
    return ramp(start, lanes) < splat(limit, lanes)


def load_part(buffer: Any, mask: Expression, *index: Index, lanes: int = LANES, other: Expression | None = None) -> Expression:
    """Load the lanes of the mask; the rest read no memory and hold ``other`` (default zero)."""
    dtype = buffer.ty.dtype if hasattr(buffer, "ty") else buffer.dtype
    vector = T.masked_load(f"{dtype}x{lanes}", buffer, *index, mask)
    return tirx.Select(mask, vector, splat(T.cast(0, dtype), lanes) if other is None else other)


def store_part(buffer: Any, value: Expression, mask: Expression, *index: Index) -> None:
    """Store the lanes of the mask only."""
    if value.ty.dtype.bits < 32:
        # LLVM 22 knows a mask of one lane at compile time, merges the narrowing of a value with its store, and then writes four bytes
        # where one was meant. A limit that it cannot see through keeps the mask unknown.
        lanes = int(value.ty.dtype.lanes)
        mask = tirx.And(mask, ramp(0, lanes) < splat(T.cast(rounded(T.float32(lanes)), "int32"), lanes))
    T.evaluate(T.masked_store(buffer, value, *index, mask))


def fold(value: Expression, combine: Callable[[Expression, Expression], Expression]) -> Expression:
    """Reduce the lanes to a scalar by halves; LLVM's own float reductions add one lane after another and compare for NaN."""
    lanes = int(value.ty.dtype.lanes)
    while lanes > 1:
        half, bound = lanes // 2, T.Bind(value)
        value = combine(tirx.Shuffle([bound], list(range(half))), tirx.Shuffle([bound], list(range(half, lanes))))
        lanes = half
    return value


def transpose(rows: list[Expression]) -> list[Expression]:
    """Transpose sixteen vectors of sixteen lanes with 64 two-input shuffles."""
    values = [T.Bind(row) for row in rows]
    step = 1
    while step < LANES:
        # Lane bit and row bit of weight ``step`` change places.
        even = [lane if not lane & step else LANES + lane - step for lane in range(LANES)]
        odd = [lane + step if not lane & step else LANES + lane for lane in range(LANES)]
        for i in range(LANES):
            if not i & step:
                low, high = values[i], values[i + step]
                values[i] = T.Bind(tirx.Shuffle([low, high], even))
                values[i + step] = T.Bind(tirx.Shuffle([low, high], odd))
        step *= 2
    return values


def each_vector(width: int, body: Callable[[Index, Expression | None, int], None], unroll: int = 4) -> None:
    """Emit ``body(start, mask, slot)`` for each vector of a row of ``width`` elements.

    The mask is None but for the ragged last vector; slot < unroll tells apart vectors in flight together, for separate accumulators.
    """
    whole, rest = divmod(width, LANES)
    if whole >= unroll:
        with T.serial(whole // unroll) as i:
            for slot in range(unroll):
                body((i * unroll + slot) * LANES, None, slot)
    for slot, vector in enumerate(range(whole // unroll * unroll, whole)):
        body(vector * LANES, None, slot)
    if rest:
        body(whole * LANES, below(rest), whole % unroll)


def load(buffer: Any, mask: Expression | None, *index: Index, lanes: int = LANES) -> Expression:
    """Load sixteen elements, the last index being the first element's; lanes outside the mask are zero."""
    where = (*index[:-1], ramp(index[-1], lanes))
    return buffer[where] if mask is None else load_part(buffer, mask, *where, lanes=lanes)


def store_row(buffer: Any, value: Expression, mask: Expression | None, *index: Index) -> None:
    """Store sixteen elements, the last index being the first element's; only those of the mask."""
    where = (*index[:-1], ramp(index[-1]))
    if mask is None:
        store(buffer, value, *where)
    else:
        store_part(buffer, value, mask, *where)


def each_row(
    rows: Index, width: int, body: Callable[[Index], None], *, begin: Callable[[], None] = lambda: None, threshold: int = 1 << 17
) -> None:
    """Emit ``body(row)`` for all rows of ``width`` elements, in tasks of a few rows; on all threads above ``threshold`` elements.

    ``begin`` emits what every task computes first.
    """
    per_task = 8

    def task(index: Index) -> None:
        begin()
        first = T.Bind(index * per_task)
        with T.serial(T.min(rows - first, long(per_task))) as i:
            body(T.Bind(first + i))

    serial_or_parallel((rows + per_task - 1) // per_task, rows * width, task, threshold)


def each_element(
    count: Index, body: Callable[[Index, Expression | None], None], *, begin: Callable[[], None] = lambda: None, threshold: int = 1 << 17
) -> None:
    """Emit ``body(start, mask)`` for all vectors of a flat array, in tasks that ``begin`` opens; on all threads above ``threshold``."""
    per_task = 8192

    def task(index: Index) -> None:
        begin()
        first = T.Bind(index * per_task)
        last = T.Bind(T.min(first + per_task, count))
        whole = T.Bind((last - first) // (4 * LANES))
        with T.serial(whole) as i:
            for slot in range(4):
                body(first + i * (4 * LANES) + slot * LANES, None)
        with T.serial((last - first - whole * (4 * LANES) + LANES - 1) // LANES) as i:
            start = T.Bind(first + (whole * 4 + i) * LANES)
            body(start, below(last - start))

    serial_or_parallel((count + per_task - 1) // per_task, count, task, threshold)


def serial_or_parallel(extent: Index, work: Index, body: Callable[[Index], None], threshold: int = SERIAL_WORK) -> None:
    """Loop over ``extent`` tasks, on all threads only where ``work`` (multiply-adds) repays waking them."""
    with T.If(long(work) < T.int64(threshold)):
        with T.Then(), T.serial(extent) as index:
            body(index)
        with T.Else(), T.parallel(extent) as index:
            body(index)


_EXP2 = (1.3264727252704203e-3, 9.671512785779646e-3, 5.550733744471052e-2, 0.24022242083111778, 0.6931469775976785, 1.0)


def exp2(value: Expression, lanes: int = LANES) -> Expression:
    """Return 2**value for value <= 0 within 1.5 ulp; below -126 within 2**-126, and exactly zero from -127 on down.

    Round to an integer by adding 1.5 * 2**23, evaluate the rest on [-1/2, 1/2] by a polynomial of degree 5 (least relative error, 9.2e-8,
    of those exact at 0), add the integer to the exponent. At -127 the exponent field becomes 0.
    """
    x = T.Bind(T.max(splat(-127.0, lanes), value))  # in this order a NaN stays one
    shifted = T.Bind(rounded(x + splat(12582912.0, lanes)))
    rest = T.Bind(x - (shifted - splat(12582912.0, lanes)))
    polynomial = splat(_EXP2[0], lanes)
    for coefficient in _EXP2[1:]:
        polynomial = polynomial * rest + splat(coefficient, lanes)
    exponent = T.shift_left(T.reinterpret(f"int32x{lanes}", shifted), T.broadcast(T.int32(23), lanes))
    return T.reinterpret(f"float32x{lanes}", T.reinterpret(f"int32x{lanes}", polynomial) + exponent)
