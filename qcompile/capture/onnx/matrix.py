"""Matrix products: MatMul and Gemm; one with a constant weight becomes ``aten.linear`` with the weight as [out, in]."""

from __future__ import annotations

import torch
import torch.fx as fx

from qcompile.capture.onnx.builder import Value
from qcompile.capture.onnx.operators import Call, Result, bounded, operator
from qcompile.capture.onnx.quantization import transposed_weight

aten = torch.ops.aten


@operator("MatMul")
def matmul(call: Call) -> Result:
    a, b = call[0], call[1]
    if isinstance(a, fx.Node) and call.build.rank(b) == 2 and call.build.rank(a) > 1:
        if isinstance(b, torch.Tensor) and b.dtype.is_floating_point:
            return call.call(aten.linear.default, a, call.build.derive(b, "transposed", torch.t))
        if isinstance(b, fx.Node) and (weight := transposed_weight(call, b, single=call.is_single_use(b, 1))) is not None:
            return call.call(aten.linear.default, a, weight)
    return call.call(aten.matmul.default, a, b)


def add_bias(call: Call) -> fx.Node | None:
    """Return the linear call that a bias was added to in place, or None where Add is no bias of a linear."""
    for index in (0, 1):
        product, bias = call[index], call[1 - index]
        if not isinstance(product, fx.Node) or product.target is not aten.linear.default or len(product.args) > 2:
            continue
        if not isinstance(bias, torch.Tensor) or not call.is_single_use(product, index) or product.users:
            continue
        if tuple(bias.shape) == tuple(call.build.fake(product).shape[-1:]) and bias.dtype == call.build.dtype(product):
            with call.build.graph.inserting_before(product):
                product.args = (*product.args, call.build.node(bias))
            return product
    return None


@operator("Gemm")
def gemm(call: Call) -> Result:
    """Return alpha * A' B' + beta * C; with B constant as one linear, alpha and beta folded into weight and bias."""
    a, b, c = call[0], call[1], call.get(2)
    alpha, beta = call.real("alpha", 1.0), call.real("beta", 1.0)
    if call.integer("transA"):
        a = call.call(aten.permute.default, a, [1, 0])
    weight = _gemm_weight(call, b, alpha)
    if weight is None or not isinstance(a, fx.Node):
        product = call.call(aten.matmul.default, a, call.call(aten.permute.default, b, [1, 0]) if call.integer("transB") else b)
        product = product if alpha == 1 else call.call(aten.mul.Tensor, product, alpha)
        return _add(call, product, c, beta)
    bias = _gemm_bias(call, c, beta, weight)
    if bias is not None:
        return call.call(aten.linear.default, a, weight, bias)
    return _add(call, call.call(aten.linear.default, a, weight), c, beta)


def _gemm_weight(call: Call, b: Value, alpha: float) -> Value | None:
    transposed = bool(call.integer("transB"))
    if isinstance(b, torch.Tensor) and b.dtype.is_floating_point:
        if transposed and alpha == 1:
            return b
        return call.build.derive(b, f"gemm {transposed} {alpha}", lambda t: (t if transposed else t.t()) * alpha)
    if isinstance(b, fx.Node) and alpha == 1:
        return b if transposed else transposed_weight(call, b, single=call.is_single_use(b, 1))
    return None


def _gemm_bias(call: Call, c: Value | None, beta: float, weight: Value) -> torch.Tensor | None:
    """Return C as one number for each output, or None where it is left out, computed or differs between rows."""
    features = call.build.static_shape(weight, [0])[0]
    if not isinstance(c, torch.Tensor) or c.numel() not in (1, features) or (c.ndim == 2 and c.shape[0] != 1):
        return None
    if tuple(c.shape) == (features,) and beta == 1:
        return c
    bounded(features)
    return call.build.derive(c, f"bias {beta} {features}", lambda t: (t.reshape(-1) * beta).expand(features))


def _add(call: Call, product: Value, c: Value | None, beta: float) -> Result:
    if c is None or beta == 0:
        return product
    scaled = c if beta == 1 else call.call(aten.mul.Tensor, c, beta)
    return call.call(aten.add.Tensor, product, scaled)


@operator("Einsum")
def einsum(call: Call) -> Result:
    return call.call(aten.einsum.default, call.string("equation"), list(call.given()))
