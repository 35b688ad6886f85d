"""Sums of products of codes: the inner block that linear layers and convolutions share, two rows of weights with one or two of inputs.

Which shape the block has is chosen by what the processor can do; the loops are in ``runtime.h``.

``pairs`` (Cortex-M4, M7, M33, ...): two products are one instruction, SMLAD, over pairs of 16-bit numbers. Bytes become pairs by SXTB16,
which takes bytes 0 and 2 of a word, or 1 and 3 when it is rotated: inputs and weights are taken apart alike, so nothing is ever put in
order. Inputs are widened once (``widen_rows``) and used for all output channels; weights stay packed in flash and are widened as they come.
Both lie in the order in which the loop reads them, so that it needs one pointer for each. Weights of 4 and 2 bits are stored plus 8 or 2,
so that a shift and a mask widen two of them; the sum of the inputs, counted while they are widened, times 8 or 2 is taken off again.

``vectors`` and ``bytes``: a plain loop over bytes. In rows of a multiple of 16 bytes C compilers turn it into vectors without a remainder,
on Armv8-A with products of four bytes into SDOT. Byte i of a row of narrower weights holds weights i, i + row / 2, .. so that inputs are
read as they lie; a mask leaves a field at the top of the byte, which as a signed byte is the weight times 16 or 64, and the sum is shifted
back, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from qcompile.backends.edge.kernels.builder import Expression, array, cell, external, let, loop, quotient, store, word
from tvm.tirx.script.builder import ir as T

Array = np.ndarray[Any, Any]


CHANNELS = 2  # rows of weights taken together


@dataclass(frozen=True)
class Product:
    """How codes are multiplied.

    Attributes:
        bits: of a weight: 8, 4 or 2.
        signed: inputs are int8, or uint8.
        shape: ``pairs``, ``vectors`` or ``bytes``.
        pixels: rows of inputs taken together, 1 or 2.
    """

    bits: int = 8
    signed: bool = True
    shape: str = "bytes"
    pixels: int = 2

    @property
    def pairs(self) -> bool:
        return self.shape == "pairs"

    @property
    def fields(self) -> int:
        """Weights in a byte."""
        return 8 // self.bits

    @property
    def lanes(self) -> int:
        """Bytes of weights of one turn of the inner loop."""
        return {"pairs": 4, "vectors": 16, "bytes": 4}[self.shape]

    @property
    def step(self) -> int:
        """Products of one turn; rows of inputs and weights are padded to a multiple of it."""
        return self.lanes * self.fields

    @property
    def input_dtype(self) -> str:
        return "int8" if self.signed else "uint8"

    @property
    def weight_dtype(self) -> str:
        return "int32" if self.pairs else "int8"


def product_shape(features: frozenset[str], signed: bool) -> str:
    """Return the shape for a processor with these features (``processors.Processor``) and inputs of this sign."""
    if features & {"neon", "sse2"} or ("mve" in features and signed):
        return "vectors"
    return "pairs" if "dsp" in features else "bytes"


def padded(length: int, product: Product) -> int:
    """Return the length of a row of so many products in memory."""
    return -(-length // product.step) * product.step


def pack_rows(weight: Array, product: Product) -> Array:
    """Return codes int8 [rows, length] in the order in which a block reads them, a row of zeros behind where ``CHANNELS`` asks for it.

    For ``pairs``: words int32 [rows / 2, padded length / step, 2]; bits f * bits and 16 + f * bits of a word begin codes 4 * (f // 2) + f %
    2 and the next but one. Else: bytes int8 [rows, padded length / fields]; the f-th field from the top of byte i is code i + f * padded
    length / fields.
    """
    rows, length = weight.shape
    codes = np.zeros((-(-rows // CHANNELS) * CHANNELS, padded(length, product)), np.int8)
    codes[:rows, :length] = weight
    mask = (1 << product.bits) - 1
    if not product.pairs:
        parts = codes.reshape(len(codes), product.fields, -1).astype(np.uint8) & mask
        shifted = [parts[:, f] << (8 - product.bits * (f + 1)) for f in range(product.fields)]
        return np.bitwise_or.reduce(shifted).astype(np.uint8).view(np.int8)
    fields = (codes.reshape(len(codes), -1, product.step).astype(np.int64) + _offset(product)) & mask
    words = np.zeros(fields.shape[:2], np.int64)
    for f in range(16 // product.bits):
        first = 4 * (f // 2) + f % 2
        words |= (fields[:, :, first] | fields[:, :, first + 2] << 16) << (f * product.bits)
    return words.reshape(-1, CHANNELS, codes.shape[1] // product.step).swapaxes(1, 2).astype(np.uint32).view(np.int32)


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


def block(
    product: Product, rows: Any, starts: list[Expression], offsets: list[Expression], weight: Any, group: Expression,
    added: list[Expression], length: Expression,
) -> list[list[Expression]]:  # fmt: skip
    """Emit the sums of products of some rows of codes with a group of rows of weights; return each, [pixel][channel].

    Args:
        product: how.
        rows: inputs, or what ``widen_rows`` wrote.
        starts: at which code each row begins; not for ``pairs``.
        offsets: for ``pairs``, what ``widen_rows`` returned.
        weight: of ``pack_rows``.
        group: of rows of weights.
        added: to the sums of each channel.
        length: products of each sum, a multiple of ``product.step``.
    """
    sums = array("sums", 2 * CHANNELS)
    for i in range(product.pixels):
        for j, value in enumerate(added):
            store(sums, value - offsets[i] if offsets else value, i * CHANNELS + j)
    turns = let("turns", quotient(length, product.step))
    first = T.address_of(weight[group * turns * CHANNELS * (1 if product.pairs else product.lanes)])
    if product.pairs:
        call = T.call_extern(
            "void", f"qc_products_w{product.bits}_{product.pixels}", first, T.address_of(rows[0]), turns, T.address_of(sums[0])
        )
    else:
        inputs = [T.address_of(rows[starts[i % product.pixels]]) for i in range(2)]
        call = T.call_extern("void", f"qc_rows_{product.input_dtype}", product.bits, product.pixels, first, *inputs, turns * product.lanes,
                             T.address_of(sums[0]))  # fmt: skip
    T.evaluate(call)
    return [[sums[i * CHANNELS + j] for j in range(CHANNELS)] for i in range(product.pixels)]
