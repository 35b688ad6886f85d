"""Sums of products of codes: the inner block that linear layers and convolutions share.

With ``pairs`` (Cortex-M4, M7, M33, ...) two products are one instruction, SMLAD, over pairs of 16-bit numbers. Bytes become pairs by SXTB16,
which takes bytes 0 and 2 of a word, or 1 and 3 when it is rotated: inputs and weights are taken apart alike, so nothing is ever put
in order. Inputs are widened once (``widen_rows``) and used for all output channels; weights stay packed in flash and are widened as they come.
Both lie in the order in which the loop (``qc_products_..`` in ``runtime.h``) reads them, so that it needs one pointer for each.

Weights of 4 and 2 bits are stored plus 8 or 2, so that a shift and a mask widen two of them; the sum of the inputs, counted while they are
widened, times 8 or 2 is taken off again.

Without ``pairs`` the same block is a plain loop over bytes. Byte i of a word of narrower weights holds weights i, 4 + i, ..; a mask leaves a
field at the top of each byte, which as a signed byte is the weight times 16 or 64; the sum is shifted back once at the end, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from qcompile.backends.edge.kernels.builder import Expression, array, cell, external, let, loop, quotient, store, widen, word
from tvm.tirx.script.builder import ir as T

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Product:
    """How codes are multiplied.

    Attributes:
        bits: of a weight: 8, 4 or 2.
        signed: inputs are int8, or uint8.
        pairs: products come in pairs; channels are then 2.
        pixels: rows of inputs taken together, 1 or 2.
        channels: rows of weights taken together.
    """

    bits: int = 8
    signed: bool = True
    pairs: bool = False
    pixels: int = 2
    channels: int = 2

    @property
    def fields(self) -> int:
        """Weights in a byte."""
        return 8 // self.bits

    @property
    def step(self) -> int:
        """Products of one turn of the inner loop; rows of inputs and weights are padded to a multiple of it."""
        return 4 * self.fields

    @property
    def input_dtype(self) -> str:
        return "int8" if self.signed else "uint8"

    @property
    def weight_dtype(self) -> str:
        return "int32" if self.pairs else "int8"


def padded(length: int, product: Product) -> int:
    """Return the length of a row of so many products in memory."""
    return -(-length // product.step) * product.step


def pack_rows(weight: Array, product: Product) -> Array:
    """Return codes int8 [rows, length] in the order in which a block reads them, rows of zeros behind.

    With ``pairs``: words int32 [groups of rows, padded length / step, channels]; bits f * bits and 16 + f * bits of a word begin codes
    4 * (f // 2) + f % 2 and the next but one. Without: bytes int8 [rows, padded length / fields].
    """
    rows, length = weight.shape
    codes = np.zeros((-(-rows // product.channels) * product.channels, padded(length, product)), np.int8)
    codes[:rows, :length] = weight
    mask = (1 << product.bits) - 1
    if not product.pairs:
        words = codes.reshape(len(codes), -1, product.fields, 4).astype(np.uint8)
        # The first four codes of a word take its highest bits.
        shifted = [(words[:, :, f] & mask) << (8 - product.bits * (f + 1)) for f in range(product.fields)]
        return np.bitwise_or.reduce(shifted).astype(np.uint8).reshape(len(codes), -1).view(np.int8)
    fields = (codes.reshape(len(codes), -1, product.step).astype(np.int64) + _offset(product)) & mask
    words = np.zeros(fields.shape[:2], np.int64)
    for f in range(16 // product.bits):
        first = 4 * (f // 2) + f % 2
        words |= (fields[:, :, first] | fields[:, :, first + 2] << 16) << (f * product.bits)
    return words.reshape(-1, product.channels, words.shape[1]).swapaxes(1, 2).astype(np.uint32).view(np.int32)


def _offset(product: Product) -> int:
    """Return what is added to weights so that none is negative."""
    return 0 if product.fields == 1 else 1 << (product.bits - 1)


def widen_rows(product: Product, rows: Any, starts: list[Expression], pairs: Any, length: Expression) -> list[Expression]:
    """Emit the copy of rows of codes as pairs of int16, int32 [length / 4, 2, pixels]; return what each row's offset weights add to a sum.

    ``length`` is a multiple of four.
    """
    parts = ("qc_sxtb16", "qc_sxtb16_ror8") if product.signed else ("qc_uxtb16", "qc_uxtb16_ror8")
    totals = [cell(f"total_{i}", T.int32(0)) for i in range(len(starts))] if _offset(product) else []
    with loop("i", quotient(length, 4)) as i:
        fours = [let(f"four_{p}", word(rows, start + i * 4)) for p, start in enumerate(starts)]
        for half, part in enumerate(parts):
            for p, four in enumerate(fours):
                pair = let("pair", external(part, four, dtype="uint32"))
                store(pairs, T.cast(pair, "int32"), (i * 2 + half) * product.pixels + p)
                if totals:
                    store(totals[p], external("qc_smlad", pair, T.uint32(0x00010001), totals[p][0]), 0)
    return [let(f"offset_{i}", total[0] * _offset(product)) for i, total in enumerate(totals)] or [T.int32(0)] * len(starts)


def pairs_block(
    product: Product, pairs: Any, offsets: list[Expression], weight: Any, group: Expression, added: list[Expression], length: Expression
) -> list[list[Expression]]:
    """Emit the sums of products of what ``widen_rows`` wrote with a group of rows of weights; return each, [pixel][channel]; ``added`` by channel."""
    sums = array("sums", product.pixels * product.channels)
    for i, offset in enumerate(offsets):
        for j, value in enumerate(added):
            store(sums, value - offset, i * product.channels + j)
    turns = let("turns", quotient(length, product.step))
    T.evaluate(
        T.call_extern("void", f"qc_products_w{product.bits}_{product.pixels}", T.address_of(weight[group * turns * product.channels]),
                      T.address_of(pairs[0]), turns, T.address_of(sums[0]))
    )  # fmt: skip
    return [[sums[i * product.channels + j] for j in range(product.channels)] for i in range(product.pixels)]


def block(
    product: Product, rows: Any, starts: list[Expression], weight: Any, group: Expression, added: list[Expression], length: Expression
) -> list[list[Expression]]:
    """Emit the sums of products of some rows of codes with a group of rows of weights; return each, [pixel][channel].

    Args:
        product: how.
        rows: inputs.
        starts: at which code each row begins.
        weight: packed rows of weights, one after another.
        group: of rows of weights.
        added: to the sums of each channel.
        length: products of each sum, a multiple of ``product.step``.
    """
    sums = [[cell(f"sum_{i}_{j}", T.int32(0)) for j in range(product.channels)] for i in range(product.pixels)]
    size = let("size", quotient(length, product.fields))
    firsts = [let(f"weights_{j}", (group * product.channels + j) * size) for j in range(product.channels)]
    with loop("turn", quotient(length, product.step)) as turn, loop("i", 4) as i:
        for column, first in enumerate(firsts):
            byte = let("byte", widen(weight[first + turn * 4 + i]))
            for field in range(product.fields):
                value = byte if product.fields == 1 else let("value", external("qc_top_bits", byte, product.bits * field, product.bits))
                for start, row in zip(starts, sums, strict=True):
                    x = widen(rows[start + turn * product.step + field * 4 + i])
                    store(row[column], row[column][0] + x * value, 0)
    back = T.int32(8 - product.bits)
    return [[(T.shift_right(total[0], back) if product.fields > 1 else total[0]) + value for total, value in zip(row, added, strict=True)]
            for row in sums]  # fmt: skip
