"""compressed-tensors, format ``pack-quantized``: integer weights of 1 to 8 bits in 32-bit words.

For a layer ``L`` with a weight [out, in]:

| tensor | content |
| --- | --- |
| ``L.weight_packed`` | i32[out, ceil(in * bits / 32)]: code + 2**(bits - 1), see ``qcompile.interchange.words`` |
| ``L.weight_scale`` | float [out, groups]; [out, 1] by channel, [1] by tensor |
| ``L.weight_zero_point`` | i32[ceil(out * bits / 32), groups]: zero point + 2**(bits - 1), packed down the rows; only where not symmetric |
| ``L.weight_shape`` | i64[2] |
| ``L.weight_g_idx`` | i32[in]: the group of each input, where ``actorder`` is ``group`` |

``quantization_config`` names the schemes (``config_groups``) with the layers that they are for (``targets``), and layers that stay float
(``ignore``). Source: the package compressed-tensors 0.20, ``compressors/pack_quantized``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qcompile.errors import Refused
from qcompile.formats import Channel, Granularity, Group, Integer, Quantized, Scheme, Tensor
from qcompile.interchange.checkpoint import StoredWeight
from qcompile.interchange.order import sorted_columns
from qcompile.interchange.tensors import Tensors
from qcompile.interchange.words import codes_of, words_of

FORMAT = "pack-quantized"
ENDINGS = (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx")
_SCALES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def read_weights(tensors: Tensors, settings: Mapping[str, Any]) -> dict[str, StoredWeight]:
    """Return the weights of a folder with codes.

    Raises:
        Refused: another format than pack-quantized, activations that are quantized, or a tensor that is not what the format says.
    """
    found = {}
    for name in tensors:
        if name.endswith(".weight_packed"):
            layer = name.removesuffix(".weight_packed")
            found[f"{layer}.weight"] = _read(tensors, layer, _scheme_of(layer, settings, str(tensors.folder)))
    if not found and settings.get("format") != FORMAT:
        raise Refused(f"the format '{settings.get('format')}' is not read", node=str(tensors.folder), way_out=f"known is {FORMAT}")
    return found


def _scheme_of(layer: str, settings: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """Return what the configuration says of a layer's weight."""
    groups = settings.get("config_groups")
    groups = groups if isinstance(groups, dict) else {}
    for group in groups.values():
        if not isinstance(group, dict) or not any(_is_target(layer, target) for target in group.get("targets") or ()):
            continue
        if group.get("input_activations"):
            raise Refused("activations are quantized as well, which is not read", node=f"{place} {layer}")
        weights = group.get("weights")
        if group.get("format", FORMAT) not in (None, FORMAT) or not isinstance(weights, dict):
            raise Refused(f"its format is '{group.get('format')}'", node=f"{place} {layer}", way_out=f"known is {FORMAT}")
        return weights
    raise Refused("no config group has the layer as a target", node=f"{place} {layer}")


def _is_target(layer: str, target: object) -> bool:
    text = str(target)
    if text.startswith("re:"):
        return re.match(text.removeprefix("re:"), layer) is not None
    return text in ("Linear", layer)


def _read(tensors: Tensors, layer: str, settings: Mapping[str, Any]) -> StoredWeight:
    place = f"{tensors.folder} {layer}"
    bits, strategy, symmetric = settings.get("num_bits"), settings.get("strategy"), settings.get("symmetric", True)
    if not (isinstance(bits, int) and 1 <= bits <= 8) or settings.get("type", "int") != "int":
        raise Refused(f"weights of {bits} bits of type '{settings.get('type')}' are not read", node=place)
    shape = tensors.read(f"{layer}.weight_shape", dtypes=(torch.int64, torch.int32), ndim=1).tolist()
    packed = tensors.read(f"{layer}.weight_packed", dtypes=(torch.int32,), ndim=2)
    scale = tensors.read(f"{layer}.weight_scale", dtypes=tuple(_SCALES))
    granularity = _granularity(strategy, settings.get("group_size"), place)
    try:
        if len(shape) != 2 or packed.shape[0] != shape[0] or min(shape) < 1:
            raise ValueError(f"weight_shape says {shape} of {packed.shape[0]} rows")
        columns = granularity.scale_shape(tuple(shape))[1] if isinstance(granularity, Group) else 1
        if scale.numel() != columns * (1 if strategy == "tensor" else shape[0]):
            raise ValueError(f"{list(scale.shape)} are no scales by {granularity} for a weight {shape}")
        codes = codes_of(packed, bits, shape[1]).to(torch.int16) - (1 << (bits - 1))
        zero_point = None
        if not symmetric:
            words = tensors.read(f"{layer}.weight_zero_point", dtypes=(torch.int32,), ndim=2)
            zero_point = codes_of(words.t(), bits, shape[0]).t().to(torch.int32) - (1 << (bits - 1))
    except ValueError as error:
        raise Refused(str(error), node=place) from error
    scale_shape = granularity.scale_shape(tuple(shape))
    scheme = Scheme(Integer(bits, True), granularity, symmetric=bool(symmetric), scale_format=_SCALES[scale.dtype])
    quantized = Quantized(
        codes.to(torch.int8), scale.to(torch.float32).reshape(scale_shape).contiguous(),
        None if zero_point is None else zero_point.reshape(scale_shape).contiguous(), scheme,
    )  # fmt: skip
    if f"{layer}.weight_g_idx" not in tensors:
        return StoredWeight(quantized)
    return sorted_columns(quantized, tensors.read(f"{layer}.weight_g_idx", dtypes=(torch.int32, torch.int64), ndim=1), place)


def _granularity(strategy: object, size: object, place: str) -> Granularity:
    if strategy == "group" and isinstance(size, int) and size > 0:
        return Group(size)
    if strategy in ("channel", "tensor"):
        return Channel(0) if strategy == "channel" else Tensor()
    raise Refused(f"the strategy '{strategy}' with group_size {size} is not read", node=place)


# ---- writing --------------------------------------------------------------------------------------------------------------


def why_not(weight: StoredWeight) -> str:
    """Return why the format cannot hold a weight, or "" where it can."""
    scheme = weight.quantized.scheme
    if weight.minimum is not None or weight.order is not None:
        return "it has minima, or columns in an order of its own"
    if not isinstance(scheme.format, Integer) or weight.quantized.table is not None:
        return f"{scheme.format} is no integer"
    if isinstance(scheme.granularity, Group) and weight.shape[1] % scheme.granularity.size:
        return f"groups of {scheme.granularity.size} do not divide {weight.shape[1]} inputs"
    if scheme.granularity != Channel(0) and not isinstance(scheme.granularity, (Group, Tensor)):
        return f"scales lie by {scheme.granularity}"
    zero_point = weight.quantized.zero_point
    if zero_point is not None and bool(((zero_point < scheme.format.lowest) | (zero_point > scheme.format.highest)).any()):
        return f"zero points are no {scheme.format}"
    return ""


def write_weight(layer: str, weight: StoredWeight) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer; ``why_not`` says which weights have none.

    Scales are written as float32 whatever they are rounded to: loaders multiply in the dtype of the scale, and in float16 the values would
    be others than the codes mean.
    """
    quantized = weight.quantized
    assert quantized.scale is not None
    bits = quantized.scheme.bits
    middle = 1 << (bits - 1)
    offset = middle if quantized.codes.dtype == torch.int8 else 0
    scale = quantized.scale.reshape(weight.shape[0], -1) if quantized.scale.ndim else quantized.scale.reshape(1)
    tensors = {
        f"{layer}.weight_packed": words_of((quantized.codes.to(torch.int16) + offset).to(torch.uint8), bits),
        f"{layer}.weight_scale": scale.to(torch.float32).contiguous(),
        f"{layer}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    zero_point = quantized.zero_point
    if zero_point is None and not offset:  # unsigned codes without a zero point: the format's own zero lies in the middle
        zero_point = torch.zeros(quantized.scale.shape, dtype=torch.int32)
    if zero_point is not None:
        rows = (zero_point.reshape(scale.shape if scale.ndim == 2 else (1, 1)) + offset).to(torch.uint8)
        tensors[f"{layer}.weight_zero_point"] = words_of(rows.t().contiguous(), bits).t().contiguous()
    return tensors


def settings_of(schemes: Mapping[str, Scheme], ignored: Sequence[str]) -> dict[str, Any]:
    """Return ``quantization_config`` for layers with these schemes; layers of one scheme share a config group."""
    groups: dict[str, dict[str, Any]] = {}
    for layer, scheme in schemes.items():
        group = groups.setdefault(str(scheme), {"targets": [], "weights": _weights_of(scheme), "format": FORMAT,
                                                "input_activations": None, "output_activations": None})  # fmt: skip
        group["targets"].append(layer)
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups.values())},
        "ignore": list(ignored),
    }


def _weights_of(scheme: Scheme) -> dict[str, Any]:
    by = scheme.granularity
    symmetric = scheme.symmetric and scheme.format.storage == torch.int8
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if isinstance(by, Group) else "channel" if isinstance(by, Channel) else "tensor",
        "group_size": by.size if isinstance(by, Group) else None,
        "dynamic": False,
    }
