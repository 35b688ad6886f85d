"""Derive the entries ``prefill`` and ``decode`` of a decoder from its graph over whole texts.

    main(input_ids i64[batch,seq]) -> logits f32[batch,seq,vocabulary]
    ->
    prefill(input_ids i64[batch,seq], past i64[batch], counts i64[batch], caches..) -> logits f32[batch,vocabulary], caches..
    decode(input_ids i64[batch,1], past i64[batch], caches..) -> logits f32[batch,vocabulary], caches..

``past`` says for each row of the batch how many tokens its caches hold, ``counts`` how many of the new tokens are its own (the others are
padding on the right), so rows of different lengths share a batch without padding in the caches. Logits are those after a row's last token.

Nothing is read from names. Three things tie a token to others, and each is found by what it does:

- causal attention: its keys and values become caches ``[batch, capacity, width]``, new ones are appended. Where they come from
  ``qc.dequantize``, the codes and those of its parameters that depend on the text are cached, so a cache is as small as its scheme.
  Where keys are quantized before rotary positions, those codes are cached, and turned when attention reads them.
  Where queries meet their own tokens in float (``own_k`` and ``own_v``), all new tokens of one call do so: they see one another as they
  are, and the codes of those of earlier calls (past-only quantization, WKVQuant, Yue et al. 2024, arXiv 2402.12065, section 3.1).
- positions: whatever depends on the number of tokens only, and on no token. It is computed once for ``context`` positions, checked to give
  every position the same value for texts of any length, and becomes a table from which rows are gathered.
- the end: the rows of the last tokens are picked as early as what follows works on each token by itself.

Passes, solvers and calibration see the one graph over whole texts; a key is quantized there as it is in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from qcompile.errors import Refused
from qcompile.formats import parse_scheme
from qcompile.graph import Graph, TensorType
from qcompile.graph.graph import attribute
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.graph.types import LARGEST_SIZE

aten = torch.ops.aten
qc = torch.ops.qc

# Operators that compute each token of [batch, tokens, ..] from that token alone: rows may be picked before them as well as after them.
_BY_TOKEN = frozenset({
    "aten.linear", "aten.rms_norm", "aten.layer_norm", "aten.mul.Tensor", "aten.div.Tensor", "aten.tanh", "aten._to_copy",
    "qc.linear", "qc.quantize", "qc.quantize_dynamic", "qc.dequantize", "qc.hadamard", "qc.vector_codes",
    "qc.vectors", "py.getitem",
})  # fmt: skip
_ATTENTION = frozenset({"qc.attention", "qc.attention_codes"})
_PAST, _COUNTS = "past", "counts"
UNBOUNDED_CONTEXT = 4096  # tokens, for a model that names no limit: caches and tables of positions must have some size


@dataclass(frozen=True)
class Cache:
    """One tensor kept from call to call: its name and type, ``[batch, capacity, ..]``."""

    name: str
    type: TensorType


@dataclass(frozen=True)
class Decoder:
    """The entries of a decoder.

    Attributes:
        prefill: takes any number of new tokens.
        decode: takes one new token of each row.
        caches: in the order in which both entries take and return them.
        context: the most tokens of a text.
        past_only: tokens of one call see one another in float, so only a text that is read token by token gives the logits of the graph
            over whole texts.
    """

    prefill: Graph
    decode: Graph
    caches: tuple[Cache, ...]
    context: int
    past_only: bool = False

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in all caches."""
        return sum(_bytes_of_row(cache.type) for cache in self.caches)


def decoder_entries(graph: Graph, context: int) -> Decoder:
    """Return the entries of a decoder, for texts of up to ``context`` tokens.

    Raises:
        Refused: the graph is no decoder: it has other inputs than tokens, attention that is not causal, or an operator that mixes tokens
            in a way that no cache can stand for.
    """
    prefill, caches = _Step(graph, context, one_token=False).build()
    decode, _ = _Step(graph, context, one_token=True).build()
    past_only = any(_name(node) == "qc.attention" and bound_arguments(node)["own_k"] is not None for node in graph.nodes)
    return Decoder(prefill, decode, caches, context, past_only)


def one_token_step(graph: Graph, context: int) -> Graph:
    """Return the entry ``decode`` of a decoder for one text, with caches for ``context`` tokens and no symbolic size.

    Raises:
        Refused: the graph is no decoder, or its texts are shorter.
    """
    if context > (longest := longest_text(graph)):
        raise Refused(f"its texts have at most {longest} tokens, not {context}", way_out=f"--context {longest}")
    step = decoder_entries(graph, context).decode
    return step.with_sizes({name: context if name == "capacity" else 1 for name in step.symbols.ranges})


def longest_text(graph: Graph) -> int:
    """Return the most tokens that a decoder takes: what its sizes allow, and what its positions can be computed for.

    Raises:
        Refused: the graph is no decoder.
    """
    _, seq = _token_type(graph)
    low, high = graph.symbols.ranges[seq]
    step = _Step(graph, low, one_token=False)
    low, high = low - 1, high if high < LARGEST_SIZE else UNBOUNDED_CONTEXT
    if step.has_positions(high):
        return high
    while high - low > 1:  # a table of learned positions ends somewhere between
        middle = (low + high) // 2
        low, high = (middle, high) if step.has_positions(middle) else (low, middle)
    if not low:
        raise Refused("its positions cannot be computed for a text of any length")
    return low


class _Step:
    """One derivation: a copy of the graph's nodes that gets new inputs, and new sources for what tied tokens together."""

    def __init__(self, graph: Graph, context: int, *, one_token: bool) -> None:
        self._source, self._context, self._one = graph, context, one_token
        self._batch, self._seq = _token_type(graph)
        self._copy = graph.copy()
        self._nodes = self._copy.module.graph
        self._inputs: list[TensorType] = []
        self._caches: list[Cache] = []
        self._appended: list[fx.Node] = []
        self._tables: dict[fx.Node, fx.Node] = {}  # rows gathered for the new tokens -> the table of all positions

    def build(self) -> tuple[Graph, tuple[Cache, ...]]:
        (tokens,) = self._copy.inputs
        self._inputs.append(TensorType(torch.int64, (self._batch, 1 if self._one else self._seq)))
        self._past = self._input(_PAST, TensorType(torch.int64, (self._batch,)))
        counts = None if self._one else self._input(_COUNTS, TensorType(torch.int64, (self._batch,)))
        by_text = _nodes_of_text(self._nodes, tokens)
        self._use_positions(tokens, by_text)
        for number, node in enumerate(n for n in self._copy.nodes if _name(n) in _ATTENTION):
            self._use_caches(number, node, by_text)
        self._pick_last(counts, by_text)
        logits = self._copy.outputs[0]
        with self._nodes.inserting_before(self._copy.output):
            rows = self._call(aten.squeeze.dim, logits, 1)
        self._copy.output.args = ((rows, *self._appended),)
        return self._finished(), tuple(self._caches)

    def _finished(self) -> Graph:
        ranges = {self._batch: self._source.symbols.ranges[self._batch], "capacity": (1, self._context)}
        if not self._one:
            ranges[self._seq] = (1, self._context)
        names = ["logits", *(cache.name for cache in self._caches)]
        module = self._copy.module
        done = Graph(module, self._inputs, ranges, stage=self._source.stage, history=self._source.history, output_names=names)
        done.clean()
        _check_types(done, self._batch)
        return done

    # ---- positions --------------------------------------------------------------------------------------------------------

    def _use_positions(self, tokens: fx.Node, by_text: set[fx.Node]) -> None:
        """Gather from tables what depends on the number of tokens alone."""
        edge = [node for node in self._copy.nodes if self._is_position(node, by_text)]
        if not edge:
            return
        first = next(n for n in self._copy.nodes if n.op == "call_function")
        with self._nodes.inserting_before(first):
            size = self._call(aten.sym_size.int, tokens, 1)
            steps = self._call(aten.arange.default, size, dtype=torch.int64, device=torch.device("cpu"), pin_memory=False)
            places = self._call(aten.add.Tensor, self._call(aten.unsqueeze.default, self._past, 1), steps)
        for node in edge:
            table = self._table(node)
            holder = self._copy.add_constant(f"{node.name}_table", table.flatten(1), before=first)
            made: dict[int, fx.Node] = {}
            for user in [user for user in node.users if user in by_text]:
                rank = _rank_at(node, user)
                if rank not in made:
                    ones = [1] * (rank - 1 - table.ndim)
                    with self._nodes.inserting_before(node):
                        rows = self._call(aten.embedding.default, holder, places)
                        shape = [self._call(aten.sym_size.int, places, 0), *ones, self._call(aten.sym_size.int, places, 1)]
                        made[rank] = self._call(aten.view.default, rows, [*shape, *table.shape[1:]])
                    self._tables[made[rank]] = holder
                user.replace_input_with(node, made[rank])

    def has_positions(self, length: int) -> bool:
        """Say whether everything that depends on positions can be computed for a text of this length."""
        by_text = _nodes_of_text(self._nodes, self._copy.inputs[0])
        try:
            for node in [node for node in self._copy.nodes if self._is_position(node, by_text)]:
                self._evaluate(node, 1, length)
        except (IndexError, RuntimeError):
            return False
        return True

    def _is_position(self, node: fx.Node, by_text: set[fx.Node]) -> bool:
        """Say whether a tensor that no token decides, and the number of tokens does, is read by what tokens decide."""
        value = node.meta.get("val")
        if node in by_text or node.op != "call_function" or not isinstance(value, torch.Tensor):
            return False
        return self._seq_axis(node) is not None and any(user in by_text for user in node.users)

    def _seq_axis(self, node: fx.Node) -> int | None:
        sizes = _sizes(self._copy, node)
        return sizes.index(self._seq) if self._seq in sizes else None

    def _table(self, node: fx.Node) -> torch.Tensor:
        """Return the values [context, ..] of a node for every position."""
        lead = self._seq_axis(node)
        assert lead is not None
        before = _sizes(self._copy, node)[:lead]
        if any(size not in ("1", self._batch) for size in before) or self._batch in before[1:]:
            raise Refused("its value differs by position and by more than that", node=node.name, operator=_name(node))
        whole, part = (self._evaluate(node, 1, length).flatten(0, lead) for length in (self._context, max(self._context // 2, 1)))
        rows = self._evaluate(node, 2, len(part)).flatten(0, lead)
        if not torch.equal(whole[: len(part)], part) or not torch.equal(rows, part.repeat(len(rows) // len(part), *[1] * (part.ndim - 1))):
            raise Refused("its value at a position depends on the length of the text or on the batch", node=node.name, operator=_name(node))
        return whole

    def _evaluate(self, node: fx.Node, batch: int, length: int) -> torch.Tensor:
        """Compute a node that depends on sizes alone, for texts of ``length`` tokens."""
        values: dict[fx.Node, Any] = {}
        tokens = torch.zeros(batch, length, dtype=torch.int64)
        for step in _needed(node):
            if step.op == "placeholder":
                values[step] = tokens
            elif step.op == "get_attr":
                values[step] = attribute(self._copy.module, str(step.target))
            else:
                args, kwargs = fx.map_arg((step.args, dict(step.kwargs)), values.__getitem__)
                values[step] = step.target(*args, **kwargs)
        return values[node]

    # ---- caches -----------------------------------------------------------------------------------------------------------

    def _use_caches(self, number: int, node: fx.Node, by_text: set[fx.Node]) -> None:
        a = bound_arguments(node)
        if not a["causal"] or a["key_mask"] is not None or a["past"] is not None:
            raise Refused("this attention sees more than the tokens before: no cache can stand for that", node=node.name)
        past = {"past": self._past}
        for word, name in (("key", "k"), ("value", "v")):
            past[name] = self._cached(f"{word}_{number}", a[name], by_text)
            own = a.get(f"own_{name}")
            if own is not None:  # the new rows in float over what was read back: only earlier calls' tokens come from the codes
                with self._nodes.inserting_before(node):
                    past[name] = self._call(qc.cache_append.default, past[name], own, self._past, like=own)
                past[f"own_{name}"] = None
        with self._nodes.inserting_before(node):
            new = self._call(node.target, *(a | past).values(), like=node)
        node.replace_all_uses_with(new)
        by_text.add(new)

    def _cached(self, name: str, node: fx.Node, by_text: set[fx.Node]) -> fx.Node:
        """Return what stands for a node over the whole text: a cache of it, or of the codes it is dequantized from."""
        if _name(node) == "qc.rotary" and _name(node.args[0]) in ("qc.dequantize", "qc.vectors"):
            return self._turned(node, self._cached(name, node.args[0], by_text), by_text)
        if _name(node) == "qc.vectors":
            return self._read(node, self._cache(name, node.args[0]), node.args[1], by_text=by_text)
        if _name(node) != "qc.dequantize":
            return self._cache(name, node)
        a = bound_arguments(node)
        codes, size = a["codes"], a["size"]
        if size is None and parse_scheme(a["scheme"]).bits < 8:
            size = int(_sizes(self._copy, codes)[-1])
            with self._nodes.inserting_after(codes):
                codes = self._call(qc.pack.default, codes, a["scheme"], like=codes)
            self._copy.infer_type(codes)
        cached = self._cache(name, codes)
        rest = [self._cache(f"{name}_{part}", a[part]) if a[part] in by_text else a[part] for part in ("scale", "zero_point")]
        return self._read(node, cached, *rest, a["scheme"], size, by_text=by_text)

    def _read(self, node: fx.Node, *arguments: Any, by_text: set[fx.Node]) -> fx.Node:
        """Return the node's operator over a cache."""
        with self._nodes.inserting_before(node):
            new = self._call(node.target, *arguments, like=node)
        by_text.add(new)
        return new

    def _turned(self, node: fx.Node, cached: fx.Node, by_text: set[fx.Node]) -> fx.Node:
        """Return rotary positions of all rows of a cache, in place of those of the new tokens."""
        a = bound_arguments(node)
        if any(angle not in self._tables for angle in (a["cos"], a["sin"])):
            raise Refused("its angles depend on more than the position: keys cannot be turned when they are read", node=node.name)
        with self._nodes.inserting_before(node):
            capacity = self._call(aten.sym_size.int, cached, 1)
            angles = [
                self._call(aten.unsqueeze.default, self._call(aten.slice.Tensor, self._tables[angle], 0, 0, capacity), 0)
                for angle in (a["cos"], a["sin"])
            ]
            new = self._call(qc.rotary.default, cached, *angles, a["heads"], like=node)
        by_text.add(new)
        return new

    def _cache(self, name: str, node: fx.Node) -> fx.Node:
        sizes = _sizes(self._copy, node)
        if sizes[:2] != [self._batch, self._seq] or not all(size.isdigit() for size in sizes[2:]):
            raise Refused(f"what attention reads is {self._copy.type_text(node)}, not one row for each token", node=node.name)
        kind = TensorType(node.meta["val"].dtype, (self._batch, "capacity", *(int(size) for size in sizes[2:])))
        cache = self._input(name, kind)
        with self._nodes.inserting_after(node):
            appended = self._call(qc.cache_append.default, cache, node, self._past, like=node)
        self._caches.append(Cache(name, kind))
        self._appended.append(appended)
        return appended

    # ---- the last token ---------------------------------------------------------------------------------------------------

    def _pick_last(self, counts: fx.Node | None, by_text: set[fx.Node]) -> None:
        """Keep one row of each text from the earliest place on that everything after goes through token by token."""
        if counts is None:
            return
        node, users = self._last_cut(by_text)
        with self._nodes.inserting_before(users[0]):
            place = self._call(aten.view.default, self._call(aten.sub.Tensor, counts, 1), [-1, 1, 1])
            place = self._call(aten.expand.default, place, [-1, -1, int(_sizes(self._copy, node)[-1])])
            picked = self._call(aten.gather.default, node, 1, place)
        for user in users:
            user.replace_input_with(node, picked)

    def _last_cut(self, by_text: set[fx.Node]) -> tuple[fx.Node, list[fx.Node]]:
        """Return the earliest node [batch, seq, width] whose rows may be picked, and which of its users read them, in order.

        From there on the text reaches the output through this node alone, and every operator works on each token by itself.
        """
        (output,) = self._copy.outputs
        if not self._has_rows(output):
            raise Refused(f"its output is {self._copy.type_text(output)}, no logits for each token", node=output.name)
        order = {node: number for number, node in enumerate(self._copy.nodes)}
        tail, frontier, cut = {self._copy.output}, {output}, output
        while True:
            node = max(frontier, key=order.__getitem__)
            if frontier == {node} and self._has_rows(node):
                cut = node
            if _name(node) not in _BY_TOKEN or not tail.issuperset(node.users):
                return cut, sorted(tail.intersection(cut.users), key=order.__getitem__)
            tail.add(node)
            frontier = (frontier - {node}) | {argument for argument in node.all_input_nodes if argument in by_text}

    def _has_rows(self, node: fx.Node) -> bool:
        """Say whether a node's value is [batch, seq, width]."""
        value = node.meta["val"]
        return isinstance(value, torch.Tensor) and value.ndim == 3 and _sizes(self._copy, node)[:2] == [self._batch, self._seq]

    # ---- nodes ------------------------------------------------------------------------------------------------------------

    def _input(self, name: str, kind: TensorType) -> fx.Node:
        last = [node for node in self._nodes.nodes if node.op == "placeholder"][-1]
        with self._nodes.inserting_after(last):
            node = self._nodes.placeholder(name)
        node.meta = {"notes": {}, "made_by": "entries", "val": None}
        self._inputs.append(kind)
        return node

    def _call(self, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        node = self._nodes.create_node("call_function", target, args, kwargs, target._opname)
        node.meta = {"notes": {}, "made_by": "entries"}
        if like is not None:
            node.meta |= {key: like.meta[key] for key in ("scope", "source", "val") if key in like.meta}
            node.meta["notes"] = dict(like.meta.get("notes", {}))
        return node


def _token_type(graph: Graph) -> tuple[str, str]:
    """Return the names of the sizes of the tokens, the graph's one input."""
    kinds = [str(kind) for kind in graph.input_types]
    if len(kinds) != 1 or graph.input_types[0].dtype != torch.int64 or len(graph.input_types[0].shape) != 2:
        raise Refused(f"its inputs are {', '.join(kinds)}; a decoder takes tokens i64[batch,seq] and nothing else")
    batch, seq = graph.input_types[0].shape
    if not isinstance(batch, str) or not isinstance(seq, str):
        raise Refused(f"its tokens are {kinds[0]}: the sizes are fixed", way_out="capture it with batch and seq as symbols")
    if len(graph.outputs) != 1:
        raise Refused(f"it has {len(graph.outputs)} outputs; a decoder gives logits and nothing else")
    return batch, seq


def _nodes_of_text(nodes: fx.Graph, tokens: fx.Node) -> set[fx.Node]:
    """Return the nodes whose values depend on the tokens themselves, not only on how many there are."""
    found = {tokens}
    for node in nodes.nodes:
        if node.op in ("call_function", "output") and _name(node) != "aten.sym_size.int" and any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _rank_at(node: fx.Node, user: fx.Node) -> int:
    """Return how many axes a value needs at its user once its first is the batch: an operator by elements aligns them at the right."""
    rank: int = node.meta["val"].ndim
    if torch.Tag.pointwise in getattr(user.target, "tags", ()):
        return max(rank, user.meta["val"].ndim)
    return rank


def _needed(node: fx.Node) -> Iterator[fx.Node]:
    """Yield what a node is computed from, in order, itself last."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        step = stack.pop()
        if step not in seen:
            seen.add(step)
            stack += step.all_input_nodes
    yield from (step for step in node.graph.nodes if step in seen)


def _check_types(graph: Graph, batch: str) -> None:
    """Refuse a graph whose logits came out in another shape: an operator mixed tokens in a way that was not foreseen."""
    kind = graph.type_text(graph.outputs[0])
    if not kind.startswith(f"f32[{batch},") or kind.count(",") != 1:
        raise Refused(f"an operator mixes tokens in a way that no cache can stand for: logits became {kind}")


def _sizes(graph: Graph, node: fx.Node) -> list[str]:
    return [graph.symbols.text(size).removeprefix("int ") for size in node.meta["val"].shape]


def _name(node: Any) -> str:
    return operator_name(node.target) if isinstance(node, fx.Node) and node.op == "call_function" else ""


def _bytes_of_row(kind: TensorType) -> int:
    count = 1
    for size in kind.shape[2:]:
        assert isinstance(size, int)
        count *= size
    return count * kind.dtype.itemsize
