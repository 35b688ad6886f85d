"""Schemes: format + granularity + symmetry + scale format, as one frozen value with one text form.

``int4 group=128 sym`` is a weight in two's-complement int4, one float32 scale for each 128 inputs and no zero point.
``uint8 tensor affine`` is an activation with one scale and one zero point found by calibration; ``int8 token sym
dynamic`` finds its scale while the model runs. ``bf16`` has no scale and is the whole text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import torch

from qcompile.formats.bfloat16 import BFloat16
from qcompile.formats.format import Format, parse_format
from qcompile.formats.granularity import Channel, Granularity, Group, Tensor, Token, parse_granularity
from qcompile.formats.integer import Integer
from qcompile.formats.lookup import Lookup, NormalFloat

_SCALE_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Scheme:
    """How one tensor is quantized.

    Attributes:
        format: how one element is coded.
        granularity: which elements share a scale.
        symmetric: True: value = scale * code. False: value = scale * (code - zero_point), zero_point an integer code.
        dynamic: the scale is computed from the tensor at run time.
        scale_format: dtype a stored scale is rounded to: f32, f16 or bf16.
    """

    format: Format
    granularity: Granularity
    symmetric: bool = True
    dynamic: bool = False
    scale_format: str = "f32"

    def __post_init__(self) -> None:
        if self.scale_format not in _SCALE_DTYPES:
            raise ValueError(f"unknown scale format '{self.scale_format}'; known are {', '.join(_SCALE_DTYPES)}")
        if isinstance(self.format, Lookup) and not self.symmetric:
            raise ValueError(f"{self.format} is symmetric: no zero point is subtracted from places in a table")
        if not self.format.scaled and (self.granularity, self.symmetric, self.dynamic, self.scale_format) != (Tensor(), True, False, "f32"):
            raise ValueError(f"{self.format} has no scale: write '{self.format}' and nothing after it")

    @property
    def bits(self) -> int:
        return self.format.bits

    @property
    def scale_dtype(self) -> torch.dtype:
        return _SCALE_DTYPES[self.scale_format]

    @property
    def calibrated(self) -> bool:
        """Whether there is a scale that must be known before the model runs."""
        return self.format.scaled and not self.dynamic

    def __str__(self) -> str:
        if not self.format.scaled:
            return str(self.format)
        words = [str(self.format), str(self.granularity), "sym" if self.symmetric else "affine"]
        words += ["dynamic"] * self.dynamic + [f"scale={self.scale_format}"] * (self.scale_format != "f32")
        return " ".join(words)


@cache
def parse_scheme(text: str) -> Scheme:
    """Parse the text form of a scheme; words after the format may stand in any order and have defaults.

    Raises:
        ValueError: naming the word that is not understood.
    """
    words = text.split()
    if not words:
        raise ValueError("an empty text is no scheme; write for example 'int8 channel=0 sym'")
    format = parse_format(words[0])
    granularity: Granularity = Tensor()
    symmetric, dynamic, scale_format = True, False, "f32"
    for word in words[1:]:
        if word in ("sym", "affine"):
            symmetric = word == "sym"
        elif word == "dynamic":
            dynamic = True
        elif word.startswith("scale="):
            scale_format = word.removeprefix("scale=")
        else:
            granularity = parse_granularity(word)
    return Scheme(format, granularity, symmetric, dynamic, scale_format)


@dataclass(frozen=True)
class LayerScheme:
    """The schemes of one layer: its weight and the activation it reads; None leaves that side in float."""

    weight: Scheme | None = None
    activation: Scheme | None = None

    def __str__(self) -> str:
        return f"weight={self.weight or 'float'}; activation={self.activation or 'float'}"


_NAME = re.compile(r"w(\d)a(\d+)(?:-?g(\d+))?(-dynamic)?|w(\d)-?g(\d+)", re.IGNORECASE)
_BFLOAT16_NAME = re.compile(r"(?:bf16|bfloat16)|w-?bf16(?:-?a-?(bf16|32))?", re.IGNORECASE)
_FORMAT_NAME = re.compile(r"(nf[2-4]|codebook[1-4]|ternary)(?:-?a(\d+))?(?:-?g(\d+))?(-dynamic)?", re.IGNORECASE)


def parse_layer_scheme(text: str) -> LayerScheme:
    """Parse a name that people know, the text form, or ``float``.

    Names are ``W8A8``, ``W4A16``, ``w4g128``, ``W4A8``, ``W8A8-dynamic`` and the like; the text form is
    ``weight=...; activation=...``. ``nf4``, ``codebook4`` and ``ternary`` name the format of a weight: ``nf4-g64``, ``ternary-a8-dynamic``.
    ``bf16`` and ``WBF16ABF16`` are weights and activations in bfloat16, ``WBF16`` and ``WBF16A32`` weights alone.
    Weights are symmetric, per output channel at 8 bits, as ternary and as codebooks, and in groups of 128 otherwise, unless the name gives
    a group.
    Activations are affine per tensor at 8 bits and more weight bits; dynamic ones are symmetric per token. A16 is float.

    Raises:
        ValueError: the text is none of these.
    """
    if text.strip() == "float":
        return LayerScheme()
    if "=" in text and ";" in text:
        parts = dict(part.strip().split("=", 1) for part in text.split(";"))
        if set(parts) != {"weight", "activation"}:
            raise ValueError(f"'{text}' must name weight= and activation=")
        return LayerScheme(*(None if parts[k] == "float" else parse_scheme(parts[k]) for k in ("weight", "activation")))
    if bfloat16 := _BFLOAT16_NAME.fullmatch(text.strip()):
        both = text.strip().lower() in ("bf16", "bfloat16") or (bfloat16[1] or "").lower() == "bf16"
        return LayerScheme(Scheme(BFloat16(), Tensor()), Scheme(BFloat16(), Tensor()) if both else None)
    match = _NAME.fullmatch(text.strip())
    if named := _FORMAT_NAME.fullmatch(text.strip()):
        format = parse_format(named[1].lower())
        by = Group(int(named[3])) if named[3] else Group(128) if isinstance(format, NormalFloat) else Channel(0)
        return LayerScheme(Scheme(format, by), _named_activation(int(named[2] or 16), bool(named[4])))
    if not match:
        examples = "W8A8, W4A16, w4g128, or 'weight=int4 group=32 sym; activation=float'"
        raise ValueError(f"unknown scheme name '{text}'; write for example {examples}")
    bits, group = int(match[1] or match[5]), match[3] or match[6]
    granularity = Group(int(group)) if group else Channel(0) if bits == 8 else Group(128)
    return LayerScheme(Scheme(Integer(bits, True), granularity), _named_activation(int(match[2] or 16), bool(match[4])))


def _named_activation(bits: int, dynamic: bool) -> Scheme | None:
    if bits in (16, 32):
        return None
    if dynamic:
        return Scheme(Integer(bits, True), Token(), symmetric=True, dynamic=True)
    return Scheme(Integer(bits, False), Tensor(), symmetric=False)
