from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qcompile.backends.reference.target import ReferenceTarget
from qcompile.passes.fuse_epilogue import FuseEpilogue

from qcompile.graph import Graph, parse_graph, tensor_digest
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context, Pipeline

U8 = 'scheme="uint8 tensor affine"'
LINEAR = 'x_scheme="uint8 tensor affine", weight_scheme="int8 channel=0 sym", in_features=6'
CONV = (
    'x_scheme="uint8 tensor affine", weight_scheme="int8 channel=0 sym", kernel_width=3, stride=[1, 1], padding=[1, 1], dilation=[1, 1], '
    "groups=1"
)
ACTIVATIONS = {
    "": None, "aten.relu(%{}) : {}": "relu", "aten.hardtanh(%{}) {{min_val=0.0, max_val=6.0}} : {}": "relu6", "aten.gelu(%{}) : {}": "gelu",
    'aten.gelu(%{}) {{approximate="tanh"}} : {}': "gelu_tanh", "aten.silu(%{}) : {}": "silu", "aten.tanh(%{}) : {}": "tanh",
    "aten.sigmoid(%{}) : {}": "sigmoid", "aten.hardswish(%{}) : {}": "hardswish",
}  # fmt: skip


def text(tail: str, result: str, *, conv: bool = False, more: str = "") -> str:
    """Return a graph of one product of codes and what follows it; ``%p`` is the product, ``%r`` an input of its shape."""
    kind = "n,4,5,5" if conv else "n,4"
    codes = "n,3,5,5" if conv else "n,6"
    product = f"qc.{'conv2d' if conv else 'linear'}(%x, %xs, %xz, %w, %ws, none, %b) {{{CONV if conv else LINEAR}}} : f32[{kind}]"
    return f"""graph @main integer(%x: u8[{codes}], %r: f32[{kind}]) where n in 1..64 {{
  %xs = const @xs
  %xz = const @xz
  %w = const @w
  %ws = const @ws
  %b = const @b
  %os = const @os
  %oz = const @oz
  %p = {product}
{tail}
  return {result}
}}
"""


def constants(conv: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (4, 3, 3, 3) if conv else (4, 6), generator=generator).to(torch.int8)
    return {"xs": torch.tensor(0.02), "xz": torch.tensor(117, dtype=torch.int32), "w": weight,
            "ws": torch.rand(4, generator=generator) / 100 + 0.001,
            "b": torch.randn(4, generator=generator), "os": torch.tensor(0.013), "oz": torch.tensor(101, dtype=torch.int32)}  # fmt: skip


KINDS = {"float32": "f32", "int32": "i32", "int8": "i8"}


def build(source: str, conv: bool = False) -> Graph:
    values = constants(conv)
    for name, value in values.items():
        kind = f"{KINDS[str(value.dtype).removeprefix('torch.')]}[{','.join(map(str, value.shape))}] @{tensor_digest(value)[:16]}"
        source = source.replace(f"const @{name}\n", f"const {kind}\n")
    return parse_graph(source, {tensor_digest(value)[:16]: value for value in values.values()})


def fuse(graph: Graph) -> tuple[Graph, Context, int]:
    after, context = graph.copy(), Context(ReferenceTarget())
    (step,) = Pipeline((FuseEpilogue(),)).run(after, context)
    (again,) = Pipeline((FuseEpilogue(),)).run(after.copy(), Context(ReferenceTarget()))
    assert again.changes == 0, "a second run changes the graph"
    return after, context, step.changes


def operators(graph: Graph) -> list[str]:
    return [operator_name(node.target) for node in graph.nodes if node.op == "call_function"]


def inputs(conv: bool = False, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (3, 3, 5, 5) if conv else (7, 6), generator=generator).to(torch.uint8)
    return codes, torch.randn((3, 4, 5, 5) if conv else (7, 4), generator=generator)


def test_golden(golden: Any) -> None:
    from qcompile.graph import print_graph

    kind = "f32[n,4,5,5]"
    tail = f"""  %a = aten.add.Tensor(%r, %p) : {kind}
  %y = aten.relu(%a) : {kind}
  %q = qc.quantize(%y, %os, %oz) {{{U8}}} : u8[n,4,5,5]"""
    graph = build(text(tail, '%q as "q"', conv=True), conv=True)
    after, _, changes = fuse(graph)
    assert changes == 3
    golden("passes/fuse_epilogue", f"{print_graph(graph, comments=False)}->\n{print_graph(after, comments=False)}")


@given(conv=st.booleans(), activation=st.sampled_from(list(ACTIVATIONS)), residual=st.sampled_from(["", "before", "after"]),
       swapped=st.booleans(), requantize=st.booleans(), seed=st.integers(0, 9))  # fmt: skip
def test_every_bit_is_kept(conv: bool, activation: str, residual: str, swapped: bool, requantize: bool, seed: int) -> None:
    """Whatever follows a product, fused or not, gives the same bits; what has a name in the dialect is fused."""
    shape = "n,4,5,5" if conv else "n,4"
    kind, lines, last = f"f32[{shape}]", [], "p"

    def then(line: str) -> None:
        nonlocal last
        name = f"v{len(lines)}"
        lines.append(f"  %{name} = {line}")
        last = name

    def add() -> None:
        then(f"aten.add.Tensor({'%r, %' + last if swapped else '%' + last + ', %r'}) : {kind}")

    if residual == "before":
        add()
    if activation:
        then(activation.format(last, kind))
    if residual == "after":
        add()
    if requantize:
        then(f"qc.quantize(%{last}, %os, %oz) {{{U8}}} : u8[{shape}]")
    graph = build(text("\n".join(lines), f'%{last} as "y"', conv=conv), conv)
    after, _, changes = fuse(graph)
    given = inputs(conv, seed)
    assert torch.equal(graph(*given)[0], after(*given)[0])
    stays = residual == "before" and ACTIVATIONS[activation] not in (None, "relu", "relu6")
    assert len(operators(after)) == (1 + 1 + requantize if stays else 1)
    assert changes == len(lines) - (1 + requantize if stays else 0)


def test_the_fused_product_takes_all_arguments() -> None:
    tail = f"  %y = aten.relu(%p) : f32[n,4]\n  %q = qc.quantize(%y, %os, %oz) {{{U8}}} : u8[n,4]"
    after, _, _ = fuse(build(text(tail, '%q as "q"')))
    (node,) = (n for n in after.nodes if n.op == "call_function")
    arguments = bound_arguments(node)
    assert (arguments["activation"], arguments["out_scheme"], arguments["residual"]) == ("relu", "uint8 tensor affine", None)
    assert float(after.constant(arguments["out_scale"])) == pytest.approx(0.013)


REFUSALS = [
    ("  %v = aten.add.Tensor(%p, %r) {alpha=2} : f32[n,4]", '%v as "y"', "v", "residual: the sum is weighted"),
    ("  %v = aten.add.Tensor(%p, 1.0) : f32[n,4]", '%v as "y"', "v", "residual: the other operand has another shape"),
    ("  %v = aten.add.Tensor(%p, %b) : f32[n,4]", '%v as "y"', "v", "residual: the other operand has another shape"),
    ("  %v = aten.hardtanh(%p) : f32[n,4]", '%v as "y"', "v", "activation: the activation has no name in the dialect"),
    ("  %u = aten.relu(%p) : f32[n,4]\n  %v = aten.tanh(%u) : f32[n,4]", '%v as "y"', "v",
     "activation: the product has the activation relu already"),
    ("  %u = aten.add.Tensor(%p, %r) : f32[n,4]\n  %v = aten.tanh(%u) : f32[n,4]", '%v as "y"', "v",
     "activation: only relu and relu6 may follow a residual"),
    ("  %v = aten.relu(%p) : f32[n,4]", '%v as "y", %p as "p"', "v", "activation: p has other users"),
    ("  %v = qc.quantize(%p, %ws, none) {scheme=\"int8 channel=1 sym\"} : i8[n,4]", '%v as "y"', "v",
     "requantize: the grid is not one for the whole tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("tail", "result", "node", "reason"), REFUSALS, ids=[case[3] for case in REFUSALS])
def test_does_not_fire(tail: str, result: str, node: str, reason: str) -> None:
    graph = build(text(tail, result))
    after, context, _ = fuse(graph)
    assert node in [n.name for n in after.nodes]
    assert reason in context.log.why_not(node)
    given = inputs()
    assert all(torch.equal(a, b) for a, b in zip(graph(*given), after(*given), strict=True))


# ---- moving codes ---------------------------------------------------------------------------------------------------------

MOVE = """graph @main integer(%x: u8[n,6], %r: u8[n,6]) where n in 1..64 {{
  %xs = const @xs
  %xz = const @xz
  %os = const @os
  %oz = const @oz
  %d = qc.dequantize(%x, %xs, %xz) {{scheme="uint8 tensor affine"}} : f32[n,6]
  %e = qc.dequantize(%r, {grid}) {{scheme="uint8 tensor affine"}} : f32[n,6]
  %c = aten.cat([%d, %e]) {{dim=1}} : f32[n,12]
  %q = qc.quantize(%c, %xs, %xz) {{scheme="uint8 tensor affine"}} : u8[n,12]
  %s = qc.quantize(%d, {grid}) {{scheme="uint8 tensor affine"}} : u8[n,6]
  return %q as "q", %s as "s"
}}
"""
ALL_CODES = torch.arange(252).view(-1, 6).to(torch.uint8), torch.arange(3, 255).view(-1, 6).to(torch.uint8)


def test_on_one_grid_codes_move_as_they_are() -> None:
    graph = build(MOVE.format(grid="%xs, %xz"))
    after, _, changes = fuse(graph)
    assert operators(after) == ["aten.cat"]
    assert changes == 2
    assert all(torch.equal(a, b) for a, b in zip(graph(*ALL_CODES), after(*ALL_CODES), strict=True))


def test_on_two_grids_they_are_rounded_anew() -> None:
    graph = build(MOVE.format(grid="%os, %oz"))
    after, context, changes = fuse(graph)
    assert changes == 0
    assert "concat: e: the two grids differ" in context.log.why_not("q")
    assert "same-grid: the two grids differ" in context.log.why_not("s")
    assert all(torch.equal(a, b) for a, b in zip(graph(*ALL_CODES), after(*ALL_CODES), strict=True))
