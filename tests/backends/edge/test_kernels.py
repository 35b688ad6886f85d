"""Edge kernels against the meaning of their operators, bit for bit: small layers in C, built with sanitizers here, or for other processors.

All layers of a test are one model with an input and an output for each, so that they share a build.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qcompile.backends.edge.firmware.emulate import measure
from qcompile.backends.edge.folder import write_folder
from qcompile.backends.edge.kernels.planes import columns_together, pack_channels
from qcompile.backends.edge.kernels.products import Product, pack_rows
from qcompile.backends.edge.processors import PROCESSORS, Processor
from torch import fx

from qcompile.formats import pack
from qcompile.graph import Graph
from qcompile.graph.code_operators import softmax_table
from qcompile.graph.fixed_point import fixed_point, sum_fixed_point
from qcompile.graph.stage import Stage
from qcompile.graph.types import TensorType
from qcompile.target import MemoryLimits

qc, aten = torch.ops.qc, torch.ops.aten

SIGNED, UNSIGNED = "int8 tensor affine", "uint8 tensor affine"
# What the shapes of kernels are chosen by; any of them can be run by this machine.
FLAVOURS = ["", "dsp", "sse2"]


def random_codes(shape: Sequence[int], signed: bool, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, tuple(shape), generator=generator, dtype=torch.uint8)
    return codes.view(torch.int8) if signed else codes


def extreme_codes(shape: Sequence[int], signed: bool, seed: int) -> torch.Tensor:
    """The lowest and the highest code alone."""
    high = random_codes(shape, False, seed) >= 128
    return torch.where(high, 127, -128).to(torch.int8) if signed else torch.where(high, 255, 0).to(torch.uint8)


class Model:
    """Layers side by side."""

    def __init__(self) -> None:
        self.root, self.graph = torch.nn.Module(), fx.Graph()
        self.inputs: list[torch.Tensor] = []
        self.outputs: list[fx.Node] = []

    def input(self, codes: torch.Tensor) -> fx.Node:
        before = next((node for node in self.graph.nodes if node.op != "placeholder"), None)
        self.inputs.append(codes)
        if before is None:
            return self.graph.placeholder(f"x{len(self.inputs)}")
        with self.graph.inserting_before(before):
            return self.graph.placeholder(f"x{len(self.inputs)}")

    def constant(self, value: torch.Tensor) -> fx.Node:
        name = f"c{len(dict(self.root.named_buffers()))}"
        self.root.register_buffer(name, value)
        return self.graph.get_attr(name)

    def zero_point(self, value: int) -> fx.Node:
        return self.constant(torch.tensor(value, dtype=torch.int32))

    def call(self, operator: Any, *arguments: Any) -> None:
        self.outputs.append(self.graph.call_function(operator, arguments))

    def finish(self) -> Graph:
        self.outputs.reverse()  # they lie one after another: what is written behind one spoils one that was written before
        self.graph.output(tuple(self.outputs))
        types = [TensorType(x.dtype, tuple(x.shape)) for x in self.inputs]
        return Graph(fx.GraphModule(self.root, self.graph), types, stage=Stage.INTEGER)


@dataclass(frozen=True)
class Conv:
    """A convolution, with what is tried of it."""

    channels: int
    out_channels: int
    height: int = 6
    width: int = 7
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    depthwise: bool = False
    bits: int = 8
    signed: bool = True
    out_signed: bool = True
    activation: str = "none"
    factor: float = 0.0  # 0: results spread over the codes
    bias: int | None = None  # None: about as large as sums
    extreme: bool = False

    def add_to(self, model: Model, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        groups = self.channels if self.depthwise else 1
        shape = (self.out_channels, self.channels // groups, *self.kernel)
        low, high = -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        weight = torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8)
        if self.extreme:
            weight = torch.where(weight < 0, low, high).to(torch.int8)
        largest = int(60 * (high + 0.5) * weight[0].numel() ** 0.5)  # of most sums
        factors = torch.rand(self.out_channels, generator=generator, dtype=torch.float64) + 0.5
        multiplier, shift = fixed_point(factors * (self.factor or 50 / largest))
        most = largest if self.bias is None else self.bias
        bias = torch.randint(-most, most + 1, (self.out_channels,), generator=generator, dtype=torch.int32)
        codes = (extreme_codes if self.extreme else random_codes)((1, self.channels, self.height, self.width), self.signed, seed)
        grids = [SIGNED if signed else UNSIGNED for signed in (self.signed, self.out_signed)]
        x_zero, out_zero = (
            7 if self.signed else 121,
            -128 if self.activation == "relu" and self.out_signed else 5 if self.out_signed else 99,
        )
        model.call(
            qc.conv2d.default, model.input(codes), model.constant(torch.tensor(0.1)), model.zero_point(x_zero),
            model.constant(pack(weight, self.bits) if self.bits < 8 else weight), model.constant(torch.ones(self.out_channels)), None,
            model.constant(bias), None, model.constant(torch.tensor(0.05)), model.zero_point(out_zero), grids[0],
            f"int{self.bits} channel=0 sym", self.kernel[1], list(self.stride), list(self.padding), list(self.dilation), groups,
            self.activation, grids[1], model.constant(multiplier), model.constant(shift),
        )  # fmt: skip


PRODUCTS = [
    Conv(3, 8),  # rows of 27, of 12 codes a piece
    Conv(1, 7, kernel=(4, 2), stride=(2, 2), padding=(2, 1), signed=False),
    Conv(5, 3, kernel=(3, 2), stride=(2, 1), padding=(0, 1), out_signed=False, activation="relu"),
    Conv(4, 5, dilation=(2, 1), padding=(2, 0), signed=False, out_signed=False),
    Conv(3, 4, dilation=(1, 2), padding=(1, 2), activation="relu6"),
    Conv(2, 2, height=1, width=1, kernel=(5, 5), padding=(2, 2)),  # nearly all is padding; one pixel
    Conv(2, 3, height=3, width=2, kernel=(1, 5), padding=(0, 4)),  # whole kernels outside of the image
    Conv(16, 6, kernel=(1, 1), padding=(0, 0)),  # direct
    Conv(32, 7, height=5, width=5, kernel=(1, 1), padding=(0, 0), signed=False, activation="relu"),
    Conv(16, 1, height=1, width=1, kernel=(1, 1), padding=(0, 0)),
    Conv(6, 5, kernel=(1, 1), padding=(0, 0)),  # channels fill no word
    Conv(16, 3, kernel=(1, 1), padding=(1, 1), stride=(2, 3)),
    Conv(33, 5, extreme=True),
    Conv(32, 5, kernel=(1, 1), padding=(0, 0), extreme=True, signed=False),
    Conv(8, 3, factor=0.7, bias=0),  # shifts of 31 and 32
    Conv(8, 3, factor=5.0, bias=0, out_signed=False),
    Conv(8, 5, factor=1e-7, bias=2**30),
]
DEPTHWISE = [
    Conv(5, 5, depthwise=True),
    Conv(8, 8, height=9, width=5, depthwise=True, signed=False, out_signed=False, activation="relu"),
    Conv(4, 4, stride=(2, 2), depthwise=True, activation="relu"),
    Conv(3, 3, height=8, width=11, stride=(1, 2), padding=(0, 1), depthwise=True, activation="relu6"),
    Conv(3, 3, height=7, width=4, kernel=(5, 5), padding=(2, 2), depthwise=True, out_signed=False),
    Conv(2, 2, height=9, width=9, kernel=(7, 7), stride=(2, 2), padding=(3, 3), depthwise=True, signed=False),
    Conv(2, 2, height=6, width=8, kernel=(2, 4), stride=(3, 3), padding=(1, 2), depthwise=True),
    Conv(3, 3, height=5, width=1, kernel=(3, 1), padding=(1, 0), depthwise=True),
    Conv(3, 3, height=1, width=1, kernel=(3, 3), padding=(1, 1), depthwise=True),
    Conv(3, 3, height=2, width=2, kernel=(4, 4), padding=(2, 2), depthwise=True),
    Conv(2, 2, height=61, width=30, depthwise=True),  # bands
    Conv(2, 2, height=40, width=50, kernel=(5, 5), stride=(2, 2), padding=(2, 2), depthwise=True),
    Conv(2, 2, height=3, width=400, kernel=(5, 5), padding=(2, 2), depthwise=True),  # a line is more than a band may take
    Conv(4, 4, dilation=(2, 2), padding=(2, 2), depthwise=True),
    Conv(4, 4, kernel=(1, 11), padding=(0, 5), width=13, depthwise=True),
    Conv(6, 6, depthwise=True, extreme=True),
    Conv(6, 6, depthwise=True, extreme=True, signed=False),
    Conv(4, 4, factor=0.7, bias=0, depthwise=True),
    Conv(16, 16, depthwise=True),  # vectors of channels
    Conv(32, 32, height=5, width=4, kernel=(5, 5), stride=(2, 1), padding=(2, 2), depthwise=True, signed=False, out_signed=False),
    Conv(16, 16, dilation=(2, 3), padding=(2, 3), depthwise=True, activation="relu6", out_signed=False),
    Conv(16, 16, height=2, width=1, kernel=(3, 5), padding=(1, 4), depthwise=True, signed=False, extreme=True),
]


def with_bits(layers: Sequence[Conv], bits: int) -> list[Conv]:
    return [replace(layer, bits=bits) for layer in layers]


def add_linear(model: Model, rows: int, inputs: int, outputs: int, bits: int, signed: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (outputs, inputs), generator=generator, dtype=torch.int8)
    multiplier, shift = fixed_point(torch.tensor(2.0 / (inputs**0.5 * 2**bits), dtype=torch.float64))
    bias = torch.randint(-3000, 3000, (outputs,), generator=generator, dtype=torch.int32)
    scale = model.constant(torch.tensor(0.1))
    model.call(
        qc.linear.default, model.input(random_codes((rows, inputs), signed, seed)), scale, model.zero_point(-3 if signed else 99),
        model.constant(pack(weight, bits) if bits < 8 else weight), model.constant(torch.ones(outputs)), None, model.constant(bias), None,
        scale, model.zero_point(4), SIGNED if signed else UNSIGNED, f"int{bits} channel=0 sym", inputs, "none", SIGNED, None,
        model.constant(multiplier), model.constant(shift),
    )  # fmt: skip


def products_model(bits: int) -> Model:
    model = Model()
    for seed, layer in enumerate(with_bits(PRODUCTS, bits)):
        layer.add_to(model, seed)
    for seed, (rows, inputs, outputs) in enumerate([(1, 64, 10), (1, 10, 3), (1, 33, 1), (3, 32, 5), (2, 7, 4)]):
        add_linear(model, rows, inputs, outputs, bits, bool(seed % 2), seed)
    return model


def depthwise_model(bits: int) -> Model:
    model = Model()
    for seed, layer in enumerate(with_bits(DEPTHWISE if bits == 8 else [*DEPTHWISE[:6], *DEPTHWISE[-4:]], bits)):
        layer.add_to(model, seed)
    return model


def codes_model() -> Model:
    """Operators of single codes, means and maxima; every pair of signs."""
    model = Model()
    for seed, (a, b, out) in enumerate((a, b, out) for a in (True, False) for b in (True, False) for out in (True, False)):
        shape = [(1, 3, 5, 7), (1, 1, 1, 1), (2, 9)][seed % 3]
        grids = [SIGNED if signed else UNSIGNED for signed in (a, b, out)]
        multipliers, shift = sum_fixed_point([0.3 + seed / 7, 0.9])
        scale, activation = model.constant(torch.tensor(0.1)), ("none", "relu", "relu6")[seed % 3]
        left, right = (model.input((extreme_codes if seed > 5 else random_codes)(shape, signed, seed + signed)) for signed in (a, b))
        zeros = [model.zero_point(zero) for zero in (3, 100, -9 if out else 40)]
        model.call(qc.add.default, left, scale, zeros[0], right, scale, zeros[1], scale, zeros[2], *grids, activation, multipliers, shift)
    for seed, signed in enumerate((True, False)):
        image, scheme = (1, 5, 7, 6), SIGNED if signed else UNSIGNED
        multiplier, shift = (int(value) for value in fixed_point(torch.tensor(1 / 42, dtype=torch.float64)))
        for make in (random_codes, extreme_codes):
            model.call(qc.mean.default, model.input(make(image, signed, seed)), [2, 3], 9, multiplier, shift, 3, False, scheme)
        model.call(qc.mean.default, model.input(random_codes((1, 1, 1, 1), signed, seed)), [2, 3], 0, 2**30, 30, 3, True, UNSIGNED)
        model.call(
            qc.avg_pool2d.default,
            model.input(random_codes(image, signed, seed)),
            [3, 2],
            [2, 1],
            [1, 1],
            7,
            multiplier,
            shift - 2,
            5,
            scheme,
        )
        model.call(aten.max_pool2d.default, model.input(random_codes(image, signed, seed)), [3, 2], [2, 2], [1, 1])
        model.call(aten.max_pool2d.default, model.input(random_codes(image, signed, seed)), [3, 3], [1, 1], [1, 1], [2, 3])
        model.call(
            qc.lookup.default, model.input(random_codes(image, signed, seed)), model.constant(random_codes((256,), not signed, seed))
        )
        model.call(qc.softmax.default, model.input(random_codes((3, 11), signed, seed)), model.constant(softmax_table(0.07, 11)), SIGNED)
        model.call(qc.softmax.default, model.input(extreme_codes((1, 2), signed, seed)), model.constant(softmax_table(0.3, 2)), UNSIGNED)
    return model


def run(model: Model, folder: Path, processor: Processor, *, sanitize: bool) -> None:
    for tool in ("gcc", "make", *(() if sanitize else processor.tools)):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed ('make edge-tools')")
    graph = model.finish()
    results = graph(*model.inputs)
    for node, result in zip(model.outputs, results, strict=True):
        if result.numel() > 20:
            assert result.unique().numel() > 1, f"{node.name}: a result of so few codes says little"
    write_folder(graph, model.inputs, folder, processor, MemoryLimits(), processor.name, "model")
    found = measure(folder, processor, sanitize=sanitize)
    assert found.ok, f"{found.mismatch}; outputs: {dict(enumerate(node.name for node in model.outputs))}"


MODELS = [
    *(pytest.param(lambda bits=bits: products_model(bits), id=f"products-{bits}") for bits in (8, 4, 2)),
    *(pytest.param(lambda bits=bits: depthwise_model(bits), id=f"depthwise-{bits}") for bits in (8, 4, 2)),
    pytest.param(codes_model, id="codes"),
]


@pytest.mark.parametrize("features", FLAVOURS)
@pytest.mark.parametrize("make", MODELS)
def test_kernels_give_the_codes_of_the_operators(make: Callable[[], Model], features: str, tmp_path: Path) -> None:
    host = replace(PROCESSORS["x86-64"], features=frozenset(features.split()))
    run(make(), tmp_path, host, sanitize=True)


@pytest.mark.edge
@pytest.mark.parametrize("name", ["cortex-m4", "cortex-m0+", "cortex-m55", "aarch64-dotprod"])
@pytest.mark.parametrize("make", MODELS)
def test_kernels_give_the_same_codes_on_other_processors(make: Callable[[], Model], name: str, tmp_path: Path) -> None:
    run(make(), tmp_path, PROCESSORS[name], sanitize=False)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_packed_words_hold_what_one_mask_widens(bits: int) -> None:
    """The f-th shift of a word shows codes 4 * (f // 2) + f % 2 and the next but one, as inputs are widened; without sign below 8 bits."""
    product = Product(bits, shape="pairs")
    weight = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (3, product.step + 1), dtype=torch.int8).numpy()
    words = pack_rows(weight, product).view(np.uint32)
    assert words.shape == (2, 2, 2)
    offset, mask = (0 if bits == 8 else 1 << (bits - 1)), (1 << bits) - 1
    for f in range(16 // bits):
        low, high = words[0, 0] >> (bits * f) & mask, words[0, 0] >> (16 + bits * f) & mask
        at = 4 * (f // 2) + f % 2
        assert (low == (weight[:2, at].astype(np.int64) + offset & mask)).all()
        assert (high == (weight[:2, at + 2].astype(np.int64) + offset & mask)).all()
    assert words[1, 0, 1] == sum(offset << (bits * f) for f in range(32 // bits))  # a row of zeros behind


def test_channels_of_narrow_weights_begin_at_a_byte() -> None:
    weight = np.array([[1, -2, 3], [-1, 0, 7]], np.int8)
    assert pack_channels(weight, 4).view(np.uint8).tolist() == [[0x1E, 0x30], [0xF0, 0x70]]


def test_columns_are_computed_twice_only_where_nothing_else_fits() -> None:
    assert [columns_together(width) for width in (1, 2, 3, 4, 5, 6, 7, 12, 25)] == [1, 2, 3, 4, 5, 3, 4, 4, 5]
