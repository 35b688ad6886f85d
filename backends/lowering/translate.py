"""The walk from a ``torch.fx`` graph to a Relax module, shared by every TVM target.

``translate(graph_module, legalize=...)`` emits one Relax function ``main(input_0, .., constants)``. Constants are one tuple
parameter, so weights are never copied into the code and a target can ask for them in its own packed order
(``Walk.parameter``). Whatever depends on constants only is computed here, once, in PyTorch.

Images: the graph is NCHW, kernels read NHWC. A value of rank 4 may exist in either order and is converted when the other
one is asked for (``Walk.plain``, ``Walk.channels_last``), so a chain of convolutions and pointwise operators holds no
transposes.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import tvm
import tvm.sym
from qcompile.backends.lowering.fallback import Fallback
from qcompile.backends.lowering.shapes import Size, Sizes, dtype_name
from torch import fx
from tvm import relax, tirx
from tvm.ir import IRModule
from tvm.ir.expr import GenericConst

from qcompile.errors import Refused
from qcompile.graph.file_tensor import in_memory

TO_CHANNELS_LAST = (0, 2, 3, 1)
TO_PLAIN = (0, 3, 1, 2)

COMPILE_LOCK = threading.Lock()  # TVM's compiler is not thread-safe: one compile at a time in a process

SCHEDULED = "qcompile.scheduled"  # attribute of a TIR function whose loops must be left as they are

# Constants up to this size are part of the code: reading one costs the virtual machine nothing, while an element of the tuple costs
# an instruction to fetch and one to drop. Weights are larger; vectors of a layer (scales, biases) are smaller.
INLINE_BYTES = 16 << 10

_PYTHON_OPERATORS: dict[Any, Callable[..., Any]] = {
    operator.add: lambda a, b: a + b,
    operator.sub: lambda a, b: a - b,
    operator.mul: lambda a, b: a * b,
    operator.neg: lambda a: -a,
    operator.floordiv: lambda a, b: tirx.floordiv(_prim(a), _prim(b)),
    operator.mod: lambda a, b: tirx.floormod(_prim(a), _prim(b)),
}


def _same(a: Size, b: Size) -> bool:
    return bool(tvm.sym.Analyzer().can_prove_equal(_prim(a), _prim(b)))


def _prim(value: Any) -> Any:
    return tirx.const(value, "int64") if isinstance(value, int) else value


@dataclass
class Lowered:
    """What ``translate`` returns.

    Attributes:
        module: the Relax module; its function ``main`` takes the inputs and then one tuple of constants.
        inputs: names of the inputs.
        constants: name and tensor of each element of the tuple, in order.
        outputs: names of the nodes returned, taps last.
        fallbacks: nodes without a kernel of the target, with the reason.
    """

    module: IRModule
    inputs: list[str]
    constants: dict[str, torch.Tensor]
    outputs: list[str]
    fallbacks: list[Fallback] = field(default_factory=list)


# A legalizer emits a node with a target's kernel and returns its value, or returns a reason (str) for the generic way.
Legalizer = Callable[["Walk", fx.Node, SimpleNamespace], Any]


class Walk:
    """The state of one translation; converters and legalizers get it as their first argument.

    Attributes:
        builder: the Relax builder; ``emit`` binds an expression in it.
        node: the node being translated.
        sizes: translates torch sizes.
        fallbacks: what has been reported so far.
        tiling: what the target's legalizers cut kernels by; not read here.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        legalize: dict[str, Legalizer],
        taps: tuple[str, ...] = (),
        tiling: Any = None,
        keep: Callable[[torch.Tensor], torch.Tensor] = in_memory,
        inline_bytes: int = INLINE_BYTES,
        images_last: bool = False,
    ) -> None:
        self._taps, self._keep = taps, keep
        self._images_last = images_last
        self._inline_bytes = inline_bytes
        self.tiling = tiling
        self.graph_module = graph_module
        self.builder = relax.BlockBuilder()
        self.sizes = Sizes()
        self.legalize = legalize
        self.fallbacks: list[Fallback] = []
        self.constants: dict[str, torch.Tensor] = {}
        self.node: fx.Node = next(iter(graph_module.graph.nodes))
        self._plain: dict[fx.Node, Any] = {}
        self._channels_last: dict[fx.Node, Any] = {}
        self._constant_values: dict[fx.Node, Any] = {}
        self._constant_nodes = nodes_of_constants_only(graph_module)
        self._parameters: dict[str, relax.Expr] = {}
        self._groups: dict[tuple[Any, ...], list[Any]] = {}
        self._kernels: dict[Any, Any] = {}
        self._views: dict[Any, Any] = {}  # what each emitted reshape is a view of

    # ---- emitting --------------------------------------------------------------------------------------------------------

    def emit(self, expression: Any) -> Any:
        """Bind an expression to a variable; sizes and tuples of Python pass through."""
        return self.builder.emit(expression) if isinstance(expression, relax.Expr) and not isinstance(expression, relax.Var) else expression

    def kernel(self, key: Any, build: Callable[[], Any], name: str) -> Any:
        """Return the global variable of a TIR kernel; ``build`` runs once for each key, so layers share their kernels."""
        if key not in self._kernels:
            function = build().without_attr("global_symbol")
            # 8 is TVM's "opaque": nothing is fused into a kernel, and its loops stay as they were written.
            function = function.with_attr("op_pattern", 8).with_attr(SCHEDULED, True)
            self._kernels[key] = self.builder.add_func(function, name)
        return self._kernels[key]

    def call_kernel(self, kernel: Any, inputs: list[Any], *results: tuple[Iterable[Size], str], numbers: Iterable[int] = ()) -> Any:
        """Emit a call of a TIR kernel; each result is (shape, dtype name). Returns the value, or a list of several.

        ``numbers`` are int32 arguments between the inputs and the results.
        """
        types = [relax.TensorType([_prim(s) for s in shape], dtype) for shape, dtype in results]
        arguments = relax.Tuple([*inputs, *(tirx.const(number, "int32") for number in numbers)])
        call = self.builder.emit(relax.op.call_tir(kernel, arguments, types[0] if len(types) == 1 else types))
        return call if len(types) == 1 else [self.builder.emit(relax.TupleGetItem(call, i)) for i in range(len(types))]

    def update(self, kernel: Any, updated: Any, *others: Any, numbers: Iterable[int] = ()) -> Any:
        """Emit a call of a TIR kernel that writes its first argument in place; return what stands for it from then on.

        ``numbers`` are int32 arguments after the others.
        """
        arguments = relax.Tuple([updated, *others, *(tirx.const(number, "int32") for number in numbers)])
        return self.builder.emit(relax.op.call_tir_inplace(kernel, arguments, 0, updated.ty))

    def reshape(self, value: Any, shape: Iterable[Size]) -> Any:
        """Emit a view of a value with another shape; nothing is copied when the value is in memory."""
        shape = list(shape)
        if len(shape) == len(value.ty.shape) and all(_same(a, b) for a, b in zip(shape, value.ty.shape, strict=True)):
            return value
        if isinstance(value, GenericConst) and all(isinstance(size, int | tirx.IntImm) for size in shape):
            return relax.const(value.value.numpy().reshape([int(size) for size in shape]), str(value.ty.dtype))
        # A view of a view is a view of the first; going back to the first shape needs no view at all.
        base = self._views.get(value, value)
        if base is not value:
            return self.reshape(base, shape)
        view = self.builder.emit(relax.op.reshape(value, [_prim(s) for s in shape]))
        self._views[view] = value
        return view

    # ---- values ----------------------------------------------------------------------------------------------------------

    def fake(self, node: fx.Node) -> Any:
        """Return the meta value of a node (a FakeTensor, a SymInt, or a list of them)."""
        if "val" not in node.meta:
            raise Refused("the node has no meta value", node=node.name, operator=str(node.target), way_out="propagate shapes first")
        return node.meta["val"]

    def shape(self, node: fx.Node | None = None) -> list[Size]:
        """Return the shape of a node's result, by default of the node being translated."""
        return self.sizes.shape(self.fake(node or self.node).shape)

    def constant(self, node: Any) -> torch.Tensor | None:
        """Return the tensor of a node that depends on constants only, or None."""
        if not isinstance(node, fx.Node) or node not in self._constant_nodes:
            return None
        if node not in self._constant_values:
            self._constant_values[node] = _evaluate(self.graph_module, node, self.constant)
        return self._constant_values[node]

    def parameter(self, name: str, make: Callable[[], torch.Tensor]) -> Any:
        """Return the Relax value of a constant; ``name`` identifies it and ``make`` runs once for each name."""
        if name not in self._parameters:
            tensor = make().detach().contiguous()
            if tensor.nbytes <= self._inline_bytes:
                self._parameters[name] = relax.const(in_memory(tensor).numpy(), dtype_name(tensor.dtype))
            else:
                self.constants[name] = self._keep(tensor)
                self._parameters[name] = relax.Var(name, relax.TensorType(list(tensor.shape), dtype_name(tensor.dtype)))
        return self._parameters[name]

    def packed_together(self, key: tuple[Any, ...], name: str, pack: Callable[[], list[torch.Tensor]]) -> list[Any]:
        """Return the constants of a kernel; ``pack`` makes them all and runs once for each key, so shared layers share them."""
        if key not in self._groups:
            unique = f"{name}:{len(self._groups)}"
            self._groups[key] = [self.parameter(f"{unique}.{i}", lambda t=tensor: t) for i, tensor in enumerate(pack())]  # type: ignore[misc]
        return self._groups[key]

    def packed(self, node: fx.Node, order: str, pack: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        """Return a constant in another order in memory; ``order`` names it, so equal requests share one copy."""
        return self.parameter(f"{_constant_name(node)}:{order}", lambda: pack(self.required_constant(node)))

    def plain(self, node: fx.Node) -> Any:
        """Return the Relax value of a node in the order of the graph (NCHW)."""
        if node not in self._plain:
            if node in self._constant_nodes:
                self._plain[node] = self._constant_expression(node)
            else:
                self._plain[node] = self.emit(relax.op.permute_dims(self._channels_last[node], TO_PLAIN))
        return self._plain[node]

    def channels_last(self, node: fx.Node) -> Any:
        """Return the Relax value of a node of rank 4 or less, broadcast from the right, in the order NHWC."""
        if node not in self._channels_last:
            self._channels_last[node] = self._to_channels_last(node)
        return self._channels_last[node]

    def is_channels_last(self, node: Any) -> bool:
        """Return whether a value exists in NHWC order only."""
        return isinstance(node, fx.Node) and node in self._channels_last and node not in self._plain

    def bind(self, node: fx.Node, value: Any, channels_last: bool = False) -> None:
        """Give a node its value; a legalizer that fuses later nodes into a kernel binds them too."""
        (self._channels_last if channels_last else self._plain)[node] = self.emit(value)

    def is_bound(self, node: fx.Node) -> bool:
        """Return whether a node has its value already (constants always have)."""
        return node in self._plain or node in self._channels_last or node in self._constant_nodes

    def is_inner(self, node: fx.Node) -> bool:
        """Return whether nobody outside the graph sees a node's value, so that a kernel may swallow it."""
        return node.name not in self._taps and all(user.op != "output" for user in node.users)

    def report(self, reason: str) -> None:
        """Report that the node being translated runs without a kernel of the target."""
        self.fallbacks.append(Fallback(self.node.name, str(self.node.target), reason))

    def required_constant(self, node: fx.Node) -> torch.Tensor:
        """Return the tensor of a node that depends on constants only.

        Raises:
            Refused: it depends on an input.
        """
        tensor = self.constant(node)
        if tensor is None:
            raise Refused("must be a constant", node=node.name, operator=str(node.target))
        return tensor

    def _constant_expression(self, node: fx.Node) -> Any:
        tensor = self.constant(node)
        if not isinstance(tensor, torch.Tensor):
            return tensor
        return self.parameter(_constant_name(node), lambda: tensor)

    def _to_channels_last(self, node: fx.Node) -> Any:
        rank = len(self.fake(node).shape)
        if not rank:
            return self.plain(node)
        shape = [1] * (4 - rank) + self.shape(node)
        if node in self._constant_nodes:
            return self.packed(node, "NHWC", lambda t: t.reshape(shape).permute(TO_CHANNELS_LAST))
        return self.emit(relax.op.permute_dims(self.reshape(self.plain(node), shape), TO_CHANNELS_LAST))

    # ---- walking ---------------------------------------------------------------------------------------------------------

    def run(self) -> Lowered:
        """Translate every node and return the module."""
        placeholders = [node for node in self.graph_module.graph.nodes if node.op == "placeholder"]
        inputs = [self._placeholder(node) for node in placeholders]
        with self.builder.function("main"):
            with self.builder.dataflow():
                for node in self.graph_module.graph.nodes:
                    self._translate(node)
                outputs = self._outputs(self._taps)
                returned = [self.channels_last(n) if self._images_last and self.fake(n).ndim == 4 else self.plain(n) for n in outputs]
                result = self.builder.emit_output(relax.Tuple(returned))
            self.builder.emit_func_output(result, [*inputs, *(self._parameters[name] for name in self.constants)])
        module, constants = _bundle_constants(self.builder.finalize(), inputs, {name: self._parameters[name] for name in self.constants})
        kept = {name: self.constants[name] for name in constants}
        return Lowered(module, [node.name for node in placeholders], kept, [node.name for node in outputs], self.fallbacks)

    def _placeholder(self, node: fx.Node) -> Any:
        fake = self.fake(node)
        if not isinstance(fake, torch.Tensor):
            raise Refused("an input is not a tensor", node=node.name, way_out="export the model with tensors as inputs")
        last = self._images_last and fake.ndim == 4
        shape = self.shape(node)
        sizes = [_prim(shape[axis]) for axis in (TO_CHANNELS_LAST if last else range(len(shape)))]
        variable = relax.Var(node.name, relax.TensorType(sizes, dtype_name(fake.dtype)))
        (self._channels_last if last else self._plain)[node] = variable
        return variable

    def _translate(self, node: fx.Node) -> None:
        unused = not node.users and node.name not in self._taps  # checks such as _assert_scalar, and dead nodes
        if node.op in ("placeholder", "output", "get_attr") or unused or self.is_bound(node):
            return
        if node.op != "call_function":
            raise Refused(f"a {node.op} node cannot be lowered", node=node.name, operator=str(node.target))
        self.node = node
        if not _is_tensor_like(self.fake(node)) and isinstance(self.fake(node), int | torch.SymInt):
            self._plain[node] = self._size_node(node)
            return
        from qcompile.backends.lowering.converters import convert  # the table imports this module's Walk

        convert(self, node)

    def _size_node(self, node: fx.Node) -> Size:
        value = self.fake(node)
        if isinstance(value, int) or not any(s not in self.sizes.variables for s in value.node.expr.free_symbols):
            return self.sizes.size(value)
        compute = _PYTHON_OPERATORS.get(node.target)
        if compute is None:
            raise Refused("a size that depends on data cannot be lowered", node=node.name, operator=str(node.target))
        return compute(*[self._plain[a] if isinstance(a, fx.Node) else a for a in node.args])

    def _outputs(self, taps: tuple[str, ...]) -> list[fx.Node]:
        (output,) = [node for node in self.graph_module.graph.nodes if node.op == "output"]
        returned = output.args[0] if isinstance(output.args[0], tuple | list) else (output.args[0],)
        by_name = {node.name: node for node in self.graph_module.graph.nodes}
        unknown = [tap for tap in taps if tap not in by_name]
        if unknown:
            raise Refused(f"there is no node named {', '.join(unknown)} to tap")
        nodes = [*returned, *(by_name[tap] for tap in taps)]
        for node in nodes:
            if not isinstance(node, fx.Node) or not isinstance(self.fake(node), torch.Tensor):
                raise Refused(f"the graph returns {node}, which is not a tensor", way_out="return tensors only")
        return nodes


def translate(
    graph_module: fx.GraphModule,
    *,
    legalize: dict[str, Legalizer] | None = None,
    taps: tuple[str, ...] = (),
    tiling: Any = None,
    keep: Callable[[torch.Tensor], torch.Tensor] = in_memory,
    inline_bytes: int = INLINE_BYTES,
    images_last: bool = False,
) -> Lowered:
    """Translate a graph of ATen core and qc operators into a Relax module.

    Args:
        graph_module: constants are ``get_attr`` nodes, every node carries ``meta["val"]``.
        legalize: a target's own emitters by operator name (``qc.linear``, ``aten.conv2d``).
        taps: names of further nodes to return after the outputs.
        tiling: handed to the legalizers as ``Walk.tiling``.
        keep: returns what holds a large constant from then on, such as a tensor in a file.
        inline_bytes: constants up to this size are part of the code.
        images_last: inputs and outputs of rank 4 are NHWC.

    Raises:
        Refused: naming the node and the operator that cannot be lowered.
    """
    return Walk(graph_module, legalize or {}, taps, tiling, keep, inline_bytes, images_last).run()


def _is_tensor_like(value: Any) -> bool:
    return isinstance(value, torch.Tensor | tuple | list)


def _constant_name(node: fx.Node) -> str:
    return str(node.target) if node.op == "get_attr" else node.name


def nodes_of_constants_only(graph_module: fx.GraphModule) -> set[fx.Node]:
    """Return get_attr nodes and the nodes computed from nothing but them."""
    constant: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            constant.add(node)
            continue
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.op == "call_function" and not random and all(argument in constant for argument in node.all_input_nodes):
            constant.add(node)
    return constant


def _evaluate(graph_module: fx.GraphModule, node: fx.Node, constant: Callable[[Any], Any]) -> Any:
    if node.op == "get_attr":
        value: Any = graph_module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value
    arguments, keywords = fx.map_arg((node.args, dict(node.kwargs)), constant)
    with torch.no_grad():
        return node.target(*arguments, **keywords)


def _bundle_constants(module: IRModule, inputs: list[Any], parameters: dict[str, Any]) -> tuple[IRModule, list[str]]:
    """Turn the constants that are read into one tuple parameter: one argument for each call, however many weights.

    Returns the module and the names of the constants kept; a weight that was packed leaves its plain form unread.
    """
    main = module["main"]
    read = {variable.name for variable in relax.analysis.free_vars(main.body)}
    kept = [name for name, variable in parameters.items() if variable.name in read]
    arguments = [*inputs, *(parameters[name] for name in kept)]
    main = relax.Function(arguments, main.body, main.ret_ty, main.is_pure)
    main = main.with_attr("global_symbol", "main").with_attr("num_input", len(inputs))
    module.update_func(module.get_global_var("main"), main)
    return relax.transform.BundleModelParams("constants")(module), kept
