"""Building of an FX graph while its types are known: calls on constants are computed at once, shape arithmetic stays symbolic."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.fx as fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.capture.onnx.load import printable
from qcompile.errors import Refused
from qcompile.graph.types import SymbolTable, TensorType

# A size is an int, or the node of a symbolic int.
Size: TypeAlias = int | fx.Node

# A constant computed at import may not be larger than this; a file of few bytes can ask for any size.
LARGEST_CONSTANT = 1 << 29

aten = torch.ops.aten


class RangeTooWide(Exception):
    """A dynamic size may be larger than the model allows: import must start again with a smaller range."""

    def __init__(self, symbol: str, largest: int) -> None:
        super().__init__(symbol)
        self.symbol, self.largest = symbol, largest


@dataclass(frozen=True, eq=False)
class Sizes:
    """An integer tensor whose elements are sizes, known or symbolic: what Shape gives, and arithmetic on it."""

    items: np.ndarray[Any, Any]

    @classmethod
    def of(cls, items: Any) -> Sizes:
        found = np.asarray(items, dtype=object)
        return cls(found)


Value: TypeAlias = fx.Node | torch.Tensor | Sizes


class Builder:
    """Makes the calls of one graph.

    Attributes:
        graph: the FX graph so far; every node has its fake value in ``meta["val"]``.
        constants: tensors by dotted name.
        scope: the ONNX node being imported, kept as provenance of each call.
        narrow: the format of constants with fewer than 8 bits, by identity of the tensor.
    """

    def __init__(self, ranges: dict[str, tuple[int, int]]) -> None:
        self.graph = fx.Graph()
        self.symbols = SymbolTable(ranges)
        self.constants: dict[str, torch.Tensor] = {}
        self.scope = ""
        self._nodes: dict[int, fx.Node] = {}  # constants that have a node, by identity of the tensor
        self._names: dict[int, tuple[torch.Tensor, str]] = {}  # names wanted for constants; holds the tensor so that its id stays its own
        self._derived: dict[tuple[int, str], torch.Tensor] = {}
        self._sizes: dict[tuple[fx.Node, int], fx.Node] = {}
        self._prefixes: set[str] = set()
        self._symbol_names: dict[str, str] = {}
        self.narrow: dict[int, str] = {}  # format of constants below 8 bits, by identity

    # ---- values -----------------------------------------------------------------------------------------------------------

    def placeholder(self, name: str, type: TensorType) -> fx.Node:
        node = self.graph.placeholder(re.sub(r"\W", "_", name) or "input")
        node.meta |= {"val": self.symbols.fake(type), "made_by": "capture"}
        for wanted, size in zip(type.shape, node.meta["val"].shape, strict=True):
            if isinstance(wanted, str):
                self._symbol_names[str(size.node.expr)] = wanted
        return node

    def limit(self, size: Size, largest: int) -> None:
        """Say that the model works only where this size is at most ``largest``: a table of positions ends there.

        Raises:
            RangeTooWide: the size is a symbol whose range goes further.
        """
        name = self._symbol_names.get(str(size.meta["val"].node.expr)) if isinstance(size, fx.Node) else None
        if name is not None and self.symbols.ranges[name][1] > largest >= 1:
            raise RangeTooWide(name, largest)

    def name_constant(self, value: torch.Tensor, name: str) -> torch.Tensor:
        """Remember the name that a constant gets if a call reads it; the first name stays."""
        self._names.setdefault(id(value), (value, name))
        return value

    def derive(self, value: torch.Tensor, what: str, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return a tensor made from a constant, the same one each time, under the constant's name."""
        key = (id(value), what)
        if key not in self._derived:
            made = make(value).contiguous()
            name = self._names.get(id(value), (value, "constant"))[1]
            self._names.setdefault(id(value), (value, name))
            self._derived[key] = self.name_constant(made, name)
        return self._derived[key]

    def node(self, value: Any) -> fx.Node:
        """Return the node of a value; a constant gets one when it is first read by a call."""
        if isinstance(value, fx.Node):
            return value
        if isinstance(value, Sizes):
            return self._node_of_sizes(value)
        if id(value) not in self._nodes:
            wanted = self._names.setdefault(id(value), (value, f"{self.scope or 'graph'}.constant"))[1]
            name = self._free_name(wanted)
            self.constants[name] = value.detach().contiguous()
            node = self.graph.get_attr(name)
            node.meta |= {
                "val": self.symbols.mode.from_tensor(value.detach(), static_shapes=True),
                "made_by": "capture",
                "scope": self.scope,
            }
            self._nodes[id(value)] = node
        return self._nodes[id(value)]

    def _node_of_sizes(self, value: Sizes) -> fx.Node:
        elements = [self.call(aten.full.default, [], self._sized(item), dtype=torch.int64) for item in value.items.reshape(-1)]
        if value.items.ndim == 0:
            return self.node(elements[0])
        flat = self.call(aten.stack.default, [self.node(element) for element in elements])
        return self.node(flat if value.items.ndim == 1 else self.reshape(flat, list(value.items.shape)))

    def _sized(self, item: Any) -> Any:
        return item if isinstance(item, fx.Node) else int(item)

    def shape(self, value: Value) -> tuple[int | torch.SymInt, ...]:
        return tuple(value.items.shape) if isinstance(value, Sizes) else tuple(self.fake(value).shape)

    def rank(self, value: Value) -> int:
        return len(self.shape(value))

    def dtype(self, value: Value) -> torch.dtype:
        return torch.int64 if isinstance(value, Sizes) else self.fake(value).dtype

    def fake(self, value: Value) -> torch.Tensor:
        """Return the fake value of a node, or the constant itself."""
        if isinstance(value, Sizes):
            value = self.node(value)
        found = value.meta["val"] if isinstance(value, fx.Node) else value
        assert isinstance(found, torch.Tensor)
        return found

    def static_shape(self, value: Value, axes: Sequence[int] | None = None) -> list[int]:
        """Return sizes that must be known now.

        Raises:
            Refused: one of them is symbolic.
        """
        shape = self.shape(value)
        chosen = [shape[axis] for axis in (axes if axes is not None else range(len(shape)))]
        if not all(isinstance(size, int) for size in chosen):
            raise Refused("the operator needs sizes that are dynamic here", way_out="make these axes static")
        return [int(size) for size in chosen]

    def size(self, value: Value, axis: int) -> Size:
        """Return one size of a value, as an int where it is known."""
        size = self.shape(value)[axis]
        if isinstance(size, int):
            return size
        if size.node.expr.is_number:
            return int(size)
        assert isinstance(value, fx.Node)
        if (value, axis) not in self._sizes:
            self._sizes[value, axis] = self._create(aten.sym_size.int, (value, axis), {})
        return self._sizes[value, axis]

    # ---- calls ------------------------------------------------------------------------------------------------------------

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Call an operator: computed now if every operand is a constant, otherwise a node.

        Raises:
            Refused: the operator does not take these operands.
        """
        flat, _ = torch.utils._pytree.tree_flatten((args, kwargs), is_leaf=lambda leaf: isinstance(leaf, (fx.Node, torch.Tensor, Sizes)))
        try:
            if not any(isinstance(leaf, (fx.Node, Sizes)) for leaf in flat):
                return self._compute(target, args, kwargs)
            args, kwargs = torch.utils._pytree.tree_map(
                lambda leaf: self.node(leaf) if isinstance(leaf, (torch.Tensor, Sizes)) else leaf,
                (args, kwargs),
                is_leaf=lambda leaf: isinstance(leaf, (fx.Node, torch.Tensor, Sizes)),
            )
            return self._create(target, args, kwargs)
        except Refused:
            raise
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise Refused(f"{target} does not take these operands: {lines[0]}") from error

    def call_node(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Call an operator as a node even where every operand is a constant: a quantized weight must stay one."""
        args = tuple(self.node(arg) if isinstance(arg, (torch.Tensor, Sizes)) else arg for arg in args)
        return self._create(target, args, kwargs)

    def _compute(self, target: Any, args: Any, kwargs: Any) -> Any:
        with FakeTensorMode(allow_non_fake_inputs=True):
            results = target(*args, **kwargs)
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, torch.Tensor) and result.numel() * result.element_size() > LARGEST_CONSTANT:
                raise Refused(f"the result is a constant of {result.numel() * result.element_size()} bytes")
        return target(*args, **kwargs)

    def _create(self, target: Any, args: Any, kwargs: Any) -> fx.Node:
        values, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        # With the dispatcher in Python: the C++ rules of some operators (constant_pad_nd) fix symbolic sizes.
        with self.symbols.mode, enable_python_dispatcher():
            value = target(*values, **named)
        node = self.graph.call_function(target, args, kwargs)
        node.meta |= {"val": value, "scope": self.scope, "made_by": "capture"}
        return node

    def release(self, node: fx.Node) -> None:
        """Take back a call that nothing reads, and the constants that only it read, so that their names are free."""
        operands = list(node.all_input_nodes)
        if node.users:
            return
        self.graph.erase_node(node)
        for operand in operands:
            if operand.op == "get_attr" and not operand.users:
                self.graph.erase_node(operand)
                del self.constants[str(operand.target)]
                self._nodes = {key: kept for key, kept in self._nodes.items() if kept is not operand}

    def size_arithmetic(self, function: Callable[[Any, Any], Any], a: Size, b: Size) -> Size:
        """Return function(a, b) of two sizes: an int where both are known, else a node."""
        if not isinstance(a, fx.Node) and not isinstance(b, fx.Node):
            return int(function(a, b))
        if (function is operator.mul and b == 1) or (function is operator.add and b == 0) or (function is operator.floordiv and b == 1):
            return a
        if (function is operator.mul and a == 1) or (function is operator.add and a == 0):
            return b
        node = self._create(function, (a, b), {})
        value = node.meta["val"]
        if isinstance(value, int):
            self.graph.erase_node(node)
            return value
        return node

    def item(self, value: Value, index: int) -> fx.Node | torch.Tensor:
        """Return one result of a call that has several."""
        return value[index] if isinstance(value, (tuple, list)) else self._create(operator.getitem, (value, index), {})

    def reshape(self, x: Value, sizes: Sequence[Size]) -> Any:
        """Return x with these sizes (one of them may be -1), by the calls that torch.export gives."""
        if isinstance(x, torch.Tensor) and all(isinstance(size, int) for size in sizes):
            return x.reshape(list(sizes))
        node = self.node(x)
        if node.meta["val"].is_contiguous():
            return self.call(aten.view.default, node, list(sizes))
        dense = self.call(aten.clone.default, node, memory_format=torch.contiguous_format)
        return self.call(aten._unsafe_view.default, dense, list(sizes))

    def cast(self, x: Value, dtype: torch.dtype) -> Any:
        return x if self.dtype(x) == dtype else self.call(aten._to_copy.default, x, dtype=dtype)

    # ---- names ------------------------------------------------------------------------------------------------------------

    def _free_name(self, wanted: str) -> str:
        """Return a dotted attribute name that is legal, not taken, and neither inside a taken one nor around one."""
        parts = [re.sub(r"[^0-9A-Za-z_]", "_", part) for part in printable(wanted).split(".")]
        parts = [f"{part}_" if hasattr(torch.nn.Module, part) or part == "training" else part for part in parts if part] or ["constant"]
        name, number = ".".join(parts), 0
        while self._taken(name):
            number += 1
            name = f"{'.'.join(parts)}_{number}"
        pieces = name.split(".")
        self._prefixes.update(".".join(pieces[:length]) for length in range(1, len(pieces)))
        return name

    def _taken(self, name: str) -> bool:
        pieces = name.split(".")
        inside = any(".".join(pieces[:length]) in self.constants for length in range(1, len(pieces)))
        return name in self.constants or name in self._prefixes or inside
