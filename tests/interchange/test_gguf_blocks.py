"""The block types of ggml, held to scalar code written after ggml-quants.c and, where it is installed, to the package gguf."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from qcompile.formats import Quantized, parse_scheme, quantize_tensor
from qcompile.interchange.checkpoint import StoredWeight
from qcompile.interchange.gguf_blocks import BLOCKS, BY_NAME, Block, choose_block, read_blocks, write_blocks

# Where the float16 numbers of a block lie.
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2],
          "Q5_K": [0, 2], "Q6_K": [208], "TQ2_0": [64]}  # fmt: skip

f32 = np.float32
Element = tuple[int, np.float32, np.float32]  # code, scale, minimum


def random_blocks(block: Block, count: int) -> np.ndarray:
    """Return blocks of random bits, their scales of both signs and tiny and zero among them."""
    random = np.random.default_rng(block.number)
    data = random.integers(0, 256, (count, block.bytes), dtype=np.uint8)
    if block.name == "TQ2_0":  # 3 is no ternary digit
        digits = random.integers(0, 3, (count, 64, 4), dtype=np.uint8)
        data[:, :64] = digits[..., 0] | digits[..., 1] << 2 | digits[..., 2] << 4 | digits[..., 3] << 6
    for place in HALVES[block.name]:
        d = random.normal(0, 0.02, count).astype(np.float16)
        d[:3] = 0, 6e-8, -60000
        data[:, place : place + 2] = d.view(np.uint8).reshape(count, 2)
    return data


# ---- one element after the other, after ggml-quants.c ---------------------------------------------------------------------


def half(b: np.ndarray, place: int) -> np.float32:
    return b[place : place + 2].view(np.float16)[0].astype(f32)


def fives(b: np.ndarray, place: int) -> Iterator[int]:
    high = int(b[place : place + 4].view(np.uint32)[0])
    for j in range(32):
        byte = int(b[place + 4 + j % 16])
        yield (byte & 15 if j < 16 else byte >> 4) | (high >> j & 1) << 4


def fours(b: np.ndarray, place: int) -> Iterator[int]:
    for j in range(32):
        byte = int(b[place + j % 16])
        yield byte & 15 if j < 16 else byte >> 4


def scale_min_k4(j: int, q: np.ndarray) -> tuple[int, int]:
    q = q.astype(int)
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return (q[j + 4] & 15) | (q[j - 4] >> 6) << 4, (q[j + 4] >> 4) | (q[j] >> 6) << 4


def q4_k(b: np.ndarray) -> Iterator[Element]:
    for j in range(8):
        scale, minimum = scale_min_k4(j, b[4:16])
        for byte in b[16 + 32 * (j // 2) :][:32].astype(int):
            yield (byte & 15 if j % 2 == 0 else byte >> 4), half(b, 0) * f32(scale), half(b, 2) * f32(minimum)


def q5_k(b: np.ndarray) -> Iterator[Element]:
    for number, (code, scale, minimum) in enumerate(q4_k(np.concatenate([b[:16], b[48:]]))):
        yield code + (16 if b[16 + number % 32] >> (number // 32) & 1 else 0), scale, minimum


def q2_k(b: np.ndarray) -> Iterator[Element]:
    for number in range(256):
        half_block, shift, place = number // 128, number % 128 // 32, number % 32
        pair = int(b[number // 16])
        yield int(b[16 + 32 * half_block + place]) >> 2 * shift & 3, half(b, 80) * f32(pair & 15), half(b, 82) * f32(pair >> 4)


def q3_k(b: np.ndarray) -> Iterator[Element]:
    packed = b[96:108].astype(int)
    for number in range(256):
        half_block, shift, place, s = number // 128, number % 128 // 32, number % 32, number // 16
        scale = (packed[s] & 15 if s < 8 else packed[s - 8] >> 4) | (packed[8 + s % 4] >> 2 * (s // 4) & 3) << 4
        low = int(b[32 + 32 * half_block + place]) >> 2 * shift & 3
        yield low - (0 if b[place] >> (number // 32) & 1 else 4), half(b, 108) * f32(scale - 32), f32(0)


def q6_k(b: np.ndarray) -> Iterator[Element]:
    for number in range(256):
        n, quarter, place = number // 128, number % 128 // 32, number % 32
        low = int(b[64 * n + place + 32 * (quarter % 2)])
        code = (low & 15 if quarter < 2 else low >> 4) | (int(b[128 + 32 * n + place]) >> 2 * quarter & 3) << 4
        yield code - 32, half(b, 208) * f32(b[192:208].view(np.int8)[number // 16]), f32(0)


SCALAR: dict[str, Callable[[np.ndarray], Iterator[Element]]] = {
    "Q4_0": lambda b: ((q - 8, half(b, 0), f32(0)) for q in fours(b, 2)),
    "Q4_1": lambda b: ((q, half(b, 0), -half(b, 2)) for q in fours(b, 4)),
    "Q5_0": lambda b: ((q - 16, half(b, 0), f32(0)) for q in fives(b, 2)),
    "Q5_1": lambda b: ((q, half(b, 0), -half(b, 2)) for q in fives(b, 4)),
    "Q8_0": lambda b: ((int(q), half(b, 0), f32(0)) for q in b[2:].view(np.int8)),
    "Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k,
    "TQ2_0": lambda b: ((int(b[32 * (k // 128) + k % 32] >> 2 * (k % 128 // 32) & 3) - 1, half(b, 64), f32(0)) for k in range(256)),
}  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_blocks_are_read_as_ggml_reads_them(block: Block) -> None:
    data = random_blocks(block, 6)
    weight = read_blocks(data.tobytes(), block, (3, 2 * block.elements))
    expected = [list(SCALAR[block.name](row)) for row in data]
    codes = np.array([[code for code, _, _ in row] for row in expected]).reshape(3, -1)
    values = np.array([[f32(code) * scale - minimum for code, scale, minimum in row] for row in expected], f32).reshape(3, -1)
    assert (weight.quantized.codes.numpy() == codes).all()
    assert weight.quantized.scheme.format.lowest <= codes.min()
    assert weight.quantized.scheme.format.highest >= codes.max()
    assert np.array_equal(weight.dequantize().numpy(), values)
    assert weight.quantized.scale.shape == weight.quantized.scheme.granularity.scale_shape(weight.shape)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_values_equal_those_of_the_package_gguf(block: Block) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    data = random_blocks(block, 64)
    weight = read_blocks(data.tobytes(), block, (8, 8 * block.elements))
    values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[block.name])
    assert np.array_equal(weight.dequantize().numpy().reshape(values.shape), values)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "TQ2_0"])
def test_blocks_that_are_written_again_are_the_same_bytes(name: str) -> None:
    block = BY_NAME[name]
    data = random_blocks(block, 12)
    weight = read_blocks(data.tobytes(), block, (4, 3 * block.elements))
    assert choose_block(weight)[0] is block
    assert write_blocks(weight, block) == data.tobytes()


@pytest.mark.parametrize(
    ("scheme", "columns", "expected"),
    [
        ("int4 group=32 sym scale=f16", 64, "Q4_0"),
        ("int4 group=128 sym scale=f16", 256, "Q4_0"),
        ("int3 channel=0 sym scale=f16", 64, "Q4_0"),
        ("int8 channel=0 sym scale=f16", 64, "Q8_0"),
        ("int8 tensor sym scale=f16", 64, "Q8_0"),
        ("ternary channel=0 sym scale=f16", 512, "TQ2_0"),
        ("ternary group=64 sym scale=f16", 512, "Q4_0"),
    ],
)
def test_a_weight_goes_into_blocks_and_back_with_its_values(scheme: str, columns: int, expected: str) -> None:
    quantized = quantize_tensor(torch.randn(6, columns), parse_scheme(scheme))
    block, reason = choose_block(StoredWeight(quantized))
    assert block is not None, reason
    assert block.name == expected
    again = read_blocks(write_blocks(StoredWeight(quantized), block), block, (6, columns))
    assert torch.equal(again.quantized.codes, quantized.codes)
    assert torch.equal(again.dequantize(), quantized.dequantize())


@pytest.mark.parametrize(
    ("scheme", "columns", "reason"),
    [
        ("int4 group=32 sym", 64, "no float16"),
        ("int4 group=16 sym scale=f16", 64, "do not divide"),
        ("int4 channel=0 sym scale=f16", 48, "do not divide"),
        ("int4 channel=1 sym scale=f16", 64, "do not divide"),
        ("int4 group=32 affine scale=f16", 64, "no signed integer"),
        ("nf4 group=32 sym scale=f16", 64, "no signed integer"),
    ],
)
def test_a_weight_that_no_block_holds_exactly_has_a_reason(scheme: str, columns: int, reason: str) -> None:
    quantized = quantize_tensor(torch.randn(6, columns), parse_scheme(scheme))
    block, said = choose_block(StoredWeight(quantized))
    assert block is None
    assert reason in said


def test_a_ternary_digit_of_three_is_refused() -> None:
    with pytest.raises(ValueError, match="ternary"):
        read_blocks(bytes([255] * 66), BY_NAME["TQ2_0"], (1, 256))


def test_a_scale_that_is_no_number_is_refused() -> None:
    for name in HALVES:
        data = random_blocks(BY_NAME[name], 4)
        data[1, HALVES[name][-1] : HALVES[name][-1] + 2] = np.array([np.nan if name == "Q4_K" else np.inf], np.float16).view(np.uint8)
        with pytest.raises(ValueError, match="NaN or infinite"):
            read_blocks(data.tobytes(), BY_NAME[name], (4, BY_NAME[name].elements))


def test_columns_and_minima_are_part_of_a_value() -> None:
    codes = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=torch.uint8)
    quantized = Quantized(codes, torch.tensor([[1.0, 2.0], [4.0, 8.0]]), None, parse_scheme("uint2 group=2 sym"))
    weight = StoredWeight(quantized, torch.tensor([[0.5, 1.0], [0.25, 0.0]]), torch.tensor([2, 0, 3, 1]))
    assert weight.dequantize().tolist() == [[0.5, 5.0, -0.5, 3.0], [7.75, 0.0, 11.75, 8.0]]
