"""The table of ONNX operators, and what one operator's function sees of its node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
import torch.fx as fx

from qcompile.capture.onnx.builder import Builder, Size, Sizes, Value
from qcompile.errors import Refused

Result = Value | tuple[Value | None, ...]
OperatorFunction = Callable[["Call"], Result]

# More elements than any table of positions has.
LARGEST_COUNT = 1 << 24

# (domain, operator) -> functions by the operator set they begin with, ascending.
TABLE: dict[tuple[str, str], list[tuple[int, OperatorFunction]]] = {}


def operator(*names: str, since: int = 1, domain: str = "") -> Callable[[OperatorFunction], OperatorFunction]:
    """Enter a function in the table for operators from an operator set on."""

    def enter(function: OperatorFunction) -> OperatorFunction:
        for name in names:
            versions = TABLE.setdefault((domain, name), [])
            if any(version == since for version, _ in versions):
                raise ValueError(f"{name} has two functions since operator set {since}")
            versions.append((since, function))
            versions.sort(key=lambda entry: entry[0])
        return function

    return enter


def find_operator(domain: str, name: str, version: int) -> OperatorFunction | None:
    """Return the function of an operator in an operator set, or None."""
    fitting = [function for since, function in TABLE.get((domain, name), []) if since <= version]
    return fitting[-1] if fitting else None


class Call:
    """One ONNX node as its operator's function sees it.

    Attributes:
        node: the onnx-ir node.
        inputs: values of its inputs; None for one that is left out.
        version: the operator set in force.
        build: where calls are made.
        read_tensor: reads a tensor attribute, with the checks of ``qcompile.capture.onnx.load``.
    """

    read_tensor: Callable[[Any, str], torch.Tensor]

    def __init__(self, node: ir.Node, inputs: list[Value | None], version: int, build: Builder) -> None:
        self.node, self.inputs, self.version, self.build = node, inputs, version, build

    # ---- inputs -----------------------------------------------------------------------------------------------------------

    def __getitem__(self, index: int) -> Value:
        value = self.get(index)
        if value is None:
            raise Refused(f"input {index} is missing")
        return value

    def get(self, index: int) -> Value | None:
        return self.inputs[index] if index < len(self.inputs) else None

    def given(self) -> list[Value]:
        return [value for value in self.inputs if value is not None]

    def constant(self, index: int) -> torch.Tensor:
        """Return a constant input, or refuse one that is computed."""
        value = self[index]
        if not isinstance(value, torch.Tensor):
            raise Refused(f"input {index} must be a constant")
        return value

    def sizes(self, index: int) -> list[Size]:
        """Return a one-dimensional integer input as sizes: constants and shape arithmetic."""
        value = self[index]
        if isinstance(value, Sizes):
            return [*value.items.reshape(-1)]
        if isinstance(value, torch.Tensor):
            return [int(item) for item in value.reshape(-1).tolist()]
        raise Refused(f"input {index} must be a constant or come from shapes", way_out="make that shape independent of values")

    def integers(self, index: int) -> list[int]:
        """Return a one-dimensional integer input that must be constant."""
        return [int(item) for item in self.constant(index).reshape(-1).tolist()]

    def name(self, index: int) -> str:
        value = self.node.inputs[index]
        return (value.name or "") if value is not None else ""

    def used_outputs(self) -> int:
        """Return the number of outputs up to the last one that somebody reads or that the graph returns."""
        used = [i for i, out in enumerate(self.node.outputs) if out.name and (out.uses() or out.is_graph_output())]
        return max(used, default=0) + 1

    # ---- attributes -------------------------------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        return name in self.node.attributes

    def _attribute(self, name: str, kind: ir.AttributeType, default: Any) -> Any:
        attribute = self.node.attributes.get(name)
        if attribute is None:
            return default
        if attribute.type != kind:
            raise Refused(f"attribute '{name}' is {attribute.type.name}, not {kind.name}")
        return attribute.value

    def integer(self, name: str, default: int = 0) -> int:
        return int(self._attribute(name, ir.AttributeType.INT, default))

    def real(self, name: str, default: float = 0.0) -> float:
        return float(self._attribute(name, ir.AttributeType.FLOAT, default))

    def string(self, name: str, default: str = "") -> str:
        value = self._attribute(name, ir.AttributeType.STRING, default)
        return value.decode(errors="replace") if isinstance(value, bytes) else str(value)

    def integer_list(self, name: str, default: list[int] | None = None) -> list[int]:
        value = self._attribute(name, ir.AttributeType.INTS, default)
        return [int(item) for item in value] if value is not None else []

    # ---- shorthands -------------------------------------------------------------------------------------------------------

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        return self.build.call(target, *args, **kwargs)

    def axis(self, name: str, rank: int, default: int) -> int:
        """Return an axis attribute as a non-negative number below rank."""
        return normal_axis(self.integer(name, default), rank)

    def is_single_use(self, value: fx.Node, index: int) -> bool:
        """Say whether this node is the only reader of its input, so that the call behind it may be changed."""
        source = self.node.inputs[index]
        return source is not None and len(source.uses()) == 1 and not source.is_graph_output()


def bounded(count: int) -> int:
    """Return a number of elements that import is about to make, or refuse one that no real model has (a small file can ask for any)."""
    if count > LARGEST_COUNT:
        raise Refused(f"the operator asks for {count} elements while it is imported")
    return count


def normal_axis(axis: int, rank: int) -> int:
    if not -max(rank, 1) <= axis < max(rank, 1):
        raise Refused(f"axis {axis} is outside a tensor of {rank} axes")
    return axis % rank if rank else 0
