"""Append rows to a cache in place (dialect ``qc.cache_append``)."""

from __future__ import annotations

from qcompile.backends.cpu.kernels.registers import argument, function, serial_or_parallel, size, store
from tvm import tirx
from tvm.tirx.script.builder import ir as T


def cache_append(width: int, dtype: str) -> tirx.PrimFunc:
    """Build ``f(cache, new, past)``: row t of new [batch, tokens, width] goes to row past[b] + t of cache [batch, capacity, width].

    ``past`` is int64 [batch]. Rows that would stand outside the cache are dropped: nothing outside of it is ever written.
    """
    with function("cache_append") as builder:
        batch, capacity, tokens = size("batch"), size("capacity"), size("tokens")
        cache, new = argument("cache", (batch, capacity, width), dtype), argument("new", (batch, tokens, width), dtype)
        past = argument("past", (batch,), "int64")

        def row(index: tirx.Var) -> None:
            b, t = T.Bind(index // tokens), T.Bind(index % tokens)
            place = T.Bind(past[b] + t)
            with T.If(tirx.all(place >= 0, place < capacity)), T.Then(), T.serial(width) as i:
                store(cache, new[b, t, i], b, place, i)

        serial_or_parallel(batch * tokens, batch * tokens * width, row)
    return builder.get()
