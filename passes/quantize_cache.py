"""Quantize what a decoder keeps of its past: the keys and values of causal attention.

    %attention = qc.attention(%q, %k, %v) {.., causal=true} : f32[batch,seq,256]

    %k.quantizer = quantizer(%k) {scheme="int4 group=32 affine dynamic"} : f32[batch,seq,128]
    %v.quantizer = quantizer(%v) {scheme="int4 group=32 affine dynamic"} : f32[batch,seq,128]
    %attention = qc.attention(%q, %k.quantizer, %v.quantizer) {.., causal=true} : f32[batch,seq,256]

Keys before rotary positions vary less from token to token (KVQuant, Hooper et al. 2024, arXiv 2401.18079, section 3.2): with
``rotary=before`` their quantizer stands before ``qc.rotary``, the cache holds the codes, and keys are turned when attention reads them.

With ``past_only`` a query meets its own token in float, as attention has it at that moment, and what is read back from the cache in codes:

    %attention = qc.attention(%q, %k.quantizer, %v.quantizer) {.., causal=true, own_k=%k, own_v=%v} : f32[batch,seq,256]

(WKVQuant, Yue et al. 2024, arXiv 2402.12065, section 3.1: keys and values of the current forward pass are not quantized.) The graph over
whole texts then computes what decoding one token at a time gives, so that is what its perplexity is of; the entry ``prefill`` leaves all
tokens of one call in float for one another, as the paper does with a prompt.

With ``coupled=4`` each run of four channels is one code of a byte, its place in a table learned from calibration data (coupled
quantization, Zhang et al. 2024, arXiv 2405.03917; ``qcompile.solvers._vectors``): 2 bits for a channel, and no scales.

    %k.codes = qc.vector_codes(%k, %k.vectors) : u8[batch,seq,32]
    %k.read = qc.vectors(%k.codes, %k.vectors) : f32[batch,seq,128]

Scales are found while the model runs, for each token and head (or for each token): a token's codes do not depend on the tokens after it,
so the graph over whole texts computes what the entries with caches compute (``qcompile.generation.entries``), where the codes are stored.

It stands after ``insert-quantizers`` where layers are quantized too, and in its place where they stay float.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.fx as fx

from qcompile.errors import Refused
from qcompile.formats import Group, Integer, Scheme, Token
from qcompile.graph import Graph, Quantizer, Stage
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context, Keeps, Pass, approximately
from qcompile.solvers._vectors import learn_vectors
from qcompile.statistics import Request, Samples, sampled_places
from qcompile.statistics.row_weights import gradient_weights


@dataclass(frozen=True)
class QuantizeCache(Pass):
    """Insert quantizers on the keys and values of causal attention.

    Attributes:
        key: bits of keys, 2 to 8.
        value: bits of values, 2 to 8.
        per: ``head`` (a scale for each token and head) or ``token``.
        symmetric: without zero points.
        rotary: quantize keys ``after`` rotary positions, or ``before``, where ``recognize-rotary`` found them.
        past_only: leave the keys and values of the step that is computed in float.
        coupled: how many channels of keys and values share a code of one byte, 2, 4 or 8: 4, 2 or 1 bits for each. 0: none.
        fisher: tables of vectors weigh tokens by the squared gradient of the loss, which needs a language model.
        rows: tokens of the calibration data that a table is learned from.
    """

    gives: ClassVar[Stage | None] = Stage.SIMULATED
    keeps: ClassVar[Keeps] = approximately()
    needs: ClassVar[tuple[str, ...]] = ("recognize-attention",)

    key: int = 8
    value: int = 8
    per: str = "head"
    symmetric: bool = False
    rotary: str = "after"
    past_only: bool = False
    coupled: int = 0
    fisher: bool = False
    rows: int = 8192

    @classmethod
    def takes(cls, stage: Stage) -> bool:
        return stage in (Stage.FLOAT, Stage.SIMULATED)

    def requests(self, graph: Graph, context: Context) -> Sequence[Request]:
        self._check()
        places = [place for _, places in self._found(graph) for place in places.values()] if self.coupled else []
        return [Samples(place.x.name, rows=self.rows) for place in dict.fromkeys(places)]

    def run(self, graph: Graph, context: Context) -> int:
        self._check()
        found = self._found(graph)
        if found and self.rotary == "before" and not any("k" in places and _is_rotary(places["k"].reader) for _, places in found):
            way_out = "put recognize-rotary before it, or choose rotary=after"
            raise Refused("no keys have rotary positions", node=self.name(), way_out=way_out)
        tables = self._tables(graph, found, context) if self.coupled else {}
        placed: dict[tuple[fx.Node, Scheme | fx.Node], fx.Node] = {}
        for node, places in found:
            a = bound_arguments(node)
            if self.past_only:
                node.kwargs = {**node.kwargs, "own_k": _as_it_is(graph, node, places.get("k")), "own_v": a["v"]}
            for name, (x, reader, number) in places.items():
                kind = tables[x] if self.coupled else self._scheme(a, name)
                read = self._placed(graph, x, kind, placed)
                reader.args = (*reader.args[:number], read, *reader.args[number + 1 :])
        return len(placed)

    def _check(self) -> None:
        for bits in (self.key, self.value):
            if not 2 <= bits <= 8:
                raise Refused(f"a cache has codes of 2 to 8 bits, not {bits}", node=self.name())
        if self.per not in ("head", "token"):
            raise Refused(f"scales of a cache are for each head or token, not '{self.per}'", node=self.name())
        if self.rotary not in ("after", "before"):
            raise Refused(f"keys are quantized before or after rotary positions, not '{self.rotary}'", node=self.name())
        if self.coupled not in (0, 2, 4, 8):
            raise Refused(f"2, 4 or 8 channels of a cache share a code, not {self.coupled}", node=self.name())
        if self.coupled and (self.key, self.value, self.per, self.symmetric) != (8, 8, "head", False):
            raise Refused("codes of coupled channels have neither bits nor scales to choose", node=self.name(),
                          way_out="leave key, value, per and symmetric out, or coupled")  # fmt: skip
        if self.fisher and not self.coupled:
            raise Refused("fisher weighs what tables of coupled channels are learned from", node=self.name(), way_out="choose coupled=4")
        if self.rows < 1:
            raise Refused(f"tables are learned from at least one token, not {self.rows}", node=self.name())

    def _found(self, graph: Graph) -> list[tuple[fx.Node, dict[str, _Place]]]:
        """Return each attention with a cache that is not quantized yet, and where its keys and values are read."""
        found = []
        for node in graph.nodes:
            if node.op != "call_function" or operator_name(node.target) != "qc.attention" or not bound_arguments(node)["causal"]:
                continue
            a = bound_arguments(node)
            turned = self.rotary == "before" and _is_rotary(a["k"])
            places = {"k": _Place(a["k"].args[0], a["k"], 0) if turned else _Place(a["k"], node, 1), "v": _Place(a["v"], node, 2)}
            places = {name: place for name, place in places.items() if not _is_quantized(graph, place.x)}
            if places and a["own_k"] is None:
                found.append((node, places))
        return found

    # ---- codes of coupled channels ----------------------------------------------------------------------------------------

    def _tables(self, graph: Graph, found: list[tuple[fx.Node, dict[str, _Place]]], context: Context) -> dict[fx.Node, fx.Node]:
        """Return the table of vectors of each key and value, learned from its sampled tokens."""
        places = dict.fromkeys(place.x for _, places in found for place in places.values())
        for node, each in found:
            width = int(next(iter(each.values())).x.meta["val"].shape[-1])
            if (d := width // bound_arguments(node)["kv_heads"]) % self.coupled:
                raise Refused(f"runs of {self.coupled} channels do not divide heads of {d}", node=node.name)
        weights = self._weights(graph, list(places), context) if self.fisher else {}
        tables = {}
        for x in places:
            assert context.statistics is not None
            table = learn_vectors(context.statistics[Samples(x.name, rows=self.rows)]["rows"].float(), self.coupled, weights.get(x))
            tables[x] = graph.add_constant(f"{x.name}.vectors", table, before=min(x.users, key=graph.nodes.index), like=x)
            context.notes.append((x.name, f"quantize-cache: tables of vectors, {table.nbytes} bytes"))
        return tables

    def _weights(self, graph: Graph, places: list[fx.Node], context: Context) -> dict[fx.Node, torch.Tensor]:
        """Return the squared gradients of the loss for each sampled token and run, f32 [rows, runs]."""
        assert context.calibration is not None
        found = {}
        by_runs = itertools.groupby(sorted(places, key=self._runs), key=self._runs)
        for runs, same in by_runs:
            for x, weights in gradient_weights(graph, list(same), context.calibration, runs).items():
                every = torch.cat(weights.batches)
                found[x] = every[sampled_places(Samples(x.name, rows=self.rows), len(every))].float()
        return found

    def _runs(self, x: fx.Node) -> int:
        return int(x.meta["val"].shape[-1]) // self.coupled

    # ---- placing ----------------------------------------------------------------------------------------------------------

    def _scheme(self, a: dict[str, Any], name: str) -> Scheme:
        bits, width = (self.key if name == "k" else self.value), int(a[name].meta["val"].shape[-1])
        granularity = Group(width // a["kv_heads"], -1) if self.per == "head" else Token()
        return Scheme(Integer(bits, self.symmetric), granularity, symmetric=self.symmetric, dynamic=True)

    def _placed(self, graph: Graph, x: fx.Node, kind: Scheme | fx.Node, placed: dict[tuple[fx.Node, Scheme | fx.Node], fx.Node]) -> fx.Node:
        """Return x read from codes: by a scheme, or by a table of vectors."""
        if (x, kind) not in placed:
            first = min(x.users, key=graph.nodes.index)
            if isinstance(kind, Scheme):
                read = graph.call_quantizer(Quantizer(kind), x, before=first, name=f"{x.name}.cache_quantizer")
            else:
                codes = graph.call(torch.ops.qc.vector_codes.default, x, kind, before=first, like=x, name=f"{x.name}_codes")
                read = graph.call(torch.ops.qc.vectors.default, codes, kind, before=first, like=x, name=f"{x.name}_read")
            placed[x, kind] = read
        return placed[x, kind]


class _Place(NamedTuple):
    """A key or value, the node that is to read its codes instead, and as which of its arguments."""

    x: fx.Node
    reader: fx.Node
    number: int


def _as_it_is(graph: Graph, attention: fx.Node, place: _Place | None) -> fx.Node:
    """Return the keys of an attention in float: where their codes are turned when they are read, turned by themselves."""
    k = bound_arguments(attention)["k"]
    if place is None or place.reader is attention:
        return k
    return graph.call(k.target, place.x, *k.args[1:], before=attention, like=k, **k.kwargs)


def _is_rotary(node: fx.Node) -> bool:
    return node.op == "call_function" and operator_name(node.target) == "qc.rotary"


def _is_quantized(graph: Graph, node: fx.Node) -> bool:
    return graph.quantizer(node) is not None or (node.op == "call_function" and operator_name(node.target) == "qc.vectors")
