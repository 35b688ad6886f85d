"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them: weights of 2, 3, 4 or 8 bits with a group of inputs to each scale.

For a layer ``L`` with a weight [out, in]:

| tensor | content |
| --- | --- |
| ``L.qweight`` | i32[in * bits / 32, out]: unsigned codes packed down the inputs, see ``qcompile.interchange.words`` |
| ``L.qzeros`` | i32[groups, out * bits / 32]: zero points, less one in ``checkpoint_format`` ``gptq``, as they are in ``gptq_v2`` |
| ``L.scales`` | float [groups, out] |
| ``L.g_idx`` | i32[in]: the group of each input; those of ``desc_act`` do not lie side by side |

The value is ``scale * (code - zero point)``. Where every zero point is the middle of the range (``sym``), codes are read as signed ones
with no zero point: ``code - 2**(bits - 1)``. Source: AutoGPTQ 0.7 ``qlinear_cuda_old.py``; GPTQModel ``convert_gptq_v1_to_v2_format``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qcompile.errors import Refused
from qcompile.formats import Channel, Granularity, Group, Integer, Quantized, Scheme
from qcompile.interchange.checkpoint import StoredWeight
from qcompile.interchange.order import sorted_columns
from qcompile.interchange.tensors import Tensors
from qcompile.interchange.words import codes_of

ENDINGS = (".qweight", ".qzeros", ".scales", ".g_idx")
_SCALES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}


def read_weights(tensors: Tensors, settings: Mapping[str, Any]) -> dict[str, StoredWeight]:
    """Return the weights of a folder with codes.

    Raises:
        Refused: bits or a format that is not known, or a tensor that is not what the format says.
    """
    bits, form = settings.get("bits"), settings.get("checkpoint_format", "gptq")
    if bits not in (2, 3, 4, 8):
        raise Refused(f"GPTQ weights of {bits} bits are not read", node=str(tensors.folder))
    if form not in ("gptq", "gptq_v2"):
        raise Refused(f"the checkpoint format '{form}' is not read", node=str(tensors.folder), way_out="known are gptq, gptq_v2")
    size = settings.get("group_size", -1)
    layers = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    return {f"{layer}.weight": _read(tensors, layer, int(bits), size, stored_less=form == "gptq") for layer in layers}


def _read(tensors: Tensors, layer: str, bits: int, size: object, *, stored_less: bool) -> StoredWeight:
    place = f"{tensors.folder} {layer}"
    packed = tensors.read(f"{layer}.qweight", dtypes=(torch.int32,), ndim=2)
    zeros = tensors.read(f"{layer}.qzeros", dtypes=(torch.int32,), ndim=2)
    scales = tensors.read(f"{layer}.scales", dtypes=tuple(_SCALES), ndim=2)
    outputs, inputs = packed.shape[1], packed.shape[0] * 32 // bits
    try:
        granularity = granularity_of(size, inputs, scales, outputs)
        if zeros.shape[0] != scales.shape[0]:
            raise ValueError(f"there are {zeros.shape[0]} rows of zero points for {scales.shape[0]} groups")
        codes = codes_of(packed.t(), bits, inputs)
        zero_point = codes_of(zeros, bits, outputs).to(torch.int32)
    except ValueError as error:
        raise Refused(str(error), node=place) from error
    if stored_less:
        zero_point = (zero_point + 1) & ((1 << bits) - 1)
    quantized = centred(codes, scales, zero_point, bits, granularity)
    if f"{layer}.g_idx" not in tensors:
        return StoredWeight(quantized)
    return sorted_columns(quantized, tensors.read(f"{layer}.g_idx", dtypes=(torch.int32, torch.int64), ndim=1), place)


def granularity_of(size: object, inputs: int, scales: torch.Tensor, outputs: int) -> Granularity:
    """Return how scales [groups, out] lie.

    Raises:
        ValueError: they are not as many as a group size says.
    """
    if size is None or size in (-1, inputs):
        granularity: Granularity = Channel(0)
        groups = 1
    elif isinstance(size, int) and size > 0:
        granularity = Group(size)
        groups = -(-inputs // size)
    else:
        raise ValueError(f"a group size of {size} is none")
    if tuple(scales.shape) != (groups, outputs):
        raise ValueError(f"scales are {list(scales.shape)}, a weight [{outputs}, {inputs}] in groups of {size} has [{groups}, {outputs}]")
    return granularity


def centred(codes: torch.Tensor, scales: torch.Tensor, zero_point: torch.Tensor, bits: int, by: Granularity) -> Quantized:
    """Return the weight of unsigned codes [out, in], scales and zero points [groups, out]; signed where all zero points are the middle."""
    scale = scales.t().to(torch.float32).contiguous()
    zero_point = zero_point.t().contiguous()
    if isinstance(by, Channel):
        scale, zero_point = scale[:, 0].contiguous(), zero_point[:, 0].contiguous()
    middle = 1 << (bits - 1)
    if bool((zero_point == middle).all()):
        signed = (codes.to(torch.int16) - middle).to(torch.int8)
        return Quantized(signed, scale, None, Scheme(Integer(bits, True), by, scale_format=_SCALES[scales.dtype]))
    return Quantized(codes, scale, zero_point, Scheme(Integer(bits, False), by, symmetric=False, scale_format=_SCALES[scales.dtype]))
