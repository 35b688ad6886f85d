"""The text form of a graph: one line for each node, constants as type and content digest.

    # after: capture, fold-batch-norm
    graph @main float(%x: f32[batch,3,224,224]) where batch in 1..64 {
      %features.0.weight = const f32[32,3,3,3] @39d77d1b00112233
      %conv2d = aten.conv2d(%x, %features.0.weight, none) {stride=[2, 2], padding=[1, 1]} : f32[batch,32,112,112]  # features.0 [capture]
      return %conv2d as logits
    }

Tensor operands stand in parentheses in the operator's own order; other arguments in braces by name, left out where they have
their default. Quantizers print as ``quantizer(%x, scale=@digest) {scheme="..."}``. Notes print as ``!{name="text"}``. Types and
digests are checked, not believed: ``parse_graph`` infers the types again and refuses a line whose type differs.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx

from qcompile.errors import Refused
from qcompile.formats import parse_scheme
from qcompile.graph.graph import Graph, build_module, node_name, tensor_digest
from qcompile.graph.quantizer import Quantizer
from qcompile.graph.stage import Stage
from qcompile.graph.types import parse_tensor_type

DIGEST_LENGTH = 16

_PYTHON: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem, "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": operator.floordiv,
    "truediv": operator.truediv, "mod": operator.mod, "neg": operator.neg, "eq": operator.eq, "ne": operator.ne, "lt": operator.lt,
    "le": operator.le, "gt": operator.gt, "ge": operator.ge, "sym_max": torch.sym_max, "sym_min": torch.sym_min, "sym_int": torch.sym_int,
}  # fmt: skip
_PYTHON_NAMES: dict[Any, str] = {function: f"py.{name}" for name, function in _PYTHON.items()}
_WORDS: dict[type, str] = {torch.dtype: "dtype", torch.device: "device", torch.memory_format: "memory", torch.layout: "layout"}


# ---- printing -------------------------------------------------------------------------------------------------------------


def print_graph(graph: Graph, *, comments: bool = True) -> str:
    """Return the text form; ``comments=False`` leaves out history, scopes and makers, which change no result."""
    names = [f"%{node.name}: {type}" for node, type in zip(graph.inputs, graph.input_types, strict=True)]
    ranges = ", ".join(f"{name} in {low}..{high}" for name, (low, high) in graph.symbols.ranges.items())
    lines = [f"# after: {', '.join(graph.history)}"] if comments and graph.history else []
    lines.append(f"graph @main {graph.stage.value}({', '.join(names)}){f' where {ranges}' if ranges else ''} {{")
    for node in graph.nodes:
        if node.op not in ("placeholder", "output"):
            lines.append(f"  {_print_node(graph, node)}{_comment(node) if comments else ''}")
        elif node.op == "placeholder" and node.meta.get("notes"):
            lines.append(f"  %{node.name} = input{_print_notes(node)}")
    returned = ", ".join(f"{_value(node)} as {json.dumps(name)}" for node, name in zip(graph.outputs, graph.output_names, strict=True))
    return "\n".join([*lines, f"  return {returned}", "}", ""])


def operator_name(target: object) -> str:
    """Return the name of an operator in the text form: ``aten.conv2d``, ``aten.add.Tensor``, ``qc.linear``, ``py.getitem``."""
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target.namespace}.{target._opname}"
        return name if target._overloadname == "default" else f"{name}.{target._overloadname}"
    name = _PYTHON_NAMES.get(target, "")
    if not name:
        raise Refused("the function is not an operator that a graph may hold", operator=str(target))
    return name


def _print_node(graph: Graph, node: fx.Node) -> str:
    left, notes = f"%{node_name(node)} = ", _print_notes(node)
    if (value := graph.constant(node)) is not None:
        return f"{left}const {graph.type_text(node)} @{tensor_digest(value)[:DIGEST_LENGTH]}{notes}"
    if quantizer := graph.quantizer(node):
        state = "".join(f", {key}=@{tensor_digest(value)[:DIGEST_LENGTH]}" for key, value in quantizer.named_buffers())
        return f'{left}quantizer({_value(node.args[0])}{state}) {{scheme="{quantizer.scheme}"}} : {graph.type_text(node)}{notes}'
    tensors, others = _split_arguments(node)
    operands = ", ".join(_value(value) for value in tensors)
    braces = f" {{{', '.join(f'{key}={_value(value)}' for key, value in others.items())}}}" if others else ""
    return f"{left}{operator_name(node.target)}({operands}){braces} : {graph.type_text(node)}{notes}"


def _split_arguments(node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    """Return the leading operands in order, and the other arguments by name without those that have their default."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return list(node.args), dict(node.kwargs)
    operands: list[Any] = []
    others: dict[str, Any] = {}
    leading = True  # a tensor after another argument is named: its position would be lost when defaults are left out
    for argument, value in bound_arguments(node).items():
        leading = leading and _is_tensor_argument(node.target, argument)
        if leading:
            operands.append(value)
        elif value != _argument(node.target, argument).default_value or isinstance(value, fx.Node):
            others[argument] = value
    while operands and operands[-1] is None:
        operands.pop()
    return operands, others


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """Return every argument of an operator's call by name, defaults filled in."""
    schema = node.target._schema.arguments
    bound = {a.name: a.default_value for a in schema}
    bound |= {a.name: value for a, value in zip(schema, node.args, strict=False)}
    return bound | dict(node.kwargs)


def _argument(target: torch._ops.OpOverload, name: str) -> torch.Argument:
    return next(a for a in target._schema.arguments if a.name == name)


def _is_tensor_argument(target: torch._ops.OpOverload, name: str) -> bool:
    return "Tensor" in str(_argument(target, name).type)


def _value(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{node_name(value)}"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(item) for item in value)}]"
    for kind, word in _WORDS.items():
        if isinstance(value, kind):
            return f"{word}:{str(value).removeprefix('torch.')}"
    raise Refused(f"an argument of type {type(value).__name__} has no text form")


def _print_notes(node: fx.Node) -> str:
    notes = node.meta.get("notes", {})
    parts = (
        f"{key}=@{tensor_digest(value)[:DIGEST_LENGTH]}" if isinstance(value, torch.Tensor) else f"{key}={json.dumps(value)}"
        for key, value in sorted(notes.items())
    )
    return f" !{{{', '.join(parts)}}}" if notes else ""


def _comment(node: fx.Node) -> str:
    words = [str(node.meta[key]) for key in ("scope",) if node.meta.get(key)]
    words += [f"[{node.meta['made_by']}]"] if node.meta.get("made_by") else []
    return f"  # {' '.join(words)}" if words else ""


# ---- parsing --------------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\]|\\.)*")|(?P<name>%[\w.]+)|(?P<digest>@[0-9a-f]+)|(?P<number>-?(?:inf\b|nan\b|\d+(?:\.\d*)?(?:[eE][+-]?\d+)?))"""
    r"""|(?P<word>[A-Za-z_][\w.]*(?::[\w.:]+)?)|(?P<mark>[()\[\]{},=!]))"""
)
_HEADER = re.compile(r"graph @main (\w+)\((.*?)\)(?: where (.*?))? \{")
_RANGE = re.compile(r"(\w+) in (\d+)\.\.(\d+)")


def parse_graph(text: str, constants: Mapping[str, torch.Tensor]) -> Graph:
    """Rebuild a graph from its text; ``constants`` maps each digest (its first 16 hex digits) to the tensor.

    Raises:
        Refused: naming the line that is not understood, or whose digest, operator or type is not right.
    """
    return _Parser(text, constants).parse()


class _Parser:
    def __init__(self, text: str, constants: Mapping[str, torch.Tensor]) -> None:
        self.lines = text.splitlines()
        self.supplied = constants
        self.values: dict[str, fx.Node] = {}
        self.graph = fx.Graph()
        self.constants: dict[str, torch.Tensor] = {}
        self.quantizers: dict[str, Quantizer] = {}
        self.types: dict[fx.Node, tuple[str, str]] = {}

    def parse(self) -> Graph:
        history: list[str] = []
        header = None
        names: list[str] = []
        for number, line in enumerate(self.lines, 1):
            try:
                if line.startswith("# after: "):
                    history = line.removeprefix("# after: ").split(", ")
                elif header is None and line.strip():
                    header = self._header(line)
                elif line.startswith("  return "):
                    names = self._return(line.removeprefix("  return "))
                elif line.strip() not in ("", "}"):
                    self._node(line)
            except (ValueError, KeyError, IndexError, AttributeError, StopIteration) as error:
                raise Refused(f"line {number} of the graph is not understood: {error}", node=line.strip()[:120]) from error
        if header is None or not names:
            raise Refused("the text holds no whole graph", way_out="the file is cut short or not a graph")
        stage, types, ranges = header
        module = build_module(self.constants, self.quantizers, self.graph)
        made = Graph(module, types, ranges, stage=stage, history=history, output_names=names)
        for node, (expected, line) in self.types.items():
            if made.type_text(node) != expected:
                raise Refused(f"the text says {expected} where the type is {made.type_text(node)}", node=line)
        made.check()
        return made

    def _header(self, line: str):  # type: ignore[no-untyped-def]
        match = _HEADER.fullmatch(line.strip())
        if not match:
            raise ValueError("expected 'graph @main STAGE(INPUTS) {'")
        types = []
        for part in filter(None, re.split(r", (?=%)", match[2])):
            name, type = part.removeprefix("%").split(": ")
            types.append(parse_tensor_type(type))
            self.values[name] = self.graph.placeholder(name)
        ranges = {name: (int(low), int(high)) for name, low, high in _RANGE.findall(match[3] or "")}
        return Stage(match[1]), types, ranges

    def _return(self, text: str) -> list[str]:
        tokens = _Tokens(text, self.values, {})
        names, nodes = [], []
        while not tokens.done:
            nodes.append(tokens.value())
            tokens.expect("as")
            names.append(tokens.value())
            tokens.accept(",")
        self.graph.output(tuple(nodes))
        return names

    def _node(self, line: str) -> None:
        body, _, comment = line.partition("  # ")
        left, _, right = body.strip().partition(" = ")
        name = left.removeprefix("%")
        right, _, notes_text = right.partition(" !{")
        notes = _Tokens(notes_text.removesuffix("}"), self.values, self.supplied).pairs() if notes_text else {}
        if right == "input":
            node = self.values[name]
        elif right.startswith("const "):
            type, digest = right.removeprefix("const ").split(" @")
            self.constants[name] = self._supplied(digest)
            node = self.graph.get_attr(name)
            self.types[node] = (type, left)
        else:
            call, _, type = right.rpartition(" : ")
            node = self._call(name, call)
            self.types[node] = (type, left)
        scope, _, maker = comment.rpartition("[")
        node.meta["notes"] = notes
        node.meta |= {"scope": scope.strip()} if scope.strip() else {}
        node.meta |= {"made_by": maker.rstrip("]")} if maker else {}
        self.values[name] = node

    def _supplied(self, digest: str) -> torch.Tensor:
        tensor = self.supplied.get(digest)
        if tensor is None or not tensor_digest(tensor).startswith(digest):
            raise ValueError(f"no constant with digest @{digest} was supplied")
        return tensor

    def _call(self, name: str, call: str) -> fx.Node:
        target, _, rest = call.partition("(")
        tokens = _Tokens(rest, self.values, self.supplied)
        operands, state = tokens.operands()
        others = tokens.pairs() if tokens.accept("{") else {}
        if target == "quantizer":
            return self._quantizer(name, operands[0], state, others)
        function = find_operator(target)
        if isinstance(function, torch._ops.OpOverload):
            positions = [a.name for a in function._schema.arguments if not a.kwarg_only]
            args = dict(zip(positions, operands, strict=False)) | others
            # An operand that is left out is none: printing drops them at the end.
            args = {a.name: None for a in function._schema.arguments if not a.has_default_value()} | args
            while len(operands) < len(positions) and positions[len(operands)] in args:
                operands.append(args[positions[len(operands)]])
            others = {key: value for key, value in args.items() if key not in positions[: len(operands)]}
        node = self.graph.create_node("call_function", function, tuple(operands), others, name)
        if node.name != name:
            raise ValueError(f"two nodes have the name %{name}")
        return node

    def _quantizer(self, name: str, x: fx.Node, state: dict[str, torch.Tensor], others: dict[str, Any]) -> fx.Node:
        self.quantizers[name] = Quantizer(parse_scheme(others["scheme"]), **state)
        return self.graph.create_node("call_module", name, (x,))


def find_operator(name: str) -> Callable[..., Any]:
    """Return the operator of a name in the text form.

    Raises:
        ValueError: there is none, or it is of a namespace that graphs do not hold.
    """
    namespace, _, rest = name.partition(".")
    if namespace == "py" and rest in _PYTHON:
        return _PYTHON[rest]
    if namespace in ("aten", "qc", "prims"):
        operator_, _, overload = rest.partition(".")
        try:
            return getattr(getattr(getattr(torch.ops, namespace), operator_), overload or "default")
        except AttributeError:
            pass
    raise ValueError(f"unknown operator {name}")


class _Tokens:
    """A reader of values: names, numbers, strings, lists, words."""

    def __init__(self, text: str, values: Mapping[str, fx.Node], constants: Mapping[str, torch.Tensor]) -> None:
        self.values, self.constants = values, constants
        self.tokens: list[tuple[str, str]] = []
        position, text = 0, text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if not match:
                raise ValueError(f"unexpected text {text[position : position + 20]!r}")
            self.tokens.append((str(match.lastgroup), match[str(match.lastgroup)]))
            position = match.end()
        self.position = 0

    @property
    def done(self) -> bool:
        return self.position >= len(self.tokens)

    def accept(self, text: str) -> bool:
        if not self.done and self.tokens[self.position][1] == text:
            self.position += 1
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.accept(text):
            raise ValueError(f"expected '{text}'")

    def operands(self) -> tuple[list[Any], dict[str, Any]]:
        """Read operands and ``name=@digest`` states up to the closing parenthesis."""
        operands: list[Any] = []
        state: dict[str, Any] = {}
        while not self.accept(")"):
            if self.tokens[self.position][0] == "word" and self.tokens[self.position + 1][1] == "=":
                key = self.tokens[self.position][1]
                self.position += 2
                state[key] = self.value()
            else:
                operands.append(self.value())
            self.accept(",")
        return operands, state

    def pairs(self) -> dict[str, Any]:
        """Read ``name=value`` pairs up to the closing brace or the end."""
        found: dict[str, Any] = {}
        while not self.done and not self.accept("}"):
            key = self.tokens[self.position][1]
            self.position += 1
            self.expect("=")
            found[key] = self.value()
            self.accept(",")
        return found

    def value(self) -> Any:
        kind, text = self.tokens[self.position]
        self.position += 1
        if kind == "name":
            return self.values[text.removeprefix("%")]
        if kind == "string":
            return json.loads(text)
        if kind == "digest":
            return self.constants[text.removeprefix("@")]
        if kind == "number":
            return float(text) if re.search(r"[.en]", text) else int(text)
        if text == "[":
            items = []
            while not self.accept("]"):
                items.append(self.value())
                self.accept(",")
            return items
        return _word(text)


def _word(text: str) -> Any:
    if text in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text]
    if text in ("inf", "nan"):
        return float(text)
    kind, _, rest = text.partition(":")
    if kind == "device":
        return torch.device(rest)
    if kind in ("dtype", "memory", "layout"):
        return getattr(torch, rest)
    raise ValueError(f"unknown word '{text}'")
