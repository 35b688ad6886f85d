"""The arguments that all convolution kernels share, and the way from an exact sum to a stored result."""

from __future__ import annotations

import dataclasses
from typing import Any

from qcompile.backends.cpu.kernels.byte_products import add_byte_products
from qcompile.backends.cpu.kernels.code_rounding import CodeRounding
from qcompile.backends.cpu.kernels.convolution_spec import LANES, Convolution
from qcompile.backends.cpu.kernels.registers import Index, argument, load_part, ramp, size, splat, store, store_part
from qcompile.backends.cpu.kernels.vector import rounded
from tvm.tirx.script.builder import ir as T


class Arguments:
    """Declares the arguments of the open function, in the order that ``convolution`` documents; absent ones are None.

    Args:
        spec: the convolution.
        weight_shape: of the packed weight, int8 or float32.
        columns: length of the arrays with one value for each output channel.
    """

    def __init__(self, spec: Convolution, weight_shape: tuple[int, ...], columns: int) -> None:
        self.spec, codes = spec, spec.epilogue.codes
        self.batch = size("batch")
        self.pixels = self.batch * spec.pixels
        self.dtype = "int32" if spec.integer else "float32"
        self.shift = spec.x_shift
        out_shape = (self.batch, spec.out_height, spec.out_width, spec.out_channels)
        self.x = argument("x", (self.batch, spec.height, spec.width, spec.channels), spec.x)
        self.x_scale = argument("x_scale", (1,)) if spec.integer else None
        self.x_zero = argument("x_zero_point", (1,), "int32") if spec.integer and spec.x_affine else None
        self.weight = argument("weight", weight_shape, "int8" if spec.integer else "float32")
        self.sums = argument("weight_sums", (columns,), "int32") if spec.has_sums else None
        self.scale = argument("weight_scale", (columns,)) if spec.integer else None
        self.weight_zero = argument("weight_zero_point", (columns,), "int32") if spec.weight_affine else None
        self.bias = argument("bias", (columns,), spec.epilogue.bias) if spec.epilogue.bias != "none" else None
        self.residual = argument("residual", out_shape) if spec.epilogue.residual else None
        self.out_scale = argument("out_scale", (1,)) if codes else None
        self.out_zero = argument("out_zero_point", (1,), "int32") if codes else None
        self.y = argument("y", out_shape, spec.epilogue.output)
        # Flat views: the address of a pixel is then one product, not the divisions that find its image, row and column.
        results = (self.pixels * spec.out_channels,)
        self.flat_x = T.decl_buffer((self.batch * (spec.height * spec.width * spec.channels),), spec.x, data=self.x.data)
        self.flat_y = T.decl_buffer(results, spec.epilogue.output, data=self.y.data)
        self.flat_residual = T.decl_buffer(results, "float32", data=self.residual.data) if self.residual is not None else None
        self.rounding: CodeRounding | None = None

    def begin_task(self) -> None:
        """Compute what is the same for all results of a task."""
        if self.spec.epilogue.codes:
            self.rounding = CodeRounding(self.out_scale[0], self.out_zero[0], *self.spec.epilogue.range, isa=self.spec.isa)

    def zero(self) -> Any:
        """Return the element that stands for the real value zero among the bytes that are multiplied (or floats)."""
        if not self.spec.integer:
            return T.float32(0.0)
        return T.cast((self.x_zero[0] if self.x_zero is not None else T.int32(0)) + T.int32(self.shift), "uint8")

    def start(self, columns: Any) -> Any:
        """Return where the sums of sixteen channels start: the int32 bias and the share of x's zero point.

        Sum (x - x_zero)(w - w_zero) = sum u w - (x_zero + shift) sum (w - w_zero) - w_zero sum u, with bytes u = x + shift.
        """
        if not self.spec.integer:
            return splat(0.0)
        start = self.bias[columns] if self.spec.epilogue.bias == "int32" else splat(T.int32(0))
        if self.sums is not None:
            zero = (self.x_zero[0] if self.x_zero is not None else T.int32(0)) + T.int32(self.shift)
            start = start - splat(zero) * self.sums[columns]
        return start

    def scaled(self, total: Any, columns: Any) -> Any:
        """Return float32 lanes from sixteen exact sums: times the weight's scale, then times x's (the epilogue rounds before it adds)."""
        if not self.spec.integer:
            return total
        return (T.cast(total, f"float32x{LANES}") * self.scale[columns]) * splat(self.x_scale[0])

    def store_result(self, y: Any, columns: Any, place: Index, mask: Any) -> None:
        """Apply the epilogue to sixteen scaled sums and store those of the mask (None: all) from flat address ``place`` on."""
        where, epilogue = ramp(place), self.spec.epilogue
        bias = self.bias[columns] if epilogue.bias == "float32" else None
        residual = None
        if self.flat_residual is not None:
            residual = self.flat_residual[where] if mask is None else load_part(self.flat_residual, mask, where)
        value = dataclasses.replace(epilogue, output="float32").apply(y, bias, residual, None, None)
        if self.rounding is not None:
            value = T.cast(self.rounding.codes(rounded(value)), f"{epilogue.output}x{LANES}")
        if mask is None:
            store(self.flat_y, value, where)
        else:
            store_part(self.flat_y, value, mask, where)


def multiply_add(total: Any, x: Any, weight: Any, isa: str) -> Any:
    """Return total + x * weight in sixteen columns: x int32 words of four bytes (or floats), weight four int8 (or a float) for each."""
    return total + x * weight if weight.ty.dtype == "float32x16" else add_byte_products(isa, total, x, weight)
