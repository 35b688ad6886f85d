"""Codes of coupled channels, found and read by kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from qcompile.backends.cpu.kernels.attention import attention
from qcompile.backends.cpu.kernels.isa import PORTABLE, detect
from qcompile.backends.cpu.kernels.stored_rows import Stored
from qcompile.backends.cpu.kernels.vectors import vector_codes

import qcompile.graph.dialect  # noqa: F401 - registers torch.ops.qc

qc = torch.ops.qc
Build = Callable[..., Callable[..., None]]
ISAS = sorted({detect(), PORTABLE})


@pytest.mark.parametrize(("width", "coupled", "isa"), [(12, 4, ISAS[0]), (64, 8, ISAS[-1]), (6, 2, ISAS[0]), (3, 1, ISAS[-1])])
def test_codes_of_vectors_bit_for_bit(compile_kernel: Build, width: int, coupled: int, isa: str) -> None:
    """Random vectors, equal ones, ones that are hardly nearer than others, and values whose squares overflow."""
    kernel = compile_kernel(vector_codes(width, coupled), isa)
    for rows, kind in ((1, "random"), (37, "random"), (300, "ties"), (64, "near"), (5, "huge")):
        x, table = torch.randn(rows, width), torch.randn(width // coupled, 256, coupled)
        if kind == "ties":
            x, table = (x * 2).round(), (table * 2).round()
        elif kind == "near":
            table = 1 + table * 1e-6
        elif kind == "huge":
            x = x * 1e30
        codes = torch.full((rows, width // coupled), 77, dtype=torch.uint8)
        kernel(x, table.transpose(1, 2).contiguous(), codes)
        assert torch.equal(codes, qc.vector_codes(x, table)), kind


@pytest.mark.parametrize(("coupled", "turned", "own", "isa"), [(4, 32, "call", ISAS[0]), (8, 0, "token", ISAS[0]), (2, 32, "", ISAS[-1])])
def test_caches_of_coupled_channels(compile_kernel: Build, coupled: int, turned: int, own: str, isa: str) -> None:
    """Keys and values by their tables as they are read, keys turned."""
    heads, kv_heads, d = 4, 2, 48 if turned and isa == ISAS[0] else 32
    key, value = Stored(8, signed=False, turned=turned, coupled=coupled), Stored(8, signed=False, coupled=coupled)
    kernel = compile_kernel(
        attention(heads, kv_heads, d, 0.2, key_mask=False, causal=True, past=True, own=own, stored_k=key, stored_v=value, isa=isa), isa
    )
    for tokens, capacity, past in ((1, 300, [0, 299, 128]), (40, 190, [150, 129, 0])):
        q, past_tokens = torch.randn(3, tokens, heads * d), torch.tensor(past)
        codes = [torch.randint(0, 256, (3, capacity, kv_heads * d // coupled), dtype=torch.uint8) for _ in range(2)]
        tables = [torch.randn(kv_heads * d // coupled, 256, coupled) for _ in range(2)]
        mine = [torch.randn(3, tokens, kv_heads * d) for _ in range(2)] if own else []
        meant, angles = [qc.vectors(*each) for each in zip(codes, tables, strict=True)], []
        if turned:
            turns = torch.randn(1, capacity, turned)
            angles = [turns.cos(), turns.sin()]
            meant[0] = qc.rotary(meant[0], *angles, kv_heads)
        meant = [m.double() for m in meant]
        if own == "call":
            meant = [qc.cache_append(m, x.double(), past_tokens) for m, x in zip(meant, mine, strict=True)]
        extra = [x.double() for x in mine] if own == "token" else []
        expected = qc.attention(q.double(), *meant, None, heads, kv_heads, 0.2, True, past_tokens, 0, *extra)
        out = torch.full_like(q, 77)
        kernel(q, *codes, past_tokens, *mine, tables[0], *angles, tables[1], out)
        # Float32 scores, whose error the exponential makes relative, and sums over keys: the bound of attention over floats, twice.
        largest = [float(torch.stack([part.abs().max() for part in (m, *mine)]).max()) for m in meant]
        score = float(q.abs().max()) * largest[0] * d * 0.2
        assert float((out - expected).abs().max()) <= 2 * largest[1] * 2.0**-23 * (2 * d * score + capacity + 16), (tokens, past)
