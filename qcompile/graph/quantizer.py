"""The quantizer of the ``simulated`` stage: quantize and dequantize with a scheme, in float."""

from __future__ import annotations

import torch

from qcompile.formats import Quantized, Scheme, dequantize, quantize, quantize_dynamic


class Quantizer(torch.nn.Module):
    """Rounds its input to a scheme's grid and returns it in float: what materialization will store as codes.

    Either the grid is static (``scale`` and ``zero_point`` of the granularity's shape), or dynamic (both None, found in each call), or the
    format has no scale, or a solver has already chosen the codes of a weight (``codes``, and ``table`` where they are places in one): then
    the input is ignored.
    """

    scale: torch.Tensor | None
    zero_point: torch.Tensor | None
    codes: torch.Tensor | None
    table: torch.Tensor | None

    def __init__(
        self,
        scheme: Scheme,
        scale: torch.Tensor | None = None,
        zero_point: torch.Tensor | None = None,
        codes: torch.Tensor | None = None,
        table: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("codes", codes)
        self.register_buffer("table", table)

    @classmethod
    def of(cls, quantized: Quantized) -> Quantizer:
        """Return a quantizer that always gives this tensor."""
        return cls(quantized.scheme, quantized.scale, quantized.zero_point, quantized.codes, quantized.table)

    def quantized(self, x: torch.Tensor) -> Quantized:
        """Return the codes this quantizer gives for x."""
        if self.codes is not None:
            return Quantized(self.codes, self.scale, self.zero_point, self.scheme, self.table)
        if self.scale is None:
            return Quantized(*quantize_dynamic(x, self.scheme), self.scheme)
        return Quantized(quantize(x, self.scale, self.zero_point, self.scheme), self.scale, self.zero_point, self.scheme)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.codes is not None:
            return dequantize(self.codes, self.scale, self.zero_point, self.scheme, self.table)
        return self.quantized(x).dequantize()
