"""Make a lowered Relax function's shapes few and their order steady.

**ShareShapes.** ``VMShapeLower`` makes a new shape object for every allocation and view; a transformer layer has some forty, of a handful
of different shapes. Each costs the virtual machine about a microsecond.

    gv1 = make_shape(heap, 2, 1, 0, 0, 384)        gv1 = make_shape(heap, 2, 1, 0, 0, 384)
    gv2 = make_shape(heap, 2, 1, 0, 0, 384)   ->   gv2 = gv1

**OrderShapes.** The functions that compute derived sizes write one slot of the shape heap in each statement, in an order that
follows addresses of objects and so changes from process to process. Sorted by slot, the same model gives the same library.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx

MAKE_SHAPE = "vm.builtin.make_shape"


@tvm.transform.module_pass(opt_level=0, name="ShareShapes")
class ShareShapes:
    """Binds every repeated ``make_shape`` of a function to the first; a variable bound to a variable costs no instruction."""

    def transform_module(self, module: tvm.IRModule, _context: Any) -> tvm.IRModule:
        for variable, function in list(module.functions.items()):
            if isinstance(function, relax.Function):
                module[variable] = _share(function)
        return module


def _share(function: relax.Function) -> relax.Function:
    if not isinstance(function.body, relax.SeqExpr):
        return function
    first: dict[tuple[Any, ...], relax.Var] = {}
    blocks = [relax.BindingBlock([_shared(binding, first) for binding in block.bindings]) for block in function.body.blocks]
    body = relax.SeqExpr(blocks, function.body.body)
    shared = relax.Function(function.params, body, function.ret_ty, function.is_pure)
    for key, value in function.attrs.items():
        shared = shared.with_attr(key, value)
    return shared


def _shared(binding: Any, first: dict[tuple[Any, ...], relax.Var]) -> Any:
    key = _shape_key(binding)
    if key is None:
        return binding
    if key in first:
        return relax.VarBinding(binding.var, first[key])
    first[key] = binding.var
    return binding


def _shape_key(binding: Any) -> tuple[Any, ...] | None:
    """Return what a ``make_shape`` reads: slots of the one shape heap and constants."""
    value = getattr(binding, "value", None)
    target = getattr(value, "op", None) if value is not None else None
    if value is None or not isinstance(target, relax.ExternFunc) or target.global_symbol != MAKE_SHAPE:
        return None
    return tuple(str(argument) for argument in value.args[1:])


@tvm.transform.module_pass(opt_level=0, name="OrderShapes")
class OrderShapes:
    """Sorts the statements of every function that ``VMShapeLower`` made; they read sizes of inputs only, so any order is right."""

    def transform_module(self, module: tvm.IRModule, _context: Any) -> tvm.IRModule:
        for variable, function in list(module.functions.items()):
            derived = isinstance(function, tirx.PrimFunc) and variable.name_hint.startswith("shape_func")
            if derived and isinstance(function.body, tirx.SeqStmt):
                ordered = sorted(function.body.seq, key=lambda statement: int(statement.indices[0]))
                module[variable] = function.with_body(tirx.SeqStmt(ordered))
        return module
