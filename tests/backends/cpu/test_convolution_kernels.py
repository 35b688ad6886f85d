"""Convolution kernels, dense, grouped and depthwise: integers bit for bit what ``qc.conv2d`` computes, floats within rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from qcompile.backends.cpu.kernels import convolution_plan
from qcompile.backends.cpu.kernels.code_rounding import is_easy
from qcompile.backends.cpu.kernels.code_sums import CodeSum
from qcompile.backends.cpu.kernels.convolution import convolution, pack_convolution
from qcompile.backends.cpu.kernels.convolution_spec import Blocks, Convolution
from qcompile.backends.cpu.kernels.depthwise import depthwise, pack_depthwise
from qcompile.backends.cpu.kernels.depthwise_words import Plan, takes_words
from qcompile.backends.cpu.kernels.isa import AMX, AVX512, AVX512_VNNI, PORTABLE, cannot_run, detect
from qcompile.backends.cpu.kernels.matmul_epilogue import Epilogue

from qcompile.graph.dialect import ACTIVATIONS  # registers torch.ops.qc

Build = Callable[..., Callable[..., None]]
HOST = detect()
RANGES = {"int8": (-128, 127), "uint8": (0, 255)}


def conv(channels: int, outputs: int, height: int, width: int, kernel: int, **options: object) -> Convolution:
    pairs = {name: (v, v) if isinstance(v := options[name], int) else v for name in ("stride", "padding", "dilation") if name in options}
    return Convolution(channels, outputs, height, width, (kernel, kernel), **{"isa": HOST, **options, **pairs})


CODES = Epilogue(bias="float32", activation="relu", output="uint8")
DENSE = {
    "3x3 without tiles": conv(16, 32, 9, 10, 3, padding=1, isa=AVX512_VNNI, epilogue=CODES),
    "1x1 int8 without tiles": conv(67, 50, 5, 7, 1, isa=AVX512_VNNI, x="int8", x_affine=False, epilogue=Epilogue(residual=True)),
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
    "64 + overlap, 7x7 int8": conv(136, 136, 9, 8, 7, padding=3, groups=136, x="int8", epilogue=replace(CODES, output="int8")),
    "blocks of four rows": conv(80, 80, 10, 7, 5, padding=2, groups=80, epilogue=replace(CODES, activation="relu6", bias="int32")),
    "blocks of two strided rows": conv(67, 67, 12, 9, 5, stride=2, padding=2, groups=67, epilogue=replace(CODES, activation="hardswish")),
    "strips of columns": conv(64, 64, 3, 150, 3, padding=1, groups=64, epilogue=replace(CODES, activation="none")),
    "strips of strided columns": conv(20, 20, 5, 601, 3, stride=2, padding=1, groups=20, epilogue=CODES),
    "no padding, narrow codes": conv(70, 70, 9, 9, 3, groups=70, epilogue=replace(CODES, lowest=3, highest=200)),
    "all columns outside": conv(33, 33, 3, 2, 3, stride=(2, 3), padding=(2, 5), groups=33, epilogue=CODES),
    "first column outside": conv(20, 20, 3, 1, 3, stride=(1, 20), padding=(1, 5), groups=20, epilogue=CODES),
    "strips outside": conv(64, 64, 2, 2, 3, padding=(1, 150), groups=64, epilogue=CODES),
    "long strides": conv(64, 64, 4, 200, 3, stride=(1, 99), padding=1, groups=64, epilogue=CODES),
    "more taps than registers": conv(64, 64, 12, 11, 11, padding=5, groups=64, epilogue=CODES),
    "5x5 strided int8": conv(67, 67, 9, 7, 5, stride=2, padding=2, groups=67, x="int8", epilogue=Epilogue("int32", "add_relu6", True)),
    "few channels, 7x7": conv(5, 5, 4, 3, 7, padding=3, groups=5, x_affine=False, epilogue=Epilogue(output="int8")),
    "weight zero points": conv(80, 80, 5, 6, 3, dilation=2, groups=80, weight_affine=True, epilogue=Epilogue(output="uint8")),
    "taps by four": conv(33, 33, 5, 7, 3, dilation=2, groups=33, x="int8", epilogue=CODES),
    "AVX512 alone": conv(83, 83, 6, 5, 5, padding=2, groups=83, isa=AVX512, epilogue=CODES),
    "portable": conv(67, 67, 5, 5, 3, padding=1, groups=67, isa=PORTABLE, x="int8", epilogue=CODES),
}
TILED = {
    "pixels as they come": conv(128, 64, 9, 11, 1, isa=AMX, epilogue=CODES),
    "pixels in tiles of fewer words": conv(96, 48, 5, 9, 1, isa=AMX, x="int8", epilogue=replace(CODES, activation="none", output="int8")),
    "pixels copied": conv(65, 33, 7, 5, 1, isa=AMX, epilogue=Epilogue("int32", "hardswish", output="uint8")),
    "few pixels and channels": conv(17, 8, 3, 2, 1, isa=AMX, epilogue=Epilogue("float32", "add_relu", True, "int8")),
    "many pixels": conv(16, 96, 29, 28, 1, isa=AMX, epilogue=CODES),
    "lines of a stem": conv(3, 64, 20, 37, 7, stride=2, padding=3, isa=AMX, epilogue=CODES),
    "lines strided without a copy": conv(64, 32, 9, 41, 1, stride=2, isa=AMX, epilogue=CODES),
    "lines without padding": conv(64, 80, 7, 40, 3, isa=AMX, x="int8", x_affine=False, epilogue=Epilogue("float32")),
    "taps apart": conv(17, 32, 11, 23, 3, dilation=2, padding=(3, 1), isa=AMX, x="int8", epilogue=CODES),
    "columns split among threads": conv(64, 160, 6, 9, 3, padding=1, isa=AMX, epilogue=replace(CODES, activation="hardswish")),
    "lines too short": conv(24, 96, 5, 7, 3, padding=1, isa=AMX, epilogue=CODES),
    "lines too short without padding": conv(65, 33, 9, 13, 3, stride=2, dilation=(1, 2), isa=AMX, x="int8", epilogue=CODES),
    "bands of lines": conv(36, 48, 12, 10, 3, stride=(2, 1), padding=(1, 2), isa=AMX, blocks=Blocks(32, 2, 4 << 10), epilogue=CODES),
    "single tiles": conv(12, 24, 9, 11, 3, padding=1, isa=AMX, blocks=Blocks(7, 1, 2 << 10), epilogue=CODES),
    "bands of pixels": conv(20, 40, 15, 13, 1, isa=AMX, blocks=Blocks(30, 1, 2 << 10), epilogue=CODES),
    "lines of a pixel": conv(64, 32, 9, 1, 3, padding=(1, 1), isa=AMX, epilogue=CODES),
}  # fmt: skip
SYMMETRIC = Epilogue(output="int8", lowest=-127)
SUMS = {
    "tiles": conv(128, 64, 9, 11, 1, isa=AMX, epilogue=SYMMETRIC, sum=CodeSum("uint8", "relu", "uint8")),
    "tiles of a float bias": conv(16, 96, 9, 11, 3, padding=1, isa=AMX, epilogue=CODES, sum=CodeSum("int8", "none", "int8", -100, 99)),
    "tiles of ragged columns": conv(65, 41, 7, 5, 1, isa=AMX, epilogue=replace(CODES, bias="int32"), sum=CodeSum("int8", "relu6", "uint8")),
    "single tiles": conv(24, 16, 9, 11, 1, isa=AMX, epilogue=SYMMETRIC, sum=CodeSum("uint8", "hardswish", "uint8")),
    "tiles, values and codes": conv(64, 32, 5, 9, 1, isa=AMX, epilogue=CODES, sum=CodeSum("uint8", "relu", "uint8", values=True)),
    "tiles, values": conv(64, 41, 5, 9, 3, isa=AMX, epilogue=SYMMETRIC, sum=CodeSum("uint8", values=True)),
    "vectors": conv(17, 48, 6, 5, 3, padding=1, isa=AVX512_VNNI, epilogue=CODES, sum=CodeSum("uint8", "relu", "uint8")),
    "vectors, values and codes": conv(67, 50, 5, 7, 1, isa=AVX512, epilogue=SYMMETRIC, sum=CodeSum("int8", "none", "int8", values=True)),
    "groups": conv(6, 9, 7, 6, 3, groups=3, weight_affine=True, x="int8", epilogue=CODES, sum=CodeSum("int8", "relu", "uint8")),
    "portable": conv(18, 33, 6, 5, 3, padding=1, isa=PORTABLE, epilogue=CODES, sum=CodeSum("uint8", "relu6", "int8", values=True)),
    "depthwise": conv(83, 83, 6, 5, 3, padding=1, groups=83, epilogue=CODES, sum=CodeSum("uint8", "relu", "uint8")),
    "depthwise of 64": conv(128, 128, 5, 7, 5, padding=2, groups=128, epilogue=SYMMETRIC, sum=CodeSum("int8", "none", "int8")),
    "depthwise of few": conv(5, 5, 4, 3, 3, padding=1, groups=5, epilogue=SYMMETRIC, sum=CodeSum("uint8", "relu", "uint8")),
    "depthwise, values": conv(64, 64, 4, 3, 3, padding=1, groups=64, epilogue=CODES, sum=CodeSum("uint8", "relu", values=True)),
    "depthwise, values and codes": conv(70, 70, 4, 3, 3, groups=70, epilogue=CODES, sum=CodeSum("int8", "relu", "int8", values=True)),
    "depthwise by four": conv(33, 33, 5, 7, 3, dilation=2, groups=33, x="int8", epilogue=CODES, sum=CodeSum("uint8", "relu", "uint8")),
    "depthwise, portable": conv(37, 37, 5, 5, 3, groups=37, isa=PORTABLE, epilogue=SYMMETRIC, sum=CodeSum("uint8", "relu", "uint8")),
}  # fmt: skip


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
        if spec.sum is not None:
            low, high = RANGES[spec.sum.addend]
            self.addend = torch.randint(low, high + 1, out_shape).to(getattr(torch, spec.sum.addend))
            self.addend_scale, self.addend_zero = self.out_scale * 0.73, torch.randint(low, high + 1, (), dtype=torch.int32)
            if extreme:
                self.addend[:] = high if extreme == "high" else low
                self.addend_zero.fill_(low if extreme == "high" else high)
            self.sum_scale, self.sum_zero = self.out_scale * 1.37, torch.tensor(-5, dtype=torch.int32)

    def expected(self) -> list[torch.Tensor]:
        """Return the dialect's results, NHWC."""
        spec, epilogue = self.spec, self.spec.epilogue
        out = (self.out_scale, self.out_zero) if epilogue.codes else (None, None)
        y = torch.ops.qc.conv2d(
            self.x, self.x_scale, self.x_zero, self.weight, self.scale, self.zero, self.bias, self.residual, *out,
            f"{spec.x} tensor {'affine' if spec.x_affine else 'sym'}", f"int8 channel=0 {'affine' if spec.weight_affine else 'sym'}",
            spec.kernel[1], spec.stride, spec.padding, spec.dilation, spec.groups, epilogue.activation,
            f"{epilogue.output} tensor affine" if epilogue.codes else "",
        )  # fmt: skip
        return [nhwc(y)] if spec.sum is None else self._added(y.clamp(*epilogue.range), spec.sum)

    def _added(self, codes: torch.Tensor, wanted: CodeSum) -> list[torch.Tensor]:
        """Return values and codes of the sum; ranges of fewer codes than the dtype has clamp after the dialect's rounding."""
        terms = (codes, self.out_scale, self.out_zero, self.addend, self.addend_scale, self.addend_zero)
        schemes = (f"{self.spec.epilogue.output} tensor affine", f"{wanted.addend} tensor affine")
        a, b = (torch.ops.qc.dequantize(*terms[3 * i : 3 * i + 3], schemes[i]) for i in (0, 1))
        found = [nhwc(ACTIVATIONS[wanted.activation](a + b))] if wanted.values else []
        if wanted.output is not None:
            out = torch.ops.qc.add(*terms, self.sum_scale, self.sum_zero, *schemes, f"{wanted.output} tensor affine", wanted.activation)
            found.append(nhwc(out).clamp(*wanted.range))
        return found

    def arguments(self, pack: Callable[..., list[object]], unsigned_weights: bool = False) -> list[torch.Tensor]:
        """Return the kernel's arguments without the result; unsigned weights are the same values, codes and zero points 128 higher."""
        weight, zero = self.weight, self.zero
        if unsigned_weights:
            weight, zero = (weight.to(torch.int16) + 128).to(torch.uint8), zero + 128
        constants = pack(self.spec, *(None if t is None else t.numpy() for t in (weight, self.scale, zero, self.bias)))
        found = [nhwc(self.x), self.x_scale.reshape(1), *([] if self.x_zero is None else [self.x_zero.reshape(1)])]
        found += [torch.from_numpy(constant) for constant in constants]
        found += [] if self.residual is None else [nhwc(self.residual)]
        found += [self.out_scale.reshape(1), self.out_zero.reshape(1)] if self.spec.epilogue.codes else []
        if self.spec.sum is not None:
            found += [nhwc(self.addend), self.addend_scale.reshape(1), self.addend_zero.reshape(1)]
            found += [self.sum_scale.reshape(1), self.sum_zero.reshape(1)] if self.spec.sum.output is not None else []
        return found


def nhwc(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(0, 2, 3, 1).contiguous()


def check(kernel: Callable[..., None], case: Case, arguments: list[torch.Tensor]) -> None:
    expected = case.expected()
    found = [torch.full_like(tensor, 77) for tensor in expected]
    kernel(*arguments, *found)
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", DENSE)
def test_dense_and_grouped(compile_kernel: Build, name: str) -> None:
    spec = DENSE[name]
    if reason := cannot_run(spec.isa):
        pytest.skip(reason)
    kernel = compile_kernel(convolution(spec), spec.isa)
    for batch, extreme in ((1, ""), (3, ""), (1, "high"), (1, "low")):
        case = Case(spec, batch, extreme)
        check(kernel, case, case.arguments(pack_convolution))
    if spec.weight_affine:
        case = Case(spec, 2)
        check(kernel, case, case.arguments(pack_convolution, unsigned_weights=True))


@pytest.mark.parametrize("name", TILED)
def test_tiled(compile_kernel: Build, name: str) -> None:
    spec = TILED[name]
    if reason := cannot_run(spec.isa):
        pytest.skip(reason)
    kernels = [compile_kernel(convolution(spec, easy=easy), spec.isa) for easy in ((False, True) if spec.epilogue.codes else (False,))]
    for batch, extreme in ((1, ""), (3, ""), (1, "high"), (1, "low")):
        case = Case(spec, batch, extreme)
        for kernel in kernels:
            check(kernel, case, case.arguments(pack_convolution))


def test_tiled_columns_of_many_threads(compile_kernel: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five panels for four threads are two each, and none for the last."""
    if reason := cannot_run(AMX):
        pytest.skip(reason)
    monkeypatch.setattr(convolution_plan.instruction_sets, "thread_count", lambda: 4)
    spec = conv(64, 160, 5, 9, 3, padding=1, isa=AMX, epilogue=CODES)
    assert spec.tasks[1] == 4
    case = Case(spec, 2)
    check(compile_kernel(convolution(spec), AMX), case, case.arguments(pack_convolution))


def test_tile_plans_cut_all_ways() -> None:
    """The suite has every way of reading an image, and every loop of a task in more than one turn."""
    plans = [spec.plan for spec in TILED.values()]
    assert all(spec.tiled for spec in TILED.values())
    assert {(plan.flat, plan.copies) for plan in plans} == {(flat, copies) for flat in (False, True) for copies in (False, True)}
    assert {plan.joined for plan in plans} == {plan.steps > 1 for plan in plans} == {plan.line_tiles > 1 for plan in plans} == {False, True}
    assert {plan.gathers for plan in plans} == {False, True}
    assert {plan.block for plan in plans} == {plan.vectors for plan in plans} == {1, 2}
    assert any(plan.tasks[1] > 1 for plan in plans) or detect() == PORTABLE
    assert {plan.flat for plan in plans if plan.band_bytes(plan.tasks[0]) <= 4 << 10 and plan.tasks[0] < plan.image_tiles} == {False, True}


@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise(compile_kernel: Build, name: str) -> None:
    spec = DEPTHWISE[name]
    if reason := cannot_run(spec.isa):
        pytest.skip(reason)
    kernels = [compile_kernel(depthwise(spec, easy=easy), spec.isa) for easy in ((False, True) if spec.epilogue.codes else (False,))]
    for batch, extreme in ((1, ""), (3, ""), (1, "high"), (1, "low")):
        case = Case(spec, batch, extreme)
        assert is_easy(float(case.out_scale)), "the quick rounding is right for this scale only if it is easy"
        for kernel in kernels:
            check(kernel, case, case.arguments(pack_depthwise))


@pytest.mark.parametrize("name", SUMS)
def test_sums_of_codes(compile_kernel: Build, name: str) -> None:
    spec = SUMS[name]
    if reason := cannot_run(spec.isa):
        pytest.skip(reason)
    build, pack = (depthwise, pack_depthwise) if spec.groups == spec.channels else (convolution, pack_convolution)
    kernels = [compile_kernel(build(spec, easy=easy), spec.isa) for easy in (False, True)]
    for batch, extreme in ((1, ""), (3, ""), (1, "high"), (1, "low")):
        case = Case(spec, batch, extreme)
        assert is_easy(float(case.out_scale)), "the quick rounding is right for this scale only if it is easy"
        assert is_easy(float(case.sum_scale)), "the same of the sum's"
        for kernel in kernels:
            check(kernel, case, case.arguments(pack))


def test_depthwise_plans_cut_all_ways() -> None:
    """The suite has every kind of block and strip of the kernel that reads words of rows."""
    plans = [Plan(spec) for spec in DEPTHWISE.values() if takes_words(replace(spec, isa=AVX512))]
    assert {plan.block for plan in plans} >= {1, 2, 4}
    assert {plan.words for plan in plans} >= {1, 2}
    assert {plan.strips > 1 for plan in plans if plan.spec.stride == (1, 1)} == {False, True}
    assert {plan.strips > 1 for plan in plans if plan.spec.stride == (2, 2)} == {False, True}


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
    with pytest.raises(ValueError, match="is codes"):
        conv(6, 9, 5, 5, 3, sum=CodeSum("uint8", output="uint8"))
    with pytest.raises(ValueError, match="no result"):
        CodeSum("uint8")
    with pytest.raises(ValueError, match="unknown"):
        CodeSum("float32", output="uint8")
    with pytest.raises(ValueError, match="do not divide"):
        conv(6, 9, 5, 5, 3, groups=4)
    with pytest.raises(ValueError, match="leaves nothing"):
        conv(6, 9, 2, 5, 3)
    with pytest.raises(ValueError, match="not depthwise"):
        depthwise(conv(6, 12, 5, 5, 3, groups=6))
    with pytest.raises(ValueError, match="does not fit"):
        pack_convolution(conv(6, 12, 5, 5, 3), torch.zeros(12, 5, 3, 3).numpy())
