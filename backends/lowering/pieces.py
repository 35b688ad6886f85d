"""Which slices and concatenations cost nothing: they stay operators, which ``read_sequence`` takes for views and for parts.

A slice along the first axis that has more than one element is a place in what it is taken from. A concatenation along it is written by the
calls that make its parts, where each part is made by a kernel for it alone. In NHWC both hold for the rows of one image. All others become
kernels that copy.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import tvm
from qcompile.backends.lowering.sequence import contiguous_along
from tvm import relax
from tvm.ir import IRModule, Op
from tvm.relax.expr_functor import PyExprMutator, mutator

PIECES = ("relax.strided_slice", "relax.concat")  # what LegalizeOps leaves to this pass


@tvm.transform.module_pass(opt_level=0, name="LegalizePieces")
class LegalizePieces:
    """Turn slices and concatenations that need a copy into kernels."""

    def transform_module(self, module: IRModule, context: Any) -> IRModule:
        """Return the module with what needs a copy in ``main`` made by kernels."""
        free = _free(module["main"])
        rewriter = _Copies(module, free)
        rewriter.builder_.update_func(module.get_global_var("main"), rewriter.visit_expr(module["main"]))
        return rewriter.builder_.get()


def _free(main: relax.Function) -> list[relax.Call]:
    """Return the calls that cost nothing."""
    bound = {binding.var: binding.value for block in main.body.blocks for binding in block.bindings}
    calls = [value for value in bound.values() if isinstance(value, relax.Call)]
    uses = Counter(var for value in (*bound.values(), main.body.body) for var in _variables(value))
    returned = _roots(main.body.body, bound)
    free = []
    for call in calls:
        if call.op == Op.get("relax.strided_slice"):
            axes, steps = [int(a) for a in call.args[1].fields], [int(s) for s in call.args[4].fields] if len(call.args) > 4 else [1]
            if len(axes) == 1 and steps == [1] and contiguous_along(call.args[0].ty.shape, axes[0]) and call not in returned:
                free.append(call)
        elif call.op == Op.get("relax.concat"):
            alone = all(_made_for_it(part, bound, uses) for part in call.args[0].fields)
            if alone and contiguous_along(call.ty.shape, int(call.attrs.axis) % len(call.ty.shape)):
                free.append(call)
    return free


def _made_for_it(part: Any, bound: dict[Any, Any], uses: Counter[Any]) -> bool:
    """Say whether a kernel makes a part, and nothing else reads it; seen through reshapes."""
    value = bound.get(part)
    if uses[part] != 1:
        return False
    if isinstance(value, relax.TupleGetItem):  # one of several results, such as the one beside scratch
        value = bound.get(value.tuple_value)
    if not isinstance(value, relax.Call):
        return False
    name = getattr(value.op, "name", "")
    return _made_for_it(value.args[0], bound, uses) if name == "relax.reshape" else name not in PIECES


def _variables(value: Any) -> list[Any]:
    """Return the variables that a bound value reads, each as often as it stands there."""
    if isinstance(value, relax.Var):
        return [value]
    if isinstance(value, relax.Tuple):
        return [variable for part in value.fields for variable in _variables(part)]
    if isinstance(value, relax.TupleGetItem):
        return _variables(value.tuple_value)
    return [variable for part in value.args for variable in _variables(part)] if isinstance(value, relax.Call) else []


def _roots(value: Any, bound: dict[Any, Any]) -> list[Any]:
    """Return the values behind what a function returns, seen through reshapes."""
    if isinstance(value, relax.Tuple):
        return [root for part in value.fields for root in _roots(part, bound)]
    if isinstance(value, relax.Var) and value in bound:
        return _roots(bound[value], bound)
    if isinstance(value, relax.Call) and getattr(value.op, "name", "") == "relax.reshape":
        return [value, *_roots(value.args[0], bound)]
    return [value]


@mutator
class _Copies(PyExprMutator):
    def __init__(self, module: IRModule, free: list[relax.Call]) -> None:
        super().__init__(module)
        self._free = free

    def visit_call_(self, call: relax.Call) -> Any:
        kept = any(call.same_as(other) for other in self._free)
        visited = self.visit_expr_post_order(call)
        if kept or getattr(call.op, "name", "") not in PIECES:
            return visited
        return visited.op.get_attr("FLegalize")(self.builder_, visited)
