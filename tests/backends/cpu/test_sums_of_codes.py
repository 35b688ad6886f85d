"""Sums of quantized tensors: read as codes and written as codes, whatever else reads the sum; bit for bit what the graph computes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from qcompile.backends.cpu.build import build

import qcompile
from qcompile.graph import Graph, parse_graph, tensor_digest

QUICK = str(Path(__file__).parents[3] / "benchmarks/models/w8a8_quick.yaml")
TYPE, SHAPE = "uint8 tensor affine", "n,16,6,5"
CONSTANTS = {
    "xs": torch.tensor(0.031), "xz": torch.tensor(7, dtype=torch.int32), "ys": torch.tensor(0.0173),
    "yz": torch.tensor(101, dtype=torch.int32), "os": torch.tensor(0.0411), "oz": torch.tensor(3, dtype=torch.int32),
    "w": torch.randint(-127, 128, (16, 16, 1, 1)).to(torch.int8), "ws": torch.rand(16) / 100 + 0.001,
}  # fmt: skip
CONV = (
    'x_scheme="uint8 tensor affine", weight_scheme="int8 channel=0 sym", kernel_width=1, stride=[1, 1], padding=[0, 0], dilation=[1, 1], '
    'groups=1, out_scheme="uint8 tensor affine"'
)
KINDS = {"float32": "f32", "int32": "i32", "int8": "i8"}


def graph_of(lines: str, results: str, signed: bool = False, grid: str = "x") -> Graph:
    """Return a graph over codes %x and %y; ``%c`` is a convolution of %x, so images lie channels last, and %a + %b the sum.

    ``grid``: that of %x, which the convolution's codes have too, or of %y: %a reads them by it.
    """
    source = f"""graph @main integer(%x: u8[{SHAPE}], %y: {"i8" if signed else "u8"}[{SHAPE}]) where n in 1..64 {{
"""
    for name, value in CONSTANTS.items():
        shape = ",".join(map(str, value.shape))
        source += f"  %{name} = const {KINDS[str(value.dtype)[6:]]}[{shape}] @{tensor_digest(value)[:16]}\n"
    scheme = "int8 tensor affine" if signed else TYPE
    source += f"""  %c = qc.conv2d(%x, %xs, %xz, %w, %ws, none, none, none, %xs, %xz) {{{CONV}}} : u8[{SHAPE}]
  %a = qc.dequantize(%c, %{grid}s, %{grid}z) {{scheme="{TYPE}"}} : f32[{SHAPE}]
  %b = qc.dequantize(%y, %ys, %yz) {{scheme="{scheme}"}} : f32[{SHAPE}]
{lines}
  return {results}
}}
"""
    return parse_graph(source, {tensor_digest(value)[:16]: value for value in CONSTANTS.values()})


ADD = f"  %s = aten.add.Tensor(%a, %b) : f32[{SHAPE}]\n"
RELU = f"  %r = aten.relu(%s) : f32[{SHAPE}]\n"
QUANTIZE = '  %q = qc.quantize(%{}, %os, %oz) {{scheme="uint8 tensor affine"}} : u8[' + SHAPE + "]\n"
AGAIN = '  %p = qc.quantize(%{}, %ys, %yz) {{scheme="uint8 tensor affine"}} : u8[' + SHAPE + "]\n"
MOVE = """  %t = aten.slice.Tensor(%r) {dim=2, start=0, end=9223372036854775807, step=2} : f32[n,16,3,5]
  %u = aten.slice.Tensor(%t) {dim=-1, start=1, end=5} : f32[n,16,3,4]
  %v = aten.slice.Tensor(%u) {dim=1, start=-9} : f32[n,9,3,4]
  %m = aten.pad(%v) {pad=[0, 1, 0, 0, 2, 3]} : f32[n,14,3,5]
"""
MUL = f"  %m = aten.mul.Tensor(%s, %a) : f32[{SHAPE}]\n"
# lines, results, sums that read codes, kernels that dequantize
CASES = {
    "codes alone": (ADD + RELU + QUANTIZE.format("r"), "%q", 1, 0),
    "codes of the sum": (ADD + QUANTIZE.format("s"), "%q", 1, 0),
    "values alone": (ADD, "%s", 1, 0),
    "values after a relu": (ADD + RELU, "%r", 1, 0),
    "relu6": (ADD + f"  %r = aten.hardtanh(%s) {{min_val=0.0, max_val=6.0}} : f32[{SHAPE}]\n" + QUANTIZE.format("r"), "%r, %q", 1, 0),
    "another clamp": (ADD + f"  %r = aten.hardtanh(%s) : f32[{SHAPE}]\n" + QUANTIZE.format("r"), "%q", 1, 0),
    "codes and values": (ADD + RELU + QUANTIZE.format("r"), "%q, %r", 1, 0),
    "codes of both": (ADD + RELU + QUANTIZE.format("s"), "%q, %r", 1, 0),
    "two grids": (ADD + RELU + QUANTIZE.format("r") + AGAIN.format("r"), "%q, %p", 1, 0),
    "moved values": (ADD + RELU + QUANTIZE.format("r") + MOVE, "%q, %m", 1, 0),
    "an operand read again": (ADD + MUL + QUANTIZE.format("m"), "%q, %s", 1, 1),
    "a weighted sum": (f"  %s = aten.add.Tensor(%a, %b) {{alpha=2}} : f32[{SHAPE}]\n" + QUANTIZE.format("s"), "%q", 0, 2),
    "with itself": (f"  %s = aten.add.Tensor(%a, %a) : f32[{SHAPE}]\n" + QUANTIZE.format("s"), "%q", 1, 0),
}


NOT_FUSED = {"an operand read again", "a weighted sum", "with itself"}


@pytest.mark.parametrize("read_again", [False, True], ids=["fused", "alone"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_every_bit_is_kept(name: str, signed: bool, read_again: bool) -> None:
    """The convolution's kernel adds where nothing but the sum reads its codes (``read_again``: the graph returns them), else another."""
    lines, results, adds, dequantized = CASES[name]
    results = f"{results}, %c" if read_again else results
    graph = graph_of(lines, ", ".join(f'{r} as "{r[1:]}"' for r in results.split(", ")), signed)
    built = build(graph.module, threads=1)
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 3):
        x = torch.randint(0, 256, (batch, 16, 6, 5), generator=generator).to(torch.uint8)
        y = torch.randint(0, 256, (batch, 16, 6, 5), generator=generator).to(torch.uint8)
        y = y.view(torch.int8) if signed else y
        for got, wanted in zip(built(x, y), graph(x, y), strict=True):
            assert torch.equal(got, wanted)
    kernels = [step.kernel for step in built.steps(x, y)]
    fused = adds if name not in NOT_FUSED and not read_again else 0
    assert sum(re.fullmatch(r"convolution_.*_add\d*", kernel) is not None for kernel in kernels) == fused
    assert sum(kernel.startswith("add_codes") for kernel in kernels) == adds - fused
    assert sum(kernel.startswith("dequantize") for kernel in kernels) == dequantized


def test_a_tapped_sum_is_kept() -> None:
    graph = graph_of(ADD + RELU + QUANTIZE.format("r"), '%q as "q"')
    x, y = (torch.randint(0, 256, (2, 16, 6, 5)).to(torch.uint8) for _ in range(2))
    for tap in ("s", "r"):
        (codes,), values = build(graph.module, threads=1, taps=(tap,)).tapped(x, y)
        wanted = graph_of(ADD + RELU + QUANTIZE.format("r"), f'%q as "q", %{tap} as "v"')(x, y)
        assert torch.equal(codes, wanted[0])
        assert torch.equal(values[tap], wanted[1])


def test_codes_on_another_grid_are_not_added() -> None:
    """What reads the convolution's codes as other values than it wrote gets them as they are."""
    graph = graph_of(ADD + QUANTIZE.format("s"), '%q as "q"', grid="y")
    built = build(graph.module, threads=1)
    x, y = (torch.randint(0, 256, (2, 16, 6, 5)).to(torch.uint8) for _ in range(2))
    assert torch.equal(built(x, y)[0], graph(x, y)[0])
    assert any(step.kernel.startswith("add_codes") for step in built.steps(x, y))


class Residual(torch.nn.Module):
    """A block whose other branch is a convolution, one whose other branch is its input, and a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.main, self.down = torch.nn.Conv2d(16, 37, 3, stride=2, padding=1), torch.nn.Conv2d(16, 37, 1, stride=2)
        self.second, self.wise = torch.nn.Conv2d(37, 37, 1), torch.nn.Conv2d(37, 37, 3, padding=1, groups=37)
        self.last = torch.nn.Conv2d(37, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.main(x) + self.down(x))
        x = torch.relu(x + self.second(x))
        return self.last(self.wise(x) + x)


def test_all_sums_of_a_network_are_ends_of_convolutions() -> None:
    torch.manual_seed(0)
    data = [(torch.randn(2, 3, 13, 11),) for _ in range(3)]
    made = qcompile.compile(Residual().eval(), data[0], recipe=QUICK, target="reference", calibration=data)
    built = build(made.graph.module, threads=2)
    kernels = [step.kernel for step in built.steps(*data[0])]
    assert sum(re.search(r"_add\d*$", kernel) is not None for kernel in kernels) == 3
    assert not any(kernel.startswith(("add_codes", "dequantize")) for kernel in kernels)
    for (x,) in data:
        assert torch.equal(built(x)[0], made.graph(x)[0])
