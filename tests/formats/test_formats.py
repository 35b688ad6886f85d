from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.formats import (
    Block,
    Channel,
    Format,
    Group,
    Integer,
    LayerScheme,
    Quantized,
    Scheme,
    Tensor,
    Token,
    bits_per_weight,
    choose_scale,
    dequantize,
    pack,
    parse_format,
    parse_granularity,
    parse_layer_scheme,
    parse_scheme,
    quantize,
    quantize_dynamic,
    quantize_tensor,
    register_family,
    stored_bytes,
    unpack,
)  # fmt: skip

INTEGERS = [Integer(bits, signed) for bits in range(1, 9) for signed in (True, False)]
GRANULARITIES = [Tensor(), Channel(0), Channel(1), Group(4), Group(5), Group(3, 0), Block(2, 3), Token()]


# ---- formats --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", INTEGERS, ids=str)
def test_every_code_is_its_own_value(format) -> None:
    values = torch.arange(format.lowest, format.highest + 1)
    assert len(values) == 2**format.bits
    codes = format.encode(values)
    assert codes.dtype == format.storage
    assert torch.equal(format.decode(codes), values)


@pytest.mark.parametrize("format", INTEGERS, ids=str)
def test_encoding_is_nearest_with_ties_to_even_and_saturates(format) -> None:
    """Against Python's own integers: round() ties to even."""
    for value in torch.arange(format.lowest - 3, format.highest + 3.25, 0.25).tolist():
        expected = min(max(round(value), int(format.lowest)), int(format.highest))
        assert format.encode(torch.tensor([value])).item() == expected


@pytest.mark.parametrize("format", INTEGERS, ids=str)
def test_format_text(format) -> None:
    assert parse_format(str(format)) == format


@pytest.mark.parametrize("name", ["int9", "int0", "int", "uint16", "fp4", " int4", ""])
def test_unknown_formats_are_refused(name) -> None:
    with pytest.raises(ValueError, match="unknown format"):
        parse_format(name)


def test_integers_have_one_to_eight_bits() -> None:
    with pytest.raises(ValueError, match="1 to 8 bits, not 9"):
        Integer(9, True)


def test_two_families_may_not_claim_one_name() -> None:
    from qcompile.formats import format as module

    register_family(lambda name: Integer(4, True) if name == "int4" else None)
    try:
        with pytest.raises(ValueError, match="belongs to two formats"):
            parse_format("int4")
    finally:
        module._families.pop()


# ---- granularities --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("shape", [(6, 12), (5, 7), (1, 1), (3, 10)])
def test_granularity_against_one_element_at_a_time(granularity, shape) -> None:
    """Each scale covers the elements that ``expand`` gives it: their range is the reduced range."""
    x = torch.randn(shape)
    low, high = granularity.reduce_range(x)
    expected = granularity.scale_shape(shape)
    assert tuple(low.shape) == tuple(high.shape) == expected
    owner = granularity.expand(torch.arange(math.prod(expected)).reshape(expected), shape).expand(shape)
    for i in range(math.prod(expected)):
        elements = x[owner == i]
        assert low.flatten()[i] == elements.min()
        assert high.flatten()[i] == elements.max()


@pytest.mark.parametrize("granularity", [*GRANULARITIES, Group(128, 1), Channel(-1)], ids=str)
def test_granularity_text(granularity) -> None:
    assert parse_granularity(str(granularity)) == granularity


@pytest.mark.parametrize("text", ["group", "group=-1", "block=4", "tensors", "channel"])
def test_unknown_granularities_are_refused(text) -> None:
    with pytest.raises(ValueError, match="unknown granularity"):
        parse_granularity(text)


def test_a_group_is_not_empty() -> None:
    with pytest.raises(ValueError, match="at least 1 element"):
        Group(0)


def test_group_of_axis_zero_keeps_its_axis() -> None:
    assert parse_granularity("group=4,axis=0") == Group(4, 0)


# ---- packing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", INTEGERS, ids=str)
@pytest.mark.parametrize("size", [*range(1, 18), 31, 64, 127])
def test_packing_round_trip(format, size) -> None:
    codes = torch.randint(int(format.lowest), int(format.highest) + 1, (2, 3, size)).to(format.storage)
    packed = pack(codes, format.bits)
    assert packed.shape == (2, 3, math.ceil(size * format.bits / 8))
    assert torch.equal(unpack(packed, format.bits, format.signed, size), codes)


@pytest.mark.parametrize("bits", range(1, 8))
def test_packed_bits_lie_end_to_end_from_the_least_significant(bits) -> None:
    """Against one big Python integer for each row."""
    codes = torch.randint(0, 2**bits, (3, 11), dtype=torch.uint8)
    for row, packed in zip(codes.tolist(), pack(codes, bits), strict=True):
        number = sum(code << (i * bits) for i, code in enumerate(row))
        assert bytes(packed.tolist()) == number.to_bytes(math.ceil(11 * bits / 8), "little")


@pytest.mark.parametrize(
    ("scheme", "shape", "expected"),
    [
        ("int4 group=128 sym", (384, 384), 4 + 32 / 128),
        ("int4 group=128 affine", (384, 384), 4 + 40 / 128),
        ("int8 channel=0 sym", (10, 100), 8 + 32 / 100),
        ("int4 group=32 sym scale=f16", (8, 64), 4 + 16 / 32),
        ("int3 tensor sym", (4, 8), 3 + 32 / 32),
        ("int3 tensor sym", (4, 3), (4 * 16 + 32) / 12),  # nine bits a row take two bytes
        ("int2 group=16 sym", (1, 24), (48 + 2 * 32) / 24),  # the last group is short
    ],
)
def test_bits_per_weight_counts_scales_and_padding(scheme, shape, expected) -> None:
    assert bits_per_weight(parse_scheme(scheme), shape) == expected


@pytest.mark.parametrize("text", ["int3 group=5 affine", "uint5 channel=0 affine", "int8 block=2x3 sym", "int1 tensor sym"])
def test_stored_bytes_are_those_of_the_tensors(text) -> None:
    scheme, shape = parse_scheme(text), (7, 13)
    quantized = quantize_tensor(torch.randn(shape), scheme)
    tensors = [quantized.packed(), quantized.scale.to(scheme.scale_dtype)]
    tensors += [quantized.zero_point.to(torch.int8)] if quantized.zero_point is not None else []
    assert stored_bytes(scheme, shape) == sum(t.numel() * t.element_size() for t in tensors)


# ---- schemes --------------------------------------------------------------------------------------------------------------

schemes = st.builds(
    Scheme,
    st.sampled_from(INTEGERS),
    st.one_of(
        st.just(Tensor()), st.just(Token()), st.builds(Channel, st.integers(-3, 3)),
        st.builds(Group, st.integers(1, 512), st.integers(-3, 3)),
        st.builds(Block, st.integers(1, 64), st.integers(1, 64)),
    ),
    st.booleans(), st.booleans(), st.sampled_from(["f32", "f16", "bf16"]),
)  # fmt: skip


@given(schemes)
def test_scheme_text_round_trip(scheme) -> None:
    assert parse_scheme(str(scheme)) == scheme


@given(schemes, st.one_of(st.none(), schemes))
def test_layer_scheme_text_round_trip(weight, activation) -> None:
    layer = LayerScheme(weight, activation)
    assert parse_layer_scheme(str(layer)) == layer


def test_words_may_stand_in_any_order() -> None:
    assert parse_scheme("int4 affine scale=f16 group=32") == parse_scheme("int4 group=32 affine scale=f16")


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "no scheme"), ("int4 group=x", "unknown granularity"), ("int8 scale=f8", "unknown scale format"), ("bf5 sym", "unknown format")],
)
def test_wrong_schemes_are_refused(text, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_scheme(text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("W8A8", "weight=int8 channel=0 sym; activation=uint8 tensor affine"),
        ("w4a16", "weight=int4 group=128 sym; activation=float"),
        ("w4g32", "weight=int4 group=32 sym; activation=float"),
        ("W4A8-g64", "weight=int4 group=64 sym; activation=uint8 tensor affine"),
        ("W8A8-dynamic", "weight=int8 channel=0 sym; activation=int8 token sym dynamic"),
        ("float", "weight=float; activation=float"),
    ],
)
def test_names_people_know(name, text) -> None:
    assert str(parse_layer_scheme(name)) == text


@pytest.mark.parametrize("name", ["W9A8", "8bit", "weight=int8; x=float", "W4"])
def test_unknown_names_are_refused(name) -> None:
    with pytest.raises(ValueError, match=r"unknown|must name|1 to 8 bits"):
        parse_layer_scheme(name)


# ---- quantize -------------------------------------------------------------------------------------------------------------


def onnx_quantize(x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None, dtype: type, axis: int) -> np.ndarray:
    """Run QuantizeLinear in ONNX Runtime."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    kind = TensorProto.INT8 if dtype is np.int8 else TensorProto.UINT8
    zero = np.zeros_like(scale, dtype=dtype) if zero_point is None else zero_point.astype(dtype)
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], **({"axis": axis} if scale.ndim else {}))
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)], [helper.make_tensor_value_info("y", kind, x.shape)],
        [numpy_helper.from_array(scale, "s"), numpy_helper.from_array(zero, "z")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize(
    "text", ["int8 tensor sym", "uint8 tensor affine", "int8 channel=0 sym", "uint8 channel=1 affine", "int8 tensor affine"]
)
@pytest.mark.parametrize("scale", [0.5, 0.1, 0.037, 3.0])
def test_codes_are_those_of_onnx_quantize_linear(text, scale) -> None:
    scheme = parse_scheme(text)
    ties = (torch.arange(-300, 300) + 0.5) * scale  # every tie of the grid, and beyond both ends
    x = torch.cat([ties, torch.randn(600) * scale * 90]).reshape(2, 600)
    shape = scheme.granularity.scale_shape((2, 600))
    scales = torch.full(shape, scale) * (1 + torch.arange(math.prod(shape)).reshape(shape) % 7)
    zero = None if scheme.symmetric else torch.full(shape, 3, dtype=torch.int32)
    codes = quantize(x, scales, zero, scheme)
    dtype = np.int8 if scheme.format.lowest < 0 else np.uint8
    axis = scheme.granularity.axis if isinstance(scheme.granularity, Channel) else 0
    assert np.array_equal(codes.numpy(), onnx_quantize(x.numpy(), scales.numpy(), None if zero is None else zero.numpy(), dtype, axis))


SCHEMES = [
    Scheme(f, g, symmetric)
    for f in (Integer(8, True), Integer(4, True), Integer(3, False))
    for g in GRANULARITIES
    for symmetric in (True, False)
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rounding_error_is_half_a_step(scheme) -> None:
    x = torch.randn(6, 10)
    x = x.abs() if scheme.symmetric and scheme.format.lowest == 0 else x
    quantized = quantize_tensor(x, scheme)
    step = scheme.granularity.expand(quantized.scale, (6, 10))
    # Affine ranges whose zero point was rounded may lose half a step more at one end.
    bound = 0.5 if scheme.symmetric else 1.0
    assert ((quantized.dequantize() - x).abs() <= bound * step * (1 + 1e-5)).all()
    assert quantized.codes.dtype == scheme.format.storage


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zero_is_coded_exactly(scheme) -> None:
    x = torch.randn(6, 10) + 2
    x[:, ::3] = 0
    assert (quantize_tensor(x, scheme).dequantize()[x == 0] == 0).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_values_on_the_grid_come_back_unchanged(scheme) -> None:
    shape = (6, 10)
    scales = 2.0 ** torch.randint(-6, 3, scheme.granularity.scale_shape(shape))
    zero = None if scheme.symmetric else torch.ones(scales.shape, dtype=torch.int32)
    codes = torch.randint(int(scheme.format.lowest), int(scheme.format.highest) + 1, shape).to(scheme.format.storage)
    assert torch.equal(quantize(dequantize(codes, scales, zero, scheme), scales, zero, scheme), codes)


@given(st.floats(-100, 100, width=32), st.floats(0, 100, width=32), schemes)
def test_scales_are_positive_and_storable(low, width, scheme) -> None:
    scale, zero_point = choose_scale(torch.tensor(low), torch.tensor(low) + torch.tensor(width), scheme)
    assert torch.isfinite(scale)
    assert scale > 0
    assert torch.equal(scale.to(scheme.scale_dtype).to(torch.float32), scale)
    assert (zero_point is None) == scheme.symmetric
    if zero_point is not None:
        assert scheme.format.lowest <= zero_point <= scheme.format.highest


def test_float64_scales_stay_float64() -> None:
    quantized = quantize_tensor(torch.randn(4, 8, dtype=torch.float64), parse_scheme("int4 group=4 sym"))
    assert quantized.scale.dtype == torch.float64
    assert quantized.dequantize().dtype == torch.float64


def test_dynamic_quantization_is_that_of_the_tensor() -> None:
    x, scheme = torch.randn(3, 8), parse_scheme("int8 token sym dynamic")
    codes, scale, zero_point = quantize_dynamic(x, scheme)
    assert zero_point is None
    assert torch.equal(scale, x.abs().amax(-1, keepdim=True) / 127)
    assert torch.equal(Quantized(codes, scale, None, scheme).dequantize(), quantize_tensor(x, scheme).dequantize())


def test_int1_holds_minus_one_and_zero() -> None:
    quantized = quantize_tensor(torch.tensor([-2.0, -0.4, 0.0, 3.0]), parse_scheme("int1 tensor sym"))
    assert quantized.codes.tolist() == [-1, 0, 0, 0]
    assert quantized.dequantize().tolist() == [-2, 0, 0, 0]


def test_formats_share_one_interface() -> None:
    assert all(isinstance(format, Format) and str(format) == format.name for format in INTEGERS)
