"""Sums of products of codes, and what becomes of them: the inner block that linear layers and convolutions share.

With ``dsp`` (Cortex-M4, M7, M33, ...) two products are one instruction, SMLAD, over pairs of 16-bit numbers. Bytes become pairs by SXTB16,
which takes bytes 0 and 2 of a word, or 1 and 3 when it is rotated: inputs and weights are taken apart alike, so nothing is ever put
in order. Inputs are widened once (``widen_row``) and used for all output channels; weights stay bytes in flash and are widened as they come.

Weights of 4 and 2 bits: byte i of a word holds weights i, 4 + i, .. (``pack_rows``). A mask leaves a field at the top of each byte, which as a
signed byte is the weight times 16 or 64; the sum is shifted back once at the end, exactly.

Without ``dsp`` the same block is a plain loop over bytes, which C compilers turn into vectors where there are some.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from qcompile.backends.edge.kernels.builder import Expression, cell, clamp, external, let, loop, quotient, store, widen, word
from tvm.tirx.script.builder import ir as T

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Product:
    """How codes are multiplied.

    Attributes:
        bits: of a weight: 8, 4 or 2.
        signed: inputs are int8, or uint8.
        dsp: products come in pairs.
        pixels: rows of inputs taken together.
        channels: rows of weights taken together.
    """

    bits: int = 8
    signed: bool = True
    dsp: bool = False
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


def padded(length: int, product: Product) -> int:
    """Return the length of a row of so many products in memory."""
    return -(-length // product.step) * product.step


def pack_rows(weight: Array, product: Product) -> Array:
    """Return codes int8 [rows, length] as bytes int8 [rows, padded length / fields]: byte i of a word holds codes i, 4 + i, 8 + i, .."""
    rows, length = weight.shape
    codes = np.zeros((rows, padded(length, product)), np.int8)
    codes[:, :length] = weight
    words = codes.reshape(rows, -1, product.fields, 4).astype(np.uint8)
    mask = (1 << product.bits) - 1
    # The first four codes of a word take its highest bits.
    shifted = [(words[:, :, f] & mask) << (8 - product.bits * (f + 1)) for f in range(product.fields)]
    return np.bitwise_or.reduce(shifted).astype(np.uint8).reshape(rows, -1).view(np.int8)


def widen_row(product: Product, x: Any, start: Expression, row: Any, to: Expression, length: Expression) -> None:
    """Emit the copy of ``length`` codes from ``x[start]`` on to pairs of int16 from byte ``to`` of ``row`` on; for ``dsp`` only.

    ``length`` is a multiple of four.
    """
    low, high = ("qc_sxtb16", "qc_sxtb16_ror8") if product.signed else ("qc_uxtb16", "qc_uxtb16_ror8")
    with loop("i", quotient(length, 4)) as i:
        four = let("four", word(x, start + i * 4))
        T.evaluate(external("qc_store_word", T.address_of(row[to + i * 8]), external(low, four, dtype="uint32")))
        T.evaluate(external("qc_store_word", T.address_of(row[to + i * 8 + 4]), external(high, four, dtype="uint32")))


def block(product: Product, rows: Any, starts: list[Expression], weight: Any, channels: list[Expression], length: Expression) -> list[list[Any]]:
    """Emit the sums of products of some rows of inputs with some rows of weights; return a cell for each pair.

    Args:
        product: how.
        rows: inputs: codes, or with ``dsp`` what ``widen_row`` wrote.
        starts: at which byte each row begins.
        weight: packed rows of weights, one after another.
        channels: the rows of weights.
        length: products of each sum, a multiple of ``product.step``.
    """
    sums = [[cell(f"sum_{i}_{j}", T.int32(0)) for j in range(len(channels))] for i in range(len(starts))]
    firsts = [let(f"weights_{i}", channel * quotient(length, product.fields)) for i, channel in enumerate(channels)]
    with loop("turn", quotient(length, product.step)) as turn:
        (_pairs if product.dsp else _bytes)(product, rows, starts, weight, firsts, sums, turn)
    for total in [total for row in sums for total in row] if product.fields > 1 else ():
        store(total, T.shift_right(total[0], T.int32(8 - product.bits)), 0)
    return sums


def _pairs(product: Product, rows: Any, starts: list[Expression], weight: Any, firsts: list[Expression], sums: Any, turn: Expression) -> None:
    words = [let(f"word_{i}", word(weight, first + turn * 4)) for i, first in enumerate(firsts)]
    for field in range(product.fields):
        taken = [_field(product, four, field) for four in words]
        halves = [[let("pair", external(part, four, dtype="uint32")) for part in ("qc_sxtb16", "qc_sxtb16_ror8")] for four in taken]
        for start, row in zip(starts, sums, strict=True):
            for half in range(2):
                pair = let("inputs", word(rows, start + turn * (2 * product.step) + field * 8 + half * 4))
                for weights, total in zip(halves, row, strict=True):
                    store(total, external("qc_smlad", pair, weights[half], total[0]), 0)


def _field(product: Product, four: Expression, field: int) -> Expression:
    """Return a word whose bytes hold the field-th weight of each byte at the top."""
    if product.fields == 1:
        return four
    mask = {4: 0xF0F0F0F0, 2: 0xC0C0C0C0}[product.bits]
    shifted = T.shift_left(four, T.uint32(product.bits * field)) if field else four
    return let("fields", T.bitwise_and(shifted, T.uint32(mask)))


def _bytes(product: Product, rows: Any, starts: list[Expression], weight: Any, firsts: list[Expression], sums: Any, turn: Expression) -> None:
    with loop("i", 4) as i:
        for column, first in enumerate(firsts):
            byte = let("byte", widen(weight[first + turn * 4 + i]))
            for field in range(product.fields):
                value = byte if product.fields == 1 else let("value", external("qc_top_bits", byte, product.bits * field, product.bits))
                for start, row in zip(starts, sums, strict=True):
                    x = widen(rows[start + turn * product.step + field * 4 + i])
                    store(row[column], row[column][0] + x * value, 0)


def finish(total: Expression, multiplier: Expression, shift: Expression, zero_point: Expression, low: Expression, high: Expression) -> Expression:
    """Return the code of a sum: the rule of ``qc.requantize`` in the dialect, its zero point and bounds."""
    return clamp(external("qc_requantize", total, multiplier, widen(shift)) + zero_point, low, high)
