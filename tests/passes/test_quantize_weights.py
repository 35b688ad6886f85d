"""QuantizeWeights: golden text, what it keeps, what it refuses, and that later layers see what earlier ones became."""

import pytest
import torch
from qcompile.passes.quantize_weights import QuantizeWeights

from qcompile.calibration import from_iterable
from qcompile.errors import Refused
from qcompile.formats import parse_scheme
from qcompile.graph import parse_graph, print_graph
from qcompile.graph.graph import Graph, tensor_digest
from qcompile.graph.quantizer import Quantizer
from qcompile.graph.stage import Stage
from qcompile.pipeline import Context, Pipeline, parse_pipeline
from qcompile.registry import find_pass
from qcompile.solvers.gptq import row_errors, solve
from qcompile.solvers.nearest import solve as nearest

A, B = (torch.randn(8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2))
K = torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(2))

LINEARS = """graph @main float(%x: f32[batch,8]) where batch in 1..64 {
  %a = const f32[8,8] @A
  %b = const f32[8,8] @B
  %linear = aten.linear(%x, %a) : f32[batch,8]
  %relu = aten.relu(%linear) : f32[batch,8]
  %linear_1 = aten.linear(%relu, %b) : f32[batch,8]
  return %linear_1 as "y"
}
"""
CONVOLUTION = """graph @main float(%x: f32[batch,4,6,5]) where batch in 1..64 {
  %k = const f32[8,2,3,3] @K
  %conv2d = aten.conv2d(%x, %k) {stride=[2, 1], padding=[1, 0], groups=2} : f32[batch,8,3,3]
  return %conv2d as "y"
}
"""


def build(text: str, scheme: str) -> Graph:
    """Return the graph in the simulated stage, a quantizer without codes on every constant."""
    digests = {name: tensor_digest(value)[:16] for name, value in (("A", A), ("B", B), ("K", K))}
    for name, digest in digests.items():
        text = text.replace(f"@{name}\n", f"@{digest}\n")
    graph = parse_graph(text, {digests[name]: value for name, value in (("A", A), ("B", B), ("K", K))})
    for node in graph.nodes:
        if node.op == "get_attr":
            (user,) = node.users
            quantizer = graph.call_quantizer(Quantizer(parse_scheme(scheme)), node, before=user, name=f"{node.target}_quantizer")
            user.replace_input_with(node, quantizer)
    graph.stage = Stage.SIMULATED
    graph.clean()
    return graph


def context(*shape: int) -> Context:
    generator = torch.Generator().manual_seed(7)
    mix = torch.randn(shape[-1], shape[-1], generator=generator)
    data = [torch.randn(4, *shape, generator=generator) @ mix for _ in range(5)]
    if len(shape) == 3:  # neighbours in a picture are alike
        data = [x.cumsum(-1).cumsum(-2) for x in data]
    return Context(target=None, calibration=from_iterable(data))  # type: ignore[arg-type]


def codes(graph: Graph, name: str) -> torch.Tensor:
    quantizer = graph.quantizer(graph.node(f"{name}_quantizer"))
    assert quantizer is not None
    assert quantizer.codes is not None
    return quantizer.codes


def test_golden_text() -> None:
    graph = build(LINEARS, "int8 channel=0 sym")
    before = print_graph(graph, comments=False)
    assert '%a_quantizer = quantizer(%a) {scheme="int8 channel=0 sym"} : f32[8,8]' in before
    assert QuantizeWeights().run(graph, Context(target=None)) == 2  # type: ignore[arg-type]
    after = print_graph(graph, comments=False)
    for name, weight in (("a", A), ("b", B)):
        found = nearest(weight, {}, parse_scheme("int8 channel=0 sym"))
        scale, code = tensor_digest(found.scale)[:16], tensor_digest(found.codes)[:16]
        line = f'%{name}_quantizer = quantizer(%{name}, scale=@{scale}, codes=@{code}) {{scheme="int8 channel=0 sym"}} : f32[8,8]'
        assert line in after
        before = before.replace(f'%{name}_quantizer = quantizer(%{name}) {{scheme="int8 channel=0 sym"}} : f32[8,8]', line)
    assert after == before


@pytest.mark.parametrize("text", [LINEARS, CONVOLUTION])
def test_nearest_changes_no_bit_of_the_simulation(text: str) -> None:
    graph = build(text, "int4 channel=0 sym")
    x = torch.randn(3, *([8] if text is LINEARS else [4, 6, 5]), generator=torch.Generator().manual_seed(1))
    before = graph(x)[0]
    QuantizeWeights().run(graph, Context(target=None))  # type: ignore[arg-type]
    assert torch.equal(graph(x)[0], before)


@pytest.mark.parametrize("solver", ["nearest", "mse", "gptq"])
def test_a_second_run_changes_nothing(solver: str) -> None:
    graph, given = build(LINEARS, "int4 group=4 sym"), context(8)
    pipeline = Pipeline((QuantizeWeights(solver=solver),))
    assert pipeline.run(graph, given)[0].changes == 2
    text = print_graph(graph, comments=False)
    assert pipeline.run(graph, given)[0].changes == 0
    assert print_graph(graph, comments=False) == text


def test_later_layers_see_what_earlier_ones_became() -> None:
    scheme, given = parse_scheme("int3 channel=0 sym"), context(8)
    graph = build(LINEARS, str(scheme))
    Pipeline((QuantizeWeights(solver="gptq"),)).run(graph, given)
    x = torch.cat([batch[0] for batch in given.calibration.batches(graph)])  # type: ignore[union-attr]
    first = solve(A, {"gram": x.double().T @ x.double() / len(x)}, scheme, grid="mse", act_order=True)
    inner = torch.relu(torch.nn.functional.linear(x, first.dequantize())).double()
    assert torch.equal(codes(graph, "a"), first.codes)
    assert torch.equal(codes(graph, "b"), solve(B, {"gram": inner.T @ inner / len(x)}, scheme, grid="mse", act_order=True).codes)


def test_without_sequence_the_pipeline_gathers() -> None:
    graph, given = build(LINEARS, "int4 channel=0 sym"), context(8)
    item = QuantizeWeights(solver="gptq", sequential=False)
    assert [str(request) for request in item.requests(graph, given)] == [
        f"Gram({x}, unfold=None, weights=None, cross=False)" for x in ("%x", "%relu")
    ]
    assert Pipeline((item,)).run(graph, given)[0].changes == 2
    assert "gptq: 0." in dict(given.notes)["linear"]


def test_gptq_lowers_the_error_of_a_grouped_convolution() -> None:
    scheme, given = parse_scheme("int4 channel=0 sym"), context(4, 6, 5)
    graph = build(CONVOLUTION, str(scheme))
    x = torch.cat([batch[0] for batch in given.calibration.batches(graph)])  # type: ignore[union-attr]
    exact = torch.nn.functional.conv2d(x, K, None, (2, 1), (1, 0), 1, 2)
    plain = (graph(x)[0] - exact).square().sum()
    Pipeline((QuantizeWeights.make({"solver": "gptq", "grid": "nearest"}),)).run(graph, given)
    assert codes(graph, "k").shape == K.shape
    ratio = float((graph(x)[0] - exact).square().sum() / plain)
    assert ratio < 0.9
    (note,) = given.notes
    assert note == ("conv2d", f"gptq: {ratio:.3f} of the error of nearest rounding")


def test_a_weight_without_a_product_does_not_fire_gptq_and_says_why() -> None:
    text = LINEARS.replace("aten.linear(%relu, %b)", "aten.add.Tensor(%relu, %b)").replace(
        "f32[batch,8]) where batch in 1..64", "f32[8,8])"
    )
    graph, given = build(text.replace("batch", "8"), "int4 channel=0 sym"), context(8)
    given.calibration = from_iterable([torch.randn(8, 8)])
    Pipeline((QuantizeWeights(solver="gptq"),)).run(graph, given)
    assert ("linear_1", "weight rounded with least squared error, not by gptq: aten.add.Tensor is no product with its rows") in given.notes


def test_scales_along_the_kernel_width_are_left_to_nearest() -> None:
    graph, given = build(CONVOLUTION, "int4 group=2 sym"), context(4, 6, 5)
    Pipeline((QuantizeWeights(solver="gptq"),)).run(graph, given)
    assert codes(graph, "k").shape == K.shape
    assert "do not lie along the kernel's inputs" in dict(given.notes)["conv2d"]


def test_tied_weights_take_the_gram_of_all_their_inputs() -> None:
    scheme, given = parse_scheme("int4 channel=0 sym"), context(8)
    graph = build(LINEARS, str(scheme))
    second = graph.node("linear_1")
    second.replace_input_with(graph.node("b_quantizer"), graph.node("a_quantizer"))
    graph.clean()
    x = torch.cat([batch[0] for batch in given.calibration.batches(graph)])  # type: ignore[union-attr]
    inner = torch.relu(torch.nn.functional.linear(x, nearest(A, {}, scheme).dequantize()))
    Pipeline((QuantizeWeights(solver="gptq"),)).run(graph, given)
    both = torch.cat([x, inner]).double()
    gram = both.T @ both / len(both)
    found = graph.quantizer(graph.node("a_quantizer"))
    assert found is not None
    assert row_errors(A, found(A), gram).sum() < row_errors(A, nearest(A, {}, scheme).dequantize(), gram).sum()


def test_a_failure_names_the_layer() -> None:
    graph, given = build(LINEARS, "int4 channel=1 sym"), context(8)
    with pytest.raises(Refused, match=r"linear: gptq fails: .*not channel=1"):
        Pipeline((QuantizeWeights(solver="gptq"),)).run(graph, given)


def test_refusals() -> None:
    graph = build(LINEARS, "int4 channel=0 sym")
    with pytest.raises(Refused, match="needs calibration data"):
        Pipeline((QuantizeWeights(solver="gptq"),)).run(graph, Context(target=None))  # type: ignore[arg-type]
    with pytest.raises(Refused, match="unknown option 'damping' of the solver nearest; known are none"):
        QuantizeWeights.make({"damping": 0.1})
    with pytest.raises(Refused, match="unknown solver 'gtpq'; did you mean 'gptq'"):
        QuantizeWeights(solver="gtpq").run(graph, Context(target=None))  # type: ignore[arg-type]


# ---- what all solvers share -----------------------------------------------------------------------------------------------


def test_a_solver_of_codebooks_leaves_other_formats_and_says_so() -> None:
    graph, given = build(LINEARS, "int8 channel=0 sym"), context(8)
    Pipeline((QuantizeWeights(solver="lnq"),)).run(graph, given)
    assert ("linear", "weight rounded with least squared error, not by lnq: that is not for int8") in given.notes
    assert codes(graph, "a").dtype == torch.int8


def test_options_reach_the_solver() -> None:
    found = {}
    for text in ("quantize-weights{solver=ldlq}", "quantize-weights{solver=ldlq, passes=0, order=false}"):
        graph = build(LINEARS, "int2 channel=0 sym")
        parse_pipeline(text, find_pass).run(graph, context(8))
        found[text] = codes(graph, "a")
    first, second = found.values()
    assert not torch.equal(first, second)


def test_aiming_at_the_float_model_makes_up_for_the_layers_before() -> None:
    errors = {}
    for toward_float in (False, True):
        graph, given = build(LINEARS, "int3 channel=0 sym"), context(8)
        assert given.calibration is not None
        x = torch.cat([batch[0] for batch in given.calibration.batches(graph)])
        exact = torch.relu(x @ A.T) @ B.T
        Pipeline((QuantizeWeights(solver="gptq", toward_float=toward_float),)).run(graph, given)
        errors[toward_float] = float((graph(x)[0] - exact).square().sum())
    assert errors[True] < 0.9 * errors[False]


def test_the_first_layer_has_nothing_to_make_up_for() -> None:
    plain, aimed = build(LINEARS, "int4 channel=0 sym"), build(LINEARS, "int4 channel=0 sym")
    Pipeline((QuantizeWeights(solver="gptq"),)).run(plain, context(8))
    Pipeline((QuantizeWeights(solver="gptq", toward_float=True),)).run(aimed, context(8))
    assert torch.equal(codes(plain, "a"), codes(aimed, "a"))
    assert not torch.equal(codes(plain, "b"), codes(aimed, "b"))
