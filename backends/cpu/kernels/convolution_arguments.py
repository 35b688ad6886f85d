"""The arguments that all convolution kernels share, and the way from an exact sum to a stored result."""

from __future__ import annotations

import dataclasses
from typing import Any

from qcompile.backends.cpu.kernels.byte_codes import ByteCodes
from qcompile.backends.cpu.kernels.byte_products import add_byte_products
from qcompile.backends.cpu.kernels.code_rounding import CodeRounding
from qcompile.backends.cpu.kernels.code_sums import values_of
from qcompile.backends.cpu.kernels.convolution_spec import LANES, Convolution
from qcompile.backends.cpu.kernels.registers import Index, argument, load_part, ramp, size, splat, store, store_part
from qcompile.backends.cpu.kernels.vector import ACTIVATIONS, rounded
from tvm.tirx.script.builder import ir as T


class Arguments:
    """Declares the arguments of the open function, in the order that ``convolution`` documents; absent ones are None.

    Args:
        spec: the convolution.
        weight_shape: of the packed weight, int8 or float32.
        columns: length of the arrays with one value for each output channel.
        easy: the scales of all codes that are made are known to be (``code_rounding.is_easy``).
    """

    def __init__(self, spec: Convolution, weight_shape: tuple[int, ...], columns: int, *, easy: bool = False) -> None:
        self.spec, self.easy, codes = spec, easy, spec.epilogue.codes
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
        self.addend, self.addend_scale, self.addend_zero = (None,) * 3
        if spec.sum is not None:
            self.addend = argument("addend", out_shape, spec.sum.addend)
            self.addend_scale, self.addend_zero = argument("addend_scale", (1,)), argument("addend_zero_point", (1,), "int32")
        self.sum_scale, self.sum_zero = self.out_scale, self.out_zero  # of the codes that are the result
        if spec.sum is not None and spec.sum.output is not None:
            self.sum_scale, self.sum_zero = argument("sum_scale", (1,)), argument("sum_zero_point", (1,), "int32")
        made = [argument(name, out_shape, dtype) for name, dtype in zip(("y", "codes"), spec.results, strict=False)]
        # Flat views: the address of a pixel is then one product, not the divisions that find its image, row and column.
        results = (self.pixels * spec.out_channels,)
        self.flat_x = T.decl_buffer((self.batch * (spec.height * spec.width * spec.channels),), spec.x, data=self.x.data)
        flat = {dtype: T.decl_buffer(results, dtype, data=y.data) for y, dtype in zip(made, spec.results, strict=True)}
        self.flat_values: Any = flat.pop("float32", None)
        self.flat_codes: Any = next(iter(flat.values()), None)
        self.flat_residual = T.decl_buffer(results, "float32", data=self.residual.data) if self.residual is not None else None
        self.flat_addend = T.decl_buffer(results, spec.sum.addend, data=self.addend.data) if spec.sum is not None else None
        self.rounding: CodeRounding | None = None
        self.sum_rounding: CodeRounding | None = None
        self.bytes: ByteCodes | None = None

    def begin_task(self, *, bytewise: bool = False) -> None:
        """Compute what is the same for all results of a task. ``bytewise``: also for those made sixty-four at once."""
        epilogue, sum_, isa = self.spec.epilogue, self.spec.sum, self.spec.isa
        if epilogue.codes:
            self.rounding = CodeRounding(self.out_scale[0], self.out_zero[0], *epilogue.range, isa=isa, easy=self.easy)
            self.sum_rounding = self.rounding
        if sum_ is not None and sum_.output is not None:
            self.sum_rounding = CodeRounding(self.sum_scale[0], self.sum_zero[0], *sum_.range, isa=isa, easy=self.easy)
        if bytewise:
            last = sum_ or epilogue
            grid = self.sum_scale[0], self.sum_zero[0], str(last.output), last.range
            self.bytes = ByteCodes(*grid, last.activation, isa, easy=self.easy)

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
        where, epilogue, sum_ = ramp(place), self.spec.epilogue, self.spec.sum
        bias = self.bias[columns] if epilogue.bias == "float32" else None
        residual = None
        if self.flat_residual is not None:
            residual = self.flat_residual[where] if mask is None else load_part(self.flat_residual, mask, where)
        value = dataclasses.replace(epilogue, output="float32").apply(y, bias, residual, None, None)
        if sum_ is not None:
            addend = self.flat_addend[where] if mask is None else load_part(self.flat_addend, mask, where)
            value = T.Bind(ACTIVATIONS[sum_.activation](self.added(rounded(value), addend)))
        if self.flat_values is not None:
            self._store(self.flat_values, value, where, mask)
        if self.flat_codes is not None:
            codes = self.sum_rounding.codes(rounded(value))
            self._store(self.flat_codes, T.cast(codes, f"{self.spec.results[-1]}x{LANES}"), where, mask)

    def before_bytes(self, total: Any, columns: Any, addend: Any) -> Any:
        """Return what ``bytes`` takes for sixteen exact sums; ``addend`` are the codes that are added, or None."""
        value, epilogue = self.scaled(total, columns), self.spec.epilogue
        value = rounded(value) + self.bias[columns] if epilogue.bias == "float32" else value
        return value if addend is None else self.added(rounded(ACTIVATIONS[epilogue.activation](value)), addend)

    def added(self, value: Any, addend: Any) -> Any:
        """Return the sum of what the codes of ``value`` and other codes stand for; emits statements."""
        return rounded(self.rounding.values(value) + values_of(addend, self.addend_scale[0], self.addend_zero[0]))

    def _store(self, buffer: Any, value: Any, where: Any, mask: Any) -> None:
        if mask is None:
            store(buffer, value, where)
        else:
            store_part(buffer, value, mask, where)


def multiply_add(total: Any, x: Any, weight: Any, isa: str) -> Any:
    """Return total + x * weight in sixteen columns: x int32 words of four bytes (or floats), weight four int8 (or a float) for each."""
    return total + x * weight if weight.ty.dtype == "float32x16" else add_byte_products(isa, total, x, weight)
