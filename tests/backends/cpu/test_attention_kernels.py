"""Attention and softmax kernels against the dialect's meaning."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from qcompile.backends.cpu.kernels.attention import attention
from qcompile.backends.cpu.kernels.cache import cache_append
from qcompile.backends.cpu.kernels.isa import PORTABLE, detect
from qcompile.backends.cpu.kernels.rotary import rotary
from qcompile.backends.cpu.kernels.softmax import softmax
from qcompile.backends.cpu.kernels.stored_rows import Stored

import qcompile.graph.dialect  # noqa: F401 - registers torch.ops.qc
from qcompile.formats import parse_scheme

Build = Callable[..., Callable[..., None]]
ISAS = sorted({detect(), PORTABLE})  # the best instruction set of this machine, and the portable code


def untouched(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape that no kernel would compute."""
    return torch.full_like(tensor, 77)


EPSILON = 2.0**-23
SIZES = [(1, 1, 1), (1, 5, 3), (2, 33, 129), (3, 17, 300), (2, 3, 260), (2, 2, 7), (1, 64, 64), (1, 40, 9)]  # batch, tokens, keys


def bound(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, d: int, scale: float) -> float:
    """Return the worst error of float32 attention: of the scores, which the exponential makes relative, and of the sum over keys."""
    score = float(q.abs().max() * k.abs().max()) * d * scale
    return float(v.abs().max()) * EPSILON * (2 * d * score + k.shape[1] + 16)


def tensors(heads: int, kv_heads: int, d: int, batch: int, tokens: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(batch, tokens, heads * d), torch.randn(batch, keys, kv_heads * d), torch.randn(batch, keys, kv_heads * d)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "causal", "isa"),
    [(3, 3, 32, False, ISAS[0]), (4, 2, 20, True, ISAS[0]), (2, 1, 16, True, ISAS[-1])],
)
def test_attention_computes_the_dialect(compile_kernel: Build, heads: int, kv_heads: int, d: int, causal: bool, isa: str) -> None:
    scale = d**-0.5
    kernel = compile_kernel(attention(heads, kv_heads, d, scale, key_mask=True, causal=causal, isa=isa), isa)
    for batch, tokens, keys in SIZES:
        q, k, v = tensors(heads, kv_heads, d, batch, tokens, keys)
        mask = torch.rand(batch, keys) > 0.3
        mask[0, : keys // 2] = False  # under causal, the first rows then see nothing
        expected = torch.ops.qc.attention(q.double(), k.double(), v.double(), mask, heads, kv_heads, scale, causal)
        out = untouched(q)
        kernel(q, k, v, mask, out)
        assert float((out - expected).abs().max()) <= bound(q, k, v, d, scale), (batch, tokens, keys)


def test_few_rows_of_heads_that_share_their_keys(compile_kernel: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread takes all query heads of a key head in one task."""
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    kernel = compile_kernel(attention(8, 2, 20, 0.3, key_mask=False, causal=True))
    for batch, tokens, keys in ((2, 1, 300), (1, 3, 129), (1, 3, 2)):
        q, k, v = tensors(8, 2, 20, batch, tokens, keys)
        out = untouched(q)
        kernel(q, k, v, out)
        expected = torch.ops.qc.attention(q.double(), k.double(), v.double(), None, 8, 2, 0.3, True)
        assert float((out - expected).abs().max()) <= bound(q, k, v, 20, 0.3), (batch, tokens, keys)


@pytest.mark.parametrize(("window", "isa"), [(0, ISAS[0]), (5, ISAS[0]), (150, ISAS[0]), (0, ISAS[-1]), (20, ISAS[-1])])
def test_caches_with_room_for_more(compile_kernel: Build, window: int, isa: str) -> None:
    """Queries of each row stand after ``past`` tokens of their own; what lies behind them in the cache is never read."""
    kernel = compile_kernel(attention(4, 2, 20, 0.3, key_mask=False, causal=True, past=True, window=window, isa=isa), isa)
    for tokens, capacity, past in ((1, 300, [0, 299, 128]), (3, 150, [147, 0, 5]), (40, 290, [250, 129, 0]), (17, 17, [0, 0, 0])):
        q, k, v = tensors(4, 2, 20, 3, tokens, capacity)
        past_tokens = torch.tensor(past)
        expected = torch.ops.qc.attention(q.double(), k.double(), v.double(), None, 4, 2, 0.3, True, past_tokens, window)
        for row, before in enumerate(past):
            k[row, before + tokens :] = v[row, before + tokens :] = math.nan
        out = untouched(q)
        kernel(q, k, v, past_tokens, out)
        assert float((out - expected).abs().max()) <= bound(q, k.nan_to_num(), v.nan_to_num(), 20, 0.3), (tokens, past)


@pytest.mark.parametrize(
    ("key", "value", "isa"),
    [
        ("int8 group=32 sym dynamic", "uint8 group=32 affine dynamic", ISAS[0]),
        ("uint4 group=32 affine dynamic", "int4 group=32 sym dynamic", ISAS[0]),
        ("int4 token sym dynamic", "uint4 token affine dynamic", ISAS[-1]),
        ("uint8 token affine dynamic", "int8 token sym dynamic", ISAS[-1]),
        ("uint2 group=32 affine dynamic", "int3 group=32 sym dynamic", ISAS[0]),
        ("int5 token sym dynamic", "uint6 token affine dynamic", ISAS[0]),
        ("int2 group=32 sym dynamic", "uint7 group=32 affine dynamic", ISAS[-1]),
    ],
)
@pytest.mark.parametrize("turned", [0, 32])
def test_caches_of_codes(compile_kernel: Build, key: str, value: str, isa: str, turned: int) -> None:
    """Codes of each row, end to end, with scales for each token, or token and head; keys may be turned when they are read."""
    heads, kv_heads, d = 4, 2, 48 if turned and isa == ISAS[0] and "group" not in key else 32
    schemes = [parse_scheme(text) for text in (key, value)]
    stored = [
        Stored(s.bits, s.format.lowest < 0, "group" in str(s), not s.symmetric, turns)
        for s, turns in zip(schemes, (turned, 0), strict=True)
    ]
    kernel = compile_kernel(
        attention(heads, kv_heads, d, 0.2, key_mask=False, causal=True, past=True, stored_k=stored[0], stored_v=stored[1], isa=isa), isa
    )
    for tokens, capacity, past in ((1, 300, [0, 299, 128]), (40, 190, [150, 129, 0])):
        q, *floats = tensors(heads, kv_heads, d, 3, tokens, capacity)
        memory, scales, meant = [], [], []
        for x, scheme in zip(floats, schemes, strict=True):
            codes, scale, zero = torch.ops.qc.quantize_dynamic(x * 3 + 1, str(scheme))
            memory.append(scheme.format.pack(codes))
            scales += [scale] if scheme.symmetric else [scale, zero]
            meant.append(torch.ops.qc.dequantize(codes, scale, None if scheme.symmetric else zero, str(scheme)))
        if turned:
            angles = torch.randn(1, capacity, turned)
            cos, sin = angles.cos(), angles.sin()
            meant[0] = torch.ops.qc.rotary(meant[0], cos, sin, kv_heads)
            after_key = 1 if schemes[0].symmetric else 2
            scales = [*scales[:after_key], cos, sin, *scales[after_key:]]
        expected = torch.ops.qc.attention(q.double(), *(m.double() for m in meant), None, heads, kv_heads, 0.2, True, torch.tensor(past))
        out = untouched(q)
        kernel(q, *memory, torch.tensor(past), *scales, out)
        assert float((out - expected).abs().max()) <= 2 * bound(q, meant[0], meant[1], d, 0.2), (tokens, past)


@pytest.mark.parametrize(
    ("own", "stored", "d", "window", "isa"),
    [
        ("token", None, 20, 0, ISAS[0]),
        ("call", None, 20, 9, ISAS[0]),
        ("token", "uint4 group=32 affine dynamic", 32, 9, ISAS[0]),
        ("call", "uint4 group=32 affine dynamic", 32, 0, ISAS[0]),
        ("call", "int8 token sym dynamic", 32, 150, ISAS[-1]),
        ("token", None, 20, 5, ISAS[-1]),
    ],
)
def test_own_tokens_in_float(compile_kernel: Build, own: str, stored: str | None, d: int, window: int, isa: str) -> None:
    """A query's own token, or all tokens of the call, are not what the cache holds of them; there, the cache is not even read."""
    scheme = parse_scheme(stored) if stored else None
    rows = Stored(scheme.bits, scheme.format.lowest < 0, "group" in str(scheme), not scheme.symmetric) if scheme else None
    kernel = compile_kernel(
        attention(4, 2, d, 0.3, key_mask=False, causal=True, past=True, window=window, own=own, stored_k=rows, stored_v=rows, isa=isa), isa
    )
    for tokens, capacity, past in ((1, 300, [0, 299, 128]), (3, 150, [147, 0, 5]), (40, 290, [250, 129, 0]), (140, 140, [0, 0, 0])):
        q, *cached = tensors(4, 2, d, 3, tokens, capacity)
        _, *mine = tensors(4, 2, d, 3, 1, tokens)
        memory, scales, past_tokens = cached, [], torch.tensor(past)
        if scheme:
            memory = []
            for place, x in enumerate(cached):
                codes, scale, zero = torch.ops.qc.quantize_dynamic(x * 3 + 1, stored)
                memory.append(scheme.format.pack(codes))
                scales += [scale] if scheme.symmetric else [scale, zero]
                cached[place] = torch.ops.qc.dequantize(codes, scale, None if scheme.symmetric else zero, stored)
        meant = [t.double() for t in (q, *cached, *mine)]
        if own == "token":
            expected = torch.ops.qc.attention(*meant[:3], None, 4, 2, 0.3, True, past_tokens, window, *meant[3:])
        else:
            appended = [torch.ops.qc.cache_append(a, b, past_tokens) for a, b in zip(meant[1:3], meant[3:], strict=True)]
            expected = torch.ops.qc.attention(meant[0], *appended, None, 4, 2, 0.3, True, past_tokens, window)
        if not scheme:
            for row, before in enumerate(past):
                for x in memory:
                    x[row, before + (tokens if own == "token" else 0) :] = math.nan
        out = untouched(q)
        kernel(q, *memory, past_tokens, *mine, *scales, out)
        largest = [torch.stack([a.nan_to_num().abs().amax(), b.abs().amax()]).amax() for a, b in zip(cached, mine, strict=True)]
        most = bound(q, *(value.expand(1, capacity) for value in largest), d, 0.3)
        assert float((out - expected).abs().max()) <= 2 * most, (tokens, past)


@pytest.mark.parametrize("options", [{"causal": False}, {"causal": True, "key_mask": True}])
def test_own_tokens_of_other_attention_are_refused(options: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match="own tokens are of causal attention without a mask"):
        attention(2, 2, 16, 1.0, **{"key_mask": False, **options}, own="call")


@pytest.mark.parametrize(("d", "stored"), [(20, Stored()), (32, Stored(turned=16))])
def test_codes_of_heads_that_are_no_whole_vectors_are_refused(d: int, stored: Stored) -> None:
    with pytest.raises(ValueError, match="not whole vectors"):
        attention(2, 2, d, 1.0, key_mask=False, causal=True, past=True, stored_k=stored)


@pytest.mark.parametrize(("heads", "d", "turned"), [(3, 10, 6), (2, 64, 64), (2, 48, 32), (1, 40, 40)])
@pytest.mark.parametrize("isa", ISAS)
def test_rotary_positions_bit_for_bit(compile_kernel: Build, heads: int, d: int, turned: int, isa: str) -> None:
    kernel = compile_kernel(rotary(heads, d, turned), isa)
    for batch, tokens, angles in ((2, 5, 1), (3, 1, 3), (1, 700, 1)):
        x = torch.randn(batch, tokens, heads * d)
        cos, sin = (torch.randn(angles, tokens, turned) for _ in range(2))
        out = untouched(x)
        kernel(x, cos, sin, out)
        assert torch.equal(out, torch.ops.qc.rotary(x, cos, sin, heads)), (batch, tokens)


def test_a_window_without_a_cache(compile_kernel: Build) -> None:
    kernel = compile_kernel(attention(2, 1, 16, 0.25, key_mask=True, causal=True, window=7))
    for batch, tokens, keys in ((1, 2, 40), (2, 50, 50), (1, 33, 200)):
        q, k, v = tensors(2, 1, 16, batch, tokens, keys)
        mask = torch.rand(batch, keys) > 0.2
        expected = torch.ops.qc.attention(q.double(), k.double(), v.double(), mask, 2, 1, 0.25, True, None, 7)
        out = untouched(q)
        kernel(q, k, v, mask, out)
        assert float((out - expected).abs().max()) <= bound(q, k, v, 16, 0.25), (batch, tokens, keys)


def test_a_past_beyond_the_cache_reads_nothing_outside(compile_kernel: Build) -> None:
    kernel = compile_kernel(attention(1, 1, 16, 1.0, key_mask=False, causal=True, past=True))
    q, k, v = tensors(1, 1, 16, 1, 2, 9)
    last, far = untouched(q), untouched(q)
    kernel(q, k, v, torch.tensor([7]), last)
    kernel(q, k, v, torch.tensor([1 << 40]), far)
    assert torch.equal(last, far)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_cache_append_writes_in_place_and_never_outside(compile_kernel: Build, dtype: torch.dtype) -> None:
    kernel = compile_kernel(cache_append(5, str(dtype).removeprefix("torch.")))
    for tokens, past in ((1, [0, 8]), (4, [3, 7]), (4, [-2, 9]), (4, [1 << 40, -(1 << 40)])):
        cache, new = torch.randn(2, 9, 5).mul(10).to(dtype), torch.randn(2, tokens, 5).mul(10).to(dtype)
        expected = torch.ops.qc.cache_append(cache, new, torch.tensor(past))
        kernel(cache, new, torch.tensor(past))
        assert torch.equal(cache, expected)


def test_a_row_without_keys_gives_zeros(compile_kernel: Build) -> None:
    kernel = compile_kernel(attention(2, 2, 16, 0.25, key_mask=True, causal=False))
    for tokens in (1, 20):
        q, k, v = tensors(2, 2, 16, 1, tokens, 5)
        out = untouched(q)
        kernel(q, k, v, torch.zeros(1, 5, dtype=torch.bool), out)
        assert torch.equal(out, torch.zeros_like(out))


def test_large_scores_do_not_overflow(compile_kernel: Build) -> None:
    """The softmax is shifted by its maximum, which may only appear in a later pass over the keys."""
    kernel = compile_kernel(attention(1, 1, 16, 1.0, key_mask=False, causal=False))
    for tokens in (2, 18):
        q, k, v = tensors(1, 1, 16, 1, tokens, 300)
        q, k = q * 100, k * torch.linspace(0, 1, 300).reshape(1, 300, 1)
        out = untouched(q)
        kernel(q, k, v, out)
        expected = torch.ops.qc.attention(q.double(), k.double(), v.double(), None, 1, 1, 1.0, False)
        assert float((out - expected).abs().max()) <= bound(q, k, v, 16, 1.0)


def test_additive_bias_broadcasts_over_batch_and_heads(compile_kernel: Build) -> None:
    heads, d = 2, 16
    kernel = compile_kernel(attention(heads, heads, d, 0.3, key_mask=False, causal=False, bias=True))
    for (batch, tokens, keys), shape in (((2, 9, 40), (1, heads)), ((2, 2, 130), (2, 1)), ((1, 35, 5), (1, 1))):
        q, k, v = tensors(heads, heads, d, batch, tokens, keys)
        bias = torch.randn(*shape, tokens, keys)
        split = [t.double().unflatten(-1, (heads, d)).transpose(1, 2) for t in (q, k, v)]
        expected = torch.nn.functional.scaled_dot_product_attention(*split, attn_mask=bias.double(), scale=0.3).transpose(1, 2).flatten(2)
        out = untouched(q)
        kernel(q, k, v, bias, out)
        assert float((out - expected).abs().max()) <= 2 * bound(q, k, v, d, 0.3)


@pytest.mark.parametrize("d", [32, 20])
def test_codes_are_those_of_the_floats(compile_kernel: Build, d: int) -> None:
    """For blocks of rows, and for few."""
    floats = compile_kernel(attention(2, 2, d, 0.3, key_mask=False, causal=True))
    coded = compile_kernel(attention(2, 2, d, 0.3, key_mask=False, causal=True, codes="uint8"))
    scale, zero = torch.tensor([0.007]), torch.tensor([119], dtype=torch.int32)
    for batch, tokens, keys in ((2, 37, 50), (1, 2, 9)):
        q, k, v = tensors(2, 2, d, batch, tokens, keys)
        out, codes = untouched(q), untouched(q).to(torch.uint8)
        floats(q, k, v, out)
        coded(q, k, v, scale, zero, codes)
        assert torch.equal(codes, torch.ops.qc.quantize(out, scale[0], zero[0], "uint8 tensor affine"))


def test_heads_must_divide() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        attention(3, 2, 16, 1.0, key_mask=False, causal=False)


@pytest.mark.parametrize("width", [5, 200])
def test_softmax(compile_kernel: Build, width: int) -> None:
    kernel = compile_kernel(softmax(width))
    x = torch.randn(33, width) * 10
    out = untouched(x)
    kernel(x, out)
    expected = torch.softmax(x.double(), -1)
    distance = x.amax(-1, keepdim=True) - x
    assert bool(((out - expected).abs() <= expected * (1e-6 + 1e-7 * distance) + math.ldexp(1, -126)).all())
