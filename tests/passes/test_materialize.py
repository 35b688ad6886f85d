from __future__ import annotations

from typing import Any

import pytest
import torch
from qcompile.backends.reference.target import ReferenceTarget
from qcompile.passes.assign_bits import AssignBits
from qcompile.passes.fuse_epilogue import FuseEpilogue
from qcompile.passes.insert_quantizers import InsertQuantizers
from qcompile.passes.materialize import Materialize
from qcompile.passes.quantize_weights import QuantizeWeights

from qcompile.calibration import from_iterable
from qcompile.formats import LayerScheme, unpack
from qcompile.graph import Graph, Stage, parse_graph, print_graph, tensor_digest
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context, Pipeline, sqnr_db
from qcompile.target import Target

LINEAR = """graph @main float(%x: f32[n,6]) where n in 1..64 {
  %w = const @w
  %b = const @b
  %y = aten.linear(%x, %w, %b) : f32[n,5]
  return %y as "y"
}
"""
# What the integer contract of a convolutional net names: conv + relu6, residual sum + relu, concatenation, a depthwise layer.
IMAGE = """graph @main float(%x: f32[n,3,6,6]) where n in 1..64 {
  %w1 = const @w1
  %b1 = const @b1
  %w2 = const @w2
  %b2 = const @b2
  %w3 = const @w3
  %b3 = const @b3
  %w4 = const @w4
  %b4 = const @b4
  %c1 = aten.conv2d(%x, %w1, %b1) {padding=[1, 1]} : f32[n,4,6,6]
  %r1 = aten.hardtanh(%c1) {min_val=0.0, max_val=6.0} : f32[n,4,6,6]
  %c2 = aten.conv2d(%r1, %w2, %b2) {padding=[1, 1], groups=4} : f32[n,4,6,6]
  %s = aten.add.Tensor(%r1, %c2) : f32[n,4,6,6]
  %r2 = aten.relu(%s) : f32[n,4,6,6]
  %c3 = aten.conv2d(%r2, %w3, %b3) : f32[n,4,6,6]
  %r3 = aten.relu(%c3) : f32[n,4,6,6]
  %j = aten.cat([%r2, %r3]) {dim=1} : f32[n,8,6,6]
  %c4 = aten.conv2d(%j, %w4, %b4) {stride=[2, 2]} : f32[n,2,3,3]
  return %c4 as "y"
}
"""
GENERATOR = torch.Generator().manual_seed(0)
SIZES = {"w1": (4, 3, 3, 3), "b1": (4,), "w2": (4, 1, 3, 3), "b2": (4,), "w3": (4, 4, 1, 1), "b3": (4,), "w4": (2, 8, 1, 1), "b4": (2,)}
IMAGES = torch.randn(8, 3, 6, 6, generator=GENERATOR)
ROWS = torch.randn(16, 6, generator=GENERATOR)


def linear(build: Any) -> Graph:
    generator = torch.Generator().manual_seed(1)
    return build(LINEAR, w=torch.randn(5, 6, generator=generator), b=torch.randn(5, generator=generator))


def image(build: Any) -> Graph:
    generator = torch.Generator().manual_seed(2)
    return build(IMAGE, **{name: torch.randn(size, generator=generator) for name, size in SIZES.items()})


def simulate(graph: Graph, data: torch.Tensor, scheme: str = "W8A8", solver: str = "nearest") -> Graph:
    simulated = graph.copy()
    context = Context(ReferenceTarget(), None, from_iterable([(data,)]))
    Pipeline((AssignBits(scheme), InsertQuantizers(), QuantizeWeights(solver=solver))).run(simulated, context)
    return simulated


def materialize(simulated: Graph, *more: Any, target: Target | None = None) -> tuple[Graph, Context, list[int]]:
    after, context = simulated.copy(), Context(target or ReferenceTarget())
    steps = Pipeline((Materialize(), *more)).run(after, context)
    text = print_graph(after)
    assert print_graph(parse_graph(text, {tensor_digest(t)[:16]: t for t in after.tensors})) == text
    return after, context, [step.changes for step in steps]


def operators(graph: Graph) -> list[str]:
    return [operator_name(node.target) for node in graph.nodes if node.op == "call_function"]


def product(graph: Graph, operator: str) -> Any:
    """Return the one node of an operator."""
    (node,) = (node for node in graph.nodes if node.op == "call_function" and operator_name(node.target) == operator)
    return node


def test_golden(build: Any, golden: Any) -> None:
    exact = build(LINEAR, w=torch.arange(-15.0, 15.0).reshape(5, 6), b=torch.arange(5.0))
    simulated = simulate(exact, torch.tensor([[-1.0, 0.0, 1.0, 2.0, 3.0, 4.0]]))
    after, _, _ = materialize(simulated)
    golden("passes/materialize", f"{print_graph(simulated, comments=False)}->\n{print_graph(after, comments=False)}")


@pytest.mark.parametrize("solver", ["nearest", "mse", "gptq"])
@pytest.mark.parametrize("scheme", ["W8A8", "W4A8g2", "W3A8-dynamic", "W8A8-dynamic", "W4A16g3", "W5A16",
                                    "weight=int8 tensor sym; activation=int8 tensor sym",
                                    "weight=uint4 channel=0 affine; activation=uint8 tensor affine"])  # fmt: skip
def test_a_linear_layer_computes_what_was_simulated(build: Any, scheme: str, solver: str) -> None:
    simulated = simulate(linear(build), ROWS, scheme, solver)
    after, _, _ = materialize(simulated)
    assert operators(after)[-1] == "qc.linear"
    assert "aten.linear" not in operators(after)
    # Only the order of float operations differs: scales are multiplied after the sum instead of before.
    assert sqnr_db(simulated(ROWS)[0], after(ROWS)[0]) > 110


def test_the_codes_of_the_simulation_are_the_codes_stored(build: Any) -> None:
    simulated = simulate(linear(build), ROWS, "W4A8g2", "gptq")
    quantizer = simulated.quantizer(simulated.node("w_quantizer"))
    assert quantizer is not None
    after, _, _ = materialize(simulated)
    arguments = bound_arguments(product(after, "qc.linear"))
    stored = after.constant(arguments["weight"])
    assert stored is not None
    assert stored.shape == (5, 3)  # six codes of four bits in three bytes
    assert torch.equal(unpack(stored, 4, True, 6), quantizer.codes)
    assert torch.equal(after.constant(arguments["weight_scale"]), quantizer.scale)
    assert "w" not in after.constants


def test_every_layer_of_an_image_net_becomes_integer(build: Any) -> None:
    after, _, _ = materialize(simulate(image(build), IMAGES), FuseEpilogue())
    found = operators(after)
    assert found == ["qc.quantize", "qc.conv2d", "qc.conv2d", "qc.add", "qc.conv2d", "aten.cat", "qc.conv2d"]
    convolutions = [
        bound_arguments(node) for node in after.nodes if node.op == "call_function" and operator_name(node.target) == "qc.conv2d"
    ]
    assert [a["activation"] for a in convolutions] == ["relu6", "none", "relu", "none"]
    assert [bool(a["out_scheme"]) for a in convolutions] == [True, True, True, False]
    assert all(after.constant(a["bias"]).dtype == torch.int32 for a in convolutions)
    assert product(after, "aten.cat").meta["val"].dtype == torch.uint8  # only codes move


def test_an_image_net_stays_within_one_step_of_the_simulation(build: Any) -> None:
    """Each rounded value by itself: int32 biases move it by less than half a step, so at most one code."""
    simulated = simulate(image(build), IMAGES)
    after, _, _ = materialize(simulated)
    before, found = values_of(simulated, IMAGES), values_of(after, IMAGES)
    steps = {}
    for node in after.nodes:
        if node.op == "call_function" and operator_name(node.target) in ("qc.quantize", "qc.add"):
            arguments = bound_arguments(node)
            key = "out_scale" if "out_scale" in arguments else "scale"
            scale, zero_point = (after.constant(arguments[key.replace("scale", part)]) for part in ("scale", "zero_point"))
            name = str(arguments[key].target).removesuffix("_scale")
            exact = before[simulated.node(name).name] / scale + zero_point
            steps[name] = float((found[node.name].double() - exact.double()).abs().max().round())
    assert steps.pop("x.quantizer") == 0
    assert set(steps) == {"r1.quantizer", "c2.quantizer", "r2.quantizer", "r3.quantizer", "j.quantizer"}
    assert max(steps.values()) <= 1
    assert sqnr_db(simulated(IMAGES)[0], after(IMAGES)[0]) > 35


def values_of(graph: Graph, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch.fx as fx

    found: dict[str, torch.Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found[n.name] = super().run_node(n)
            return found[n.name]

    with torch.no_grad():
        Recorder(graph.module).run(*inputs)
    return found


ONE = """graph @main float(%x: f32[n,3,6,6]) where n in 1..64 {
  %w1 = const @w1
  %b1 = const @b1
  %c1 = aten.conv2d(%x, %w1, %b1) {padding=[1, 1]} : f32[n,4,6,6]
  return %c1 as "y"
}
"""


def one(build: Any, bias: torch.Tensor) -> Graph:
    return build(ONE, w1=torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(3)), b1=bias)


def test_the_bias_of_a_convolution_is_int32_at_the_accumulators_scale(build: Any) -> None:
    bias = torch.tensor([0.5, -1.25, 0.0, 100.0])
    after, _, _ = materialize(simulate(one(build, bias), IMAGES))
    node = product(after, "qc.conv2d")
    arguments = bound_arguments(node)
    codes, step = after.constant(arguments["bias"]), after.constant(arguments["x_scale"]) * after.constant(arguments["weight_scale"])
    assert codes.dtype == torch.int32
    assert float(((codes.double() * step.double() - bias).abs() / step).max()) <= 0.5 + 1e-6


def test_a_bias_that_does_not_fit_stays_float(build: Any) -> None:
    bias = torch.tensor([0.5, 1e6, 0.0, 1.0])
    simulated = simulate(one(build, bias), IMAGES)
    after, _, _ = materialize(simulated)
    node = product(after, "qc.conv2d")
    assert torch.equal(after.constant(bound_arguments(node)["bias"]), bias)
    assert sqnr_db(simulated(IMAGES)[0], after(IMAGES)[0]) > 100


class Linear8(ReferenceTarget):
    """A target that runs linear layers of 8 bits only."""

    def supports(self, operator: str, scheme: LayerScheme) -> str | None:
        return (
            None
            if operator == "qc.linear" and scheme.weight is not None and scheme.weight.bits == 8
            else "only qc.linear of 8 bits runs here"
        )


def test_what_the_target_has_no_kernel_for_stays_a_float_operator(build: Any) -> None:
    simulated = simulate(one(build, torch.zeros(4)), IMAGES)
    after, context, _ = materialize(simulated, target=Linear8())
    assert operators(after) == ["qc.quantize", "qc.dequantize", "qc.dequantize", "aten.conv2d"]
    assert context.log.why_not("c1") == [
        "qc.conv2d-quantized: only qc.linear of 8 bits runs here", "qc.conv2d-weight-only: only qc.linear of 8 bits runs here"
    ]  # fmt: skip
    assert torch.equal(after(IMAGES)[0], simulated(IMAGES)[0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("aten.add.Tensor(%r1, %c2)", "aten.add.Tensor(%r1, %c2) {alpha=2}"), "the sum is weighted"),
        (("aten.relu(%s)", "aten.gelu(%s)"), None),
    ],
)
def test_sums_that_have_no_integer_form(build: Any, change: tuple[str, str], reason: str | None) -> None:
    generator = torch.Generator().manual_seed(2)
    graph = build(IMAGE.replace(*change), **{name: torch.randn(size, generator=generator) for name, size in SIZES.items()})
    simulated = simulate(graph, IMAGES)
    after, context, _ = materialize(simulated)
    assert "qc.add" not in operators(after)
    assert reason is None or any(reason in line for lines in context.log.reasons.values() for line in lines)
    assert sqnr_db(simulated(IMAGES)[0], after(IMAGES)[0]) > 35


def test_a_table_is_stored_packed(build: Any) -> None:
    text = """graph @main float(%i: i64[n,3]) where n in 1..64 {
  %t = const @t
  %y = aten.embedding(%t, %i) : f32[n,3,6]
  return %y as "y"
}
"""
    simulated = build(text, t=torch.randn(9, 6))
    context = Context(ReferenceTarget())
    Pipeline((AssignBits(), InsertQuantizers(), QuantizeWeights())).run(simulated, context)
    after, _, _ = materialize(simulated)
    assert operators(after) == ["qc.embedding"]
    indices = torch.randint(0, 9, (4, 3))
    assert torch.equal(after(indices)[0], simulated(indices)[0])


def test_the_stage_changes_and_a_second_run_is_refused(build: Any) -> None:
    from qcompile.errors import Refused

    after, context, _ = materialize(simulate(linear(build), ROWS))
    assert after.stage == Stage.INTEGER
    with pytest.raises(Refused, match="materialize takes a graph of stage simulated, here it is integer"):
        Pipeline((Materialize(),)).run(after, context)
