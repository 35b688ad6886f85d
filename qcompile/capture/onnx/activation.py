"""Activations, and those that exporters write out as products: GELU by its error function, SiLU and hard-swish by their gate."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx as fx

from qcompile.capture.onnx.operators import Call, Result, operator

aten = torch.ops.aten


@operator("LeakyRelu")
def leaky_relu(call: Call) -> Result:
    return call.call(aten.leaky_relu.default, call[0], call.real("alpha", 0.01))


@operator("Elu", "Celu")
def elu(call: Call) -> Result:
    alpha = call.real("alpha", 1.0)
    if call.node.op_type == "Celu":
        return call.call(aten.elu.default, call[0], alpha, 1.0, 1.0 / alpha)
    return call.call(aten.elu.default, call[0], alpha)


@operator("Selu")
def selu(call: Call) -> Result:
    alpha, gamma = call.real("alpha", 1.67326319217681884765625), call.real("gamma", 1.05070102214813232421875)
    return call.call(aten.elu.default, call[0], alpha, gamma)


@operator("ThresholdedRelu")
def thresholded_relu(call: Call) -> Result:
    return call.call(aten.threshold.default, call[0], call.real("alpha", 1.0), 0)


@operator("Shrink")
def shrink(call: Call) -> Result:
    x, limit, bias = call[0], call.real("lambd", 0.5), call.real("bias", 0.0)
    zero = call.call(aten.zeros_like.default, x)
    above = call.call(aten.where.self, call.call(aten.gt.Scalar, x, limit), call.call(aten.sub.Tensor, x, bias), zero)
    return call.call(aten.where.self, call.call(aten.lt.Scalar, x, -limit), call.call(aten.add.Tensor, x, bias), above)


@operator("Softsign")
def softsign(call: Call) -> Result:
    return call.call(aten.div.Tensor, call[0], call.call(aten.add.Tensor, call.call(aten.abs.default, call[0]), 1))


@operator("HardSigmoid")
def hard_sigmoid(call: Call) -> Result:
    alpha, beta = call.real("alpha", 0.2), call.real("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return call.call(aten.hardsigmoid.default, call[0])
    line = call.call(aten.add.Tensor, call.call(aten.mul.Tensor, call[0], alpha), beta)
    return call.call(aten.clamp.default, line, 0, 1)


@operator("Gelu")
def gelu(call: Call) -> Result:
    return call.call(aten.gelu.default, call[0], approximate=call.string("approximate", "none"))


@operator("Swish")
def swish(call: Call) -> Result:
    alpha = call.real("alpha", 1.0)
    if alpha == 1.0:
        return call.call(aten.silu.default, call[0])
    return call.call(aten.mul.Tensor, call[0], call.call(aten.sigmoid.default, call.call(aten.mul.Tensor, call[0], alpha)))


@operator("PRelu")
def prelu(call: Call) -> Result:
    x, slope = call[0], call[1]
    shape = call.build.shape(x)
    if isinstance(slope, torch.Tensor) and isinstance(x, fx.Node) and len(shape) > 1:
        # torch's slope runs along axis 1; ONNX's broadcasts from the right.
        full = (1,) * (len(shape) - slope.ndim) + tuple(slope.shape)
        if len(full) == len(shape) and all(size == 1 for axis, size in enumerate(full) if axis != 1) and full[1] in (1, shape[1]):
            return call.call(aten.prelu.default, x, call.build.derive(slope, "flat", lambda t: t.reshape(-1)))
    negative = call.call(aten.mul.Tensor, x, slope)
    return call.call(aten.where.self, call.call(aten.lt.Scalar, x, 0), negative, x)


@operator("Clip")
def clip(call: Call) -> Result:
    """Clamp to constant or computed limits; the pairs that torch names become relu and relu6."""
    if call.version < 11:
        low = torch.tensor(call.real("min")) if call.has("min") else None
        high = torch.tensor(call.real("max")) if call.has("max") else None
    else:
        low, high = call.get(1), call.get(2)  # type: ignore[assignment]
    limits = [value for value in (low, high) if value is not None]
    if not limits:
        return call[0]
    if not all(isinstance(value, torch.Tensor) for value in limits):
        return call.call(aten.clamp.Tensor, call[0], low, high)
    numbers = [None if value is None else value.reshape(()).item() for value in (low, high)]
    if numbers == [0, 6] and call.build.dtype(call[0]).is_floating_point:
        return call.call(aten.relu6.default, call[0])
    if numbers == [0, None] and call.build.dtype(call[0]).is_floating_point:
        return call.call(aten.relu.default, call[0])
    return call.call(aten.clamp.default, call[0], *numbers)


# ---- activations written as products --------------------------------------------------------------------------------------


def recognize_product(call: Call) -> fx.Node | None:
    """Return the activation that this product is, or None.

    x * sigmoid(x) is SiLU, x * hardsigmoid(x) is hard-swish, and 0.5 * x * (1 + erf(x / sqrt 2)), in any grouping, is GELU. The
    factors may be read elsewhere too; those that are not are dropped as dead.
    """
    for x, gate in ((call[0], call[1]), (call[1], call[0])):
        if isinstance(x, fx.Node) and isinstance(gate, fx.Node) and gate.args[:1] == (x,):
            if gate.target is aten.sigmoid.default:
                return call.call(aten.silu.default, x)
            if gate.target is aten.hardsigmoid.default:
                return call.call(aten.hardswish.default, x)
    factors = [factor for value in call.given() for factor in _factors(call, value)]
    halves = [factor for factor in factors if _is_number(factor, 0.5)]
    gates = [source for factor in factors if (source := _error_gate(factor)) is not None]
    if len(factors) == 3 and halves and gates and any(factor is gates[0] for factor in factors):
        return call.call(aten.gelu.default, gates[0])
    return None


def _factors(call: Call, value: Any) -> list[Any]:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return [value.item()]
    return list(value.args) if isinstance(value, fx.Node) and value.target is aten.mul.Tensor else [value]


def _is_number(value: Any, wanted: float) -> bool:
    return isinstance(value, (int, float)) and math.isclose(value, wanted, rel_tol=1e-6)


def _error_gate(value: Any) -> fx.Node | None:
    """Return x where value is 1 + erf(x / sqrt 2)."""
    if not isinstance(value, fx.Node) or value.target is not aten.add.Tensor or not _is_number(value.args[1], 1.0):
        return None
    error = value.args[0]
    if not isinstance(error, fx.Node) or error.target is not aten.erf.default:
        return None
    scaled = error.args[0]
    if not isinstance(scaled, fx.Node) or not isinstance(scaled.args[0], fx.Node):
        return None
    divided = scaled.target is aten.div.Tensor and _is_number(scaled.args[1], math.sqrt(2))
    multiplied = scaled.target is aten.mul.Tensor and _is_number(scaled.args[1], math.sqrt(0.5))
    return scaled.args[0] if divided or multiplied else None
