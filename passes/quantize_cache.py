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

Scales are found while the model runs, for each token and head (or for each token): a token's codes do not depend on the tokens after it,
so the graph over whole texts computes what the entries with caches compute (``qcompile.generation.entries``), where the codes are stored.

It stands after ``insert-quantizers`` where layers are quantized too, and in its place where they stay float.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.fx as fx

from qcompile.errors import Refused
from qcompile.formats import Group, Integer, Scheme, Token
from qcompile.graph import Graph, Quantizer, Stage
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context, Keeps, Pass, approximately


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

    @classmethod
    def takes(cls, stage: Stage) -> bool:
        return stage in (Stage.FLOAT, Stage.SIMULATED)

    def run(self, graph: Graph, context: Context) -> int:
        for bits in (self.key, self.value):
            if not 2 <= bits <= 8:
                raise Refused(f"a cache has codes of 2 to 8 bits, not {bits}", node=self.name())
        if self.per not in ("head", "token"):
            raise Refused(f"scales of a cache are for each head or token, not '{self.per}'", node=self.name())
        if self.rotary not in ("after", "before"):
            raise Refused(f"keys are quantized before or after rotary positions, not '{self.rotary}'", node=self.name())
        placed: dict[tuple[fx.Node, Scheme], fx.Node] = {}
        found = False
        for node in graph.nodes:
            if node.op != "call_function" or operator_name(node.target) != "qc.attention" or not bound_arguments(node)["causal"]:
                continue
            a = bound_arguments(node)
            if a["own_k"] is not None:
                continue  # its cache is quantized already
            turned = self.rotary == "before" and _is_rotary(a["k"])
            if self.past_only:
                own_k = graph.call(a["k"].target, *a["k"].args, before=node, like=a["k"], **a["k"].kwargs) if turned else a["k"]
                node.kwargs = {**node.kwargs, "own_k": own_k, "own_v": a["v"]}
            for name, reader, place in (("k", a["k"], 0) if turned else ("k", node, 1), ("v", node, 2)):
                quantizer = self._placed(graph, reader.args[place], self._scheme(a, name), placed)
                reader.args = (*reader.args[:place], quantizer, *reader.args[place + 1 :])
            found = found or turned
        if placed and self.rotary == "before" and not found:
            way_out = "put recognize-rotary before it, or choose rotary=after"
            raise Refused("no keys have rotary positions", node=self.name(), way_out=way_out)
        return len(placed)

    def _scheme(self, a: dict[str, Any], name: str) -> Scheme:
        bits, width = (self.key if name == "k" else self.value), int(a[name].meta["val"].shape[-1])
        granularity = Group(width // a["kv_heads"], -1) if self.per == "head" else Token()
        return Scheme(Integer(bits, self.symmetric), granularity, symmetric=self.symmetric, dynamic=True)

    def _placed(self, graph: Graph, x: fx.Node, scheme: Scheme, placed: dict[tuple[fx.Node, Scheme], fx.Node]) -> fx.Node:
        if graph.quantizer(x):
            return x
        if (x, scheme) not in placed:
            first = min(x.users, key=graph.nodes.index)
            placed[x, scheme] = graph.call_quantizer(Quantizer(scheme), x, before=first, name=f"{x.name}.cache_quantizer")
        return placed[x, scheme]


def _is_rotary(node: fx.Node) -> bool:
    return node.op == "call_function" and operator_name(node.target) == "qc.rotary"
