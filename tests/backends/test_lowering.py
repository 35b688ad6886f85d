"""Every converter of the table against eager PyTorch: all cases are compiled as one module, each is judged on its own."""

from __future__ import annotations

import contextlib
import math
import operator
from typing import Any

import pytest
import torch
from qcompile.backends.cpu.build import build
from qcompile.backends.lowering.converters import TABLE, check, entry_of, operator_names
from qcompile.backends.lowering.translate import translate
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import qcompile.graph.dialect as dialect
from qcompile.errors import Refused
from qcompile.formats import parse_scheme, quantize_tensor

aten = torch.ops.aten
qc = torch.ops.qc


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def _positive(*shape: int) -> torch.Tensor:
    return _normal(*shape).abs() + 0.1


def _integers(high: int, *shape: int, low: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(high))


def _bools(*shape: int) -> torch.Tensor:
    return _normal(*shape) > 0


X, Y, IMAGE = _normal(3, 5, 16), _normal(5, 16), _normal(2, 8, 9, 7)
UNIT = torch.tanh(X) * 0.9
WHOLE = _integers(9, 3, 5, 16, low=-9)
TIES = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.49999997, -0.0])

POINTWISE = [
    *(
        (op.default, (X,))
        for op in (
            aten.neg,
            aten.exp,
            aten.erf,
            aten.abs,
            aten.tanh,
            aten.sigmoid,
            aten.sin,
            aten.cos,
            aten.floor,
            aten.ceil,
            aten.trunc,
            aten.relu,
            aten.silu,
            aten.sign,
            aten.reciprocal,
            aten.square,
            aten.hardsigmoid,
            aten.hardswish,
            aten.mish,
            aten.clone,
            aten.alias,
            aten.detach,
            aten.relu6,
            aten.gelu,
            aten.softplus,
            aten.elu,
            aten.leaky_relu,
            aten.hardtanh,
            aten.isnan,
            aten.isinf,
        )
    ),
    *((op.default, (_positive(3, 5, 16),)) for op in (aten.sqrt, aten.rsqrt, aten.log, aten.log2, aten.log1p)),
    (aten.round.default, (TIES,)),
    (aten.relu.default, (IMAGE,)),
    (aten.sqrt.default, (_integers(9, 4, 4),)),
    (aten.gelu.default, (X * 3,), {"approximate": "tanh"}),
    (aten.leaky_relu.default, (X, 0.3)),
    (aten.elu.default, (X, 0.7)),
    (aten.hardtanh.default, (X, -0.5, 0.25)),
    (aten.logical_not.default, (_integers(2, 4, 4),)),
    (aten.bitwise_not.default, (_bools(4, 4),)),
    (aten.bitwise_not.default, (WHOLE,)),
    *((op.Tensor, (X, Y)) for op in (aten.add, aten.sub, aten.mul, aten.div, aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge)),
    *((op.Scalar, (X, 0.5)) for op in (aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge)),
    *((op.Tensor, (WHOLE, 3)) for op in (aten.add, aten.sub, aten.mul, aten.div)),
    (aten.add.Tensor, (X, Y), {"alpha": 2}),
    (aten.sub.Tensor, (X, Y), {"alpha": 0.5}),
    (aten.add.Tensor, (WHOLE, 0.5)),
    (aten.add.Tensor, (WHOLE, X)),
    (aten.mul.Scalar, (X, 3)),
    (aten.rsub.Scalar, (X, 1)),
    (aten.rsub.Scalar, (X, 1, 2)),
    (aten.rsub.Tensor, (X, Y)),
    (aten.div.Tensor_mode, (X, Y), {"rounding_mode": "floor"}),
    (aten.div.Tensor_mode, (X, Y), {"rounding_mode": "trunc"}),
    (aten.div.Tensor_mode, (WHOLE, 4), {"rounding_mode": "floor"}),
    (aten.div.Tensor_mode, (WHOLE, 4), {"rounding_mode": "trunc"}),
    (aten.floor_divide.default, (WHOLE, torch.tensor(4))),
    (aten.remainder.Scalar, (WHOLE, 4)),
    (aten.fmod.Scalar, (WHOLE, 4)),
    (aten.remainder.Tensor, (X, _positive(5, 16))),
    (aten.minimum.default, (X, Y)),
    (aten.maximum.default, (X, Y)),
    (aten.max.other, (X, Y)),
    (aten.min.other, (X, Y)),
    *((aten.pow.Tensor_Scalar, (_positive(3, 4), exponent)) for exponent in (0.5, 1, 2, 3, -0.5, -1, 1.7)),
    (aten.pow.Tensor_Tensor, (_positive(5, 16), Y)),
    (aten.pow.Scalar, (2.0, X)),
    (aten.pow.Tensor_Scalar, (WHOLE, 2)),
    (aten.clamp.default, (X, -0.5, 0.5)),
    (aten.clamp.default, (X, None, 0.5)),
    (aten.clamp.Tensor, (X, -Y.abs(), Y.abs())),
    (aten.clamp_min.default, (X, 0.25)),
    (aten.clamp_max.default, (X, 0.25)),
    (aten.where.self, (_bools(5, 16), X, Y)),
    (aten.where.ScalarOther, (_bools(3, 5, 16), X, -1.0)),
    (aten.where.ScalarSelf, (_bools(3, 5, 16), 2.0, X)),
    (aten.masked_fill.Scalar, (X, _bools(5, 16), -math.inf)),
    (aten.masked_fill.Tensor, (X, _bools(5, 16), torch.tensor(2.0))),
    (aten.nan_to_num.default, (torch.tensor([math.nan, math.inf, -math.inf, 1.0]), 0.5)),
    (aten.isnan.default, (torch.tensor([math.nan, math.inf, 1.0]),)),
    (aten.isinf.default, (torch.tensor([math.nan, math.inf, -math.inf, 1.0]),)),
    *((op.default, (_bools(4, 4), _bools(1, 4))) for op in (aten.logical_and, aten.logical_or, aten.logical_xor)),
    (aten.logical_and.default, (_integers(3, 4, 4), _bools(4, 4))),
    *((op.Tensor, (WHOLE, _integers(7, 5, 16))) for op in (aten.bitwise_and, aten.bitwise_or, aten.bitwise_xor, aten.__and__, aten.__or__)),
    (aten._to_copy.default, (X,), {"dtype": torch.int32}),
    (aten._to_copy.default, (WHOLE,), {"dtype": torch.float32}),
    (aten._to_copy.default, (WHOLE,), {"dtype": torch.bool}),
    (aten.to.dtype, (X, torch.float64)),
    (aten.type_as.default, (X, WHOLE)),
    (aten.copy.default, (X, Y)),
    (aten.log_sigmoid.default, (X,)),
]

REDUCTIONS = [
    (aten.mean.dim, (X, [-1], True)),
    (aten.mean.dim, (IMAGE, [2, 3])),
    (aten.mean.default, (X,)),
    (aten.sum.dim_IntList, (X, [0, 2])),
    (aten.sum.default, (WHOLE,)),
    (aten.sum.dim_IntList, (_bools(3, 4), [1])),
    (aten.amax.default, (X, [-1])),
    (aten.amin.default, (X, [0, 1], True)),
    (aten.max.default, (X,)),
    (aten.min.default, (X,)),
    (aten.prod.dim_int, (Y, 0)),
    (aten.prod.default, (UNIT,)),
    (aten.any.dim, (_bools(3, 4), 1)),
    (aten.all.dim, (_bools(3, 4), 0, True)),
    (aten.any.default, (_bools(3, 4),)),
    (aten.var.correction, (X, [-1]), {"correction": 1}),
    (aten.var.correction, (X, [1, 2]), {"correction": 0, "keepdim": True}),
    (aten.var.dim, (X, [0], False)),
    (aten.argmax.default, (X, -1)),
    (aten.argmin.default, (X, 1, True)),
    (aten.max.dim, (X, 1)),
    (aten.min.dim, (X, -1, True)),
    (aten.cumsum.default, (WHOLE, 1)),
    (aten.softmax.int, (X, -1)),
    (aten._softmax.default, (X * 30, 1, False)),
    (aten.log_softmax.int, (X, -1)),
    (aten._log_softmax.default, (X, -1, False)),
]

STRUCTURE = [
    (aten.view.default, (X, [15, 16])),
    (aten.view.default, (X, [3, -1])),
    (aten.reshape.default, (X, [5, 3, 4, 4])),
    (aten._unsafe_view.default, (X, [240])),
    (aten.flatten.using_ints, (X, 1)),
    (aten.unflatten.int, (X, -1, [4, 4])),
    (aten.unsqueeze.default, (X, 1)),
    (aten.squeeze.dim, (_normal(3, 1, 4), 1)),
    (aten.squeeze.dims, (_normal(1, 3, 1, 4), [0, 2])),
    (aten.squeeze.default, (_normal(1, 3, 1),)),
    (aten.permute.default, (X, [2, -3, 1])),
    (aten.transpose.int, (X, -1, 0)),
    (aten.t.default, (Y,)),
    (aten.t.default, (_normal(4),)),
    (aten.mT.default, (X,)),
    (aten.numpy_T.default, (Y,)),
    (aten.expand.default, (_normal(1, 5, 1), [3, -1, 4])),
    (aten.broadcast_to.default, (_normal(5, 1), [3, 5, 4])),
    (aten.expand_as.default, (_normal(5, 1), X)),
    (aten.cat.default, ([X, _normal(3, 2, 16), X], 1)),
    (aten.cat.default, ([Y, WHOLE[0]], -1)),
    (aten.stack.default, ([X, X + 1], -1)),
    (aten.split.Tensor, (X, 2, 1)),
    (aten.split_with_sizes.default, (X, [3, 13], -1)),
    (aten.chunk.default, (X, 4, 2)),
    (aten.unbind.int, (X, 1)),
    (aten.slice.Tensor, (X, 1, 1, 4)),
    (aten.slice.Tensor, (X, -1, -7, 9223372036854775807, 3)),
    (aten.slice.Tensor, (X, 2, None, -2)),
    (aten.narrow.default, (X, 2, 3, 5)),
    (aten.select.int, (X, 1, -2)),
    (aten.select.int, (X, -1, 3)),
    (aten.constant_pad_nd.default, (IMAGE, [1, 2, 0, 3], 0.5)),
    (aten.pad.default, (IMAGE, [1, 2, 3, 1], "reflect")),
    (aten.repeat.default, (Y, [2, 1, 3])),
    (aten.repeat_interleave.self_int, (Y, 3, 1)),
    (aten.flip.default, (X, [0, 2])),
    (aten.tril.default, (Y, 1)),
    (aten.triu.default, (Y, -1)),
    (aten.embedding.default, (_normal(20, 6), _integers(20, 3, 4))),
    (aten.index_select.default, (X, 1, _integers(5, 7))),
    (aten.gather.default, (X, 1, _integers(5, 3, 2, 16))),
    (aten.index.Tensor, (X, [None, _integers(5, 4, low=-5)])),
    (aten.index.Tensor, (X, [_integers(3, 4, 1), _integers(5, 2, low=-5)])),
    (aten.index.Tensor, (X, [None, _integers(5, 4), _integers(16, 4)])),
    (aten.arange.default, (7,)),
    (aten.arange.start_step, (2, 9, 3)),
    (aten.arange.start, (1, 5)),
    (aten.full.default, ([2, 3], 0.5)),
    (aten.full_like.default, (X, 3)),
    (aten.new_full.default, (X, [2], -1)),
    (aten.zeros.default, ([2, 3],)),
    (aten.zeros_like.default, (WHOLE,)),
    (aten.new_zeros.default, (X, [4])),
    (aten.ones.default, ([2, 3],)),
    (aten.ones_like.default, (X,)),
    (aten.new_ones.default, (X, [4])),
    (aten.scalar_tensor.default, (0.5,)),
    (aten.slice_scatter.default, (X, _normal(3, 2, 16), 1, 1, 5, 2)),
]

LAYERS = [
    (aten.linear.default, (X, _normal(10, 16), _normal(10))),
    (aten.linear.default, (X, _normal(10, 16))),
    (aten.mm.default, (Y, _normal(16, 3))),
    (aten.bmm.default, (X, _normal(3, 16, 4))),
    (aten.matmul.default, (X, _normal(16, 4))),
    (aten.matmul.default, (_normal(2, 3, 4, 5), _normal(3, 5, 6))),
    (aten.mv.default, (Y, _normal(16))),
    (aten.dot.default, (_normal(16), _normal(16) + 1)),
    (aten.addmm.default, (_normal(3), Y, _normal(16, 3)), {"beta": 0.5, "alpha": 2}),
    (aten.baddbmm.default, (_normal(3, 5, 4), X, _normal(3, 16, 4))),
    (aten.conv1d.default, (_normal(2, 4, 9), _normal(6, 4, 3), _normal(6), [2], [1])),
    (aten.conv2d.default, (IMAGE, _normal(4, 8, 3, 3), _normal(4), [2, 1], [1, 0], [1, 2])),
    (aten.conv2d.default, (IMAGE, _normal(8, 1, 3, 3), None, [1, 1], [1, 1], [1, 1], 8)),
    (aten.convolution.default, (IMAGE, _normal(6, 4, 1, 1), _normal(6), [1, 1], [0, 0], [1, 1], False, [0, 0], 2)),
    (aten.max_pool2d.default, (IMAGE, [3, 2], [2, 2], [1, 0])),
    (aten.max_pool2d.default, (IMAGE, [3, 3], [2, 2], [1, 1], [1, 2], True)),
    (aten.max_pool2d_with_indices.default, (IMAGE, [2, 2])),
    (aten.avg_pool2d.default, (IMAGE, [2, 3], [2, 2], [1, 1])),
    (aten.avg_pool2d.default, (IMAGE, [2, 3], [2, 2], [1, 1], True, False)),
    (aten.avg_pool2d.default, (IMAGE, [3, 3], [2, 2], [1, 1], True)),
    (aten.avg_pool2d.default, (IMAGE, [3, 3], [2, 2], [1, 1], True, True, 5)),
    (aten.adaptive_avg_pool2d.default, (IMAGE, [1, 1])),
    (aten._adaptive_avg_pool2d.default, (IMAGE, [3, 7])),
    (aten.adaptive_avg_pool1d.default, (_normal(2, 3, 8), [4])),
    (aten.upsample_nearest2d.default, (IMAGE, [18, 14])),
    (aten.layer_norm.default, (X, [16], _normal(16), _normal(16), 1e-5)),
    (aten.layer_norm.default, (X, [5, 16])),
    (aten.native_layer_norm.default, (X, [16], _normal(16), None, 1e-5)),
    (aten.rms_norm.default, (X, [16], _normal(16), 1e-6)),
    (aten.rms_norm.default, (X, [16])),
    (aten.group_norm.default, (IMAGE, 4, _normal(8), _normal(8))),
    (aten.native_group_norm.default, (IMAGE, _normal(8), None, 2, 8, 63, 2, 1e-5)),
    (aten.batch_norm.default, (IMAGE, _normal(8), _normal(8), _normal(8), _positive(8), False, 0.1, 1e-5, False)),
    (aten._native_batch_norm_legit_no_training.default, (IMAGE, _normal(8), _normal(8), _normal(8), _positive(8), 0.1, 1e-5)),
    (aten.dropout.default, (X, 0.5, False)),
    *((aten.scaled_dot_product_attention.default, (_normal(2, 4, 6, 8), _normal(2, 4, 7, 8), _normal(2, 4, 7, 8) + 1, *more)) for more in (
        (), (_normal(6, 7),), (_bools(2, 1, 6, 7),), (torch.zeros(6, 7, dtype=torch.bool),), (None, 0.0, True),
    )),
    (aten.scaled_dot_product_attention.default, (_normal(2, 4, 6, 8), _normal(2, 2, 7, 8), _normal(2, 2, 7, 8) + 1),
     {"scale": 0.3, "enable_gqa": True}),
]  # fmt: skip


def _weight(text: str, *shape: int) -> tuple[Any, ...]:
    q = quantize_tensor(_normal(*shape), parse_scheme(text))
    return q.packed(), q.scale, q.zero_point, text, shape[-1]


def _activation(text: str, *shape: int) -> tuple[Any, ...]:
    q = quantize_tensor(_normal(*shape), parse_scheme(text))
    return q.codes, q.scale, q.zero_point, text


OUT = (torch.tensor(0.05), torch.tensor(9, dtype=torch.int32))


def _linear(x: str, weight: str, bias: Any = None, residual: Any = None, activation: str = "none", out: str = "") -> Any:
    codes, scale, zero, _ = _activation(x, 6, 32) if x else (_normal(6, 32), None, None, "")
    packed, weight_scale, weight_zero, _, size = _weight(weight, 10, 32)
    outs = OUT if out else (None, None)
    return qc.linear.default, (
        codes,
        scale,
        zero,
        packed,
        weight_scale,
        weight_zero,
        bias,
        residual,
        *outs,
        x,
        weight,
        size,
        activation,
        out,
    )


def _conv(x: str, weight: str, groups: int, bias: Any = None, residual: Any = None, activation: str = "none", out: str = "") -> Any:
    codes, scale, zero, _ = _activation(x, 2, 8, 9, 7) if x else (IMAGE, None, None, "")
    packed, weight_scale, weight_zero, _, size = _weight(weight, 8, 8 // groups, 3, 3)
    outs = OUT if out else (None, None)
    shape = ([2, 1], [1, 0], [1, 1], groups)
    return qc.conv2d.default, (
        codes,
        scale,
        zero,
        packed,
        weight_scale,
        weight_zero,
        bias,
        residual,
        *outs,
        x,
        weight,
        size,
        *shape,
        activation,
        out,
    )


UINT8, INT8, TOKEN, CHANNEL = "uint8 tensor affine", "int8 tensor sym", "int8 token sym dynamic", "int8 channel=0 sym"
BIAS = _integers(2000, 10, low=-2000).to(torch.int32)

QUANTIZED = [
    (qc.quantize.default, (X, torch.tensor(0.02), torch.tensor(7, dtype=torch.int32), UINT8)),
    (qc.quantize.default, (TIES, torch.tensor(1.0), None, "int4 tensor sym")),
    (qc.quantize.default, (X, _positive(5) * 0.02, None, "int8 channel=1 sym")),
    (qc.quantize.default, (X, _positive(3, 5, 2) * 0.02, None, "int8 group=8 sym")),
    (qc.quantize_dynamic.default, (X, TOKEN)),
    (qc.quantize_dynamic.default, (X, "uint8 token affine dynamic")),
    (qc.quantize_dynamic.default, (X, "uint8 tensor affine dynamic")),
    (qc.quantize_dynamic.default, (_normal(3, 5, 24), "uint4 group=8 affine dynamic")),
    (qc.quantize_dynamic.default, (_normal(3, 5, 24), "int8 group=12 sym dynamic")),
    (qc.pack.default, (_integers(8, 3, 5, 7).to(torch.uint8), "uint3 token affine dynamic")),
    (qc.pack.default, (_integers(8, 3, 16, low=-8).to(torch.int8), "int4 token sym dynamic")),
    (qc.dequantize.default, (_integers(256, 3, 5, 3).to(torch.uint8), _positive(3, 5, 1), None, "int3 token sym dynamic", 7)),
    (
        qc.dequantize.default,
        (_integers(256, 2, 8).to(torch.uint8), _positive(2, 4), _integers(16, 2, 4).to(torch.int32), "uint4 group=4 affine dynamic", 16),
    ),
    (qc.dequantize.default, _activation(UINT8, 3, 16)),
    (qc.dequantize.default, _activation("int8 channel=0 sym", 3, 16)),
    (qc.dequantize.default, _activation("uint8 block=2x8 affine", 3, 20)),
    _linear(UINT8, CHANNEL, BIAS, None, "relu"),
    _linear(UINT8, CHANNEL, _normal(10), _normal(6, 10), "add_relu", UINT8),
    _linear(INT8, "int4 channel=0 sym", _normal(10), None, "gelu"),
    _linear(TOKEN, "int4 group=16 sym", _normal(10), _normal(6, 10)),
    _linear(UINT8, "uint4 group=8 affine", None, None, "silu"),
    _linear("", "int4 group=16 sym", _normal(10), None, "hardswish"),
    _conv(UINT8, CHANNEL, 1, BIAS[:8], None, "relu6", UINT8),
    _conv(INT8, CHANNEL, 8, _normal(8), _normal(2, 8, 5, 5), "add_relu"),
    _conv("", "int4 channel=0 sym", 1, _normal(8), None, "tanh"),
    (qc.matmul.default, (*_activation(UINT8, 2, 4, 8)[:3], *_activation(INT8, 2, 8, 5)[:3], None, None, UINT8, INT8)),
    (qc.embedding.default, (_integers(12, 3, 4), *_weight("int4 group=16 sym", 12, 32))),
    (qc.embedding.default, (_integers(12, 5), *_weight("uint8 channel=0 affine", 12, 20))),
    (qc.add.default, (*_activation(UINT8, 3, 16)[:3], *_activation(INT8, 3, 16)[:3], *OUT, UINT8, INT8, UINT8, "relu")),
    (qc.hadamard.default, (X, 8)),
    (qc.rotary.default, (_normal(2, 5, 30), _normal(1, 5, 6), _normal(1, 5, 6), 3)),
    (qc.rotary.default, (_normal(2, 5, 30), _normal(2, 5, 10), _normal(2, 5, 10), 3)),
    (qc.attention.default, (_normal(2, 6, 32), _normal(2, 7, 16), _normal(2, 7, 16) + 1, _bools(2, 7), 4, 2, 0.3, True)),
    (qc.attention.default, (_normal(2, 6, 32), _normal(2, 7, 32), _normal(2, 7, 32) + 1, None, 4, 4, 0.3, False)),
    (qc.attention.default, (_normal(2, 6, 32), _normal(2, 9, 16), _normal(2, 9, 16) + 1, None, 4, 2, 0.3, True, None, 3)),
    (
        qc.attention.default,
        (_normal(2, 2, 32), _normal(2, 9, 16), _normal(2, 9, 16) + 1, None, 4, 2, 0.3, True, torch.tensor([7, 0]), 4),
    ),
    (
        qc.attention.default,
        (
            _normal(2, 6, 32),
            _normal(2, 7, 16),
            _normal(2, 7, 16) + 1,
            _bools(2, 7),
            4,
            2,
            0.3,
            True,
            None,
            3,
            _normal(2, 6, 16),
            _normal(2, 6, 16),
        ),
    ),
    (
        qc.attention.default,
        (
            _normal(2, 2, 32),
            _normal(2, 9, 16),
            _normal(2, 9, 16),
            None,
            4,
            2,
            0.3,
            True,
            torch.tensor([7, 0]),
            0,
            _normal(2, 2, 16),
            _normal(2, 2, 16),
        ),
    ),
    (qc.vector_codes.default, (_normal(2, 5, 24), _normal(6, 256, 4))),
    (qc.vectors.default, (_integers(256, 2, 5, 3).to(torch.uint8), _normal(3, 256, 8))),
    (qc.cache_append.default, (_normal(3, 9, 4), _normal(3, 2, 4), torch.tensor([0, 7, 8]))),
]

CASES = [*POINTWISE, *REDUCTIONS, *STRUCTURE, *LAYERS, *QUANTIZED]
# Arguments that are constants of a graph: weights, scales and zero points. All other tensors are inputs.
_CONSTANT_ARGUMENTS = ("weight", "scale", "zero", "bias", "running", "table")


def _is_constant(op: Any, position: int) -> bool:
    name = op._schema.arguments[position].name
    return op.namespace == "qc" and name not in ("x", "a", "b", "q", "k", "v") and any(part in name for part in _CONSTANT_ARGUMENTS)


class _Graph:
    """One graph of many independent cases, and its inputs."""

    def __init__(self) -> None:
        self.module = torch.nn.Module()
        self.graph = fx.Graph()
        self.mode = FakeTensorMode()
        self.inputs: list[torch.Tensor] = []
        self.results: list[list[fx.Node]] = []
        self.constants = 0

    def tensor(self, value: torch.Tensor, constant: bool) -> fx.Node:
        if constant:
            name = f"constant_{self.constants}"
            self.constants += 1
            self.module.register_buffer(name, value)
            node = self.graph.get_attr(name)
        else:
            first = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
            with self.graph.inserting_before(first) if first is not None else contextlib.nullcontext():
                node = self.graph.placeholder(f"input_{len(self.inputs)}")
            self.inputs.append(value)
        node.meta["val"] = self.mode.from_tensor(value)
        return node

    def add(self, op: Any, arguments: tuple[Any, ...], keywords: dict[str, Any] | None = None) -> None:
        def lift(value: Any, position: int) -> Any:
            if isinstance(value, torch.Tensor):
                return self.tensor(value, _is_constant(op, position))
            return [lift(v, position) for v in value] if isinstance(value, list) else value

        node = self.graph.call_function(op, tuple(lift(a, i) for i, a in enumerate(arguments)), keywords or {})
        fakes, fake_keywords = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = op(*fakes, **fake_keywords)
        if isinstance(node.meta["val"], torch.Tensor):
            self.results.append([node])
            return
        parts = []
        for i, fake in enumerate(node.meta["val"]):
            if operator_names(op)[1] in ("aten.max_pool2d_with_indices",) and i:
                continue  # the indices are not lowered
            if operator_names(op)[1] == "aten._native_batch_norm_legit_no_training" and i:
                continue  # the saved statistics are empty outside training
            part = self.graph.call_function(operator.getitem, (node, i))
            part.meta["val"] = fake
            parts.append(part)
        self.results.append(parts)

    def finish(self) -> fx.GraphModule:
        self.graph.output(tuple(node for nodes in self.results for node in nodes))
        return fx.GraphModule(self.module, self.graph)


def graph_of(cases: list[Any]) -> _Graph:
    graph = _Graph()
    for case in cases:
        graph.add(*case)
    return graph


def _close(got: torch.Tensor, want: torch.Tensor, exact: bool) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    if exact or not want.is_floating_point():
        assert torch.equal(got, want)
    else:
        # float32 operators in another order, transcendental functions to a few units in the last place
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5, equal_nan=True)


@pytest.fixture(scope="module")
def outputs() -> list[list[torch.Tensor]]:
    """The outputs of all cases through the generic lowering alone, compiled without any kernel of a target."""
    return _run(CASES, kernels=False)


@pytest.fixture(scope="module")
def kernel_outputs() -> list[list[torch.Tensor]]:
    """The outputs of layers and quantized operators with the CPU's kernels where they fit."""
    return _run([*LAYERS, *QUANTIZED], kernels=True)


def _run(cases: list[Any], kernels: bool) -> list[list[torch.Tensor]]:
    graph = graph_of(cases)
    results = iter(build(graph.finish(), threads=1, kernels=kernels)(*graph.inputs))
    return [[next(results) for _ in nodes] for nodes in graph.results]


def _name(case: Any) -> str:
    return operator_names(case[0])[0]


def _expected(case: Any) -> list[torch.Tensor]:
    op, arguments, keywords = (*case, {})[:3]
    result = op(*arguments, **keywords)
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _check(case: Any, got: list[torch.Tensor]) -> None:
    for value, want in zip(got, _expected(case), strict=False):
        _close(value, want, exact=False)


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: f"{i}-{_name(CASES[i])}")
def test_converter_agrees_with_torch(index: int, outputs: list[list[torch.Tensor]]) -> None:
    _check(CASES[index], outputs[index])


@pytest.mark.parametrize("index", range(len(LAYERS) + len(QUANTIZED)), ids=lambda i: f"{i}-{_name([*LAYERS, *QUANTIZED][i])}")
def test_kernels_agree_with_torch(index: int, kernel_outputs: list[list[torch.Tensor]]) -> None:
    _check([*LAYERS, *QUANTIZED][index], kernel_outputs[index])


def test_every_converter_has_a_case() -> None:
    covered = {name for case in CASES for name in operator_names(case[0])}
    entry_of(aten.relu.default)  # fills the table
    synonyms = {
        "view_copy", "_reshape_alias", "unsqueeze_copy", "squeeze_copy", "permute_copy", "transpose_copy", "expand_copy", "split_copy",
        "unbind_copy", "slice_copy", "select_copy", "narrow_copy", "contiguous", "concat", "empty", "empty_like", "new_empty",
        "lift_fresh_copy",
        "native_batch_norm", "_fused_rms_norm", "native_dropout", "where.Scalar", "sym_size", "sym_numel", "_assert_tensor_metadata",
    }  # fmt: skip
    missing = [
        name for name in TABLE if name not in covered and name.removeprefix("aten.") not in synonyms and not name.startswith("python.")
    ]
    assert missing == []


def test_unknown_operator_is_refused_by_name() -> None:
    graph = graph_of([(aten.fft_fft.default, (X,))])
    module = graph.finish()
    for node in module.graph.find_nodes(op="call_function", target=aten.fft_fft.default):
        node.meta["source"] = "net.py:7"
    for refuse in (translate, lambda module: check(module, {})):
        with pytest.raises(Refused, match=r"fft_fft.*cannot be lowered") as refusal:
            refuse(module)
        assert (refusal.value.node, refusal.value.operator, refusal.value.source) == ("fft_fft_default", "aten.fft_fft.default", "net.py:7")
        assert refusal.value.way_out
    check(module, {"aten.fft_fft": None})  # a target's legalizer takes it


def test_dialect_operators_are_all_lowered() -> None:
    names = [name.removeprefix("qc::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("qc::")]
    assert len(names) >= len([name for name in dir(dialect) if name.endswith("_shape") and name.startswith("_")])
    # Attention over codes has a kernel on every instruction set of the one target that takes it; those on integers alone are refused.
    without = {"attention_codes", "lookup", "mean", "avg_pool2d", "resize_nearest", "softmax"}
    assert {name for name in names if entry_of(getattr(qc, name).default) is None} == without


def test_constants_are_computed_once_and_kept_once() -> None:
    """A weight that a kernel reads transposed is stored transposed only; what depends on constants only is not code."""
    graph = _Graph()
    x, weight = graph.tensor(_normal(4, 100), False), graph.tensor(_normal(90, 100), True)
    doubled = graph.graph.call_function(aten.mul.Tensor, (weight, 2))
    doubled.meta["val"] = weight.meta["val"]
    graph.results.append([graph.graph.call_function(aten.linear.default, (x, doubled))])
    graph.results[0][0].meta["val"] = graph.mode.from_tensor(torch.empty(4, 90))
    lowered = translate(graph.finish())
    assert [tuple(t.shape) for t in lowered.constants.values()] == [(100, 90)]
    assert "multiply" not in str(lowered.module["main"])
    torch.testing.assert_close(next(iter(lowered.constants.values())), 2 * graph.module.get_buffer("constant_0").t())
