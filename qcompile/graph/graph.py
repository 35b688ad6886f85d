"""A graph under compilation: a torch.fx GraphModule, its stage and history, and the few edits that passes make.

Everything FX offers is there in ``graph.module``. This class adds what FX lacks: types that follow each edit, constants by name and digest,
annotations that survive printing, and provenance of new nodes.

Metadata of a node (``node.meta``):
    val: the fake value, see ``qcompile.graph.types``.
    scope: dotted name of the source module the node came from.
    source: ``file.py:line`` in the model's code, where known.
    notes: annotations that passes leave for later passes, name -> text or tensor; printed and parsed with the graph.
    made_by: the pass that made the node.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._dispatch.python import enable_python_dispatcher
from torch.utils.weak import WeakIdKeyDictionary

from qcompile.errors import Refused
from qcompile.graph.file_tensor import FileTensor, parts_of
from qcompile.graph.quantizer import Quantizer
from qcompile.graph.stage import Stage, check_legal
from qcompile.graph.types import SymbolTable, TensorType

Note = str | torch.Tensor
_digests: WeakIdKeyDictionary = WeakIdKeyDictionary()


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the SHA-256, in hex, of a tensor's dtype, shape and bytes."""
    known = _digests.get(tensor)
    if known is not None and known[0] == tensor._version:
        return str(known[1])
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    for part in parts_of(tensor):
        digest.update(part.view(torch.uint8).numpy().data)
    _digests[tensor] = (tensor._version, digest.hexdigest())
    return digest.hexdigest()


def set_digest(tensor: torch.Tensor, digest: str) -> None:
    """Say the digest of a tensor that is known without reading it."""
    _digests[tensor] = (tensor._version, digest)


class Graph:
    """A model as a graph of operators.

    Args:
        module: FX module whose nodes are placeholders, ``get_attr`` constants, ATen and qc calls, quantizers, one output (a tuple).
        input_types: the type of each placeholder, in order.
        ranges: smallest and largest size of each symbol in those types.
        stage: see ``Stage``.
        history: names of the passes that ran.
        output_names: one for each output.
        symbols: where nodes have their types already, the table that these belong to; by default types are inferred.

    Attributes:
        keep: is given every new constant and returns what to hold in its place: the same values, perhaps in a file.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        input_types: Sequence[TensorType],
        ranges: Mapping[str, tuple[int, int]] | None = None,
        *,
        stage: Stage = Stage.FLOAT,
        history: Iterable[str] = (),
        output_names: Sequence[str] = (),
        symbols: SymbolTable | None = None,
    ) -> None:
        self.module = module
        self.input_types = list(input_types)
        self.symbols = symbols or SymbolTable(ranges or {})
        self.stage = stage
        self.history = tuple(history)
        self.maker = self.history[-1] if self.history else "capture"
        self.keep: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
        for node in module.graph.nodes:
            node.meta.setdefault("notes", {})
        self.output_names = list(output_names) or [f"output{i}" for i in range(len(self.outputs))]
        if symbols is None:
            self.infer_types()

    # ---- reading ----------------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[fx.Node]:
        """All nodes in topological order, as a list that stays as it is while the graph is edited."""
        return list(self.module.graph.nodes)

    @property
    def inputs(self) -> list[fx.Node]:
        return [node for node in self.module.graph.nodes if node.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        return self.module.graph.output_node()

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        return tuple(self.output.args[0])

    def node(self, name: str) -> fx.Node:
        """Return the node of this name; a constant may be named by its dotted name.

        Raises:
            Refused: there is none.
        """
        for node in self.module.graph.nodes:
            if name in (node.name, node_name(node)):
                return node
        raise Refused("there is no such node", node=name)

    def type_text(self, node: fx.Node) -> str:
        """Return the type of a node's value as text, ``f32[batch,384]``."""
        return self.symbols.text(node.meta["val"])

    def constant(self, node: object) -> torch.Tensor | None:
        """Return the tensor of a ``get_attr`` node, or None for any other node."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return attribute(self.module, str(node.target))
        return None

    def quantizer(self, node: object) -> Quantizer | None:
        """Return the Quantizer that a node calls, or None."""
        if isinstance(node, fx.Node) and node.op == "call_module":
            module = self.module.get_submodule(str(node.target))
            return module if isinstance(module, Quantizer) else None
        return None

    @property
    def constants(self) -> dict[str, torch.Tensor]:
        """Name -> tensor of every constant, quantizers' own tensors included."""
        found = {str(n.target): attribute(self.module, str(n.target)) for n in self.module.graph.nodes if n.op == "get_attr"}
        for node in self.module.graph.nodes:
            if quantizer := self.quantizer(node):
                found |= {f"{node.target}.{key}": value for key, value in quantizer.named_buffers()}
        return found

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that the text form names by its digest: all constants, and those that stand in notes."""
        notes = (value for node in self.module.graph.nodes for value in node.meta.get("notes", {}).values())
        return [*self.constants.values(), *(value for value in notes if isinstance(value, torch.Tensor))]

    @property
    def digest(self) -> str:
        """SHA-256 of the text form, which names every constant by its digest."""
        from qcompile.graph.text import print_graph

        return hashlib.sha256(print_graph(self, comments=False).encode()).hexdigest()

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the graph in PyTorch by the operators' meanings."""
        with torch.no_grad():
            return tuple(fx.Interpreter(self.module).run(*inputs))

    # ---- editing ----------------------------------------------------------------------------------------------------------

    def call(
        self,
        target: Callable[..., Any],
        *args: Any,
        before: fx.Node,
        like: fx.Node | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> fx.Node:
        """Insert a call before a node and infer its type; scope and source are taken from ``like`` (default ``before``)."""
        with self.module.graph.inserting_before(before):
            node = self.module.graph.create_node("call_function", target, args, kwargs, name or getattr(target, "_opname", None))
        return self._register(node, like or before)

    def call_quantizer(self, quantizer: Quantizer, x: fx.Node, *, before: fx.Node, name: str) -> fx.Node:
        """Insert a quantizer as a submodule of this name and a call of it."""
        name = self._free_name(name)
        _container(self.module, name).add_module(name.rsplit(".", 1)[-1], quantizer)
        with self.module.graph.inserting_before(before):
            node = self.module.graph.create_node("call_module", name, (x,))
        return self._register(node, x)

    def add_constant(self, name: str, value: torch.Tensor, *, before: fx.Node | None = None, like: fx.Node | None = None) -> fx.Node:
        """Add a constant and its ``get_attr`` node, by default before the first operator; a taken name gets a number."""
        name = self._free_name(name)
        _container(self.module, name).register_buffer(name.rsplit(".", 1)[-1], self.keep(value.detach().contiguous()))
        with self.module.graph.inserting_before(before or next(n for n in self.nodes if n.op != "placeholder")):
            node = self.module.graph.create_node("get_attr", name)
        return self._register(node, like)

    def set_constant(self, node: fx.Node, value: torch.Tensor) -> None:
        """Replace the tensor of a constant that has one user; a shared one must be copied by ``add_constant`` instead."""
        target = str(node.target)
        _container(self.module, target).register_buffer(target.rsplit(".", 1)[-1], self.keep(value.detach().contiguous()))
        self._infer(node)

    def own_constant(self, node: fx.Node, user: fx.Node) -> fx.Node:
        """Return a constant node that only ``user`` reads: the node itself, or a copy of it that ``user`` now reads."""
        if set(node.users) == {user}:
            return node
        value = self.constant(node)
        assert value is not None
        copy = self.add_constant(f"{node.target}", value.clone(), before=user, like=node)
        user.replace_input_with(node, copy)
        return copy

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Make every user of ``old`` use ``new`` (not ``new`` itself) and hand over its notes."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        for key, value in old.meta.get("notes", {}).items():
            new.meta["notes"].setdefault(key, value)

    def clean(self) -> None:
        """Drop dead nodes and unused constants, and check the graph."""
        for node in reversed(self.nodes):
            if not node.users and node.op not in ("output", "placeholder"):
                self.module.graph.erase_node(node)
        used = {str(n.target) for n in self.module.graph.nodes if n.op in ("get_attr", "call_module")}
        _drop_unused(self.module, "", used)
        self.module.graph.lint()
        self.module.recompile()

    def infer_types(self) -> None:
        """Infer the type of every node from the input types.

        Raises:
            Refused: naming the first node whose operator does not take its inputs.
        """
        types = iter(self.input_types)
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                node.meta["val"] = self.symbols.fake(next(types))
            elif node.op != "output":
                self._infer(node)

    def infer_type(self, node: fx.Node) -> None:
        """Infer the type of one node again, from those of its inputs as they stand; raises as ``infer_types`` does."""
        self._infer(node)

    def check(self) -> None:
        """Raise Refused if the graph is not legal in its stage."""
        check_legal(self.module, self.stage)

    def copy(self) -> Graph:
        """Return a graph that can be edited by itself; constants are shared until replaced."""
        new = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        new.output(new.graph_copy(self.module.graph, values))
        for old, node in values.items():
            node.meta = {**old.meta, "notes": dict(old.meta.get("notes", {}))}
        root = torch.nn.Module()
        for name, tensor in self.constants.items():
            if not any(name.startswith(f"{n.target}.") for n in self.module.graph.nodes if n.op == "call_module"):
                _container(root, name).register_buffer(name.rsplit(".", 1)[-1], tensor)
        for node in self.module.graph.nodes:
            if quantizer := self.quantizer(node):
                twin = Quantizer(quantizer.scheme, quantizer.scale, quantizer.zero_point, quantizer.codes, quantizer.table)
                _container(root, str(node.target)).add_module(str(node.target).rsplit(".", 1)[-1], twin)
        module = fx.GraphModule(root, new)
        copied = Graph(
            module, self.input_types, stage=self.stage, history=self.history, output_names=self.output_names, symbols=self.symbols
        )
        copied.keep = self.keep
        return copied

    def with_sizes(self, sizes: Mapping[str, int]) -> Graph:
        """Return a copy in which these symbols are numbers, all types inferred again.

        Raises:
            Refused: an operator does not take its inputs in these sizes.
        """
        copied = self.copy()
        types = [TensorType(t.dtype, tuple(sizes.get(s, s) if isinstance(s, str) else s for s in t.shape)) for t in self.input_types]
        ranges = {name: limits for name, limits in self.symbols.ranges.items() if name not in sizes}
        fixed = Graph(copied.module, types, ranges, stage=self.stage, history=self.history, output_names=self.output_names)
        fixed.keep = self.keep
        return fixed

    # ---- inside -----------------------------------------------------------------------------------------------------------

    def _register(self, node: fx.Node, like: fx.Node | None) -> fx.Node:
        node.meta |= {key: like.meta[key] for key in ("scope", "source") if like is not None and key in like.meta}
        node.meta |= {"made_by": self.maker, "notes": {}}
        self._infer(node)
        return node

    def _free_name(self, name: str) -> str:
        taken = {str(n.target) for n in self.module.graph.nodes if n.op in ("get_attr", "call_module")}
        for other in sorted(taken, key=len):  # nothing can lie under a tensor or a quantizer
            if name.startswith(f"{other}."):
                name = f"{other}_{name[len(other) + 1 :]}"
        free, number = name, 0
        while free in taken or _is_inside(free, taken):
            number += 1
            free = f"{name}_{number}"
        return free

    def _fake_constant(self, value: torch.Tensor) -> torch.Tensor:
        if isinstance(value, FileTensor):
            return self.symbols.fake(TensorType(value.dtype, tuple(value.shape)))
        return self.symbols.mode.from_tensor(value, static_shapes=True)

    def _infer(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            node.meta["val"] = self._fake_constant(attribute(self.module, str(node.target)))
        elif node.op == "call_module":
            node.meta["val"] = node.args[0].meta["val"]
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            try:
                # With the dispatcher in Python: some operators' C++ rules (baddbmm) do not take symbolic sizes.
                with self.symbols.mode, enable_python_dispatcher():
                    node.meta["val"] = node.target(*args, **kwargs)
            except Exception as error:
                first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise Refused(first_line, node=node.name, operator=str(node.target), source=node.meta.get("source", "")) from error


def _is_inside(name: str, taken: set[str]) -> bool:
    """Say whether a name lies under a taken one or holds one, which nested modules do not allow."""
    return any(name.startswith(f"{other}.") or other.startswith(f"{name}.") for other in taken)


def attribute(module: torch.nn.Module, target: str) -> torch.Tensor:
    """Return the tensor at a dotted name."""
    return operator.attrgetter(target)(module)


def node_name(node: fx.Node) -> str:
    """Return the name a node has in the text form: dotted for constants and quantizers, FX's own for operators."""
    return str(node.target) if node.op in ("get_attr", "call_module") else node.name


def _container(module: torch.nn.Module, target: str) -> torch.nn.Module:
    """Return the module that holds the attribute of a dotted name; missing ones are made."""
    for part in target.split(".")[:-1]:
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    return module


def _drop_unused(module: torch.nn.Module, prefix: str, used: set[str]) -> None:
    for name in [*module._buffers, *module._parameters]:
        if prefix + name not in used:
            delattr(module, name)
    for name, child in list(module.named_children()):
        if prefix + name in used:
            continue
        _drop_unused(child, f"{prefix}{name}.", used)
        if not child._buffers and not child._parameters and not child._modules:
            delattr(module, name)


def build_module(constants: Mapping[str, torch.Tensor], quantizers: Mapping[str, Quantizer], graph: fx.Graph) -> fx.GraphModule:
    """Return an FX module of this graph over constants and quantizers by dotted name."""
    root = torch.nn.Module()
    for name, tensor in constants.items():
        _container(root, name).register_buffer(name.rsplit(".", 1)[-1], tensor.detach())
    for name, quantizer in quantizers.items():
        _container(root, name).add_module(name.rsplit(".", 1)[-1], quantizer)
    return fx.GraphModule(root, graph)
