"""Lookups in tables of sixteen values that lie in a register: one shuffle takes sixty-four bytes, or sixteen floats, through one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qcompile.backends.cpu.kernels import isa as instruction_sets
from qcompile.backends.cpu.kernels.registers import Expression, Index, ramp, splat
from tvm import tirx
from tvm.tirx.script.builder import ir as T

LEVELS = 16


def byte_lookup(isa: str, tables: Any, column: Index, group: Index, *, raised: bool = False) -> Callable[[Expression], Expression]:
    """Return a function from sixty-four indices (uint8) to the bytes of a table [column, group, 16]; the table's load is emitted here.

    ``raised``: 128 is added to the bytes, which makes them ones without sign by turning over the top bit.
    """
    top = T.int8(-128)
    found = instruction_sets.SETS[isa]
    parts = {"x86_64": found.parts, "aarch64": 4}.get(found.machine, 0)
    if not parts:

        def gather(indices: Expression) -> Expression:
            found = tables[column, group, T.cast(indices, "int32x64")]
            return T.bitwise_xor(found, splat(top, 64)) if raised else found

        return gather
    name = {1: "llvm.x86.avx512.pshuf.b.512", 2: "llvm.x86.avx2.pshuf.b", 4: "llvm.aarch64.neon.tbl1"}[parts]
    lanes = 64 // parts
    table = T.Bind(tables[column, group, ramp(0, LEVELS)])
    table = T.Bind(T.bitwise_xor(table, splat(top, LEVELS))) if raised else table
    wide = T.Bind(tirx.Shuffle([table] * (lanes // LEVELS), list(range(lanes)))) if lanes > LEVELS else table

    def look_up(indices: Expression) -> Expression:
        indices = T.reinterpret("int8x64", indices)
        each = [indices] if parts == 1 else [tirx.Shuffle([indices], list(range(i * lanes, (i + 1) * lanes))) for i in range(parts)]
        values = [T.call_llvm_pure_intrin(f"int8x{lanes}", T.llvm_lookup_intrinsic_id(name), wide, part) for part in each]
        while len(values) > 1:
            both = 2 * int(values[0].ty.dtype.lanes)
            values = [tirx.Shuffle(values[i : i + 2], list(range(both))) for i in range(0, len(values), 2)]
        return values[0]

    return look_up


def float_lookup(isa: str, tables: Any, column: Index, group: Index) -> Callable[[Expression], Expression]:
    """Return a function from the low four bits of sixteen int32 lanes to the floats of a table [column, group, 16]."""
    found = instruction_sets.SETS[isa]
    if found.machine != "x86_64" or found.parts > 1:  # no shuffle of sixteen floats
        return lambda lanes: tables[column, group, T.bitwise_and(lanes, splat(T.int32(15)))]
    table, name = T.Bind(tables[column, group, ramp(0)]), "llvm.x86.avx512.permvar.sf.512"
    return lambda lanes: T.call_llvm_pure_intrin("float32x16", T.llvm_lookup_intrinsic_id(name), table, lanes)
