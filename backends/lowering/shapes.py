"""Sizes: torch's symbolic sizes (sympy) as TVM expressions, and dtypes by their TVM names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from tvm import tirx

from qcompile.errors import Refused

Size = Any  # an int or a tvm.tirx.PrimExpr of dtype int64


def dtype_name(dtype: torch.dtype) -> str:
    """Return TVM's name of a torch dtype: ``float32``, ``int64``, ``bool`` ..."""
    return str(dtype).removeprefix("torch.")


class Sizes:
    """Translates sizes; each sympy symbol becomes one ``tirx.Var`` of dtype int64."""

    def __init__(self) -> None:
        self.variables: dict[sympy.Symbol, tirx.Var] = {}

    def size(self, value: int | torch.SymInt) -> Size:
        """Return one size as an int or a TVM expression."""
        if not isinstance(value, torch.SymInt):
            return int(value)
        return self._expression(value.node.expr)

    def shape(self, shape: Any) -> list[Size]:
        """Return a torch shape as a list of sizes."""
        return [self.size(s) for s in shape]

    def define(self, symbol: sympy.Symbol) -> tirx.Var:
        """Return the variable of a symbol, made on first use."""
        if symbol not in self.variables:
            self.variables[symbol] = tirx.Var(str(symbol), "int64")
        return self.variables[symbol]

    def _expression(self, expression: sympy.Basic) -> Size:
        if isinstance(expression, sympy.Integer):
            return int(expression)
        if isinstance(expression, sympy.Symbol):
            return self.define(expression)
        parts = [self._expression(argument) for argument in expression.args]
        name = type(expression).__name__
        if name not in _COMBINE:
            raise Refused(f"the size {expression} uses {name}, which has no TVM form", way_out="export the model with that size fixed")
        return _COMBINE[name](*parts)


def _sum(*parts: Size) -> Size:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _product(*parts: Size) -> Size:
    total = parts[0]
    for part in parts[1:]:
        total = total * part
    return total


def _power(base: Size, exponent: Size) -> Size:
    if not isinstance(exponent, int) or exponent < 0:
        raise Refused(f"a size has the exponent {exponent}", way_out="export the model with that size fixed")
    return _product(*[base] * exponent) if exponent else 1


def _wide(value: Size) -> tirx.PrimExpr:
    return tirx.const(value, "int64") if isinstance(value, int) else value


_COMBINE: dict[str, Callable[..., Size]] = {
    "Add": _sum,
    "Mul": _product,
    "Pow": _power,
    "FloorDiv": lambda a, b: tirx.floordiv(_wide(a), _wide(b)),
    "CleanDiv": lambda a, b: tirx.floordiv(_wide(a), _wide(b)),
    "CeilToInt": lambda a: a,
    "Mod": lambda a, b: tirx.floormod(_wide(a), _wide(b)),
    "PythonMod": lambda a, b: tirx.floormod(_wide(a), _wide(b)),
    "ModularIndexing": lambda a, b, c: tirx.floormod(tirx.floordiv(_wide(a), _wide(b)), _wide(c)),
    "Max": lambda a, b: tirx.max(_wide(a), _wide(b)),
    "Min": lambda a, b: tirx.min(_wide(a), _wide(b)),
}
