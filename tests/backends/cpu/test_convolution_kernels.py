"""Convolution kernels, dense, grouped and depthwise: integers bit for bit what ``qc.conv2d`` computes, floats within rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from qcompile.backends.cpu.kernels.convolution import convolution, pack_convolution
from qcompile.backends.cpu.kernels.convolution_spec import Convolution
from qcompile.backends.cpu.kernels.depthwise import depthwise, pack_depthwise
from qcompile.backends.cpu.kernels.isa import PORTABLE, detect
from qcompile.backends.cpu.kernels.matmul_epilogue import Epilogue

import qcompile.graph.dialect  # noqa: F401 - registers torch.ops.qc

Build = Callable[..., Callable[..., None]]
HOST = detect()
RANGES = {"int8": (-128, 127), "uint8": (0, 255)}


def conv(channels: int, outputs: int, height: int, width: int, kernel: int, **options: object) -> Convolution:
    pairs = {name: (v, v) if isinstance(v := options[name], int) else v for name in ("stride", "padding", "dilation") if name in options}
    return Convolution(channels, outputs, height, width, (kernel, kernel), **{"isa": HOST, **options, **pairs})


CODES = Epilogue(bias="float32", activation="relu", output="uint8")
DENSE = {
    "3x3": conv(16, 32, 9, 10, 3, padding=1, epilogue=CODES),
    "ragged stem": conv(3, 37, 19, 17, 3, stride=2, padding=1, epilogue=Epilogue(bias="int32", activation="relu6")),
    "1x1 int8": conv(67, 50, 5, 7, 1, x="int8", x_affine=False, epilogue=Epilogue("float32", "add_relu", True, "int8")),
    "1x1 strided": conv(33, 16, 7, 9, 1, stride=2, x="int8", epilogue=replace(CODES, activation="hardswish")),
    "image smaller than kernel": conv(5, 1, 2, 3, 5, padding=2, epilogue=Epilogue(bias="float32", activation="relu6")),
    "groups, dilation, weight zero points": conv(
        6, 9, 7, 6, 3, stride=(1, 2), padding=(2, 3), dilation=(1, 2), groups=3, weight_affine=True, x="int8",
        epilogue=Epilogue(residual=True),
    ),
    "columns split among threads": conv(48, 128, 3, 3, 3, padding=1, epilogue=CODES),
    "portable": conv(18, 33, 6, 5, 3, padding=1, isa=PORTABLE, epilogue=CODES),
}  # fmt: skip
DEPTHWISE = {
    "64 + overlap": conv(83, 83, 6, 5, 3, padding=1, groups=83, epilogue=CODES),
    "5x5 strided int8": conv(67, 67, 9, 7, 5, stride=2, padding=2, groups=67, x="int8", epilogue=Epilogue("int32", "add_relu6", True)),
    "few channels, 7x7": conv(5, 5, 4, 3, 7, padding=3, groups=5, x_affine=False, epilogue=Epilogue(output="int8")),
    "weight zero points": conv(80, 80, 5, 6, 3, dilation=2, groups=80, weight_affine=True, epilogue=Epilogue(output="uint8")),
    "portable": conv(67, 67, 5, 5, 3, padding=1, groups=67, isa=PORTABLE, x="int8", epilogue=CODES),
}


class Case:
    """Random arguments of one convolution and what the dialect makes of them."""

    def __init__(self, spec: Convolution, batch: int, extreme: str = "") -> None:
        self.spec, epilogue = spec, spec.epilogue
        low, high = RANGES[spec.x]
        shape = (batch, spec.channels, spec.height, spec.width)
        self.x = torch.randint(low, high + 1, shape).to(getattr(torch, spec.x))
        self.weight = torch.randint(-128, 128, (spec.out_channels, spec.group_channels, *spec.kernel)).to(torch.int8)
        self.x_zero = torch.randint(low, high + 1, (), dtype=torch.int32)
        if extreme:  # all products of one sign and the largest size
            self.x[:], self.weight[:] = (high, -128) if extreme == "high" else (low, 127)
            self.x_zero.fill_(low if extreme == "high" else high)
        self.x_zero = self.x_zero if spec.x_affine else None
        self.x_scale, self.scale = torch.tensor(0.02), torch.rand(spec.out_channels) * 0.01 + 0.001
        self.zero = torch.randint(-128, 128, (spec.out_channels,), dtype=torch.int32) if spec.weight_affine else None
        integers = torch.randint(-9999, 9999, (spec.out_channels,), dtype=torch.int32)
        biases = {"none": None, "float32": torch.randn(spec.out_channels) * 3, "int32": integers}
        self.bias = biases[epilogue.bias]
        out_shape = (batch, spec.out_channels, spec.out_height, spec.out_width)
        self.residual = torch.randn(out_shape) * 5 if epilogue.residual else None
        self.out_scale, self.out_zero = torch.tensor(0.05 * spec.depth**0.5), torch.tensor(7, dtype=torch.int32)

    def expected(self) -> torch.Tensor:
        """Return the dialect's result, NHWC."""
        spec, epilogue = self.spec, self.spec.epilogue
        out = (self.out_scale, self.out_zero) if epilogue.codes else (None, None)
        y = torch.ops.qc.conv2d(
            self.x, self.x_scale, self.x_zero, self.weight, self.scale, self.zero, self.bias, self.residual, *out,
            f"{spec.x} tensor {'affine' if spec.x_affine else 'sym'}", f"int8 channel=0 {'affine' if spec.weight_affine else 'sym'}",
            spec.kernel[1], spec.stride, spec.padding, spec.dilation, spec.groups, epilogue.activation,
            f"{epilogue.output} tensor affine" if epilogue.codes else "",
        )  # fmt: skip
        return nhwc(y)

    def arguments(self, pack: Callable[..., list[object]], unsigned_weights: bool = False) -> list[torch.Tensor]:
        """Return the kernel's arguments without the result; unsigned weights are the same values, codes and zero points 128 higher."""
        weight, zero = self.weight, self.zero
        if unsigned_weights:
            weight, zero = (weight.to(torch.int16) + 128).to(torch.uint8), zero + 128
        constants = pack(self.spec, *(None if t is None else t.numpy() for t in (weight, self.scale, zero, self.bias)))
        found = [nhwc(self.x), self.x_scale.reshape(1), *([] if self.x_zero is None else [self.x_zero.reshape(1)])]
        found += [torch.from_numpy(constant) for constant in constants]
        found += [] if self.residual is None else [nhwc(self.residual)]
        return [*found, self.out_scale.reshape(1), self.out_zero.reshape(1)] if self.spec.epilogue.codes else found


def nhwc(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(0, 2, 3, 1).contiguous()


def check(kernel: Callable[..., None], case: Case, arguments: list[torch.Tensor]) -> None:
    expected = case.expected()
    out = torch.full_like(expected, 77)
    kernel(*arguments, out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", DENSE)
def test_dense_and_grouped(compile_kernel: Build, name: str) -> None:
    spec = DENSE[name]
    kernel = compile_kernel(convolution(spec), spec.isa)
    for batch, extreme in ((1, ""), (3, ""), (1, "high"), (1, "low")):
        case = Case(spec, batch, extreme)
        check(kernel, case, case.arguments(pack_convolution))
    if spec.weight_affine:
        case = Case(spec, 2)
        check(kernel, case, case.arguments(pack_convolution, unsigned_weights=True))


@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise(compile_kernel: Build, name: str) -> None:
    spec = DEPTHWISE[name]
    kernel = compile_kernel(depthwise(spec), spec.isa)
    for batch, extreme in ((1, ""), (3, ""), (1, "high"), (1, "low")):
        case = Case(spec, batch, extreme)
        check(kernel, case, case.arguments(pack_depthwise))


def test_column_tasks_cover_all_columns() -> None:
    """The suite has a case whose columns are split, else that path would go untested."""
    assert DENSE["columns split among threads"].tasks[1] > 1 or detect() == PORTABLE


@pytest.mark.parametrize("groups", [1, 7])
def test_float(compile_kernel: Build, groups: int) -> None:
    outputs = 7 if groups == 7 else 19
    spec = conv(7, outputs, 6, 5, 3, padding=1, groups=groups, x="float32", epilogue=Epilogue(bias="float32", activation="relu"))
    build, pack = (depthwise, pack_depthwise) if groups == 7 else (convolution, pack_convolution)
    x, weight, bias = torch.randn(2, 7, 6, 5), torch.randn(outputs, 7 // groups, 3, 3), torch.randn(outputs)
    out = torch.full((2, 6, 5, outputs), 77.0)
    constants = [torch.from_numpy(c) for c in pack(spec, weight.numpy(), bias=bias.numpy())]
    compile_kernel(build(spec))(nhwc(x), *constants, out)
    expected = nhwc(torch.relu(torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), 1, 1, 1, groups)))
    assert float((out - expected).abs().max()) <= spec.depth * 2.0**-23 * float(x.abs().max() * weight.abs().max()) * 4


def test_refusals() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        conv(6, 9, 5, 5, 3, groups=4)
    with pytest.raises(ValueError, match="leaves nothing"):
        conv(6, 9, 2, 5, 3)
    with pytest.raises(ValueError, match="not depthwise"):
        depthwise(conv(6, 12, 5, 5, 3, groups=6))
    with pytest.raises(ValueError, match="does not fit"):
        pack_convolution(conv(6, 12, 5, 5, 3), torch.zeros(12, 5, 3, 3).numpy())
