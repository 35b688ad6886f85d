"""Sums of two quantized tensors: a kernel that reads codes and writes codes, or the end of the convolution that makes one of the two.

A sum stands in the graph as ``qc.add``, or, where something reads it in float, as ``aten.add`` of two dequantized tensors with perhaps
a relu and a quantize behind it. Both mean the same: dequantize, add, activate, and the values or their codes or both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from qcompile.backends.cpu.kernels import quantization
from qcompile.backends.cpu.kernels.code_sums import CodeSum
from qcompile.backends.cpu.kernels.quantization import code_dtype, code_range
from qcompile.backends.cpu.legalize_arguments import (
    Arguments,
    Grid,
    activation_name,
    first_quantize,
    grid_of,
    is_plain_tensor,
    product,
)  # fmt: skip
from qcompile.backends.lowering.converters import named_arguments
from qcompile.backends.lowering.translate import Legalizer, Walk
from torch import fx

from qcompile.formats import parse_scheme
from qcompile.graph.text import bound_arguments

aten, qc = torch.ops.aten, torch.ops.qc

_GENERIC = ""  # no reason to report: the generic way is as good


@dataclass(frozen=True)
class SumOfCodes:
    """What one kernel computes of the sum of two tensors of codes.

    Attributes:
        terms: the nodes of the codes, and what the codes stand for.
        activation: of the sum.
        values, quantized: the nodes that are the float sum, and those that are its codes on ``grid``.
        passed: nodes on the way that nobody else reads.
    """

    terms: tuple[tuple[fx.Node, Grid], tuple[fx.Node, Grid]]
    activation: str
    values: list[fx.Node]
    quantized: list[fx.Node]
    grid: Grid | None
    passed: list[fx.Node] = field(default_factory=list)

    def added_to(self, addend: Grid) -> CodeSum:
        """Return what the kernel of one term does with the codes of the other."""
        dtype, values = code_dtype(addend.scheme), bool(self.values)
        if self.grid is None:
            return CodeSum(dtype, self.activation, values=values)
        return CodeSum(dtype, self.activation, code_dtype(self.grid.scheme), *code_range(self.grid.scheme), values)

    def bind(self, walk: Walk, results: list[Any], *, channels_last: bool) -> None:
        """Give the nodes their values, of which values come first; ``passed`` are only marked as done."""
        for node, result in zip([*self.values, *self.quantized], results, strict=True):
            walk.bind(node, result, channels_last)
        for node in self.passed:
            walk.bind(node, results[0], channels_last)


# ---- what the graph says --------------------------------------------------------------------------------------------------


def read_sum(walk: Walk, node: fx.Node) -> SumOfCodes | str:
    """Return the sum that an addition begins, or the reason why no kernel computes it."""
    a = Arguments(**named_arguments(node))
    return _quantized_sum(walk, node, a) if node.target is qc.add.default else _float_sum(walk, node, a)


def _quantized_sum(walk: Walk, node: fx.Node, a: Arguments) -> SumOfCodes | str:
    first, second, out = (parse_scheme(text) for text in (a.a_scheme, a.b_scheme, a.out_scheme))
    if not all(map(is_plain_tensor, (first, second, out))):
        return f"no kernel adds '{first}' and '{second}' to '{out}'"
    if tuple(walk.fake(a.a).shape) != tuple(walk.fake(a.b).shape):
        return "no kernel adds tensors of two shapes"
    terms = (a.a, Grid(a.a_scale, a.a_zero_point, first)), (a.b, Grid(a.b_scale, a.b_zero_point, second))
    return SumOfCodes(terms, a.activation, [], [node], Grid(a.out_scale, a.out_zero_point, out))


def _float_sum(walk: Walk, node: fx.Node, a: Arguments) -> SumOfCodes | str:
    """Return aten.add of two dequantized tensors of one shape, with the relu and the codes that follow it."""
    first, second = _codes_behind(a.self), _codes_behind(a.other)
    if first is None or second is None or a.alpha != 1 or walk.fake(a.self).shape != walk.fake(a.other).shape:
        return _GENERIC
    last, activation = node, "none"
    if walk.is_inner(node) and len(node.users) == 1 and (name := activation_name(next(iter(node.users)))) in ("relu", "relu6"):
        last, activation = next(iter(node.users)), name
    quantize = first_quantize(last)
    quantized = [quantize] if quantize is not None else []
    values = [last] if not walk.is_inner(last) or set(last.users) - set(quantized) else []
    grid = grid_of(quantize) if quantize is not None else None
    passed = [passed for passed in dict.fromkeys((node, last)) if passed not in values]
    return SumOfCodes((first, second), activation, values, quantized, grid, passed)


def _codes_behind(node: Any) -> tuple[fx.Node, Grid] | None:
    """Return the codes of a value that is dequantized with one scale, or None."""
    if not isinstance(node, fx.Node) or node.target is not qc.dequantize.default:
        return None
    a, grid = bound_arguments(node), grid_of(node)
    return (a["codes"], grid) if a["size"] is None and is_plain_tensor(grid.scheme) else None


def sum_after(walk: Walk, node: fx.Node, grid: Grid) -> tuple[SumOfCodes, fx.Node, Grid] | None:
    """Return the sum that the kernel of ``node``, which makes codes on ``grid``, can end with, and the codes that it adds.

    Nothing else reads the node's codes, and the others exist already: of two convolutions the later one adds.
    """
    before, user = [node], _only_reader(walk, node)
    if user is not None and user.target is qc.dequantize.default:
        before, user = [node, user], _only_reader(walk, user)
    if user is None or user.target not in (qc.add.default, aten.add.Tensor):
        return None
    found = read_sum(walk, user)
    if isinstance(found, str):
        return None
    own, others = ([term for term in found.terms if (term[0] is node) == mine] for mine in (True, False))
    if len(own) != 1 or not _same_grid(walk, own[0][1], grid):
        return None
    addend, its_grid = others[0]
    known = its_grid.is_bound(walk) and (found.grid is None or found.grid.is_bound(walk))
    if not walk.is_bound(addend) or not known:
        return None
    found.passed.extend(before)
    return found, addend, its_grid


def _only_reader(walk: Walk, node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if walk.is_inner(node) and len(node.users) == 1 else None


def _same_grid(walk: Walk, a: Grid, b: Grid) -> bool:
    """Return whether codes stand for the same values: by the same nodes, or by constants of one value."""

    def same(first: fx.Node | None, second: fx.Node | None) -> bool:
        one, two = ((walk.constant(node) if node is not None else torch.zeros(1)) for node in (first, second))
        return first is second or (one is not None and two is not None and torch.equal(one.reshape(-1), two.reshape(-1)))

    return code_dtype(a.scheme) == code_dtype(b.scheme) and same(a.scale, b.scale) and same(a.zero_point, b.zero_point)


# ---- the kernel of a sum alone ----------------------------------------------------------------------------------------------


def _add(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.add, or aten.add of dequantized tensors, in whichever order of memory the terms have."""
    found = read_sum(walk, node)
    if isinstance(found, str):
        return found
    last = any(walk.is_channels_last(codes) for codes, _ in found.terms)
    operands = [walk.channels_last(codes) if last else walk.plain(codes) for codes, _ in found.terms]
    shape = list(operands[0].ty.shape)
    count, dtypes, out = product(shape), [code_dtype(grid.scheme) for _, grid in found.terms], found.grid.scheme if found.grid else None
    kernel = walk.kernel(
        ("add", *dtypes, out, found.activation, bool(found.values)),
        lambda: quantization.quantized_add(dtypes[0], dtypes[1], out, found.activation, values=bool(found.values)),
        "add_codes",
    )
    inputs = []
    for operand, (_, grid) in zip(operands, found.terms, strict=True):
        inputs += [walk.reshape(operand, [count]), *grid.arguments(walk)]
    inputs += found.grid.arguments(walk) if found.grid is not None else []
    kinds = ["float32"] * len(found.values) + ([code_dtype(out)] if out is not None else [])
    made = walk.call_kernel(kernel, inputs, *(([count], kind) for kind in kinds))
    results = made if len(kinds) == 2 else [made]
    found.bind(walk, [walk.reshape(result, shape) for result in results], channels_last=last)
    return None


LEGALIZE_SUMS: dict[str, Legalizer] = {"qc.add": _add, "aten.add.Tensor": _add}
