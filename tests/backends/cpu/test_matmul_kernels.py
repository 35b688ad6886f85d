"""Linear kernels against the dialect: integers and simple epilogues bit for bit, float products within their rounding bound."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import tvm
from qcompile.backends.cpu.kernels import isa
from qcompile.backends.cpu.kernels.code_rounding import is_easy
from qcompile.backends.cpu.kernels.matmul import linear
from qcompile.backends.cpu.kernels.matmul_batched import BatchedMatmul, batched_matmul
from qcompile.backends.cpu.kernels.matmul_epilogue import Epilogue
from qcompile.backends.cpu.kernels.matmul_spec import Linear, Tile
from qcompile.backends.cpu.kernels.pack import pack_linear
from qcompile.backends.lowering.sequence import IN_PLACE

import qcompile.graph.dialect
from qcompile.formats import pack

ISAS = sorted({isa.detect(), isa.PORTABLE})
SMALL = Tile(rows=4, vectors=2, words=32, packed_bytes=8 << 10, threads=2)  # so that small layers cut every loop
SMALL_TILED = Tile(rows=32, vectors=2, words=32, packed_bytes=8 << 10, threads=2)  # the same in tile registers


@dataclass
class Layer:
    """Random arrays of one layer, as the dialect takes them."""

    spec: Linear
    codes: np.ndarray
    scale: np.ndarray | None
    zero_point: np.ndarray | None
    bias: np.ndarray | None


def _make_layer(spec: Linear, rng: np.random.Generator, extreme: bool = False) -> Layer:
    n, k, groups = spec.out_features, spec.in_features, spec.groups
    low, high = (-(1 << (spec.bits - 1)), 1 << (spec.bits - 1)) if spec.weight_signed else (0, 1 << spec.bits)
    low = -1 if spec.ternary else low
    codes = rng.choice([low, high - 1], (n, k)) if extreme else rng.integers(low, high, (n, k))
    shape = (n, groups) if spec.group else (n,)
    bias = None
    if spec.epilogue.bias == "int32":
        bias = rng.integers(-5000, 5000, n).astype(np.int32)
    elif spec.epilogue.bias == "float32":
        bias = rng.standard_normal(n).astype(np.float32)
    zero_point = rng.integers(low, high, shape).astype(np.int32) if spec.weight_affine else None
    scale = (rng.random(shape) * 0.01 + 0.001).astype(np.float32)
    return Layer(spec, codes.astype(np.int8 if spec.weight_signed else np.uint8), scale, zero_point, bias)


def _compile(spec: Linear, *, easy: bool = False):
    return tvm.compile(tvm.IRModule({"linear": linear(spec, easy=easy)}), tvm.target.Target(isa.target_description()))["linear"]


def _run(kernel, layer: Layer, x: np.ndarray, x_scale, x_zero, residual, out, *, in_place: bool = False) -> np.ndarray:
    """Call the kernel with the arguments that its layer has; ``in_place``: the result lies where the residual does."""
    spec = layer.spec
    inputs = [x]
    if spec.integer:
        inputs += [x_scale.reshape(-1)] + ([x_zero.reshape(-1)] if spec.x_affine else [])
    inputs += pack_linear(spec, layer.codes, layer.scale, layer.zero_point, layer.bias)
    inputs += [residual] if spec.epilogue.residual else []
    inputs += [np.array([out[0]], np.float32), np.array([out[1]], np.int32)] if spec.epilogue.codes else []
    given = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in inputs]
    result = given[-1] if in_place else tvm.runtime.tensor(np.full((x.shape[0], spec.out_features), 77, spec.epilogue.output))
    kernel(*given, result)
    return result.numpy()


def _meaning(layer: Layer, x: np.ndarray, x_scale, x_zero, residual, out) -> np.ndarray:
    """Return what the dialect says."""
    spec = layer.spec

    def tensor(a):
        return None if a is None else torch.from_numpy(np.array(a))

    weight = pack(tensor(layer.codes), spec.bits)
    sign, granularity = "" if spec.weight_signed else "u", f"group={spec.group}" if spec.group else "channel=0"
    x_scheme = f"{spec.x} {'token' if spec.x_per_token else 'tensor'} {'affine' if spec.x_affine else 'sym'}" if spec.integer else ""
    has = spec.epilogue.codes
    result = torch.ops.qc.linear(
        tensor(x), tensor(x_scale) if spec.integer else None, tensor(x_zero) if spec.integer and spec.x_affine else None,
        weight, tensor(layer.scale), tensor(layer.zero_point), tensor(layer.bias),
        tensor(residual) if spec.epilogue.residual else None,
        torch.tensor(out[0]) if has else None, torch.tensor(out[1], dtype=torch.int32) if has else None,
        x_scheme, f"{sign}int{spec.bits} {granularity} {'affine' if spec.weight_affine else 'sym'}", spec.in_features,
        spec.epilogue.activation, f"{spec.epilogue.output} tensor affine" if has else "",
    )  # fmt: skip
    return result.numpy()


def _random_input(spec: Linear, m: int, rng: np.random.Generator, extreme: bool = False):
    """Return x, its scale and zero point, the residual, and the scale and zero point of the result."""
    low = -128 if spec.x == "int8" else 0
    x = rng.standard_normal((m, spec.in_features)).astype(np.float32)
    if spec.integer:
        x = (rng.choice([low, low + 255], x.shape) if extreme else rng.integers(low, low + 256, x.shape)).astype(spec.x)
    granule = (m, 1) if spec.x_per_token else ()
    x_scale = np.asarray(rng.random(granule) * 0.02 + 0.001, np.float32)
    x_zero = np.asarray(rng.choice([low, low + 255], granule) if extreme else rng.integers(low, low + 256, granule), np.int32)
    residual = rng.standard_normal((m, spec.out_features)).astype(np.float32)
    out_low = -128 if spec.epilogue.output == "int8" else 0
    return x, x_scale, x_zero, residual, (0.37, int(rng.integers(out_low, out_low + 256)))


_F32 = Epilogue("float32", "relu", True)
_INTEGER = {
    "affine": Linear(203, 70, epilogue=_F32),
    "int8": Linear(64, 33, x="int8", epilogue=replace(_F32, activation="add_relu6", output="int8")),
    "symmetric": Linear(130, 64, x="int8", x_affine=False, epilogue=Epilogue(output="uint8", activation="relu6")),
    "int32 bias": Linear(384, 96, epilogue=Epilogue("int32", "add_relu", True, "uint8")),
    "token": Linear(201, 48, x="int8", x_per_token=True, x_affine=False, epilogue=Epilogue("float32")),
    "codes by token": Linear(192, 96, x_per_token=True, epilogue=Epilogue("float32", "hardswish", output="int8")),
    "token affine": Linear(96, 50, x_per_token=True, epilogue=Epilogue(activation="hardswish")),
    "int4 g32": Linear(200, 70, x="int8", x_per_token=True, x_affine=False, bits=4, group=32, epilogue=_F32),
    "int4 g16": Linear(72, 40, bits=4, group=16),
    "uint4 affine g64": Linear(192, 40, bits=4, group=64, weight_signed=False, weight_affine=True, epilogue=Epilogue("float32")),
    "uint4 token g128": Linear(300, 40, x_per_token=True, bits=4, group=128, weight_signed=False, weight_affine=True),
    "int4 channel": Linear(131, 40, bits=4, epilogue=Epilogue("int32", output="int8")),
    "uint4 affine channel": Linear(131, 40, x="int8", bits=4, weight_signed=False, weight_affine=True),
    "int8 g32": Linear(160, 40, bits=8, group=32),
    "int2 g32": Linear(160, 40, bits=2, group=32),
    "uint4 token g32": Linear(300, 40, x_per_token=True, bits=4, group=32, weight_signed=False, weight_affine=True),
    "int3 g64": Linear(192, 40, bits=3, group=64),
    "int5": Linear(100, 40, bits=5),
    "uint7 affine": Linear(100, 40, bits=7, weight_signed=False, weight_affine=True),
    "int1 g128": Linear(256, 40, bits=1, group=128),
    "ternary": Linear(203, 70, bits=2, ternary=True, epilogue=_F32),
    "ternary, int8 by token, a last step of one word": Linear(384, 40, "int8", True, False, bits=2, ternary=True),
    "ternary, several stretches": Linear(1100, 40, x="int8", bits=2, ternary=True, epilogue=Epilogue("int32", output="int8")),
}


@pytest.mark.parametrize("name", _INTEGER)
@pytest.mark.parametrize("isa_name", ISAS)
def test_integer_layers_agree_bit_for_bit(name: str, isa_name: str) -> None:
    spec = replace(_INTEGER[name], isa=isa_name, tile=None)
    spec = replace(spec, tile=SMALL_TILED if spec.tiled else SMALL)
    rng = np.random.default_rng(1)
    assert is_easy(0.37), "the quick rounding is right for the results' scale only if it is easy"
    kernel = _compile(spec, easy=True)
    for extreme in (False, True):
        layer = _make_layer(spec, rng, extreme)
        for m in (1, 2, 3, 7, 19, 67):
            arrays = _random_input(spec, m, rng, extreme)
            np.testing.assert_array_equal(_run(kernel, layer, *arrays), _meaning(layer, *arrays))


_IN_PLACE = {"float": Linear(203, 70, x="float32", bits=32), "codes": Linear(203, 70), "groups": Linear(200, 70, bits=4, group=32)}


@pytest.mark.parametrize("name", _IN_PLACE)
@pytest.mark.parametrize("isa_name", ISAS)
def test_a_result_may_take_the_residuals_place(name: str, isa_name: str) -> None:
    spec = replace(_IN_PLACE[name], isa=isa_name, tile=None, epilogue=Epilogue("float32", "none", True))
    spec = replace(spec, tile=SMALL_TILED if spec.tiled else SMALL)
    assert IN_PLACE not in linear(replace(spec, epilogue=Epilogue("float32"))).attrs
    function = linear(spec)
    assert [parameter.name for parameter in function.params][int(function.attrs[IN_PLACE])] == "residual"
    kernel, rng = _compile(spec), np.random.default_rng(3)
    layer = _make_layer(spec, rng)
    layer = replace(layer, codes=rng.standard_normal(layer.codes.shape).astype(np.float32), scale=None) if spec.bits == 32 else layer
    for m in (1, 2, 7, 19, 67, 130):
        arrays = _random_input(spec, m, rng)
        np.testing.assert_array_equal(_run(kernel, layer, *arrays, in_place=True), _run(kernel, layer, *arrays))


@pytest.mark.parametrize("isa_name", ISAS)
def test_default_tiles_agree_over_row_counts(isa_name: str) -> None:
    spec = Linear(1100, 100, isa=isa_name, epilogue=replace(_F32, output="int8"))
    kernel, rng = _compile(spec), np.random.default_rng(2)
    layer = _make_layer(spec, rng)
    for m in (1, 4, 5, 8, 9, 16, 31, 33, 64, 257):
        arrays = _random_input(spec, m, rng)
        np.testing.assert_array_equal(_run(kernel, layer, *arrays), _meaning(layer, *arrays))


def test_sums_wrap_and_do_not_saturate() -> None:
    """The sum of unsigned bytes passes 2**31; taking back the shift of x wraps it back to the true sum, which fits."""
    spec = Linear(70000, 16, x="int8", x_affine=False, epilogue=Epilogue())
    layer = Layer(spec, np.full((16, 70000), 127, np.int8), np.ones(16, np.float32), None, None)
    x = np.full((3, 70000), 127, np.int8)
    result = _run(_compile(spec), layer, x, np.float32([1.0]), None, None, None)
    np.testing.assert_array_equal(result, np.float32(70000 * 127 * 127))


def test_codes_come_from_a_true_division_rounded_half_to_even() -> None:
    """Integer sums over even scales meet many exact ties, which a product with the reciprocal would miss."""
    spec, rng = Linear(64, 48, x="int8", x_affine=False, epilogue=Epilogue(output="int8")), np.random.default_rng(5)
    kernel, layer = _compile(spec), _make_layer(spec, rng)
    layer.codes, layer.scale = (layer.codes // 16).astype(np.int8), np.ones_like(layer.scale)
    x, one = rng.integers(-8, 8, (64, 64)).astype(np.int8), np.float32(1)
    for scale in (6.0, 10.0, 14.0, 22.0, 26.0, 38.0, 82.0):
        arrays = (x, one, None, None, (scale, 3))
        np.testing.assert_array_equal(_run(kernel, layer, *arrays), _meaning(layer, *arrays))


_FLOAT = {
    "float32": Linear(203, 70, x="float32", bits=32, epilogue=replace(_F32, activation="gelu")),
    "int4 g32": Linear(200, 70, x="float32", bits=4, group=32, epilogue=_F32),
    "uint4 affine g128": Linear(256, 33, x="float32", bits=4, group=128, weight_signed=False, weight_affine=True),
    "int8 channel": Linear(130, 48, x="float32", bits=8),
    "int3": Linear(130, 48, x="float32", bits=3, epilogue=Epilogue("float32", "silu")),
    "int2 g32": Linear(96, 48, x="float32", bits=2, group=32, epilogue=Epilogue(activation="tanh")),
    "uint6 affine": Linear(96, 48, x="float32", bits=6, weight_signed=False, weight_affine=True, epilogue=Epilogue(activation="sigmoid")),
}


@pytest.mark.parametrize("name", _FLOAT)
@pytest.mark.parametrize("isa_name", ISAS)
def test_float_layers_agree_within_rounding(name: str, isa_name: str) -> None:
    """The bound is k + 8 roundings of the sum of magnitudes, and the activations' own 1e-6 (they do not stretch distances above 1.2)."""
    spec = replace(_FLOAT[name], isa=isa_name, tile=SMALL)
    kernel, rng = _compile(spec), np.random.default_rng(3)
    layer = _make_layer(replace(spec, bits=8, x="int8", tile=None) if spec.bits == 32 else spec, rng)
    layer.spec = spec
    if spec.bits == 32:
        layer.codes, layer.scale = rng.standard_normal((spec.out_features, spec.in_features)).astype(np.float32), None
    for m in (1, 3, 8, 35):
        arrays = _random_input(spec, m, rng)
        plain, weight = _plain_float_layer(layer, arrays)
        magnitude = np.abs(arrays[0]).astype(np.float64) @ np.abs(weight).T + 8
        bound = 1.2 * (spec.in_features + 8) * 2.0**-24 * magnitude + 1e-6 * np.maximum(1, np.abs(plain))
        assert (np.abs(_run(kernel, layer, *arrays) - plain) <= bound).all()


def _plain_float_layer(layer: Layer, arrays) -> tuple[np.ndarray, np.ndarray]:
    """Return the layer in float64, and its dequantized weight."""
    spec, (x, _, _, residual, _) = layer.spec, arrays
    weight = layer.codes.astype(np.float64)
    if spec.bits < 32:
        length = spec.group or spec.in_features
        n, k = weight.shape
        zero_point = np.zeros(1, np.int32).repeat(n) if layer.zero_point is None else layer.zero_point
        scale, zero = (a.reshape(n, -1).repeat(length, 1)[:, :k] for a in (layer.scale, zero_point))
        weight = (weight - (zero if layer.zero_point is not None else 0)) * scale
    y = torch.from_numpy(x.astype(np.float64) @ weight.T + (0 if layer.bias is None else layer.bias))
    y = qcompile.graph.dialect.ACTIVATIONS[spec.epilogue.activation](y).numpy()
    return y + residual if spec.epilogue.residual else y, weight


def test_five_ternary_codes_in_a_byte_are_limited() -> None:
    ternary = {"bits": 2, "ternary": True}
    for wrong in ({"x": "float32"}, {"weight_signed": False}, {"bits": 3}):
        with pytest.raises(ValueError, match="five codes in a byte"):
            Linear(64, 64, **{**ternary, **wrong})
    with pytest.raises(ValueError, match="five codes in a byte"):
        Linear(640, 64, group=320, **ternary)
    with pytest.raises(ValueError, match="fewer than 32768 inputs"):
        Linear(1 << 15, 64, **ternary)


def test_every_byte_of_five_ternary_codes_and_the_longest_sum() -> None:
    """Column c holds the digits of c in each run of five words; x is as large as it can be, and the row as long."""
    k = (1 << 15) - 1
    spec = Linear(k, 243, x="int8", x_per_token=True, x_affine=False, bits=2, ternary=True)
    digits = np.arange(243)[:, None] // 3 ** np.arange(5) % 3 - 1
    codes = digits.repeat(4, 1)[:, np.arange(k) % 20].astype(np.int8)
    layer, kernel = Layer(spec, codes, np.ones(243, np.float32), None, None), _compile(spec)
    for x in (np.full((1, k), -128, np.int8), np.full((1, k), 127, np.int8), np.full((3, k), 127, np.int8)):
        arrays = (x, np.ones((len(x), 1), np.float32), None, None, None)
        np.testing.assert_array_equal(_run(kernel, layer, *arrays), _meaning(layer, *arrays))


def test_unsupported_layers_are_refused() -> None:
    for wrong in (
        {"bits": 9},
        {"group": 24, "bits": 4},
        {"weight_affine": True},
        {"x": "int4"},
        {"isa": "mmx"},
        {"bits": 32},
        {"ternary": True},
    ):
        with pytest.raises(ValueError, match=r"."):
            Linear(64, 64, **wrong)
    with pytest.raises(ValueError, match="known are"):
        Epilogue(activation="swish")


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("transposed", [False, True])
def test_batched_float_product(transposed: bool, isa_name: str) -> None:
    spec = BatchedMatmul(transposed=transposed, isa=isa_name)
    kernel = tvm.compile(tvm.IRModule({"main": batched_matmul(spec)}), tvm.target.Target(isa.target_description()))["main"]
    rng = np.random.default_rng(4)
    for batch, m, k, n in ((1, 1, 1, 1), (2, 3, 5, 7), (3, 17, 130, 50), (2, 150, 260, 96)):
        a, b = rng.standard_normal((batch, m, k)).astype(np.float32), rng.standard_normal((batch, k, n)).astype(np.float32)
        y = tvm.runtime.tensor(np.full((batch, m, n), 9, np.float32))
        kernel(tvm.runtime.tensor(a), tvm.runtime.tensor(np.ascontiguousarray(b.transpose(0, 2, 1)) if transposed else b), y)
        wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
        bound = k * 2.0**-24 * (np.abs(wide_a) @ np.abs(wide_b)) + 1e-30
        assert (np.abs(y.numpy() - wide_a @ wide_b) <= bound).all()
