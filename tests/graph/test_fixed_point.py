"""Operators in integers alone against Python's and numpy's own, with the extremes that 64 and 32 bits must hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.formats import pack, parse_scheme
from qcompile.graph import parse_graph, print_graph, tensor_digest
from qcompile.graph.code_operators import softmax_table
from qcompile.graph.fixed_point import fixed_point, requantize, sum_fits, sum_fixed_point

qc = torch.ops.qc
AFFINE = ("int8 tensor affine", "uint8 tensor affine")


def codes(shape: tuple[int, ...], scheme: str) -> torch.Tensor:
    """Return random codes with both ends of the range among them."""
    format = parse_scheme(scheme).format
    found = torch.randint(int(format.lowest), int(format.highest) + 1, shape)
    found.view(-1)[0], found.view(-1)[-1] = int(format.lowest), int(format.highest)
    return found.to(format.storage)


def limits(scheme: str) -> tuple[int, int]:
    format = parse_scheme(scheme).format
    return int(format.lowest), int(format.highest)


def rounded(acc: int, multiplier: int, shift: int) -> int:
    """Return requantize() in whole numbers of any size: floor of the product over 2**shift plus a half."""
    return (2 * acc * multiplier + 2**shift) // 2 ** (shift + 1)


def numpy_codes(acc: np.ndarray, multiplier: np.ndarray, shift: np.ndarray, zero: int, low: int, high: int) -> np.ndarray:
    flat = [rounded(int(a), int(m), int(s)) for a, m, s in np.broadcast(acc, multiplier, shift)]
    return np.clip(np.array(flat, dtype=object) + zero, low, high).astype(np.int64).reshape(acc.shape)


def check_meta(operator, *args) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
    real = operator(*args)
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


# ---- the rule -------------------------------------------------------------------------------------------------------------


@given(st.floats(2.0**-32, 2.0**29.99))
def test_a_factor_is_kept_within_half_of_the_last_bit(factor: float) -> None:
    multiplier, shift = fixed_point(torch.tensor(factor, dtype=torch.float64))
    assert 2**30 <= int(multiplier) < 2**31
    assert 1 <= int(shift) <= 62
    assert abs(int(multiplier) * 2.0 ** -int(shift) / factor - 1) <= 2.0**-31


def test_a_factor_just_below_a_power_of_two_is_carried() -> None:
    multiplier, shift = fixed_point(torch.tensor([1 - 2.0**-40, 0.5], dtype=torch.float64))
    assert multiplier.tolist() == [2**30, 2**30]
    assert shift.tolist() == [30, 31]
    assert (multiplier.dtype, shift.dtype) == (torch.int32, torch.int8)


@pytest.mark.parametrize("acc", [-(2**31), -(2**31) + 1, 2**31 - 1, 7])
def test_a_faint_factor_gives_zero(acc: int) -> None:
    multiplier, shift = fixed_point(torch.tensor([2.0**-33, 2.0**-100], dtype=torch.float64))
    assert requantize(torch.tensor([acc, acc]), multiplier, shift).tolist() == [0, 0]


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf, 2.0**30])
def test_a_factor_that_has_no_multiplier_is_named(factor: float) -> None:
    with pytest.raises(ValueError, match=r"between 0 and 2\*\*30"):
        fixed_point(torch.tensor(factor))


@given(st.integers(-(2**31), 2**31 - 1), st.integers(2**30, 2**31 - 1), st.integers(1, 62))
def test_requantize_is_floor_of_the_exact_product_and_a_half(acc: int, multiplier: int, shift: int) -> None:
    assert int(requantize(torch.tensor(acc), torch.tensor(multiplier, dtype=torch.int32), shift)) == rounded(acc, multiplier, shift)


def test_halves_go_up() -> None:
    assert requantize(torch.tensor([-5, -3, -1, 1, 3, 5]), 2**30, 31).tolist() == [-2, -1, 0, 1, 2, 3]


@given(st.floats(1e-9, 1e6), st.floats(1e-9, 1e6))
def test_multipliers_of_a_sum_are_as_fine_as_int32_allows(a: float, b: float) -> None:
    (first, second), shift = sum_fixed_point([a, b])
    assert sum_fits([first, second], shift)
    assert abs(first * 2.0**-shift - a) <= 2.0 ** -(shift + 1)
    assert abs(second * 2.0**-shift - b) <= 2.0 ** -(shift + 1)
    assert shift == 20 or not sum_fits([round(a * 2 ** (shift + 1)), round(b * 2 ** (shift + 1))], shift + 1)


def test_a_sum_that_int32_cannot_hold_is_named() -> None:
    with pytest.raises(ValueError, match="no shift keeps the sum in int32"):
        sum_fixed_point([1.0, 1e8])
    with pytest.raises(ValueError, match="not positive"):
        sum_fixed_point([1.0, 0.0])


# ---- products -------------------------------------------------------------------------------------------------------------


def one_product(x_scheme: str, weight_scheme: str, out: str, features: int = 37, outputs: int = 6):
    """Return arguments of qc.linear in integers, and its accumulators as int64."""
    x, w = codes((2, 3, features), x_scheme), codes((outputs, features), weight_scheme)
    x_zero, bias = sum(limits(x_scheme)) // 2 + 4, torch.randint(-400, 400, (outputs,), dtype=torch.int32)
    acc = (x.numpy().astype(np.int64) - x_zero) @ w.numpy().astype(np.int64).T + bias.numpy()
    factor = torch.rand(outputs, dtype=torch.float64) * 100 / np.abs(acc).max() + 1e-5
    grid = (torch.tensor(0.05), torch.tensor(-7, dtype=torch.int32))
    packed = parse_scheme(weight_scheme).format.pack(w)
    arguments = [x, torch.tensor(0.1), torch.tensor(x_zero, dtype=torch.int32), packed, torch.rand(outputs), None, bias, None, *grid,
                 x_scheme, weight_scheme, features]  # fmt: skip
    return arguments, acc, *fixed_point(factor)


@pytest.mark.parametrize("weight_scheme", ["int8 channel=0 sym", "int4 channel=0 sym", "int2 channel=0 sym", "ternary channel=0 sym"])
@pytest.mark.parametrize("x_scheme", AFFINE)
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_linear(weight_scheme: str, x_scheme: str, activation: str) -> None:
    out = "int8 tensor affine"
    arguments, acc, multiplier, shift = one_product(x_scheme, weight_scheme, out)
    arguments += [activation, out, None, multiplier, shift]
    low, high = limits(out)
    low = low if activation == "none" else -7
    high = high if activation != "relu6" else -7 + 120  # 6 / 0.05
    expected = numpy_codes(acc, multiplier.numpy(), shift.numpy(), -7, low, high)
    found = qc.linear(*arguments)
    assert found.dtype == torch.int8
    assert np.array_equal(found.numpy(), expected)
    assert len(np.unique(expected)) > 6
    check_meta(qc.linear, *arguments)


def test_linear_with_one_multiplier_for_all_and_no_bias() -> None:
    x, w = codes((5, 8), "int8 tensor sym"), codes((3, 8), "int8 tensor sym")
    multiplier, shift = fixed_point(torch.tensor(1e-3))
    y = qc.linear(x, torch.tensor(1.0), None, w, torch.tensor(1.0), None, None, None, torch.tensor(1.0), None,
                  "int8 tensor sym", "int8 tensor sym", 8, "none", "int8 tensor sym", None, multiplier, shift)  # fmt: skip
    acc = x.numpy().astype(np.int64) @ w.numpy().astype(np.int64).T
    assert np.array_equal(y.numpy(), numpy_codes(acc, multiplier.numpy(), shift.numpy(), 0, -127, 127))


def test_linear_at_the_ends_of_the_accumulator() -> None:
    """Accumulators of +-2**31 less a little times multipliers of 31 bits: 62 bits of product."""
    x = torch.tensor([[-128] * 4, [127] * 4], dtype=torch.int8)
    w, bias = torch.full((2, 4), -127, dtype=torch.int8), torch.tensor([2**31 - 2**17, -(2**31) + 2**17], dtype=torch.int32)
    multiplier, shift = torch.tensor([2**31 - 1, 2**30], dtype=torch.int32), torch.tensor([62, 54], dtype=torch.int8)
    y = qc.linear(x, torch.tensor(1.0), None, w, torch.ones(2), None, bias, None, torch.tensor(1.0), None,
                  "int8 tensor sym", "int8 channel=0 sym", 4, "none", "int8 tensor affine", None, multiplier, shift)  # fmt: skip
    acc = x.numpy().astype(np.int64) @ w.numpy().astype(np.int64).T + bias.numpy()
    assert np.array_equal(y.numpy(), numpy_codes(acc, multiplier.numpy(), shift.numpy(), 0, -128, 127))
    assert y.tolist() == [[1, -128], [1, -128]]


@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), [(1, 1, 1, 1), (2, 0, 1, 2), (1, 2, 2, 4), (2, 1, 1, 8)])
@pytest.mark.parametrize("weight_scheme", ["int8 channel=0 sym", "int4 channel=0 sym", "ternary channel=0 sym"])
def test_conv2d(stride: int, padding: int, dilation: int, groups: int, weight_scheme: str) -> None:
    x, w = codes((2, 8, 7, 6), AFFINE[0]), codes((8, 8 // groups, 3, 3), weight_scheme)
    bias, zero = torch.randint(-9000, 9000, (8,), dtype=torch.int32), 100
    multiplier, shift = fixed_point(torch.rand(8, dtype=torch.float64) / 100)
    grid = (torch.tensor(0.1), torch.tensor(-50, dtype=torch.int32))
    packed = parse_scheme(weight_scheme).format.pack(w)
    arguments = (x, torch.tensor(0.02), torch.tensor(zero, dtype=torch.int32), packed, torch.rand(8), None, bias, None, *grid,
                 AFFINE[0], weight_scheme, 3, [stride] * 2, [padding] * 2, [dilation] * 2, groups, "relu", AFFINE[0],
                 multiplier, shift)  # fmt: skip
    a = np.pad(x.numpy().astype(np.int64) - zero, ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2))
    w64, reach = w.numpy().astype(np.int64), 2 * dilation + 1
    height, width = ((size + 2 * padding - reach) // stride + 1 for size in (7, 6))
    acc = np.zeros((2, 8, height, width), np.int64)
    for o in range(8):
        of = slice(o // (8 // groups) * (8 // groups), (o // (8 // groups) + 1) * (8 // groups))
        for i in range(height):
            for j in range(width):
                window = a[:, of, i * stride : i * stride + reach : dilation, j * stride : j * stride + reach : dilation]
                acc[:, o, i, j] = (window * w64[o]).sum((1, 2, 3)) + int(bias[o])
    shaped = (t.numpy().reshape(-1, 1, 1) for t in (multiplier, shift))
    assert np.array_equal(qc.conv2d(*arguments).numpy(), numpy_codes(acc, *shaped, -50, -50, 127))
    check_meta(qc.conv2d, *arguments)


@pytest.mark.parametrize(("place", "value", "reason"), [
    (6, torch.zeros(6), "int32 bias"), (7, torch.zeros(2, 3, 6), "no residual"), (10, "int8 token sym", "one static grid"),
    (10, "", "one static grid"), (14, "", "one static grid"), (13, "gelu", "none, relu, relu6"), (17, None, "stands with a shift"),
    (11, "int8 group=8 sym", "no weight groups"),
])  # fmt: skip
def test_a_product_that_is_not_integers_alone_is_named(place: int, value: object, reason: str) -> None:
    arguments, _, multiplier, shift = one_product(AFFINE[0], "int8 channel=0 sym", AFFINE[0])
    arguments += ["none", AFFINE[0], None, multiplier, shift]
    arguments[place] = value
    with pytest.raises(ValueError, match=reason):
        qc.linear(*arguments)


# ---- sums, lookups, means -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("factors", [(0.3, 0.7), (1.0, 1e-4), (4.0, 4.0), (90.0, 0.5)])
def test_add(activation: str, factors: tuple[float, float]) -> None:
    a, b = codes((3, 85), AFFINE[0]), codes((3, 85), AFFINE[1])
    a[0, 1], b[0, 1], a[0, 2], b[0, 2] = -128, 0, 127, 255
    multipliers, shift = sum_fixed_point(factors)
    one, zeros = torch.tensor(1.0), [torch.tensor(z, dtype=torch.int32) for z in (-128, 0, 5)]
    arguments = (a, one, zeros[0], b, one, zeros[1], torch.tensor(0.25), zeros[2], *AFFINE, AFFINE[0], activation, multipliers, shift)
    total = (a.numpy().astype(np.int64) + 128) * multipliers[0] + b.numpy().astype(np.int64) * multipliers[1] + 2 ** (shift - 1)
    assert total.max() < 2**31
    low, high = (-128 if activation == "none" else 5), (127 if activation != "relu6" else 5 + 24)
    assert np.array_equal(qc.add(*arguments).numpy(), np.clip(np.floor_divide(total, 2**shift) + 5, low, high))
    check_meta(qc.add, *arguments)


@pytest.mark.parametrize(("multipliers", "shift"), [([2**23, 2**23], 20), ([1], 20), ([1, 1], 0), ([-1, 1], 3)])
def test_a_sum_outside_int32_is_named(multipliers: list[int], shift: int) -> None:
    x, one = codes((4,), "int8 tensor sym"), torch.tensor(1.0)
    with pytest.raises(ValueError, match="do not keep a sum of two codes in int32"):
        qc.add(x, one, None, x, one, None, one, None, *["int8 tensor sym"] * 3, "none", multipliers, shift)


@pytest.mark.parametrize("scheme", AFFINE)
def test_lookup_reads_every_byte(scheme: str) -> None:
    low, _ = limits(scheme)
    every = torch.arange(low, low + 256).to(parse_scheme(scheme).format.storage)
    table = torch.randint(-128, 128, (256,)).to(torch.int8)
    assert qc.lookup(every, table).tolist() == [int(table[int(c) % 256]) for c in every]
    check_meta(qc.lookup, every, table)
    with pytest.raises(RuntimeError, match="reads a table of 256 codes"):
        check_meta(qc.lookup, every, table[:200])


@pytest.mark.parametrize("scheme", AFFINE)
@pytest.mark.parametrize(("dims", "keepdim"), [([2, 3], False), ([2, 3], True), ([-1], False), ([1], True)])
def test_mean(scheme: str, dims: list[int], keepdim: bool) -> None:
    x, zero = codes((2, 3, 9, 11), scheme), 17
    x[0] = limits(scheme)[0]  # the largest sum
    count = math.prod(x.shape[d] for d in dims)
    multiplier, shift = (int(t) for t in fixed_point(torch.tensor(1.7 / count, dtype=torch.float64)))
    acc = (x.numpy().astype(np.int64) - zero).sum(tuple(dims), keepdims=keepdim)
    expected = numpy_codes(acc, np.array(multiplier), np.array(shift), -3, -128, 127)
    arguments = (x, dims, zero, multiplier, shift, -3, keepdim, AFFINE[0])
    assert np.array_equal(qc.mean(*arguments).numpy(), expected)
    check_meta(qc.mean, *arguments)


@pytest.mark.parametrize("scheme", AFFINE)
@pytest.mark.parametrize(("kernel", "stride", "padding"), [((2, 2), (2, 2), (0, 0)), ((3, 2), (1, 2), (1, 0)), ((7, 5), (1, 1), (3, 2))])
def test_avg_pool2d(scheme: str, kernel, stride, padding) -> None:
    x, zero = codes((2, 3, 7, 9), scheme), 17
    multiplier, shift = (int(t) for t in fixed_point(torch.tensor(1.3 / math.prod(kernel), dtype=torch.float64)))
    a = np.pad(x.numpy().astype(np.int64) - zero, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    windows = np.lib.stride_tricks.sliding_window_view(a, kernel, (2, 3))[:, :, :: stride[0], :: stride[1]]
    expected = numpy_codes(windows.sum((-1, -2)), np.array(multiplier), np.array(shift), 4, *limits(scheme))
    arguments = (x, list(kernel), list(stride), list(padding), zero, multiplier, shift, 4, scheme)
    assert np.array_equal(qc.avg_pool2d(*arguments).numpy(), expected)
    check_meta(qc.avg_pool2d, *arguments)


def test_a_mean_without_a_normal_multiplier_is_named() -> None:
    with pytest.raises(ValueError, match="multiplier lies in"):
        qc.mean(codes((2, 4), AFFINE[0]), [1], 0, 5, 3, 0, False, AFFINE[0])


def test_resize_nearest_reads_whole_number_places() -> None:
    x = codes((1, 2, 3, 5), AFFINE[0])
    y = qc.resize_nearest(x, [7, 2])
    assert all(torch.equal(y[..., i, j], x[..., i * 3 // 7, j * 5 // 2]) for i in range(7) for j in range(2))
    check_meta(qc.resize_nearest, x, [7, 2])


# ---- softmax --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 2, 12, 1000, 2**14])
@pytest.mark.parametrize("scale", [1e-3, 0.1, 3.0])
def test_softmax_stays_in_int32_and_near_the_real_one(columns: int, scale: float) -> None:
    x = codes((3, columns), AFFINE[0])
    x[0] = 5  # all equal: the largest sum
    table = softmax_table(scale, columns)
    entries, expected = table.tolist(), np.empty((3, columns), np.int64)
    assert 256 * entries[0] + entries[0] * columns // 2 < 2**31
    for row, line in enumerate(x.tolist()):
        greatest = max(line)
        e = [entries[greatest - c] for c in line]
        total = sum(e)
        assert total < 2**31
        expected[row] = [min((256 * v + total // 2) // total - 128, 127) for v in e]
    y = qc.softmax(x, table, AFFINE[0])
    assert np.array_equal(y.numpy(), expected)
    real = torch.softmax(x.double() * scale, -1) * 256
    assert float((y.double() + 128 - real.clamp(max=255)).abs().max()) <= 0.51
    check_meta(qc.softmax, x, table, AFFINE[0])


def test_softmax_gives_unsigned_codes_too() -> None:
    x, table = codes((2, 9), AFFINE[1]), softmax_table(0.05, 9)
    signed, unsigned = qc.softmax(x, table, AFFINE[0]), qc.softmax(x, table, AFFINE[1])
    assert torch.equal(signed.int() + 128, unsigned.int())


def test_a_row_too_long_is_named() -> None:
    with pytest.raises(ValueError, match="too long to sum in int32"):
        softmax_table(0.1, 2**14 + 1)


# ---- text -----------------------------------------------------------------------------------------------------------------


def test_a_graph_of_integers_alone_prints_and_parses() -> None:
    tensors = {
        "w": codes((2, 4), "int8 channel=0 sym"), "s": torch.rand(2), "one": torch.tensor(0.5), "z": torch.tensor(3, dtype=torch.int32),
        "m": torch.tensor([2**30, 2**31 - 1], dtype=torch.int32), "n": torch.tensor([33, 34], dtype=torch.int8),
        "t": codes((256,), AFFINE[0]),
    }  # fmt: skip
    kinds = {torch.int8: "i8", torch.int32: "i32", torch.float32: "f32"}
    constants = "".join(
        f"  %{name} = const {kinds[t.dtype]}[{','.join(map(str, t.shape))}] @{tensor_digest(t)[:16]}\n" for name, t in tensors.items()
    )
    grid = (
        '{activation="relu", in_features=4, multiplier=%m, out_scheme="int8 tensor affine", shift=%n, weight_scheme="int8 channel=0 sym", '
    )
    text = (
        "graph @main integer(%x: f32[3,4]) {\n" + constants + "  %q = qc.quantize(%x, %one, %z) {scheme=\"int8 tensor affine\"} : i8[3,4]\n"
        f'  %y = qc.linear(%q, %one, %z, %w, %s, none, none, none, %one, %z) {grid}x_scheme="int8 tensor affine"}} : i8[3,2]\n'
        '  %a = qc.add(%y, %one, %z, %y, %one, %z, %one, %z) {a_scheme="int8 tensor affine", b_scheme="int8 tensor affine", '
        'out_scheme="int8 tensor affine", multipliers=[1048576, 5], shift=20} : i8[3,2]\n'
        "  %l = qc.lookup(%a, %t) : i8[3,2]\n"
        "  %v = qc.mean(%l) {dims=[1], x_zero_point=0, multiplier=1073741824, shift=31, out_zero_point=3, keepdim=false, "
        'out_scheme="int8 tensor affine"} : i8[3]\n'
        '  %r = qc.dequantize(%v, %one, %z) {scheme="int8 tensor affine"} : f32[3]\n'
        '  return %r as "y"\n}\n'
    )  # fmt: skip
    supplied = {tensor_digest(t)[:16]: t for t in tensors.values()}
    graph = parse_graph(text, supplied)
    printed = print_graph(graph)
    again = parse_graph(printed, supplied)
    assert print_graph(again) == printed
    assert "multipliers=[1048576, 5], shift=20" in printed
    x = torch.randn(3, 4)
    assert torch.equal(graph(x)[0], again(x)[0])


@pytest.mark.parametrize("target", ["cpu", "onnx"])
def test_targets_without_the_rule_refuse(target: str) -> None:
    from qcompile.errors import Refused
    from qcompile.registry import find_target

    x, one = "i8[4]", torch.tensor(1.0)
    digest = tensor_digest(one)[:16]
    text = (
        f"graph @main integer(%x: {x}) {{\n  %one = const f32[] @{digest}\n"
        '  %a = qc.add(%x, %one, none, %x, %one, none, %one) {a_scheme="int8 tensor sym", b_scheme="int8 tensor sym", '
        'out_scheme="int8 tensor sym", multipliers=[1, 1], shift=1} : i8[4]\n'
        '  return %a as "y"\n}\n'
    )
    with pytest.raises(Refused, match="by multiplier and shift"):
        find_target(target).build(parse_graph(text, {digest: one}))


def test_pack_of_two_bits_is_what_products_read() -> None:
    w = codes((3, 5), "int2 channel=0 sym")
    assert torch.equal(parse_scheme("int2 channel=0 sym").format.pack(w), pack(w, 2))
