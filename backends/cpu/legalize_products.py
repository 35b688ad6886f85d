"""Legalizers of products of two activations: of codes (``qc.matmul``, ``qc.attention_codes``), and of floats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from qcompile.backends.cpu.kernels.attention_codes import CodeAttention, attention_codes
from qcompile.backends.cpu.kernels.matmul_batched import BatchedMatmul, batched_matmul
from qcompile.backends.cpu.kernels.matmul_codes import CodeMatmul, code_matmul
from qcompile.backends.cpu.kernels.quantization import code_dtype, code_range
from qcompile.backends.cpu.legalize_arguments import Arguments, first_quantize, flat, grid_of, is_plain_tensor, product, zero_or
from qcompile.backends.lowering.shapes import Size
from qcompile.backends.lowering.translate import Legalizer, Walk
from torch import fx

from qcompile.formats import parse_scheme


def _code_matmul(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.matmul of two tensors with one scale each."""
    schemes = [parse_scheme(text) for text in (a.a_scheme, a.b_scheme, a.out_scheme) if text]
    if not all(map(is_plain_tensor, schemes)):
        return f"no kernel multiplies '{schemes[0]}' by '{schemes[1]}'" + (f" to '{schemes[2]}'" if a.out_scheme else "")
    batch = _batch(walk, a.a, a.b)
    if isinstance(batch, str):
        return batch
    spec = CodeMatmul(code_dtype(schemes[0]), code_dtype(schemes[1]), a.a_zero_point is not None, a.b_zero_point is not None)
    if a.out_scheme:
        lowest, highest = code_range(schemes[2])
        spec = replace(spec, codes=code_dtype(schemes[2]), lowest=lowest, highest=highest)
    inputs: list[Any] = []
    for operand, scale, zero in ((a.a, a.a_scale, a.a_zero_point), (a.b, a.b_scale, a.b_zero_point)):
        inputs += [_entries(walk, operand, batch), flat(walk, scale), *([flat(walk, zero)] if zero is not None else [])]
    if a.out_scheme:
        inputs += [flat(walk, a.out_scale), zero_or(walk, a.out_zero_point)]
    kernel = walk.kernel(spec, lambda: code_matmul(spec), f"matmul_{spec.a}_{spec.b}")
    return _call(walk, node, kernel, inputs, spec.codes or "float32")


def _code_attention(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.attention_codes; writes codes where only a following qc.quantize reads the result."""
    depth = int(walk.fake(a.q).shape[-1]) // a.heads
    quantize = first_quantize(node) if walk.is_inner(node) and len(node.users) == 1 else None
    grid = grid_of(quantize) if quantize is not None else None
    codes = code_dtype(grid.scheme) if grid else ""
    spec = CodeAttention(
        a.heads, a.kv_heads, depth, a.scale, a.key_mask is not None, a.causal, a.past is not None, a.window, codes
    )  # fmt: skip
    name = f"attention_codes_{a.heads}x{depth}" + f"_{codes}" * (codes != "") + "_cached" * spec.past
    kernel = walk.kernel(spec, lambda: attention_codes(spec), name)
    inputs = [walk.plain(codes) for codes in (a.q, a.k, a.v)] + [flat(walk, scale) for scale in (a.q_scale, a.k_scale, a.v_scale)]
    inputs += [walk.plain(t) for t in (a.key_mask, a.past) if t is not None] + (grid.arguments(walk) if grid else [])
    result = walk.call_kernel(kernel, inputs, (walk.shape(node), codes or "float32"))
    if quantize is None:
        return result
    for done in (quantize, node):  # nobody else reads the node itself
        walk.bind(done, result)
    return None


def _float_matmul(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """aten.bmm, aten.matmul and aten.mm of two float32 activations."""
    left, right = a.self, next(getattr(a, name) for name in ("mat2", "other") if hasattr(a, name))
    if {walk.fake(left).dtype, walk.fake(right).dtype} != {torch.float32}:
        return "no kernel for this product: it is of float32"
    batch = _batch(walk, left, right)
    if isinstance(batch, str):
        return batch
    kernel = walk.kernel("batched matmul", lambda: batched_matmul(BatchedMatmul()), "matmul_float")
    return _call(walk, node, kernel, [_entries(walk, operand, batch) for operand in (left, right)], "float32")


def _batch(walk: Walk, left: fx.Node, right: fx.Node) -> list[Size] | str:
    """Return the leading sizes of a product; none where the right side is one matrix, or why no kernel fits."""
    a, b = (tuple(walk.fake(operand).shape) for operand in (left, right))
    if len(a) < 2 or len(b) < 2:
        return "no kernel multiplies vectors"
    if len(b) == 2:
        return []
    return walk.shape(left)[:-2] if a[:-2] == b[:-2] else "no kernel multiplies two batches of different sizes"


def _entries(walk: Walk, operand: fx.Node, batch: list[Size]) -> Any:
    """Return an operand as [batch, rows, columns]; one batch entry holds all rows where the other side is one matrix."""
    *leading, last = walk.shape(operand)
    shape = [product(batch), leading[-1], last] if batch else [1, product(leading), last]
    return walk.reshape(walk.plain(operand), shape)


def _call(walk: Walk, node: fx.Node, kernel: Any, inputs: list[Any], dtype: str) -> Any:
    a, b = (value.ty.shape for value in inputs if len(value.ty.shape) == 3)
    return walk.reshape(walk.call_kernel(kernel, inputs, ([a[0], a[1], b[2]], dtype)), walk.shape(node))


LEGALIZE_PRODUCTS: dict[str, Legalizer] = {
    "qc.matmul": _code_matmul,
    "qc.attention_codes": _code_attention,
    "aten.bmm": _float_matmul,
    "aten.mm": _float_matmul,
    "aten.matmul": _float_matmul,
}
