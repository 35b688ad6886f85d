"""What every edge kernel is written with: plain pointers, sizes as int32 arguments, and the inline functions of ``runtime.h``.

A kernel is a TIR function whose sizes are arguments, so that all layers of a family share one C function: flash holds each loop once.
Buffers are flat and declared without a length; the legalizer checks shapes. Scratch is an argument after the results: it lies in the arena,
because a function here has no heap and little stack.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

Expression = Any  # TIR expressions carry no useful static types

UNBOUNDED = 1 << 30  # the declared length of a pointer; nothing reads it


@contextmanager
def function(name: str) -> Iterator[IRBuilder]:
    """Open a PrimFunc of this name; the builder's ``get()`` returns it after the block."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True})
        yield builder


def pointer(name: str, dtype: str) -> Any:
    """Declare the next argument: a flat buffer."""
    return T.arg(name, T.buffer((UNBOUNDED,), dtype, buffer_name=name))


def numbers(names: str) -> list[Expression]:
    """Declare the next arguments: int32 sizes, by their names between blanks."""
    return [T.arg(name, tirx.Var(name, "int32")) for name in names.split()]


def let(name: str, value: Expression) -> Expression:
    """Give a value a name; it is computed here, once."""
    return IRBuilder.name(name, T.Bind(value))


@contextmanager
def loop(name: str, extent: Expression) -> Iterator[Expression]:
    """Open a loop from zero to below ``extent``."""
    with T.serial(extent) as index:
        yield IRBuilder.name(name, index)


def quotient(a: Expression, b: Expression) -> Expression:
    """Return a / b for numbers that are not negative: C's own division."""
    return tirx.truncdiv(a, b) if not isinstance(b, int) or b & (b - 1) else T.shift_right(a, T.int32(b.bit_length() - 1))


def cell(name: str, value: Expression, dtype: str = "int32") -> Any:
    """Allocate one element that a C compiler keeps in a register, and set it."""
    made = array(name, 1, dtype)
    store(made, value, 0)
    return made


def array(name: str, length: int, dtype: str = "int32") -> Any:
    """Allocate a few elements on the stack, or in registers where every index is known."""
    return IRBuilder.name(name, T.alloc_buffer((length,), dtype, scope="global"))


def store(buffer: Any, value: Expression, index: Expression) -> None:
    """Emit ``buffer[index] = value``."""
    T.buffer_store(buffer, value, [index])


def widen(value: Expression) -> Expression:
    """Return an 8-bit code as int32."""
    return T.cast(value, "int32")


def external(name: str, *arguments: Expression, dtype: str = "int32") -> Expression:
    """Call an inline function of ``runtime.h`` that returns a value."""
    return T.call_extern(dtype, name, *arguments)


def word(buffer: Any, index: Expression) -> Expression:
    """Load four bytes as uint32, from any address."""
    return external("qc_load_word", T.address_of(buffer[index]), dtype="uint32")


def clamp(value: Expression, low: Expression, high: Expression) -> Expression:
    """Return the value held between two bounds."""
    return T.max(T.min(value, high), low)
