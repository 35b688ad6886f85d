"""The integer form of the ONNX export: ONNX Runtime's codes and products equal the graph's bit for bit."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.fx as fx
from hypothesis import given
from hypothesis import strategies as st
from qcompile.backends.onnx import TARGET
from qcompile.backends.onnx.export import export_onnx
from qcompile.backends.onnx.integers import weight_parts
from qcompile.backends.onnx.runner import OnnxRunner
from torch import nn

import qcompile
from qcompile.errors import Refused
from qcompile.formats import Quantized, choose_scale, parse_scheme
from qcompile.graph import Graph, Stage, TensorType
from qcompile.graph.dialect import ACTIVATIONS
from qcompile.graph.graph import build_module
from qcompile.verification import verify

qc = torch.ops.qc

AFFINE, SIGNED = "uint8 tensor affine", "int8 tensor affine"
# Float functions that PyTorch and ONNX Runtime compute by other approximations, a few units in the last place apart.
APPROXIMATED = {"gelu", "gelu_tanh", "silu", "tanh", "sigmoid"}


# ---- making graphs --------------------------------------------------------------------------------------------------------


def make_graph(build: Callable[..., Any], inputs: list[torch.Tensor], constants: dict[str, torch.Tensor]) -> Graph:
    """Return the integer graph that ``build(call, nodes of inputs.., nodes of constants by name)`` makes."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(len(inputs))]
    named = {name: graph.get_attr(name) for name in constants}
    result = build(lambda target, *args: graph.call_function(target, args), *nodes, **named)
    graph.output(result if isinstance(result, tuple) else (result,))
    return Graph(build_module(constants, {}, graph), [TensorType(x.dtype, tuple(x.shape)) for x in inputs], stage=Stage.INTEGER)


def codes(*shape: int, text: str, extreme: bool, seed: int = 0) -> torch.Tensor:
    """Return codes over the whole range of a scheme's format, or its two ends only with a first row that is all the highest."""
    format, generator = parse_scheme(text).format, torch.Generator().manual_seed(seed)
    if not extreme:
        return torch.randint(int(format.lowest), int(format.highest) + 1, shape, generator=generator).to(format.storage)
    ends = torch.where(torch.rand(*shape, generator=generator) < 0.5, format.lowest, format.highest)
    ends[0] = format.highest
    return ends.to(format.storage)


def weight_of(*shape: int, text: str, extreme: bool) -> dict[str, torch.Tensor]:
    """Return packed codes, scales and zero points (drawn over the whole range, both ends among them) as constants."""
    scheme, generator = parse_scheme(text), torch.Generator().manual_seed(7)
    drawn = codes(*shape, text=text, extreme=extreme, seed=1)
    scale = torch.rand(scheme.granularity.scale_shape(shape), generator=generator) * 0.01 + 1e-4
    zero = None
    if not scheme.symmetric:
        zero = codes(max(scale.numel(), 1), text=text, extreme=extreme, seed=2).to(torch.int32)
        zero[0], zero[-1] = int(scheme.format.lowest), int(scheme.format.highest)
        zero = zero.reshape(scale.shape)
    made = {"w": Quantized(drawn, scale, zero, scheme).packed(), "w_scale": scale}
    return made if zero is None else made | {"w_zero": zero}


def static(scale: float, zero_point: int | None, prefix: str) -> dict[str, torch.Tensor]:
    made = {f"{prefix}_scale": torch.tensor(scale)}
    return made if zero_point is None else made | {f"{prefix}_zero": torch.tensor(zero_point, dtype=torch.int32)}


def assert_equal(graph: Graph, *inputs: torch.Tensor, optimizations: tuple[str, ...] = ("basic", "all")) -> list[torch.Tensor]:
    """Assert that ONNX Runtime gives the graph's bits; return the graph's outputs."""
    model = export_onnx(graph, "integer")
    expected = graph(*inputs)
    for optimization in optimizations:
        for found, wanted in zip(OnnxRunner(model, optimization=optimization)(*inputs), expected, strict=True):
            assert isinstance(found, torch.Tensor)
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted), f"{int((found != wanted).sum())} of {found.numel()} differ ({optimization})"
    assert_all_products_are_unsigned(model)
    return list(expected)


def static_over(values: torch.Tensor, text: str, prefix: str) -> dict[str, torch.Tensor]:
    """Return a grid that holds most of the values and clips the largest."""
    scale, zero = choose_scale(values.min() * 0.8, values.max() * 0.8, parse_scheme(text))
    return {f"{prefix}_scale": scale} | ({} if zero is None else {f"{prefix}_zero": zero})


def assert_all_products_are_unsigned(model: onnx.ModelProto) -> None:
    """Assert what keeps sums exact on processors that would saturate pairs of signed products (this one may not)."""
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input)}
    types |= {tensor.name: tensor.data_type for tensor in inferred.initializer}
    for node in inferred.node:
        if node.op_type in ("MatMulInteger", "ConvInteger"):
            assert [types[name] for name in node.input] == [onnx.TensorProto.UINT8] * 4


def kinds(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


# ---- weights --------------------------------------------------------------------------------------------------------------


@given(st.sampled_from(["int8", "uint8", "int4", "uint7", "int2"]), st.booleans(), st.integers(0, 2**31 - 1))
def test_parts_of_a_weight_add_up_to_it(format: str, one_zero_point: bool, seed: int) -> None:
    scheme = parse_scheme(f"{format} channel=0 affine")
    drawn = codes(6, 5, text=format, extreme=seed % 2 == 0, seed=seed)
    zero = codes(6, text=format, extreme=seed % 3 == 0, seed=seed + 1).to(torch.int32)
    zero = zero[:1].expand(6) if one_zero_point else zero
    parts = weight_parts(drawn, zero, scheme)
    assert len(parts) <= (1 if one_zero_point or scheme.bits < 8 else 2)
    for part, shift in parts:
        assert part.dtype == torch.uint8
        assert 0 <= shift <= 255
    assert torch.equal(sum(part.to(torch.int32) - shift for part, shift in parts), drawn.to(torch.int32) - zero.unsqueeze(1))


# ---- linear ---------------------------------------------------------------------------------------------------------------

WEIGHTS = ["int8 channel=0 sym", "int8 tensor sym", "uint8 tensor affine", "int8 channel=0 affine", "int4 channel=0 affine",
           "int3 channel=0 sym", "int4 group=8 sym", "int8 group=8 affine", "int4 group=7 affine"]  # fmt: skip
ACTIVATION_GRIDS = [(AFFINE, 0), (AFFINE, 255), (AFFINE, 77), (SIGNED, -128), (SIGNED, 127), ("int8 tensor sym", None)]


def linear_graph(x: torch.Tensor, weight: str, grid: tuple[str, int | None], *, extreme: bool, bias: str = "", out: str = "") -> Graph:
    features, (text, zero) = x.shape[-1], grid
    constants = weight_of(11, features, text=weight, extreme=extreme) | static(0.0173, zero, "x")
    if bias:
        drawn = torch.randn(11, generator=torch.Generator().manual_seed(3))
        constants["bias"] = drawn if bias == "float" else (drawn * 5000).to(torch.int32)
    if out:
        constants |= static_over(linear_graph(x, weight, grid, extreme=extreme, bias=bias)(x)[0], out, "out")

    def build(call: Any, x: Any, x_scale: Any, w: Any, w_scale: Any, **c: Any) -> Any:
        return call(qc.linear.default, x, x_scale, c.get("x_zero"), w, w_scale, c.get("w_zero"), c.get("bias"), None,
                    c.get("out_scale"), c.get("out_zero"), text, weight, features, "none", out)  # fmt: skip

    return make_graph(build, [x], constants)


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("grid", ACTIVATION_GRIDS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_linear(weight: str, grid: tuple[str, int | None], extreme: bool) -> None:
    x = codes(2, 7, 27, text=grid[0], extreme=extreme)
    for bias, out in (("float", ""), ("" if "group" in weight else "int32", "int8 tensor sym")):
        (found,) = assert_equal(linear_graph(x, weight, grid, out=out, extreme=extreme, bias=bias), x, optimizations=("basic",))
        assert found.unique().numel() > 8


def test_long_sums_are_exact_beyond_float32() -> None:
    """4001 products of two ends: float32 sums of these are wrong, int16 pairs of them would saturate."""
    x = torch.full((3, 4001), 255, dtype=torch.uint8)
    x[1, 0] = 254
    graph = linear_graph(x, "int8 channel=0 sym", (AFFINE, 0), extreme=True)
    (found,) = assert_equal(graph, x)
    assert float(found.abs().max()) > 2**24 * float(graph.module.w_scale.min()) * 0.0173
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("weight", ["int8 channel=0 sym", "int8 channel=0 affine", "int4 group=8 sym"])
@pytest.mark.parametrize("text", ["int8 token sym dynamic", "uint8 token affine dynamic", "int8 token affine dynamic",
                                  "int8 tensor sym dynamic", "uint8 tensor affine dynamic", "int8 tensor affine dynamic"])  # fmt: skip
def test_linear_with_scales_found_at_run_time(weight: str, text: str) -> None:
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [30], [0], [0.01], [5]])
    x[3] += 2  # a row whose zero point is at an end

    def build(call: Any, x: Any, w: Any, w_scale: Any, w_zero: Any = None) -> Any:
        made = call(qc.quantize_dynamic.default, x, text)
        found, scale, zero = (call(operator.getitem, made, index) for index in range(3))
        return call(qc.linear.default, found, scale, zero if "affine" in text else None, w, w_scale, w_zero, None, None, None, None,
                    text, weight, 24)  # fmt: skip

    assert_equal(make_graph(build, [x], weight_of(9, 24, text=weight, extreme=False)), x)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_epilogue_rounds_in_the_order_of_the_dialect(activation: str) -> None:
    x = codes(40, 24, text=AFFINE, extreme=False)
    residual = torch.randn(40, 11, generator=torch.Generator().manual_seed(5)) * 3
    constants = weight_of(11, 24, text="int8 channel=0 sym", extreme=False) | static(0.0173, 100, "x") | static(0.03, 120, "out")
    constants["bias"] = torch.randn(11, generator=torch.Generator().manual_seed(4))

    def build(call: Any, x: Any, residual: Any, x_scale: Any, x_zero: Any, w: Any, w_scale: Any, bias: Any, **c: Any) -> Any:
        arguments = (qc.linear.default, x, x_scale, x_zero, w, w_scale, None, bias, residual)
        wide = call(*arguments, None, None, AFFINE, "int8 channel=0 sym", 24, activation, "")
        return wide, call(*arguments, c["out_scale"], c["out_zero"], AFFINE, "int8 channel=0 sym", 24, activation, AFFINE)

    graph = make_graph(build, [x, residual], constants)
    if activation not in APPROXIMATED:
        assert_equal(graph, x, residual)
        return
    wide, narrow = OnnxRunner(export_onnx(graph, "integer"))(x, residual)
    expected = graph(x, residual)
    assert float((wide - expected[0]).abs().max()) <= 4e-7 * float(expected[0].abs().max()) + 1e-6
    assert int((narrow.int() - expected[1].int()).abs().max()) <= 1  # type: ignore[union-attr]


# ---- convolution, products of activations, addition -----------------------------------------------------------------------

CONVOLUTIONS = [  # channels in and out, kernel, stride, padding, dilation, groups
    (3, 5, (3, 3), [1, 1], [1, 1], [1, 1], 1),
    (8, 16, (3, 3), [2, 1], [1, 2], [1, 2], 4),
    (6, 6, (5, 3), [2, 2], [2, 1], [1, 1], 6),
    (4, 8, (3, 3), [1, 2], [3, 0], [2, 1], 4),
    (7, 9, (1, 1), [1, 1], [0, 0], [1, 1], 1),
]


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize(
    "weight", ["int8 channel=0 sym", "int8 tensor sym", "uint8 tensor affine", "int8 channel=0 affine", "int4 channel=0 affine"]
)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(case: tuple[Any, ...], weight: str, extreme: bool) -> None:
    channels, outputs, (height, width), stride, padding, dilation, groups = case
    weights = weight_of(outputs, channels // groups, height, width, text=weight, extreme=extreme)
    for index, (text, zero) in enumerate(ACTIVATION_GRIDS[extreme::2]):
        x = codes(2, channels, 11, 9, text=text, extreme=extreme, seed=index)
        constants = weights | static(0.0173, zero, "x")
        drawn = torch.randn(outputs, generator=torch.Generator().manual_seed(3))
        constants["bias"] = drawn if index % 2 else (drawn * 3000).to(torch.int32)

        def build(
            call: Any, x: Any, w: Any, w_scale: Any, x_scale: Any, bias: Any, out_scale: Any = None, text: str = text, **c: Any
        ) -> Any:
            arguments = (x, x_scale, c.get("x_zero"), w, w_scale, c.get("w_zero"), bias, None, out_scale, c.get("out_zero"))
            out = "" if out_scale is None else AFFINE
            return call(qc.conv2d.default, *arguments, text, weight, width, stride, padding, dilation, groups, "none", out)

        (wide,) = assert_equal(make_graph(build, [x], constants), x, optimizations=("basic",))
        (found,) = assert_equal(make_graph(build, [x], constants | static_over(wide, AFFINE, "out")), x, optimizations=("basic",))
        assert found.unique().numel() > 8


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("shapes", [((4, 3, 7, 6), (4, 3, 6, 9)), ((5, 6), (6, 3)), ((2, 3, 5, 6), (6, 9))])
@pytest.mark.parametrize("grids", [((AFFINE, 255), (SIGNED, -128)), (("int8 tensor sym", None), (AFFINE, 0)), ((SIGNED, 5), (SIGNED, 127))])
def test_matmul_of_activations(grids: Any, shapes: Any, extreme: bool) -> None:
    (a_text, a_zero), (b_text, b_zero) = grids
    a, b = codes(*shapes[0], text=a_text, extreme=extreme), codes(*shapes[1], text=b_text, extreme=extreme, seed=1)
    constants = static(0.013, a_zero, "a") | static(0.007, b_zero, "b") | static(0.05, 100, "out")

    def build(call: Any, a: Any, b: Any, a_scale: Any, b_scale: Any, out_scale: Any, out_zero: Any, a_zero: Any = None,
              b_zero: Any = None) -> Any:  # fmt: skip
        arguments = (qc.matmul.default, a, a_scale, a_zero, b, b_scale, b_zero)
        return call(*arguments, None, None, a_text, b_text, ""), call(*arguments, out_scale, out_zero, a_text, b_text, AFFINE)

    assert_equal(make_graph(build, [a, b], constants), a, b)


ADDED = [((AFFINE, 0), (AFFINE, 255)), ((SIGNED, -128), (AFFINE, 90)), (("int8 tensor sym", None), (SIGNED, 127))]


@pytest.mark.parametrize("activation", ["none", "relu", "hardswish"])
@pytest.mark.parametrize(
    "grids", [((AFFINE, 0), (AFFINE, 255)), ((SIGNED, -128), (AFFINE, 90)), (("int8 tensor sym", None), (SIGNED, 127))]
)
def test_addition(grids: Any, activation: str) -> None:
    (a_text, a_zero), (b_text, b_zero) = grids
    a, b = codes(60, 50, text=a_text, extreme=False), codes(60, 50, text=b_text, extreme=False, seed=1)
    constants = static(0.013, a_zero, "a") | static(0.007, b_zero, "b") | static(0.015, 80, "out")

    def build(call: Any, a: Any, b: Any, a_scale: Any, b_scale: Any, out_scale: Any, out_zero: Any, a_zero: Any = None,
              b_zero: Any = None) -> Any:  # fmt: skip
        arguments = (a, a_scale, a_zero, b, b_scale, b_zero, out_scale, out_zero)
        return call(qc.add.default, *arguments, a_text, b_text, AFFINE, activation)

    assert_equal(make_graph(build, [a, b], constants), a, b)


def test_two_roundings_stay_two() -> None:
    """From grid to grid: ONNX Runtime makes one rounding of a QuantizeLinear, DequantizeLinear pair and the next, as the form qdq shows."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 2
    constants = static(0.02, 90, "a") | static(0.031, 100, "b")

    def build(call: Any, x: Any, a_scale: Any, a_zero: Any, b_scale: Any, b_zero: Any) -> Any:
        for scale, zero in ((a_scale, a_zero), (b_scale, b_zero)):
            x = call(qc.dequantize.default, call(qc.quantize.default, x, scale, zero, AFFINE), scale, zero, AFFINE)
        return x

    graph = make_graph(build, [x], constants)
    (expected,) = assert_equal(graph, x)
    (fused,) = OnnxRunner(export_onnx(graph))(x)
    assert not torch.equal(fused, expected)  # else the precaution can go


# ---- what the model says of itself, and refusals --------------------------------------------------------------------------


def test_products_of_floats_are_named_with_the_reason() -> None:
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    constants = weight_of(9, 24, text="int4 group=8 sym", extreme=False) | static(0.02, 128, "x")

    def build(call: Any, x: Any, w: Any, w_scale: Any, x_scale: Any, x_zero: Any) -> Any:
        made = call(qc.quantize.default, x, x_scale, x_zero, AFFINE)
        scheme = ("int4 group=8 sym", 24)
        return (call(qc.linear.default, x, None, None, w, w_scale, None, None, None, None, None, "", *scheme),
                call(qc.linear.default, made, x_scale, x_zero, w, w_scale, None, None, None, None, None, AFFINE, *scheme))  # fmt: skip

    graph = make_graph(build, [x], constants)
    found = metadata(export_onnx(graph, "integer"))
    assert found["qcompile.form"] == "integer"
    assert json.loads(found["qcompile.float_products"]) == {"linear_default": "its activations are float"}
    assert metadata(export_onnx(graph)) == {"qcompile.form": "qdq"}


def test_weight_scales_inside_the_sum_leave_the_product_in_float() -> None:
    x = codes(5, 24, text=AFFINE, extreme=False)
    graph = linear_graph(x, "int8 group=4,axis=0 sym", (AFFINE, 9), extreme=False)
    model = export_onnx(graph, "integer")
    assert "stand inside the sum" in metadata(model)["qcompile.float_products"]
    assert "MatMulInteger" not in kinds(model)


def test_equal_graphs_give_equal_bytes() -> None:
    x = codes(5, 24, text=SIGNED, extreme=False)
    graph = linear_graph(x, "int8 group=8 affine", (SIGNED, 9), extreme=False, out=AFFINE)
    first, second = (export_onnx(g, "integer").SerializeToString(deterministic=True) for g in (graph, graph.copy()))
    assert first == second


def test_unknown_form_is_refused() -> None:
    x = codes(5, 24, text=AFFINE, extreme=False)
    with pytest.raises(Refused, match="known are qdq, integer"):
        export_onnx(linear_graph(x, WEIGHTS[0], (AFFINE, 9), extreme=False), "int")


# ---- whole models ---------------------------------------------------------------------------------------------------------


class Pictures(nn.Module):
    """Convolution, inverted residual block with a depthwise one, pooling, head: what the integer-only contract covers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 24, 1)
        self.depthwise, self.project, self.head = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 8, 1), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu6(self.stem(x))
        y = nn.functional.relu6(self.depthwise(nn.functional.relu6(self.expand(x))))
        return self.head((x + self.project(y)).mean((2, 3)))


@pytest.fixture(scope="module")
def pictures() -> qcompile.Artifact:
    torch.manual_seed(0)
    example = torch.randn(2, 3, 17, 17)
    return qcompile.compile(Pictures().eval(), (example,), recipe="w8a8", target="reference", calibration=[(example,)])


def test_every_code_of_a_model_is_equal(pictures: qcompile.Artifact) -> None:
    tapped = pictures.graph.copy()
    inner = [n for n in tapped.nodes if n.op == "call_function" and n.meta["val"].dtype in (torch.int8, torch.uint8)]
    tapped.output.args = ((*tapped.outputs, *inner),)
    tapped.output_names = [*tapped.output_names, *(n.name for n in inner)]
    tapped.module.recompile()
    x = torch.randn(2, 3, 17, 17, generator=torch.Generator().manual_seed(1)) * 1.5
    assert len(inner) >= 5
    for found, expected in zip(TARGET.build(tapped)([x]), tapped(x), strict=True):
        assert torch.equal(found, expected)


def test_verification_on_onnx_asks_for_equal_bits(pictures: qcompile.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures.save(tmp_path / "net.qc")
    result = verify(qcompile.load(tmp_path / "net.qc", target="onnx"))
    assert result["ok"]
    assert len(result["layers"]) == 5
    assert all(layer["ok"] for layer in result["layers"])
    build = type(TARGET).build
    monkeypatch.setattr(type(TARGET), "build", lambda self, graph, **options: build(self, graph, **options | {"form": "qdq"}))
    result = verify(qcompile.load(tmp_path / "net.qc", target="onnx"))
    assert not result["ok"]  # dequantized floats have not the reference's bits, and that is not let pass
    assert result["first_mismatch"] in {layer["name"] for layer in result["layers"]}


def test_the_command_writes_either_form(cli: Callable[..., Any], pictures: qcompile.Artifact, tmp_path: Path) -> None:
    pictures.save(tmp_path / "net.qc")
    x = np.random.default_rng(0).standard_normal((2, 3, 17, 17)).astype(np.float32)
    assert cli("export", tmp_path / "net.qc", "--form", "integer").code == 0
    model = onnx.load(tmp_path / "net.onnx")
    assert {"ConvInteger", "MatMulInteger"} <= kinds(model)
    assert not {"Conv", "MatMul", "DequantizeLinear"} & kinds(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    (found,) = onnxruntime.InferenceSession(tmp_path / "net.onnx", options).run(None, {model.graph.input[0].name: x})
    assert np.array_equal(found, qcompile.load(tmp_path / "net.qc", target="reference")(x))
    assert cli("export", tmp_path / "net.qc", "-o", tmp_path / "q.onnx").code == 0
    assert {"Conv", "DequantizeLinear"} <= kinds(onnx.load(tmp_path / "q.onnx"))
    assert cli("export", tmp_path / "net.qc", "--form", "exact").code == 2
