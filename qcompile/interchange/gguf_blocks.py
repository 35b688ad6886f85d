"""The block types of ggml: bytes <-> codes, scales and minima. Nothing is rounded on the way in.

A row is a run of blocks of 32 or 256 elements. What a block says, with float16 ``d``, ``dmin`` and ``m``:

| type | elements | value | scheme |
| --- | --- | --- | --- |
| Q4_0, Q5_0, Q8_0 | 32 | d * q | int4, int5, int8, ``group=32 sym scale=f16`` |
| Q4_1, Q5_1 | 32 | d * q + m | uint4, uint5, ``group=32 sym scale=f16`` and a minimum -m |
| Q4_K, Q5_K | 256 in eights of 32 | (d * sc) * q - (dmin * mc) | uint4, uint5, ``group=32 sym`` and a minimum; sc and mc of 6 bits |
| Q2_K | 256 in sixteens of 16 | (d * sc) * q - (dmin * mc) | uint2 ``group=16 sym`` and a minimum; sc and mc of 4 bits |
| Q3_K, Q6_K | 256 in sixteens of 16 | (d * sc) * q | int3, int6, ``group=16 sym``; sc of 6 and 8 bits |
| TQ2_0 | 256 | d * q | ``ternary group=256 sym scale=f16`` |

The products d * sc and dmin * mc are exact in float32 (11 bits by at most 8), so scales of two levels become scales of one without
rounding. Source: ggml, ``ggml-quants.c``; gguf-py, ``quants.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from qcompile.formats import Channel, Group, Integer, Quantized, Tensor, Ternary, parse_scheme
from qcompile.interchange.checkpoint import StoredWeight

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Parts = tuple[NDArray[np.uint8] | NDArray[np.int8], Floats, Floats | None]  # codes [n, elements], scales and minima [n, groups]


@dataclass(frozen=True)
class Block:
    """A block type.

    Attributes:
        name: ggml's.
        number: ggml's, as files hold it.
        elements: of a block.
        bytes: of a block.
        scheme: of a weight in such blocks.
        read: from blocks u8[n, bytes].
        write: from codes i8[n, elements] and scales f16[n, 1] to blocks, where it is written.
    """

    name: str
    number: int
    elements: int
    bytes: int
    scheme: str
    read: Callable[[Bytes], Parts]
    write: Callable[[NDArray[np.int8], Bytes], Bytes] | None = None


def _f16(data: Bytes) -> Floats:
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


def _fields(data: Bytes, shifts: tuple[int, ...], width: int) -> Bytes:
    """Return runs of ``width`` bytes split by shifts: of each run first all lowest fields, then all of the next shift, .."""
    runs = data.reshape(len(data), -1, 1, width)
    return (runs >> np.array(shifts, np.uint8).reshape(1, 1, -1, 1)).reshape(len(data), -1)


def _nibbles(data: Bytes) -> Bytes:
    return _fields(data, (0, 4), 16) & np.uint8(15)


def _q4_0(b: Bytes) -> Parts:
    return _nibbles(b[:, 2:]).astype(np.int8) - np.int8(8), _f16(b[:, :2]), None


def _q4_1(b: Bytes) -> Parts:
    return _nibbles(b[:, 4:]), _f16(b[:, :2]), -_f16(b[:, 2:4])


def _fifth_bits(data: Bytes) -> Bytes:
    return np.unpackbits(data, axis=1, bitorder="little") << np.uint8(4)


def _q5_0(b: Bytes) -> Parts:
    return (_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])).astype(np.int8) - np.int8(16), _f16(b[:, :2]), None


def _q5_1(b: Bytes) -> Parts:
    return _nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8]), _f16(b[:, :2]), -_f16(b[:, 2:4])


def _q8_0(b: Bytes) -> Parts:
    return np.ascontiguousarray(b[:, 2:]).view(np.int8), _f16(b[:, :2]), None


def _q2_k(b: Bytes) -> Parts:
    scales, d, dmin = b[:, :16], _f16(b[:, 80:82]), _f16(b[:, 82:84])
    codes = _fields(b[:, 16:80], (0, 2, 4, 6), 32) & np.uint8(3)
    return codes, d * (scales & 15).astype(np.float32), dmin * (scales >> 4).astype(np.float32)


def _q3_k(b: Bytes) -> Parts:
    low, packed, d = b[:, 32:96], b[:, 96:108], _f16(b[:, 108:110])
    low_scales = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], 1)
    high_scales = np.concatenate([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], 1)
    scales = (low_scales | (high_scales << np.uint8(4))).astype(np.int8) - np.int8(32)
    high = _fields(b[:, :32], tuple(range(8)), 32) & np.uint8(1)
    codes = (_fields(low, (0, 2, 4, 6), 32) & np.uint8(3)).astype(np.int8) - ((high ^ np.uint8(1)) << np.uint8(2)).astype(np.int8)
    return codes, d * scales.astype(np.float32), None


def _six_bit_pairs(b: Bytes) -> tuple[Bytes, Bytes]:
    """Return eight scales and eight minima of 6 bits each from 12 bytes."""
    low, minimum, high = b[:, :4], b[:, 4:8], b[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], 1)
    return scales, np.concatenate([minimum & 63, (high >> 4) | ((minimum >> 2) & 48)], 1)


def _k_scales(b: Bytes) -> tuple[Floats, Floats]:
    scales, minima = _six_bit_pairs(b[:, 4:16])
    return _f16(b[:, :2]) * scales.astype(np.float32), _f16(b[:, 2:4]) * minima.astype(np.float32)


def _q4_k(b: Bytes) -> Parts:
    return _fields(b[:, 16:], (0, 4), 32) & np.uint8(15), *_k_scales(b)


def _q5_k(b: Bytes) -> Parts:
    high = _fields(b[:, 16:48], tuple(range(8)), 32) & np.uint8(1)
    return (_fields(b[:, 48:], (0, 4), 32) & np.uint8(15)) | (high << np.uint8(4)), *_k_scales(b)


def _q6_k(b: Bytes) -> Parts:
    low, high = _fields(b[:, :128], (0, 4), 64) & np.uint8(15), _fields(b[:, 128:192], (0, 2, 4, 6), 32) & np.uint8(3)
    scales = np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32)
    return (low | (high << np.uint8(4))).astype(np.int8) - np.int8(32), _f16(b[:, 208:210]) * scales, None


def _tq2_0(b: Bytes) -> Parts:
    codes = (_fields(b[:, :64], (0, 2, 4, 6), 32) & np.uint8(3)).astype(np.int8) - np.int8(1)
    if codes.size and codes.max() > 1:
        raise ValueError("a ternary code is 2")
    return codes, _f16(b[:, 64:66]), None


# ---- writing --------------------------------------------------------------------------------------------------------------


def _write_q4_0(codes: NDArray[np.int8], d: Bytes) -> Bytes:
    nibbles = (codes + np.int8(8)).astype(np.uint8)
    return np.concatenate([d, nibbles[:, :16] | (nibbles[:, 16:] << np.uint8(4))], 1)


def _write_q8_0(codes: NDArray[np.int8], d: Bytes) -> Bytes:
    return np.concatenate([d, codes.view(np.uint8)], 1)


def _write_tq2_0(codes: NDArray[np.int8], d: Bytes) -> Bytes:
    fields = (codes + np.int8(1)).astype(np.uint8).reshape(len(codes), -1, 4, 32) << np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    return np.concatenate([np.bitwise_or.reduce(fields, 2).reshape(len(codes), -1), d], 1)


BLOCKS = (
    Block("Q4_0", 2, 32, 18, "int4 group=32 sym scale=f16", _q4_0, _write_q4_0),
    Block("Q4_1", 3, 32, 20, "uint4 group=32 sym scale=f16", _q4_1),
    Block("Q5_0", 6, 32, 22, "int5 group=32 sym scale=f16", _q5_0),
    Block("Q5_1", 7, 32, 24, "uint5 group=32 sym scale=f16", _q5_1),
    Block("Q8_0", 8, 32, 34, "int8 group=32 sym scale=f16", _q8_0, _write_q8_0),
    Block("Q2_K", 10, 256, 84, "uint2 group=16 sym", _q2_k),
    Block("Q3_K", 11, 256, 110, "int3 group=16 sym", _q3_k),
    Block("Q4_K", 12, 256, 144, "uint4 group=32 sym", _q4_k),
    Block("Q5_K", 13, 256, 176, "uint5 group=32 sym", _q5_k),
    Block("Q6_K", 14, 256, 210, "int6 group=16 sym", _q6_k),
    Block("TQ2_0", 35, 256, 66, "ternary group=256 sym scale=f16", _tq2_0, _write_tq2_0),
)
BY_NUMBER = {block.number: block for block in BLOCKS}
BY_NAME = {block.name: block for block in BLOCKS}


def read_blocks(data: bytes | memoryview, block: Block, shape: tuple[int, ...]) -> StoredWeight:
    """Return the weight [out, in] that blocks hold.

    Raises:
        ValueError: the bytes are not as many as the shape takes, or hold a code or scale that means nothing.
    """
    rows, columns = shape
    blocks = np.frombuffer(data, np.uint8).reshape(-1, block.bytes)
    if columns % block.elements or len(blocks) != rows * columns // block.elements:
        raise ValueError(f"{len(blocks)} blocks of {block.elements} are no weight {list(shape)}")
    with np.errstate(invalid="ignore"):  # infinity times zero: refused below
        codes, scale, minimum = block.read(blocks)
    if not np.isfinite(scale).all() or (minimum is not None and not np.isfinite(minimum).all()):
        raise ValueError("a scale or minimum is NaN or infinite")
    parts = [torch.from_numpy(np.ascontiguousarray(part).reshape(rows, -1)) for part in (codes, scale) if part is not None]
    quantized = Quantized(parts[0], parts[1], None, parse_scheme(block.scheme))
    return StoredWeight(quantized, None if minimum is None else torch.from_numpy(np.ascontiguousarray(minimum).reshape(rows, -1)))


def choose_block(weight: StoredWeight) -> tuple[Block | None, str]:
    """Return the smallest written block type that holds a weight's codes and scales exactly, or None and why there is none."""
    quantized = weight.quantized
    scheme, columns = quantized.scheme, weight.shape[1]
    by = scheme.granularity
    if weight.minimum is not None or weight.order is not None:
        return None, "it has minima, or columns in an order of its own"
    if quantized.zero_point is not None or not isinstance(scheme.format, Integer) or quantized.codes.dtype != torch.int8:
        return None, f"'{scheme}' is no signed integer without zero points"
    fits = [BY_NAME["TQ2_0"]] * isinstance(scheme.format, Ternary) + [BY_NAME["Q4_0"]] * (scheme.bits <= 4) + [BY_NAME["Q8_0"]]
    whole = [block for block in fits if columns % block.elements == 0 and not (isinstance(by, Group) and by.size % block.elements)]
    if not whole or not (isinstance(by, (Group, Tensor)) or by == Channel(0)):
        return None, f"blocks of {fits[-1].elements} do not divide {columns} inputs in '{by}'"
    assert quantized.scale is not None
    if not torch.equal(quantized.scale.to(torch.float16).to(torch.float32), quantized.scale):
        return None, f"scales of '{scheme}' are no float16: compile with scale=f16 in the scheme"
    return whole[0], ""


def write_blocks(weight: StoredWeight, block: Block) -> bytes:
    """Return the blocks of a weight; ``choose_block`` says which it has."""
    quantized, (rows, columns) = weight.quantized, weight.shape
    assert quantized.scale is not None
    scale = quantized.scheme.granularity.expand(quantized.scale, weight.shape).expand(rows, columns)[:, :: block.elements]
    d = scale.to(torch.float16).contiguous().numpy().reshape(-1, 1).view(np.uint8)
    assert block.write is not None
    return block.write(quantized.codes.contiguous().numpy().reshape(-1, block.elements), d).tobytes()
