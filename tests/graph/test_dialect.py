"""The meaning of each qc operator against plain numpy integers, and its result type against its result."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qcompile.formats import pack, parse_scheme
from qcompile.graph import parse_graph
from qcompile.graph.dialect import ACTIVATIONS, _power_codes
from qcompile.graph.hadamard import hadamard_matrix

qc = torch.ops.qc
F32 = np.float32


def codes(shape: tuple[int, ...], scheme: str) -> torch.Tensor:
    format = parse_scheme(scheme).format
    return torch.randint(int(format.lowest), int(format.highest) + 1, shape).to(format.storage)


def rounded(y: np.ndarray, scale: float, zero: int, scheme: str) -> np.ndarray:
    format = parse_scheme(scheme).format
    return np.clip(np.rint(y / F32(scale)) + zero, format.lowest, format.highest)


def zero_of(scheme: str, value: int) -> torch.Tensor | None:
    return None if parse_scheme(scheme).symmetric else torch.tensor(value, dtype=torch.int32)


def check_meta(operator, *args) -> None:
    """Hold the fake result's shape and dtype against the real one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
    real = operator(*args)
    for one, other in zip(
        fake if isinstance(fake, (tuple, list)) else [fake], real if isinstance(real, (tuple, list)) else [real], strict=True
    ):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


# ---- linear ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weight_scheme", ["int8 channel=0 sym", "int4 channel=0 sym", "int4 group=4 sym", "int3 group=5 sym", "int8 tensor sym"]
)
@pytest.mark.parametrize("x_scheme", ["uint8 tensor affine", "int8 token sym dynamic"])
@pytest.mark.parametrize(("bias", "activation", "residual", "out"), [
    (None, "none", False, ""), ("float", "relu", True, ""), ("int", "relu6", False, "uint8 tensor affine"),
    ("float", "add_relu", True, "int8 tensor sym"),
])  # fmt: skip
def test_linear(weight_scheme, x_scheme, bias, activation, residual, out) -> None:
    grouped = "group" in weight_scheme
    if grouped and bias == "int":
        bias = None  # an integer bias has no place in a sum over groups
    scheme = parse_scheme(weight_scheme)
    x, w = codes((2, 3, 13), x_scheme), codes((6, 13), weight_scheme)
    x_scale = torch.rand(2, 3, 1) / 50 if "token" in x_scheme else torch.tensor(0.02)
    x_zero, w_scale = zero_of(x_scheme, 121), torch.rand(scheme.granularity.scale_shape((6, 13))) / 50
    b = {None: None, "float": torch.randn(6), "int": torch.randint(-900, 900, (6,), dtype=torch.int32)}[bias]
    r = torch.randn(2, 3, 6) if residual else None
    out_scale, out_zero = (torch.tensor(0.05), zero_of(out, 7)) if out else (None, None)
    args = (
        x,
        x_scale,
        x_zero,
        pack(w, scheme.bits),
        w_scale,
        None,
        b,
        r,
        out_scale,
        out_zero,
        x_scheme,
        weight_scheme,
        13,
        activation,
        out,
    )

    a64 = x.numpy().astype(np.int64) - (0 if x_zero is None else 121)
    w64 = w.numpy().astype(np.int64)
    if grouped:
        size, y = scheme.granularity.size, np.zeros((2, 3, 6), F32)
        for g in range(w_scale.shape[1]):
            part = slice(g * size, (g + 1) * size)
            y = y + (a64[..., part] @ w64[:, part].T).astype(F32) * w_scale[:, g].numpy()
    else:
        acc = a64 @ w64.T + (b.numpy() if bias == "int" else 0)
        y = acc.astype(F32) * w_scale.numpy()
    y = y * x_scale.numpy()
    y = y + b.numpy() if bias == "float" else y
    clamp = {"none": lambda t: t, "relu": lambda t: np.maximum(t, 0), "relu6": lambda t: np.clip(t, 0, 6)}
    y = y if activation.startswith("add_") else clamp[activation](y)
    y = y + r.numpy() if residual else y
    y = np.maximum(y, 0) if activation == "add_relu" else y
    y = rounded(y, 0.05, 0 if out_zero is None else 7, out) if out else y
    assert np.array_equal(qc.linear(*args).numpy(), y.astype(F32) if not out else y)
    check_meta(qc.linear, *args)


def test_linear_over_float_activations_dequantizes_the_weight() -> None:
    x, w, scale = torch.randn(2, 8), codes((3, 8), "int4 group=4 sym"), torch.rand(3, 2)
    y = qc.linear(x, None, None, pack(w, 4), scale, None, None, None, None, None, "", "int4 group=4 sym", 8)
    assert torch.allclose(y, x @ (w * scale.repeat_interleave(4, 1)).t())


def test_linear_of_bfloat16_sums_exact_products_and_rounds_once() -> None:
    """Sums that float32 would lose on its way: 2**24 + 1 - 2**24 is 1."""
    encode = parse_scheme("bf16").format.encode
    x, w = encode(torch.tensor([[4096.0, 1.0, 4096.0]])), encode(torch.tensor([[4096.0, 1.0, -4096.0], [0.0, -1.0, 0.0]]))
    bias, residual = torch.tensor([0.5, 0.25]), torch.tensor([[1.0, -1.0]])
    args = (x, None, None, w, None, None, bias, residual, None, None, "bf16", "bf16", 3, "relu")
    assert qc.linear(*args).tolist() == [[2.5, -1.0]]
    check_meta(qc.linear, *args)
    rounded = (*args[:-1], "relu", "bf16")
    assert torch.equal(qc.linear(*rounded), encode(torch.tensor([[2.5, -1.0]])))
    check_meta(qc.linear, *rounded)
    nothing = qc.linear(encode(-torch.ones(1, 3)), None, None, torch.zeros_like(w), *[None] * 6, "bf16", "bf16", 3)
    assert not nothing.signbit().any()
    with pytest.raises(ValueError, match="'bf16' has no scale to find"):
        qc.quantize_dynamic(torch.ones(2), "bf16")


def test_linear_names_the_sizes_that_differ() -> None:
    with pytest.raises(RuntimeError, match="reads 8 features, its input has 9"):
        check_meta(qc.linear, torch.randn(2, 9), None, None, torch.zeros(3, 4, dtype=torch.uint8), torch.ones(3),
                   None, None, None, None, None, "",
                   "int4 channel=0 sym", 8)  # fmt: skip


# ---- convolution ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), [(1, 1, 1, 1), (2, 0, 1, 2), (1, 2, 2, 4)])
def test_conv2d(bits, stride, padding, dilation, groups) -> None:
    weight_scheme, x_scheme, out = f"int{bits} channel=0 sym", "uint8 tensor affine", "uint8 tensor affine"
    x, w = codes((2, 4, 7, 6), x_scheme), codes((8, 4 // groups, 3, 3), weight_scheme)
    w_scale, bias = torch.rand(8) / 50, torch.randint(-900, 900, (8,), dtype=torch.int32)
    zero = torch.tensor(100, dtype=torch.int32)
    args = (x, torch.tensor(0.02), zero, pack(w, bits), w_scale, None, bias, None, torch.tensor(0.1), zero, x_scheme, weight_scheme, 3,
            [stride] * 2, [padding] * 2, [dilation] * 2, groups, "relu", out)  # fmt: skip
    a = np.pad(x.numpy().astype(np.int64) - 100, ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2))  # padding is the real zero
    size = [(a.shape[2 + d] - 2 * dilation - 1) // stride + 1 for d in range(2)]
    acc = np.zeros((2, 8, *size), np.int64)
    for o in range(8):
        first = o // (8 // groups) * (4 // groups)
        for c, i, j in np.ndindex(4 // groups, 3, 3):
            window = a[:, first + c, i * dilation :, j * dilation :][:, ::stride, ::stride][:, : size[0], : size[1]]
            acc[:, o] += window * int(w[o, c, i, j])
    y = ((acc + bias.numpy()[:, None, None]).astype(F32) * w_scale.numpy()[:, None, None]) * F32(0.02)
    assert np.array_equal(qc.conv2d(*args).numpy(), rounded(np.maximum(y, 0), 0.1, 100, out))
    check_meta(qc.conv2d, *args)


def test_conv2d_pads_side_by_side() -> None:
    """Rows above, columns left, rows below, columns right, as over codes that were padded with the zero point before."""
    x, w, zero = codes((1, 2, 5, 4), "uint8 tensor affine"), codes((3, 2, 3, 3), "int8 channel=0 sym"), torch.tensor(90, dtype=torch.int32)
    bias = torch.randint(-900, 900, (3,), dtype=torch.int32)

    def run(x: torch.Tensor, padding: list[int]) -> torch.Tensor:
        scale = torch.rand(3, generator=torch.Generator().manual_seed(0))
        args = (x, torch.tensor(0.02), zero, w, scale, None, bias, None, torch.tensor(1.0), zero, "uint8 tensor affine",
                "int8 channel=0 sym", 3, [2, 1], padding, [1, 1], 1, "none", "uint8 tensor affine")  # fmt: skip
        check_meta(qc.conv2d, *args)
        return qc.conv2d(*args)

    padded = torch.full((1, 2, 8, 6), 90, dtype=torch.uint8)
    padded[:, :, 1:6, 2:] = x
    assert torch.equal(run(x, [1, 2, 2, 0]), run(padded, [0, 0]))
    assert torch.equal(run(x, [1, 1, 1, 1]), run(x, [1, 1]))


# ---- the others -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["", "uint8 tensor affine"])
def test_matmul(out) -> None:
    a, b = codes((2, 3, 4, 5), "uint8 tensor affine"), codes((2, 3, 5, 6), "int8 tensor sym")
    zero = torch.tensor(9, dtype=torch.int32)
    args = (a, torch.tensor(0.02), zero, b, torch.tensor(0.03), None, torch.tensor(0.1) if out else None, zero if out else None,
            "uint8 tensor affine", "int8 tensor sym", out)  # fmt: skip
    acc = (a.numpy().astype(np.int64) - 9) @ b.numpy().astype(np.int64)
    y = (acc.astype(F32) * F32(0.03)) * F32(0.02)
    assert np.array_equal(qc.matmul(*args).numpy(), rounded(y, 0.1, 9, out) if out else y)
    check_meta(qc.matmul, *args)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_add(activation) -> None:
    s = "uint8 tensor affine"
    a, b, zero = codes((2, 3, 4), s), codes((3, 4), s), torch.tensor(50, dtype=torch.int32)
    args = (a, torch.tensor(0.02), zero, b, torch.tensor(0.05), zero, torch.tensor(0.06), zero, s, s, s, activation)
    y = (a.numpy().astype(F32) - 50) * F32(0.02) + (b.numpy().astype(F32) - 50) * F32(0.05)
    y = np.maximum(y, 0) if activation == "relu" else y
    assert np.array_equal(qc.add(*args).numpy(), rounded(y, 0.06, 50, s))
    check_meta(qc.add, *args)


@pytest.mark.parametrize("scheme", ["int4 group=4 sym", "int8 channel=0 sym", "uint3 channel=0 affine"])
def test_embedding(scheme) -> None:
    parsed, table, indices = parse_scheme(scheme), codes((9, 10), scheme), torch.tensor([[0, 8], [3, 3]])
    shape = parsed.granularity.scale_shape((9, 10))
    scale, zero = torch.rand(shape), None if parsed.symmetric else torch.full(shape, 2, dtype=torch.int32)
    args = (indices, pack(table, parsed.bits), scale, zero, scheme, 10)
    wide = np.repeat(scale.numpy().reshape(9, -1), 4 if "group" in scheme else 10, 1)[:, :10]
    expected = (table.numpy().astype(F32) - (0 if zero is None else 2)) * wide
    assert np.array_equal(qc.embedding(*args).numpy(), expected[indices.numpy()])
    check_meta(qc.embedding, *args)


@pytest.mark.parametrize("scheme", ["int8 token sym dynamic", "uint8 tensor affine dynamic"])
def test_quantize_and_dequantize(scheme) -> None:
    x = torch.randn(3, 5)
    parsed = parse_scheme(scheme)
    found, scale, zero = qc.quantize_dynamic(x, scheme)
    low, high = (x.amin(-1, True), x.amax(-1, True)) if "token" in scheme else (x.amin(), x.amax())
    s = np.maximum(abs(low.numpy()), high.numpy()) / F32(127) if parsed.symmetric else (high.numpy() - low.numpy()) / F32(255)
    z = np.zeros_like(s) if parsed.symmetric else np.rint(-low.numpy() / s)
    assert np.array_equal(scale.numpy(), s)
    assert np.array_equal(zero.numpy(), z)
    given = None if parsed.symmetric else zero
    assert np.array_equal(found.numpy(), np.clip(np.rint(x.numpy() / s) + z, parsed.format.lowest, parsed.format.highest))
    assert torch.equal(qc.quantize(x, scale, given, scheme), found)
    assert np.array_equal(qc.dequantize(found, scale, given, scheme).numpy(), (found.numpy().astype(F32) - z.astype(F32)) * s)
    check_meta(qc.quantize_dynamic, x, scheme)
    check_meta(qc.quantize, x, scale, given, scheme)
    check_meta(qc.dequantize, found, scale, given, scheme)


def test_dequantize_reads_packed_codes() -> None:
    table, scale = codes((3, 7), "int3 channel=0 sym"), torch.rand(3)
    args = (pack(table, 3), scale, None, "int3 channel=0 sym", 7)
    assert torch.equal(qc.dequantize(*args), table * scale[:, None])
    check_meta(qc.dequantize, *args)


@pytest.mark.parametrize("block", [1, 2, 8, 16])
def test_hadamard(block) -> None:
    matrix = hadamard_matrix(block, torch.float64)
    assert torch.allclose(matrix @ matrix.t(), torch.eye(block, dtype=torch.float64))
    x = torch.randn(3, 16)
    signs = np.array([[(-1) ** bin(i & j).count("1") for j in range(block)] for i in range(block)]) / math.sqrt(block)
    expected = (x.numpy().astype(np.float64).reshape(3, -1, block) @ signs).reshape(3, 16)
    assert np.allclose(qc.hadamard(x, block).numpy(), expected, atol=1e-6)
    check_meta(qc.hadamard, x, block)


@pytest.mark.parametrize("turned", [4, 6])
def test_rotary(turned) -> None:
    """Pairs are complex numbers, and turning is a product with exp(i angle)."""
    x, angle = torch.randn(2, 5, 3, 6), torch.randn(1, 5, turned // 2)
    twice = torch.cat([angle, angle], -1)
    pairs = torch.complex(x[..., : turned // 2], x[..., turned // 2 : turned]) * torch.polar(torch.ones_like(angle), angle).unsqueeze(2)
    expected = torch.cat([pairs.real, pairs.imag, x[..., turned:]], -1).flatten(2)
    assert torch.allclose(qc.rotary(x.flatten(2), twice.cos(), twice.sin(), 3), expected, atol=1e-6)
    check_meta(qc.rotary, x.flatten(2), twice.cos(), twice.sin(), 3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_one_query_at_a_time(causal, kv_heads, masked) -> None:
    q, k, v = torch.randn(2, 3, 8), torch.randn(2, 5, 2 * kv_heads), torch.randn(2, 5, 2 * kv_heads)
    mask = torch.tensor([[True, False, True, True, False], [False] * 5]) if masked else None
    result = qc.attention(q, k, v, mask, 4, kv_heads, 0.5, causal)
    expected = np.zeros((2, 3, 8))
    for b, i, h in np.ndindex(2, 3, 4):
        own, shared = slice(2 * h, 2 * h + 2), slice(2 * (h * kv_heads // 4), 2 * (h * kv_heads // 4) + 2)
        seen = [j for j in range(5) if (mask is None or mask[b, j]) and (not causal or j <= i + 2)]
        if seen:
            scores = np.exp([0.5 * float(q[b, i, own] @ k[b, j, shared]) for j in seen])
            expected[b, i, own] = sum(s * v[b, j, shared].numpy() for s, j in zip(scores / scores.sum(), seen, strict=True))
    assert np.allclose(result.numpy(), expected, atol=1e-6)
    check_meta(qc.attention, q, k, v, mask, 4, kv_heads, 0.5, causal)


@pytest.mark.parametrize("c", [1, 2, 8])
def test_codes_of_vectors_one_run_at_a_time(c: int) -> None:
    x, table = torch.randn(2, 3, 3 * c), torch.randn(3, 256, c)
    table[1, 200] = table[1, 7] = x[0, 0, c : 2 * c]  # of equal ones the first
    codes = qc.vector_codes(x, table)
    assert codes.dtype == torch.uint8
    assert codes[0, 0, 1] == 7
    for run in range(3):
        part = x[..., run * c : (run + 1) * c]
        nearest = (part.unsqueeze(-2) - table[run]).square().sum(-1).amin(-1)
        found = table[run, codes[..., run].long()]
        torch.testing.assert_close((part - found).square().sum(-1), nearest)
        assert torch.equal(qc.vectors(codes, table)[..., run * c : (run + 1) * c], found)
    check_meta(qc.vector_codes, x, table)
    check_meta(qc.vectors, codes, table)


@pytest.mark.parametrize("window", [0, 2])
def test_queries_meet_their_own_tokens(window: int) -> None:
    """One query at a time over the keys with its own one replaced."""
    q, k, v = torch.randn(2, 3, 8), torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    own_k, own_v, past = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([6, 2])
    found = qc.attention(q, k, v, None, 4, 2, 0.5, True, past, window, own_k, own_v)
    for i in range(3):
        keys, values = (qc.cache_append(x, own[:, i : i + 1], past + i) for x, own in ((k, own_k), (v, own_v)))
        alone = qc.attention(q[:, i : i + 1], keys, values, None, 4, 2, 0.5, True, past + i, window)
        torch.testing.assert_close(found[:, i : i + 1], alone)
    whole = qc.attention(q, k[:, :3], v[:, :3], None, 4, 2, 0.5, True, None, window, own_k, own_v)
    again = qc.attention(q, k[:, :3], v[:, :3], None, 4, 2, 0.5, True, torch.zeros(2, dtype=torch.int64), window, own_k, own_v)
    assert torch.equal(whole, again)
    check_meta(qc.attention, q, k, v, None, 4, 2, 0.5, True, past, window, own_k, own_v)


def test_weights_of_attention_are_powers_of_two_within_three_hundredths_of_a_code() -> None:
    x = torch.linspace(-14, 0, 100_001)
    codes = _power_codes(x)
    assert float((codes - 255 * torch.exp2(x.double())).abs().max()) <= 0.5 + 0.03
    assert codes[-1] == 255
    assert codes[x < -9.1].max() == 0
    whole = torch.arange(-10.0, 1.0)
    assert _power_codes(whole).tolist() == [round(math.ldexp(255, int(n))) for n in whole.tolist()]


@pytest.mark.parametrize(("causal", "past", "window"), [(False, None, 0), (True, None, 0), (True, [1, 0], 0), (True, [1, 2], 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_codes_one_query_at_a_time(causal, past, window, masked) -> None:
    """Integers of Python and floats of NumPy, one operation after another."""
    q, k, v = (codes((2, n, width), "int8 tensor sym") for n, width in ((3, 16), (5, 8), (5, 8)))
    q_scale, k_scale, v_scale = torch.tensor(0.013), torch.tensor(0.021), torch.tensor(0.5)
    mask = torch.tensor([[True, False, True, True, False], [False] * 5]) if masked else None
    before = None if past is None else torch.tensor(past)
    arguments = (q, q_scale, k, k_scale, v, v_scale, mask, 4, 2, 0.7, causal, before, window)
    found = qc.attention_codes(*arguments)
    step = (q_scale.numpy() * k_scale.numpy()) * np.float32(0.7 * math.log2(math.e))
    expected = np.zeros((2, 3, 16), np.float32)
    for b, i, h in np.ndindex(2, 3, 4):
        own, shared = slice(4 * h, 4 * h + 4), slice(4 * (h // 2), 4 * (h // 2) + 4)
        last = i + (2 if past is None else past[b])
        seen = [j for j in range(5) if (mask is None or mask[b, j]) and (not causal or last - (window or 9) < j <= last)]
        scores = {j: sum(x * y for x, y in zip(q[b, i, own].tolist(), k[b, j, shared].tolist(), strict=True)) for j in seen}
        steps = {j: np.float32(score - max(scores.values())) * step for j, score in scores.items()}
        weights = {j: int(_power_codes(torch.tensor([x])).item()) for j, x in steps.items()}
        sums = [sum(weights[j] * int(v[b, j, c]) for j in seen) for c in range(shared.start, shared.stop)]
        scale = v_scale.numpy() / np.float32(max(sum(weights.values()), 1))
        expected[b, i, own] = np.array(sums, np.float32) * scale
    assert np.array_equal(found.numpy(), expected)
    check_meta(qc.attention_codes, *arguments)


def test_activations() -> None:
    y = torch.linspace(-8, 8, 33, dtype=torch.float64)
    erf = np.array([math.erf(v / math.sqrt(2)) for v in y.tolist()])
    n, sigmoid = y.numpy(), 1 / (1 + np.exp(-y.numpy()))
    expected = {
        "none": n, "relu": np.maximum(n, 0), "relu6": np.clip(n, 0, 6), "gelu": n * 0.5 * (1 + erf), "silu": n * sigmoid,
        "tanh": np.tanh(n),
        "gelu_tanh": n * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (n + 0.044715 * n**3))), "sigmoid": sigmoid,
        "hardswish": n * np.clip(n + 3, 0, 6) / 6, "add_relu": np.maximum(n, 0), "add_relu6": np.clip(n, 0, 6),
    }  # fmt: skip
    assert set(expected) == set(ACTIVATIONS)
    for name, values in expected.items():
        assert np.allclose(ACTIVATIONS[name](y).numpy(), values, atol=1e-12), name


def test_types_follow_symbolic_sizes() -> None:
    text = """graph @main integer(%x: f32[n,4,t,16], %ids: i64[n,t]) where n in 1..8, t in 1..64 {
  %q = qc.quantize_dynamic(%x) {scheme="int8 token sym dynamic"} : (i8[n,4,t,16], f32[n,4,t,1], i32[n,4,t,1])
  %codes = py.getitem(%q, 0) : i8[n,4,t,16]
  %scale = py.getitem(%q, 1) : f32[n,4,t,1]
  %back = qc.dequantize(%codes, %scale) {scheme="int8 token sym dynamic"} : f32[n,4,t,16]
  %turned = qc.hadamard(%back) {block=16} : f32[n,4,t,16]
  %rows = aten.select.int(%turned) {dim=1, index=0} : f32[n,t,16]
  %seen = aten.ne.Scalar(%ids) {other=0} : bool[n,t]
  %y = qc.attention(%rows, %rows, %rows, %seen) {heads=4, kv_heads=4, scale=0.5, causal=false} : f32[n,t,16]
  return %y as "y"
}
"""
    graph = parse_graph(text, {})
    assert graph(torch.randn(2, 4, 5, 16), torch.ones(2, 5, dtype=torch.long))[0].shape == (2, 5, 16)
