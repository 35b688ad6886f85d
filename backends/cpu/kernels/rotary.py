"""Rotary positions (dialect ``qc.rotary``)."""

from __future__ import annotations

from typing import Any

from qcompile.backends.cpu.kernels.registers import (
    Index,
    argument,
    each_vector,
    function,
    load,
    serial_or_parallel,
    size,
    store_row,
)  # fmt: skip
from qcompile.backends.cpu.kernels.vector import rounded
from tvm import tirx
from tvm.tirx.script.builder import ir as T


def rotary(heads: int, head_dim: int, turned: int) -> tirx.PrimFunc:
    """Build ``f(x, cos, sin, out)``: x, out float32 [batch, tokens, heads * head_dim]; cos, sin float32 [angles, tokens, turned].

    ``angles`` is 1 or batch. The first ``turned`` channels of each head are rotated, an even number. Products are rounded before they
    are added, as in the dialect: not one bit differs.
    """
    with function("rotary") as builder:
        batch, tokens, angles = size("batch"), size("tokens"), size("angles")
        x = argument("x", (batch, tokens, heads * head_dim))
        cos, sin = (argument(name, (angles, tokens, turned)) for name in ("cos", "sin"))
        out = argument("out", (batch, tokens, heads * head_dim))

        def row(index: tirx.Var) -> None:
            b, t = T.Bind(index // tokens), T.Bind(index % tokens)
            a = T.Bind(T.min(b, angles - 1))
            with T.serial(heads) as head:
                start = T.Bind(head * head_dim)

                def pair(c: Index, mask: Any, slot: int) -> None:
                    places = (c, c + turned // 2)
                    first, second = (T.Bind(load(x, mask, b, t, start + place)) for place in places)
                    for place, mine, other in zip(places, (first, second), (-second, first), strict=True):
                        angle = (a, t, place)
                        value = rounded(mine * load(cos, mask, *angle)) + rounded(other * load(sin, mask, *angle))
                        store_row(out, value, mask, b, t, start + place)

                def kept(c: Index, mask: Any, slot: int) -> None:
                    store_row(out, load(x, mask, b, t, start + turned + c), mask, b, t, start + turned + c)

                each_vector(turned // 2, pair)
                each_vector(head_dim - turned, kept)

        serial_or_parallel(batch * tokens, batch * tokens * heads * head_dim, row, 1 << 17)
    return builder.get()
