"""AWQ checkpoints of AutoAWQ, version ``gemm``: unsigned 4-bit weights with zero points, eight neighbouring outputs in a word.

For a layer ``L`` with a weight [out, in]:

| tensor | content |
| --- | --- |
| ``L.qweight`` | i32[in, out / 8]: of eight outputs the nibbles, lowest first, are those of 0, 2, 4, 6, 1, 3, 5, 7 |
| ``L.qzeros`` | i32[groups, out / 8]: zero points in the same order |
| ``L.scales`` | float [groups, out] |

The value is ``scale * (code - zero point)``. Source: AutoAWQ 0.2, ``awq/modules/linear/gemm.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qcompile.errors import Refused
from qcompile.interchange.checkpoint import StoredWeight
from qcompile.interchange.gptq import centred, granularity_of
from qcompile.interchange.tensors import Tensors
from qcompile.interchange.words import codes_of

ENDINGS = (".qweight", ".qzeros", ".scales")
_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each nibble of a word holds
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def read_weights(tensors: Tensors, settings: Mapping[str, Any]) -> dict[str, StoredWeight]:
    """Return the weights of a folder with codes.

    Raises:
        Refused: bits or a version that is not known, or a tensor that is not what the format says.
    """
    bits, version = settings.get("bits", settings.get("w_bit", 4)), str(settings.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise Refused(f"AWQ of {bits} bits in version '{version}' is not read", node=str(tensors.folder), way_out="known is gemm, 4 bits")
    size = settings.get("group_size", settings.get("q_group_size", 128))
    layers = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    return {f"{layer}.weight": _read(tensors, layer, size) for layer in layers}


def _read(tensors: Tensors, layer: str, size: object) -> StoredWeight:
    packed = tensors.read(f"{layer}.qweight", dtypes=(torch.int32,), ndim=2)
    zeros = tensors.read(f"{layer}.qzeros", dtypes=(torch.int32,), ndim=2)
    scales = tensors.read(f"{layer}.scales", dtypes=_DTYPES, ndim=2)
    inputs, outputs = packed.shape[0], 8 * packed.shape[1]
    try:
        granularity = granularity_of(size, inputs, scales, outputs)
        if zeros.shape[0] != scales.shape[0]:
            raise ValueError(f"there are {zeros.shape[0]} rows of zero points for {scales.shape[0]} groups")
        codes, zero_point = _in_order(codes_of(packed, 4, outputs)), _in_order(codes_of(zeros, 4, outputs))
    except ValueError as error:
        raise Refused(str(error), node=f"{tensors.folder} {layer}") from error
    return StoredWeight(centred(codes.t().contiguous(), scales, zero_point.to(torch.int32), 4, granularity))


def _in_order(nibbles: torch.Tensor) -> torch.Tensor:
    """Return [rows, out] in the order of the outputs, of nibbles in the order of the words."""
    places = torch.tensor([_NIBBLES.index(output) for output in range(8)])
    return nibbles.unflatten(1, (-1, 8))[..., places].flatten(1)
