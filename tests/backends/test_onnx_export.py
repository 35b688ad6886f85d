"""ONNX export: ONNX Runtime gives what the graph gives, for float graphs and for every qc operator."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.fx as fx
from qcompile.backends.onnx.emit import TABLE
from qcompile.backends.onnx.export import export_onnx
from qcompile.backends.onnx.runner import OnnxRunner
from torch import nn

from qcompile.capture.onnx import capture_onnx
from qcompile.capture.torch_export import capture_module
from qcompile.errors import Refused
from qcompile.formats import choose_scale, parse_scheme, quantize_tensor
from qcompile.graph import Graph, Stage, TensorType
from qcompile.graph.dialect import ACTIVATIONS
from qcompile.graph.graph import build_module

aten, qc = torch.ops.aten, torch.ops.qc

# Two float32 sums of a few hundred terms in other orders differ by a few units in the last place of the largest term.
FLOAT_BOUND = 2e-5


# ---- making graphs --------------------------------------------------------------------------------------------------------


def make_graph(build: Callable[..., Any], inputs: list[torch.Tensor], constants: dict[str, torch.Tensor], *, dynamic: bool = True) -> Graph:
    """Return the integer graph that ``build(nodes of inputs.., **nodes of constants)`` makes; the first axis of inputs is dynamic."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(len(inputs))]
    named = {name: graph.get_attr(name) for name in constants}

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return graph.call_function(target, args, kwargs)

    result = build(call, *nodes, **named)
    graph.output(result if isinstance(result, tuple) else (result,))
    types = [TensorType(x.dtype, ("batch", *x.shape[1:]) if dynamic else tuple(x.shape)) for x in inputs]
    ranges = {"batch": (1, 4096)} if dynamic else {}
    return Graph(build_module(constants, {}, graph), types, ranges, stage=Stage.INTEGER)


def run_both(graph: Graph, *inputs: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (ONNX Runtime's result, the graph's own) for each output, after checks that hold for every export."""
    model = export_onnx(graph)
    onnx.checker.check_model(model, full_check=True)
    assert model.SerializeToString(deterministic=True) == export_onnx(graph.copy()).SerializeToString(deterministic=True)
    assert [value.name for value in model.graph.output] == graph.output_names
    found, expected = OnnxRunner(model)(*inputs), graph(*inputs)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert isinstance(ours, torch.Tensor)
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
    return list(zip(found, expected, strict=True))  # type: ignore[arg-type]


def assert_close(graph: Graph, *inputs: torch.Tensor, bound: float = FLOAT_BOUND) -> None:
    for found, expected in run_both(graph, *inputs):
        largest = max(1.0, float(expected.abs().max())) if expected.dtype.is_floating_point else 1.0
        assert float((found.double() - expected.double()).abs().max()) <= bound * largest


def assert_codes(graph: Graph, *inputs: torch.Tensor) -> None:
    """Assert that codes are equal, except ties: at most 1 in 500 may differ, and by one step.

    The graph's products are exact integers; ONNX Runtime sums the same terms in float32, so a sum that lies within a few roundings
    of a boundary between two codes may fall on its other side.
    """
    for found, expected in run_both(graph, *inputs):
        difference = (found.to(torch.int32) - expected.to(torch.int32)).abs()
        assert int(difference.max()) <= 1
        assert int((difference > 0).sum()) <= found.numel() / 500
        assert expected.unique().numel() > 8  # codes that are all the same would prove nothing


def grid(x: torch.Tensor, text: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    scheme = parse_scheme(text)
    return choose_scale(*scheme.granularity.reduce_range(x), scheme)


def stored(weight: torch.Tensor, text: str, prefix: str = "w") -> dict[str, torch.Tensor]:
    """Return packed codes, scale and zero point (if there is one) of a weight as named constants."""
    made = quantize_tensor(weight, parse_scheme(text))
    found = {prefix: made.packed(), f"{prefix}_scale": made.scale}
    return found | ({f"{prefix}_zero": made.zero_point} if made.zero_point is not None else {})


def static(x: torch.Tensor, text: str, prefix: str) -> dict[str, torch.Tensor]:
    scale, zero_point = grid(x, text)
    return {f"{prefix}_scale": scale} | ({f"{prefix}_zero": zero_point} if zero_point is not None else {})


def torch_random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- quantize and dequantize ----------------------------------------------------------------------------------------------

STATIC_SCHEMES = ["int8 tensor sym", "uint8 tensor affine", "int8 channel=1 sym", "uint8 channel=2 affine", "int4 tensor sym",
                  "uint4 tensor affine", "int6 channel=1 affine", "int2 tensor sym"]  # fmt: skip


@pytest.mark.parametrize("text", STATIC_SCHEMES)
def test_quantize_gives_equal_codes(text: str) -> None:
    x = torch_random(7, 5, 6) * 3
    constants = static(x * 0.8, text, "x")

    def build(call: Any, x: Any, x_scale: Any, x_zero: Any = None) -> Any:
        codes = call(qc.quantize.default, x, x_scale, x_zero, text)
        return codes, call(qc.dequantize.default, codes, x_scale, x_zero, text)

    for found, expected in run_both(make_graph(build, [x], constants), x):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("text", ["int8 token sym dynamic", "int8 tensor sym dynamic", "uint8 tensor affine dynamic",
                                  "uint8 token affine dynamic",
                                  "int8 channel=1 sym dynamic", "int4 token sym dynamic", "int8 token sym dynamic scale=f16"])  # fmt: skip
def test_dynamic_quantization_gives_equal_codes_and_scales(text: str) -> None:
    x = torch_random(7, 5, 6) * 3
    x[2] = 0

    def build(call: Any, x: Any) -> Any:
        made = call(qc.quantize_dynamic.default, x, text)
        return tuple(call(operator.getitem, made, index) for index in range(3))

    for found, expected in run_both(make_graph(build, [x], {}), x):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("rest", ["channel=0 sym", "group=4 affine", "group=5 sym", "block=2x3 affine", "tensor affine"])
def test_weights_of_all_widths_dequantize_exactly(bits: int, rest: str) -> None:
    text = f"int{bits} {rest}"
    weight = torch_random(6, 12, seed=bits)

    def build(call: Any, x: Any, w: Any, w_scale: Any, w_zero: Any = None) -> Any:
        return call(aten.add.Tensor, call(qc.dequantize.default, w, w_scale, w_zero, text, 12), x)

    x = torch.zeros(6, 12)
    graph = make_graph(build, [x], stored(weight, text), dynamic=False)
    for found, expected in run_both(graph, x):
        assert torch.equal(found, expected)
    if bits == 4:
        types = {t.data_type for t in export_onnx(graph).graph.initializer}
        assert onnx.TensorProto.INT4 in types


# ---- products -------------------------------------------------------------------------------------------------------------


def linear_graph(x: torch.Tensor, weight_text: str, x_text: str, out_text: str, activation: str, bias: str, residual: bool) -> Graph:
    weight = torch_random(10, x.shape[-1], seed=3) / 4
    constants = stored(weight, weight_text)
    dynamic = x_text.endswith("dynamic")
    if x_text and not dynamic:
        constants |= static(x, x_text, "x")
    if bias:
        values = torch_random(10, seed=4)
        constants["bias"] = values if bias == "float" else (values / (constants["x_scale"] * constants["w_scale"])).round().to(torch.int32)
    if out_text:
        constants |= static(torch.nn.functional.linear(x, weight) * 1.2, out_text, "out")

    def build(call: Any, x: Any, r: Any = None, **c: Any) -> Any:
        scale, zero = c.get("x_scale"), c.get("x_zero")
        if dynamic:
            made = call(qc.quantize_dynamic.default, x, x_text)
            x, scale, zero = (call(operator.getitem, made, index) for index in range(3))
            zero = zero if "affine" in x_text else None
        elif x_text:
            x = call(qc.quantize.default, x, scale, zero, x_text)
        return call(qc.linear.default, x, scale, zero, c["w"], c["w_scale"], c.get("w_zero"), c.get("bias"), r,
                    c.get("out_scale"), c.get("out_zero"),
                    x_text, weight_text, weight.shape[1], activation, out_text)  # fmt: skip

    inputs = [x] + ([torch_random(*x.shape[:-1], 10, seed=5)] if residual else [])
    return make_graph(build, inputs, constants)


LINEAR = [
    ("int8 channel=0 sym", "uint8 tensor affine", "uint8 tensor affine", "none", "int32"),
    ("int8 tensor sym", "int8 tensor sym", "int8 tensor sym", "relu", "int32"),
    ("int8 channel=0 sym", "int8 token sym dynamic", "", "none", "float"),
    ("int4 group=8 sym", "int8 token sym dynamic", "", "gelu", "float"),
    ("int4 channel=0 affine", "uint8 token affine dynamic", "", "silu", ""),
    ("int4 group=8 sym", "", "", "none", "float"),
    ("int3 group=8 affine", "", "", "tanh", ""),
    ("int4 group=7 sym", "", "", "none", "float"),
]


@pytest.mark.parametrize(("weight", "x", "out", "activation", "bias"), LINEAR)
@pytest.mark.parametrize("shape", [(40, 24), (5, 9, 24)])
def test_linear(weight: str, x: str, out: str, activation: str, bias: str, shape: tuple[int, ...]) -> None:
    data = torch_random(*shape)
    graph = linear_graph(data, weight, x, out, activation, bias, residual=False)
    if out:
        assert_codes(graph, data)
    else:
        assert_close(graph, data)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_linear_epilogue_order(activation: str) -> None:
    x, residual = torch_random(40, 24), torch_random(40, 10, seed=5)
    graph = linear_graph(x, "int8 channel=0 sym", "int8 tensor sym", "", activation, "float", residual=True)
    assert_close(graph, x, residual)


@pytest.mark.parametrize(
    ("groups", "weight"), [(1, "int8 channel=0 sym"), (8, "int8 channel=0 sym"), (1, "int4 channel=0 affine"), (2, "int8 tensor sym")]
)
@pytest.mark.parametrize("out", ["uint8 tensor affine", ""])
def test_convolution(groups: int, weight: str, out: str) -> None:
    x, values = torch_random(3, 8, 9, 7), torch_random(16, 8 // groups, 3, 3, seed=2) / 4
    constants = stored(values, weight) | static(x, "uint8 tensor affine", "x") | static(torch_random(50) * 4, out or "uint8", "out")
    constants["bias"] = (torch_random(16, seed=4) / (constants["x_scale"] * constants["w_scale"])).round().to(torch.int32)

    def build(
        call: Any,
        x: Any,
        x_scale: Any,
        x_zero: Any,
        out_scale: Any,
        bias: Any,
        w: Any,
        w_scale: Any,
        w_zero: Any = None,
        out_zero: Any = None,
    ) -> Any:
        codes = call(qc.quantize.default, x, x_scale, x_zero, "uint8 tensor affine")
        grid_of_output = (out_scale, out_zero) if out else (None, None)
        return call(qc.conv2d.default, codes, x_scale, x_zero, w, w_scale, w_zero, bias, None, *grid_of_output,
                    "uint8 tensor affine", weight, 3,
                    [2, 1], [1, 2], [1, 1], groups, "relu6", out)  # fmt: skip

    graph = make_graph(build, [x], constants)
    if out:
        assert_codes(graph, x)
    else:
        assert_close(graph, x)


@pytest.mark.parametrize("out", ["int8 tensor sym", ""])
def test_matmul_of_activations(out: str) -> None:
    a, b = torch_random(4, 3, 8, 6), torch_random(4, 3, 6, 9, seed=1)
    constants = static(a, "int8 tensor sym", "a") | static(b, "uint8 tensor affine", "b") | static(a @ b, "int8 tensor sym", "out")

    def build(call: Any, a: Any, b: Any, a_scale: Any, b_scale: Any, b_zero: Any, out_scale: Any) -> Any:
        qa = call(qc.quantize.default, a, a_scale, None, "int8 tensor sym")
        qb = call(qc.quantize.default, b, b_scale, b_zero, "uint8 tensor affine")
        return call(
            qc.matmul.default,
            qa,
            a_scale,
            None,
            qb,
            b_scale,
            b_zero,
            out_scale if out else None,
            None,
            "int8 tensor sym",
            "uint8 tensor affine",
            out,
        )

    graph = make_graph(build, [a, b], constants)
    if out:
        assert_codes(graph, a, b)
    else:
        assert_close(graph, a, b)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_addition_gives_equal_codes(activation: str) -> None:
    a, b = torch_random(6, 40), torch_random(6, 40, seed=1) * 2
    text = "uint8 tensor affine"
    constants = static(a, text, "a") | static(b, text, "b") | static(a + b, text, "out")

    def build(call: Any, a: Any, b: Any, **c: Any) -> Any:
        qa, qb = (
            call(qc.quantize.default, a, c["a_scale"], c["a_zero"], text),
            call(qc.quantize.default, b, c["b_scale"], c["b_zero"], text),
        )
        return call(
            qc.add.default,
            qa,
            c["a_scale"],
            c["a_zero"],
            qb,
            c["b_scale"],
            c["b_zero"],
            c["out_scale"],
            c["out_zero"],
            text,
            text,
            text,
            activation,
        )

    for found, expected in run_both(make_graph(build, [a, b], constants), a, b):
        assert torch.equal(found, expected)  # one addition has one rounding: no order to differ in


@pytest.mark.parametrize(
    "text",
    ["int8 channel=0 sym", "int8 channel=0 affine", "int4 group=4 sym", "int4 group=5 affine", "int8 tensor sym", "int3 channel=0 sym"],
)
def test_embedding_is_exact(text: str) -> None:
    indices = torch.tensor([[0, 3, 9], [5, 5, 1]])

    def build(call: Any, indices: Any, w: Any, w_scale: Any, w_zero: Any = None) -> Any:
        return call(qc.embedding.default, indices, w, w_scale, w_zero, text, 12)

    for found, expected in run_both(make_graph(build, [indices], stored(torch_random(10, 12), text)), indices):
        assert torch.equal(found, expected)


def test_hadamard() -> None:
    x = torch_random(3, 5, 32)
    assert_close(make_graph(lambda call, x: call(qc.hadamard.default, x, 8), [x], {}), x)


@pytest.mark.parametrize("turned", [4, 6])
def test_rotary(turned: int) -> None:
    x, cos, sin = torch_random(2, 5, 18), torch_random(1, 5, turned, seed=1), torch_random(1, 5, turned, seed=2)
    assert_close(make_graph(lambda call, *inputs: call(qc.rotary.default, *inputs, 3), [x, cos, sin], {}), x, cos, sin)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(causal: bool, kv_heads: int, masked: bool) -> None:
    q, k, v = torch_random(2, 5, 32), torch_random(2, 7, 8 * kv_heads, seed=1), torch_random(2, 7, 8 * kv_heads, seed=2)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 3:] = False
    mask[0] = not masked  # a query that sees no key gives zeros

    def build(call: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
        return call(qc.attention.default, q, k, v, mask if masked else None, 4, kv_heads, 8**-0.5, causal)

    assert_close(make_graph(build, [q, k, v, mask], {}), q, k, v, mask)


# ---- float graphs ---------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Convolutions, normalizations, pooling, resizing and activations of usual networks for images."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bounds", torch.linspace(0.1, 0.6, 3).view(3, 1, 1))
        self.convolution, self.normalization = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.depthwise, self.group, self.slope = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.GroupNorm(2, 8), nn.PReLU(8)
        self.up, self.head = nn.ConvTranspose2d(8, 4, 2, 2), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        f = nn.functional
        x = f.relu6(self.normalization(self.convolution(x)))
        y = self.slope(self.group(self.depthwise(x))) + f.hardswish(x) * f.hardsigmoid(x)
        pooled = torch.cat([f.max_pool2d(y, 3, 2, 1), f.avg_pool2d(y, 2)], 1)
        large = f.interpolate(pooled, scale_factor=2.0, mode="nearest")[:, 1:7:2]
        resized = f.interpolate(f.pad(pooled, (1, 0, 2, 1)), size=(9, 11), mode="bilinear")
        z = f.adaptive_avg_pool2d(self.up(y), 1).flatten(1)
        return (
            self.head(f.elu(z)),
            large.clamp(-0.5, 0.5),
            large.clamp(-self.bounds, self.bounds),
            resized.amax((2, 3)),
            y.split(3, 1)[2].mean((2, 3), keepdim=True),
            f.leaky_relu(z) ** 2,
        )


class Block(nn.Module):
    """A transformer encoder block with embedding and mask, batch and tokens dynamic."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first, self.second = nn.Embedding(50, 32), nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.out, self.up, self.down = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.first(self.embedding(ids) + torch.arange(ids.shape[1])[None, :, None] * 0.01)
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        seen = mask[:, None, None, :].to(torch.bool)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        scores = torch.softmax((q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~seen, -1e9), -1) @ v
        x = self.second(x + self.out((attended + scores).transpose(1, 2).reshape(*ids.shape, 32)))
        x = x + self.down(nn.functional.gelu(self.up(x)))
        weights = mask.unsqueeze(-1).to(x.dtype)
        return x, (x * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def test_float_network() -> None:
    torch.manual_seed(0)
    graph = capture_module(Network(), (torch_random(2, 3, 16, 16),))
    assert_close(graph, torch_random(2, 3, 16, 16, seed=1))


def test_float_block_with_dynamic_sizes() -> None:
    torch.manual_seed(0)
    ids, mask = torch.randint(0, 50, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    graph = capture_module(Block(), (ids, mask), [{0: "batch", 1: "tokens"}] * 2)
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, 4:] = 0
    assert_close(graph, torch.randint(0, 50, (3, 9)), mask)
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in export_onnx(graph).graph.output]
    assert shapes == [["batch", "tokens", 32], ["batch", 32]]


# ---- round trip, names, refusals ------------------------------------------------------------------------------------------


def test_exported_integer_graph_is_imported_with_equal_results() -> None:
    x = torch_random(40, 24)
    graph = linear_graph(x, "int8 channel=0 sym", "uint8 tensor affine", "uint8 tensor affine", "relu", "int32", residual=False)
    again = capture_onnx(export_onnx(graph))
    assert again.stage is Stage.INTEGER
    difference = (again(x)[0].to(torch.int32) - graph(x)[0].to(torch.int32)).abs()
    assert int(difference.max()) <= 1
    assert int((difference > 0).sum()) <= difference.numel() / 500


def test_names_are_kept() -> None:
    x = torch_random(40, 24)
    graph = linear_graph(x, "int8 channel=0 sym", "uint8 tensor affine", "", "none", "float", residual=False)
    graph.output_names = ["logits"]
    model = export_onnx(graph)
    assert {"w", "w_scale", "bias", "x_scale"} <= {t.name for t in model.graph.initializer}
    assert model.graph.output[0].name == "logits"
    assert model.graph.input[0].name == "x0"


def test_outputs_that_are_inputs_or_returned_twice() -> None:
    x = torch_random(4, 3)
    graph = make_graph(lambda call, x: (x, (y := call(aten.relu.default, x)), y), [x], {})
    assert_close(graph, x)


def test_operator_without_export_is_named() -> None:
    x = torch_random(4, 3)
    graph = make_graph(lambda call, x: call(aten.digamma.default, x), [x], {})
    with pytest.raises(Refused, match="digamma") as caught:
        export_onnx(graph)
    assert caught.value.node == "digamma_default"
    assert "\n" not in str(caught.value)


def test_simulated_graph_is_refused() -> None:
    graph = make_graph(lambda call, x: call(aten.relu.default, x), [torch_random(4, 3)], {})
    graph.stage = Stage.SIMULATED
    with pytest.raises(Refused, match="materialize"):
        export_onnx(graph)


def test_every_qc_operator_is_exported() -> None:
    from qcompile.graph.dialect import LIBRARY

    defined = {name.removeprefix("qc::").split("/")[0].split(".")[0] for name in LIBRARY._op_defs}
    assert defined
    # Entries of decoders and codes of caches alone have no export, and ONNX no operator whose softmax rounds as attention over codes does.
    # Operators of codes alone serve targets without floating point.
    refused = {"qc.cache_append", "qc.pack", "qc.attention_codes", "qc.vector_codes", "qc.vectors"}
    refused |= {"qc.lookup", "qc.mean", "qc.avg_pool2d", "qc.softmax", "qc.resize_nearest"}
    assert {f"qc.{name}" for name in defined} - refused <= set(TABLE)


def test_runner_takes_arrays_and_names() -> None:
    x = torch_random(4, 3)
    runner = OnnxRunner(export_onnx(make_graph(lambda call, x: call(aten.relu.default, x), [x], {})), optimization="all", threads=1)
    (found,) = runner(x0=x.numpy())
    assert isinstance(found, np.ndarray)
    assert np.array_equal(found, x.relu().numpy())
    with pytest.raises(Refused, match="x0"):
        runner(y=x)
    with pytest.raises(Refused, match="known are"):
        OnnxRunner(export_onnx(make_graph(lambda call, x: call(aten.relu.default, x), [x], {})), optimization="most")
