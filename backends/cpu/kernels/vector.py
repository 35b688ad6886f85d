"""Vector expressions in TIR: a rounding barrier, rounding to codes, and the activation functions.

Every function takes and returns expressions of any number of float32 lanes, a scalar included, and may be used in any kernel.
Float errors are against exact arithmetic; tests check them.

| function | largest error |
| --- | --- |
| exp | 1 ulp; 0 below -87.3, held at exp(88) above 88 |
| tanh | 3e-7 absolute |
| sigmoid | 1e-7 absolute |
| gelu | 4e-7 * max(1, abs(x)) absolute; 0 up to -5.1, x from 5.1 on |
| gelu_tanh | 3e-7 * max(1, abs(x)) absolute; 0 up to -4.9, x from 4.9 on |
| silu | 2e-7 * max(1, abs(x)) absolute |
| relu, relu6, hardswish | none: bit for bit what PyTorch computes |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

Expr = Any  # a TIR expression; the bindings carry no types

_ROUNDING = 1.5 * 2.0**23  # adding it to abs(x) < 2**22 leaves round-half-even(x) in the low mantissa bits
_ROUNDING_BITS = 0x4B400000


def lanes_of(x: Expr) -> int:
    """Return the number of lanes of an expression, 1 for a scalar."""
    return int(x.ty.dtype.lanes)


def vector_type(dtype: str, lanes: int) -> str:
    """Return the name of a vector type, ``float32x16``, or of the scalar where there is one lane."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def constant(value: float, like: Expr) -> Expr:
    """Return ``value`` as float32 in every lane of ``like``."""
    return spread(T.float32(value), lanes_of(like))


def spread(x: Expr, lanes: int) -> Expr:
    """Return a scalar copied to ``lanes`` lanes."""
    return x if lanes == 1 else T.broadcast(x, lanes)


def let(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """Return ``body`` of a value that is computed once."""
    name = tirx.Var("t", value.ty)
    return tirx.Let(name, value, body(name))


def register(dtype: str, lanes: int = 1) -> Expr:
    """Return a buffer of some lanes that stays on the stack, where LLVM makes it a register.

    TVM keeps only ``global`` buffers of at most 1 KiB there: ``local`` ones come from its heap, a call each, and LLVM must store
    every change to them unless nothing in the loop might read it.
    """
    return T.alloc_buffer((lanes,), dtype)


def hold(value: Expr) -> Expr:
    """Return a scalar or vector kept in a local variable that TVM's simplifier does not see through.

    It follows bound names, and a dozen nested minima and quotients then cost it minutes; LLVM makes the variable a register.
    """
    lanes = lanes_of(value)
    kept = register(str(value.ty.dtype.with_lanes(1)), lanes)
    spot = 0 if lanes == 1 else T.ramp(0, 1, lanes)
    T.buffer_store(kept, value, [spot])
    return kept[spot]


def rounded(x: Expr) -> Expr:
    """Return x as a float32 that later operations cannot merge with: no product inside it becomes a fused multiply-add.

    TVM lets LLVM contract ``a * b + c``; the dialect rounds each operation by itself. The fence costs no instruction.
    """
    return T.call_llvm_pure_intrin(x.ty.dtype, T.llvm_lookup_intrinsic_id("llvm.arithmetic.fence"), x)


def clamp(x: Expr, low: Expr, high: Expr) -> Expr:
    """Return x held to [low, high]; a NaN stays one."""
    return T.min(high, T.max(low, x))


def round_to_int(x: Expr) -> Expr:
    """Return int32 lanes with x rounded half to even, for abs(x) < 2**22, without leaving the float adder."""
    lanes = lanes_of(x)
    bits = T.reinterpret(vector_type("int32", lanes), rounded(x + constant(_ROUNDING, x)))
    return bits - spread(T.int32(_ROUNDING_BITS), lanes)


def to_codes(y: Expr, scale: Expr, zero_point: Expr, lowest: int, highest: int) -> Expr:
    """Return int32 lanes ``clamp(round_half_even(y / scale) + zero_point, lowest, highest)`` for a scalar scale and zero point.

    The clamp goes first, with both bounds shifted by the zero point: they are integers, so rounding keeps them in place,
    and a value beyond int32 cannot wrap.
    """
    lanes = lanes_of(y)
    low = spread(T.cast(T.int32(lowest) - zero_point, "float32"), lanes)
    high = spread(T.cast(T.int32(highest) - zero_point, "float32"), lanes)
    return round_to_int(clamp(y / spread(scale, lanes), low, high)) + spread(zero_point, lanes)


def polynomial(x: Expr, coefficients: tuple[float, ...]) -> Expr:
    """Return the polynomial with these coefficients, highest power first, by Horner's rule."""
    y = constant(coefficients[0], x)
    for coefficient in coefficients[1:]:
        y = y * x + constant(coefficient, x)
    return y


_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)  # Cephes expf


def exp(x: Expr) -> Expr:
    """Return e**x: 2**n times a polynomial on [-ln 2 / 2, ln 2 / 2]."""

    def on_reduced(x: Expr, n: Expr) -> Expr:
        scaled = T.cast(n, x.ty.dtype)
        power = T.reinterpret(x.ty.dtype, T.shift_left(n + spread(T.int32(127), lanes_of(n)), spread(T.int32(23), lanes_of(n))))
        remainder = (x - scaled * constant(0.693359375, x)) - scaled * constant(-2.12194440e-4, x)
        return let(remainder, lambda r: (polynomial(r, _EXP) * (r * r) + r + constant(1.0, r)) * power)

    def on_clamped(held: Expr) -> Expr:
        return let(round_to_int(held * constant(1.44269504088896341, x)), lambda n: on_reduced(held, n))

    def on_value(x: Expr) -> Expr:
        y = let(clamp(x, constant(-87.3, x), constant(88.0, x)), on_clamped)
        return T.Select(x < constant(-87.3, x), constant(0.0, x), y)

    return let(x, on_value)


_TANH = (
    (-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08, 1.48572235717979e-05,
     6.37261928875436e-04, 4.89352455891786e-03),
    (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03),
)  # fmt: skip


def _odd_rational(x: Expr, bound: float, ratio: tuple[tuple[float, ...], tuple[float, ...]]) -> Expr:
    """Return x P(x**2) / Q(x**2) with x held to [-bound, bound] (coefficients of Eigen's float kernels)."""
    numerator, denominator = ratio
    return let(
        clamp(x, constant(-bound, x), constant(bound, x)),
        lambda x: let(x * x, lambda square: x * polynomial(square, numerator) / polynomial(square, denominator)),
    )


def tanh(x: Expr) -> Expr:
    """Return the hyperbolic tangent."""
    return _odd_rational(x, 9.0, _TANH)


def sigmoid(x: Expr) -> Expr:
    """Return 1 / (1 + exp(-x))."""
    return constant(1.0, x) / (constant(1.0, x) + exp(constant(0.0, x) - x))


def relu(x: Expr) -> Expr:
    """Return max(0, x)."""
    return T.max(constant(0.0, x), x)


def relu6(x: Expr) -> Expr:
    """Return x held to [0, 6]."""
    return clamp(x, constant(0.0, x), constant(6.0, x))


# Of Q in 1/2 + x Q(t), t = 2 (x / bound)**2 - 1: within 2.4e-7 of the curve for abs(x) < bound, 1 + 6e-8 at bound, so that what is held
# to [0, 1] is exactly 0 or 1 from there on. (Fitted by reweighted least squares to the error of x times the curve.)
_GELU_BOUND, _GELU = 5.1, (
    8.283189315e-04, -2.106183445e-03, 1.985419747e-03, -2.883682018e-03, 7.227509489e-03, -1.23110541e-02, 1.732231069e-02,
    -2.391444159e-02, 3.17399543e-02, -4.023311878e-02, 5.078160428e-02, -6.900270394e-02, 1.386052939e-01,
)  # fmt: skip
_GELU_TANH_BOUND, _GELU_TANH = 4.9, (
    5.275206267e-04, -1.559856061e-03, 2.036030673e-03, -2.848593204e-03, 5.48641034e-03, -9.498774619e-03, 1.489207839e-02,
    -2.219106049e-02, 3.093070351e-02, -4.065430562e-02, 5.237130947e-02, -7.169929642e-02, 1.44248662e-01,
)  # fmt: skip


def _times_curve(x: Expr, bound: float, coefficients: tuple[float, ...]) -> Expr:
    """Return x times a curve from 0 to 1 that is odd about (0, 1/2): without a division, which costs as much as the polynomial."""

    def on_value(x: Expr) -> Expr:
        t = T.min(x * x * constant(2 / bound**2, x) - constant(1.0, x), constant(1.0, x))
        curve = let(t, lambda t: polynomial(t, coefficients)) * x + constant(0.5, x)
        return x * clamp(curve, constant(0.0, x), constant(1.0, x))

    return let(x, on_value)


def gelu(x: Expr) -> Expr:
    """Return x times the normal distribution function of x."""
    return _times_curve(x, _GELU_BOUND, _GELU)


def gelu_tanh(x: Expr) -> Expr:
    """Return the approximation of gelu by a hyperbolic tangent."""
    return _times_curve(x, _GELU_TANH_BOUND, _GELU_TANH)


def silu(x: Expr) -> Expr:
    """Return x sigmoid(x)."""
    return let(x, lambda x: x * sigmoid(x))


def hardswish(x: Expr) -> Expr:
    """Return x relu6(x + 3) / 6, each operation rounded by itself as PyTorch does."""
    return let(x, lambda x: rounded(x * relu6(x + constant(3.0, x))) / constant(6.0, x))


ACTIVATIONS: dict[str, Callable[[Expr], Expr]] = {
    "none": lambda x: x,
    "relu": relu,
    "relu6": relu6,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "hardswish": hardswish,
    "add_relu": relu,
    "add_relu6": relu6,
}
