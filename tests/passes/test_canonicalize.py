from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qcompile.passes.canonicalize import Canonicalize

from qcompile.graph import parse_graph
from qcompile.pipeline import Context, Pipeline

HEAD = "graph @main float(%x: f32[n,4,8]) where n in 1..64 {\n"


def float_graph(*lines: str, head: str = HEAD, result: str = "y") -> str:
    return head + "\n".join(f"  {line}" for line in lines) + f'\n  return %{result} as "y"\n}}\n'


def test_golden(build, run_pass, golden) -> None:
    text = float_graph(
        "%w = const @w",
        "%n = aten.sym_size.int(%x) {dim=0} : int n",
        "%copy = aten.clone(%x) : f32[n,4,8]",
        "%two = aten.permute(%copy) {dims=[0, 2, 1]} : f32[n,8,4]",
        "%back = aten.transpose.int(%two) {dim0=-1, dim1=1} : f32[n,4,8]",
        "%n_again = aten.sym_size.int(%back) {dim=0} : int n",
        "%flat = aten.view(%back) {size=[%n_again, 32]} : f32[n,32]",
        "%whole = aten.view(%flat) {size=[%n, 4, 8]} : f32[n,4,8]",
        "%product = aten.matmul(%whole, %w) : f32[n,4,3]",
        "%y = aten.hardtanh(%product) {min_val=0, max_val=6} : f32[n,4,3]",
    )
    ran = run_pass(build(text, w=torch.arange(24.0).reshape(8, 3)), Canonicalize())
    golden("passes/canonicalize", ran.golden_text)
    assert ran.sqnr(torch.randn(3, 4, 8)) > 120


NO_OPS = [
    "aten.clone(%x)", "aten.dropout(%x) {p=0.1, train=false}", "aten._to_copy(%x) {dtype=dtype:float32}",
    "aten.expand(%x) {size=[-1, 4, 8]}",
    "aten.slice.Tensor(%x) {dim=1, start=0, end=9223372036854775807}", "aten.view(%x) {size=[-1, 4, 8]}", "aten.mul.Tensor(%x, 1)",
    "aten.add.Tensor(%x, 0)", "aten.contiguous(%x)", "aten.permute(%x) {dims=[0, 1, 2]}", "aten.div.Tensor(%x, 1)",
]  # fmt: skip


@pytest.mark.parametrize("call", NO_OPS)
def test_operators_that_return_their_input_go(build, run_pass, call) -> None:
    ran = run_pass(build(float_graph(f"%a = {call} : f32[n,4,8]", "%y = aten.relu(%a) : f32[n,4,8]")), Canonicalize())
    assert ran.operators == ["aten.relu"]


@pytest.mark.parametrize(
    ("call", "type", "reason"),
    [
        ("aten.dropout(%x) {p=0.1, train=true}", "f32[n,4,8]", "training mode"),
        ("aten._to_copy(%x) {dtype=dtype:float64}", "f64[n,4,8]", "f32[n,4,8] becomes f64[n,4,8]"),
        ("aten.slice.Tensor(%x) {dim=1, start=0, end=2}", "f32[n,2,8]", "f32[n,4,8] becomes f32[n,2,8]"),
        ("aten.mul.Tensor(%x, 2)", "f32[n,4,8]", "its operand is not 1"),
        ("aten.hardtanh(%x) {min_val=-1, max_val=6}", "f32[n,4,8]", "its bounds are not 0 and 6"),
    ],
)
def test_what_does_something_stays_and_says_why(build, run_pass, call, type, reason) -> None:
    ran = run_pass(build(float_graph(f"%a = {call} : {type}", f"%y = aten.relu(%a) : {type}")), Canonicalize())
    assert ran.changes == 0
    assert any(reason in text for text in ran.context.log.why_not("a"))


def test_a_copy_before_a_view_becomes_a_reshape(build, run_pass) -> None:
    text = float_graph(
        "%turned = aten.transpose.int(%x) {dim0=1, dim1=2} : f32[n,8,4]",
        "%copy = aten.clone(%turned) {memory_format=memory:contiguous_format} : f32[n,8,4]",
        "%more = aten.neg(%copy) : f32[n,8,4]",  # keeps the strides: its view must become a reshape too
        "%y = aten.view(%more) {size=[-1, 32]} : f32[n,32]",
    )
    ran = run_pass(build(text), Canonicalize())
    assert ran.operators == ["aten.transpose.int", "aten.neg", "aten.reshape"]
    assert ran.sqnr(torch.randn(3, 4, 8)) == math.inf


@settings(max_examples=30)
@given(orders=st.lists(st.permutations([0, 1, 2]), min_size=1, max_size=4))
def test_permutes_of_permutes_are_one(orders) -> None:
    lines, shape, last = [], ["n", "4", "8"], "x"
    for i, order in enumerate(orders):
        shape = [shape[axis] for axis in order]
        lines.append(f"%p{i} = aten.permute(%{last}) {{dims={list(order)}}} : f32[{','.join(shape)}]")
        last = f"p{i}"
    graph = parse_graph(float_graph(*lines, result=last), {})
    after = graph.copy()
    Pipeline((Canonicalize(),)).run(after, Context(target=None))
    assert sum(node.op == "call_function" for node in after.nodes) <= 1
    x = torch.randn(3, 4, 8)
    assert torch.equal(graph(x)[0], after(x)[0])


# ---- operators written out ------------------------------------------------------------------------------------------------

T = "f32[n,4,8]"
SIGMOID = f"%s = aten.sigmoid(%x) : {T}"
PLUS_3 = [f"%a = aten.add.Tensor(%x, 3) : {T}", f"%c = aten.clamp(%a) {{min=0, max=6}} : {T}"]
TANH_GELU = [
    f"%p = aten.pow.Tensor_Scalar(%x) {{exponent=3}} : {T}", f"%q = aten.mul.Tensor(%p, 0.044715) : {T}",
    f"%a = aten.add.Tensor(%x, %q) : {T}",
    f"%m = aten.mul.Tensor(%a, 0.7978845608) : {T}", f"%t = aten.tanh(%m) : {T}", f"%o = aten.add.Tensor(%t, 1) : {T}",
]  # fmt: skip
ERF = [f"%d = aten.div.Tensor(%x, 1.41421354) : {T}", f"%e = aten.erf(%d) : {T}", f"%o = aten.add.Tensor(%e, 1) : {T}"]
HALF = f"%h = aten.mul.Tensor(%x, 0.5) : {T}"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([*ERF, HALF, f"%y = aten.mul.Tensor(%h, %o) : {T}"], "aten.gelu(%x) :"),
        ([*ERF, f"%m = aten.mul.Tensor(%x, %o) : {T}", f"%y = aten.mul.Tensor(%m, 0.5) : {T}"], "aten.gelu(%x) :"),
        ([*TANH_GELU, HALF, f"%y = aten.mul.Tensor(%h, %o) : {T}"], 'aten.gelu(%x) {approximate="tanh"} :'),
        ([SIGMOID, f"%y = aten.mul.Tensor(%s, %x) : {T}"], "aten.silu(%x) :"),
        ([*PLUS_3, f"%y = aten.div.Tensor(%c, 6) : {T}"], "aten.hardsigmoid(%x) :"),
        ([*PLUS_3, f"%m = aten.mul.Tensor(%x, %c) : {T}", f"%y = aten.div.Tensor(%m, 6) : {T}"], "aten.hardswish(%x) :"),
        ([f"%s = aten.hardsigmoid(%x) : {T}", f"%y = aten.mul.Tensor(%x, %s) : {T}"], "aten.hardswish(%x) :"),
    ],
)
def test_activations_are_known_by_their_values(build, run_pass, lines, expected) -> None:
    # A pointwise operator before the activation must not hide where it begins.
    text = float_graph(f"%before = aten.relu(%x) : {T}", *(line.replace("%x", "%before") for line in lines))
    ran = run_pass(build(text), Canonicalize())
    assert ran.operators == ["aten.relu", expected.partition("(")[0]]
    assert expected.replace("%x", "%before") in ran.text
    assert ran.sqnr(3 * torch.randn(3, 4, 8)) > 110


def test_a_function_that_is_nearly_an_activation_stays(build, run_pass) -> None:
    quick = [f"%m = aten.mul.Tensor(%x, 1.702) : {T}", f"%s = aten.sigmoid(%m) : {T}", f"%y = aten.mul.Tensor(%s, %x) : {T}"]
    assert run_pass(build(float_graph(*quick)), Canonicalize()).changes == 0


MEAN = "%mean = aten.mean.dim(%x) {dim=[-1], keepdim=true} : f32[n,4,1]"
CENTERED = f"%d = aten.sub.Tensor(%x, %mean) : {T}"


def variance(power: str = "aten.pow.Tensor_Scalar(%d) {exponent=2}", axis: int = -1) -> list[str]:
    return [
        MEAN, CENTERED, f"%p = {power} : {T}", f"%v = aten.mean.dim(%p) {{dim=[{axis}], keepdim=true}} : f32[n,4,1]",
        "%e = aten.add.Tensor(%v, 1e-05) : f32[n,4,1]",
    ]  # fmt: skip


AFFINE = [f"%g = aten.mul.Tensor(%norm, %gain) : {T}", f"%y = aten.add.Tensor(%g, %shift) : {T}"]
NORMALISED = [
    ["%r = aten.sqrt(%e) : f32[n,4,1]", f"%norm = aten.div.Tensor(%d, %r) : {T}"],
    ["%r = aten.rsqrt(%e) : f32[n,4,1]", f"%norm = aten.mul.Tensor(%r, %d) : {T}"],
    ["%r = aten.pow.Tensor_Scalar(%e) {exponent=-0.5} : f32[n,4,1]", f"%norm = aten.mul.Tensor(%d, %r) : {T}"],
]


@pytest.mark.parametrize("end", NORMALISED)
@pytest.mark.parametrize("power", ["aten.pow.Tensor_Scalar(%d) {exponent=2}", "aten.mul.Tensor(%d, %d)"])
def test_layer_norm_written_out(build, run_pass, end, power) -> None:
    text = float_graph("%gain = const @gain", "%shift = const @shift", *variance(power), *end, *AFFINE)
    ran = run_pass(build(text, gain=torch.randn(8), shift=torch.randn(8)), Canonicalize())
    assert ran.operators == ["aten.layer_norm"]
    assert "weight=%gain, bias=%shift" in ran.text
    assert ran.sqnr(torch.randn(3, 4, 8)) > 110


def test_rms_norm_written_out(build, run_pass) -> None:
    lines = [line.replace("%d", "%x") for line in variance()[2:]]
    text = float_graph(
        "%gain = const @gain", *lines, "%r = aten.rsqrt(%e) : f32[n,4,1]", f"%norm = aten.mul.Tensor(%x, %r) : {T}",
        f"%y = aten.mul.Tensor(%gain, %norm) : {T}",
    )  # fmt: skip
    ran = run_pass(build(text, gain=torch.randn(8)), Canonicalize())
    assert ran.operators == ["aten.rms_norm"]
    assert ran.sqnr(torch.randn(3, 4, 8)) > 110


def test_a_normalisation_over_another_axis_stays(build, run_pass) -> None:
    lines = [line.replace("[-1]", "[1]").replace("f32[n,4,1]", "f32[n,1,8]") for line in [*variance(), *NORMALISED[0]]]
    ran = run_pass(build(float_graph(*lines, result="norm")), Canonicalize())
    assert "aten.layer_norm" not in ran.operators
    assert any("over other axes than the last" in text for text in ran.context.log.why_not("norm"))


@pytest.mark.parametrize("transposed", [False, True])
def test_products_with_constants_are_linear_layers(build, run_pass, transposed) -> None:
    w, b = torch.randn(8, 3), torch.randn(3)
    lines = ["%w = const @w", "%b = const @b"]
    lines += ["%wt = aten.t(%w) : f32[8,3]"] if transposed else []
    lines += [f"%p = aten.matmul(%x, %w{'t' * transposed}) : f32[n,4,3]", "%y = aten.add.Tensor(%b, %p) : f32[n,4,3]"]
    ran = run_pass(build(float_graph(*lines), w=w.t().contiguous() if transposed else w, b=b), Canonicalize())
    assert ran.operators == ["aten.linear"]
    weight = ran.after.constant(next(n for n in ran.after.nodes if n.op == "call_function").args[1])
    assert torch.equal(weight, w.t())
    assert ran.sqnr(torch.randn(3, 4, 8)) > 110


def test_addmm_with_a_factor_stays(build, run_pass) -> None:
    head = "graph @main float(%x: f32[n,8]) where n in 1..64 {\n"
    text = float_graph("%w = const @w", "%b = const @b", "%y = aten.addmm(%b, %x, %w) {alpha=2} : f32[n,3]", head=head)
    ran = run_pass(build(text, w=torch.randn(8, 3), b=torch.randn(3)), Canonicalize())
    assert ran.changes == 0
    assert "linear: it scales its operands" in ran.context.log.why_not("y")


def test_native_names_become_the_plain_ones(build, run_pass) -> None:
    head = "graph @main float(%x: f32[n,4,8,8]) where n in 1..64 {\n"
    kind = "f32[n,6,8,8]"
    text = float_graph(
        "%w = const @w", "%v = const @v", "%m = const @m",
        "%c = aten.convolution(%x, %w, none) {stride=[1, 1], padding=[1, 1], dilation=[1, 1], "
        f"transposed=false, output_padding=[0, 0], groups=1}} : {kind}",
        f"%b = aten._native_batch_norm_legit_no_training(%c, %v, %m, %m, %v) {{momentum=0.1, eps=1e-05}} : ({kind}, f32[0], f32[0])",
        f"%y = py.getitem(%b, 0) : {kind}", head=head,
    )  # fmt: skip
    ran = run_pass(build(text, w=torch.randn(6, 4, 3, 3), v=torch.rand(6) + 0.5, m=torch.randn(6)), Canonicalize())
    assert ran.operators == ["aten.conv2d", "aten.batch_norm"]
    assert ran.sqnr(torch.randn(2, 4, 8, 8)) > 120


def test_sizes_of_one_symbol_are_read_once(build, run_pass) -> None:
    text = float_graph(
        "%r = aten.relu(%x) : f32[n,4,8]",
        "%a = aten.sym_size.int(%r) {dim=0} : int n",
        "%b = aten.sym_size.int(%x) {dim=0} : int n",
        "%four = aten.sym_size.int(%x) {dim=1} : int 4",
        "%m = py.mul(%a, %four) : int 4*n",
        "%v = aten.view(%r) {size=[%m, 8]} : f32[4*n,8]",
        "%y = aten.view(%v) {size=[%b, 32]} : f32[n,32]",
    )
    ran = run_pass(build(text), Canonicalize())
    assert ran.operators == ["aten.sym_size.int", "aten.relu", "aten.view"]
