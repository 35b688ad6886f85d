"""Attention over codes against the dialect (``qc.attention_codes``), bit for bit: odd sizes, extreme codes, masks, caches, every set."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from qcompile.backends.cpu.build import build
from qcompile.backends.cpu.kernels import isa as instruction_sets
from qcompile.backends.cpu.kernels.attention_codes import PASS, TASK_ROWS, CodeAttention, attention_codes
from qcompile.backends.cpu.target import TARGET

from qcompile.capture.torch_export import capture_module
from qcompile.graph.dialect import POWER, _power_codes

Build = Callable[[Any, str], Callable[..., None]]
ALL = [pytest.param(name, marks=[pytest.mark.edge] if found.machine == "aarch64" else []) for name, found in instruction_sets.SETS.items()]
SIZES = [(1, 1, 1), (2, 5, 3), (1, 33, 129), (1, 17, 70)]  # batch, tokens, keys
MANY = [(1, 40, PASS + 90), (1, TASK_ROWS + 5, PASS + 1)]  # keys of several passes, rows of several tasks


def _check(spec: CodeAttention, kernel: Callable[..., None], sizes: tuple[int, int, int], kind: str) -> None:
    """Compare one call with the dialect: random codes, all codes at an end of their range, or steps too fine to tell scores apart.

    Random scores are spread over the weights' whole range: enough different powers for some to lie beside a tie, where a rounding that
    the dialect does not have, or one less, would show.
    """
    batch, tokens, keys = sizes

    def codes(rows: int, heads: int) -> torch.Tensor:
        shape = (batch, rows, heads * spec.head_dim)
        found = torch.tensor([-128, 127])[torch.randint(0, 2, shape)] if kind == "extreme" else torch.randint(-128, 128, shape)
        return found.to(torch.int8)

    q, k, v = codes(tokens, spec.heads), codes(keys, spec.kv_heads), codes(keys, spec.kv_heads)
    spread = (spec.scale * spec.head_dim**0.5 * 74**2 / 2) ** -0.5  # codes deviate by 74: scores by twice the unit of the softmax
    fine = {"random": spread, "extreme": 0.01, "fine": 1e-12}[kind] * (0.8 + 0.4 * torch.rand(2, 1))
    scales = [*fine, torch.tensor([0.1])]
    mask = torch.rand(batch, keys) > 0.3 if spec.key_mask else None
    if mask is not None:
        mask[0, : keys // 2] = False  # under causal, the first rows then see nothing
    past = torch.randint(0, max(keys - tokens, 0) + 1, (batch,)) if spec.past else None
    expected = torch.ops.qc.attention_codes(
        *itertools.chain(*zip((q, k, v), (scale[0] for scale in scales), strict=True)), mask, spec.heads, spec.kv_heads, spec.scale,
        spec.causal, past, spec.window,
    )  # fmt: skip
    grid = (torch.tensor([0.37]), torch.tensor([7], dtype=torch.int32)) if spec.codes else (None, None)
    if spec.codes:
        expected = torch.ops.qc.quantize(expected, grid[0][0], grid[1][0], f"{spec.codes} tensor affine")
    found = torch.full_like(expected, 77)
    arguments = [q, k, v, *(scale.clone() for scale in scales), mask, past, *grid, found]
    kernel(*(argument for argument in arguments if argument is not None))
    assert torch.equal(found, expected), (sizes, kind)


SPECS = {
    "heads of half a tile, masked": CodeAttention(3, 3, 32, 0.5, key_mask=True),
    "ragged heads that share keys, causal": CodeAttention(4, 2, 20, 0.4, key_mask=True, causal=True, codes="uint8"),
    "whole tiles": CodeAttention(2, 1, 64, 0.1, codes="int8"),
    "more than a tile, window": CodeAttention(1, 1, 80, 0.1, causal=True, window=40),
    "odd channels": CodeAttention(2, 2, 7, 1.0, key_mask=True),
}


@pytest.mark.parametrize("name", SPECS)
def test_codes_agree_with_the_dialect(compile_for: Build, name: str) -> None:
    spec = SPECS[name]
    kernel = compile_for(attention_codes(spec), spec.isa)
    for sizes, kind in itertools.product([*SIZES, *MANY], ("random", "extreme", "fine")):
        if not spec.causal or sizes[2] >= sizes[1]:
            _check(spec, kernel, sizes, kind)


def test_powers_beside_a_tie(compile_for: Build) -> None:
    """Steps between scores at which a fused multiply-add would round a weight otherwise; a query of one sees scores 0 to -255."""
    scores, steps = torch.arange(-255.0, 1.0), torch.linspace(0.02, 0.04, 20_000)
    x = (scores * steps.unsqueeze(1)).clamp(min=-10.0)
    y = torch.full_like(x, POWER[0])
    for coefficient in POWER[1:]:
        y = (y.double() * (x - x.round()).double() + coefficient).float()
    beside = ((y * torch.exp2(x.round())).round() != _power_codes(x)).any(1)
    spec = CodeAttention(1, 1, 4, math.log(2))  # a step of q_scale
    kernel = compile_for(attention_codes(spec), spec.isa)
    q, k = torch.tensor([[[1, 0, 0, 0]]], dtype=torch.int8), torch.zeros(1, 256, 4, dtype=torch.int8)
    k[0, :, 0], one = torch.arange(-128, 128), torch.ones(1)
    v = torch.randint(-128, 128, (1, 256, 4)).to(torch.int8)
    assert beside.any()
    for step in steps[beside]:
        expected = torch.ops.qc.attention_codes(q, step, k, one[0], v, one[0], None, 1, 1, spec.scale, False)
        found = torch.full_like(expected, 77)
        kernel(q, k, v, step.reshape(1).clone(), one, one.clone(), found)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("window", [0, 60])
def test_caches_with_room_for_more(compile_for: Build, window: int) -> None:
    spec = CodeAttention(4, 2, 32, 0.3, causal=True, past=True, window=window)
    kernel = compile_for(attention_codes(spec), spec.isa)
    for sizes in ((3, 1, 300), (2, 1, 2 * PASS + 20), (3, 40, 290), (1, 17, 17)):
        _check(spec, kernel, sizes, "random")


@pytest.mark.parametrize("instruction_set", ALL, indirect=True)
@pytest.mark.parametrize("head_dim", [32, 68])
def test_every_instruction_set(compile_for: Build, instruction_set: str, head_dim: int) -> None:
    spec = CodeAttention(2, 1, head_dim, 0.2, key_mask=True, causal=True, isa=instruction_set)
    kernel = compile_for(attention_codes(spec), instruction_set)
    for sizes, kind in itertools.product(((2, 19, 35), (1, 1, 3)), ("random", "extreme")):
        _check(spec, kernel, sizes, kind)


class _Attention(torch.nn.Module):
    """Attention over codes whose result is read as floats, and as codes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.02))
        self.register_buffer("zero", torch.tensor(120, dtype=torch.int32))

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        codes, keys = (torch.ops.qc.quantize(t, self.scale, None, "int8 tensor sym") for t in (q, k))
        operands = (codes, self.scale, keys, self.scale, keys, self.scale, None, 2, 2)
        attended = torch.ops.qc.attention_codes(*operands, 0.3, False)
        other = torch.ops.qc.attention_codes(*operands, 0.4, False)
        return attended, torch.ops.qc.quantize(other, self.scale, self.zero, "uint8 tensor affine")


def test_built_graphs_take_this_kernel() -> None:
    module = _Attention().eval()
    graph = capture_module(module, (torch.randn(3, 5, 32), torch.randn(3, 9, 32)), dynamic_shapes={"q": {1: "tokens"}, "k": {1: "keys"}})
    assert not TARGET.leftovers(graph)
    run = build(graph.module, threads=2)
    for tokens, keys in ((5, 9), (40, 33)):
        q, k = torch.randn(3, tokens, 32), torch.randn(3, keys, 32)
        for found, expected in zip(run(q, k), module(q, k), strict=True):
            assert torch.equal(found, expected)
    assert {"attention_codes_2x16", "attention_codes_2x16_uint8"} <= {name for name, _ in run.kernel_calls(q, k)}


def test_what_no_attention_has() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        CodeAttention(3, 2, 16, 1.0)
    with pytest.raises(ValueError, match="of causal attention"):
        replace(SPECS["whole tiles"], past=True)
