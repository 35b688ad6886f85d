"""Replace attention, whole or written out, by one ``qc.attention`` over [batch, tokens, features].

    %view = aten.view(%linear) {size=[%batch, %seq, 12, 32]} : f32[batch,seq,12,32]
    %transpose = aten.transpose.int(%view) {dim0=1, dim1=2} : f32[batch,12,seq,32]  (and so for keys and values)
    %sdpa = aten.scaled_dot_product_attention(%transpose, %transpose_1, %transpose_2, %mask) : f32[batch,12,seq,32]
    %back = aten.transpose.int(%sdpa) {dim0=1, dim1=2} : f32[batch,seq,12,32]
    %join = aten.view(%back) {size=[%batch, %seq, 384]} : f32[batch,seq,384]
    ->
    %ne = aten.ne.Scalar(%attention_mask) {other=0} : bool[batch,seq]
    %attention = qc.attention(%linear, %linear_1, %linear_2, %ne) {heads=12, kv_heads=12, scale=0.17.., causal=false} : f32[batch,seq,384]

The written-out form is softmax(q k^T * scale + mask) v (Vaswani et al. 2017, equation 1); scale and mask may stand in any order, the scale
also on q or k. Masks are known by what they do, see ``_attention_masks.py``. Around the new operator views and transposes back to the old
layout are put; they cancel against those of the model where the model has them, and are right where it has not.

One choice changes values: a query that sees no key gives zeros here. PyTorch gives NaN or the mean of all values for it, by the spelling
of the mask; such rows are padding, and no later operator may rely on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.fx as fx
from qcompile.passes._attention_masks import HIDES, MaskUse, Meaning, find_meaning
from qcompile.passes._composed_rules import scalar
from qcompile.passes._layout_rules import rank, size_nodes, static_size, view
from qcompile.passes.canonicalize import tidy_layout

from qcompile.graph import Graph
from qcompile.graph.graph import node_name
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import VALUES, Context, Keeps, Pass

aten = torch.ops.aten
qc = torch.ops.qc


@dataclass
class Attention:
    """One attention found in a graph: q [b, h, t, d], k and v [b, kv_h, keys, d], masks, scale."""

    root: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    scale: float
    masks: list[tuple[fx.Node, bool]] = field(default_factory=list)  # (mask, whether True hides)
    causal: bool = False


@dataclass(frozen=True)
class RecognizeAttention(Pass):
    """Attention with its masks and layouts becomes one ``qc.attention``."""

    keeps: ClassVar[Keeps] = VALUES
    needs: ClassVar[tuple[str, ...]] = ("canonicalize",)

    def run(self, graph: Graph, context: Context) -> int:
        count = 0
        meanings: dict[Any, Meaning | str] = {}
        for node in graph.nodes:
            found = _describe(graph, node) if node.users else None
            if found is None:
                continue
            context.log.tried[self.name()] += 1
            reason = found if isinstance(found, str) else _replace(graph, found, meanings)
            if reason:
                context.log.reasons[node_name(node)].append(f"{self.name()}: {reason}")
            else:
                context.log.matched[self.name()] += 1
                count += 1
        graph.clean()
        # Only where something changed: a second run must change nothing.
        return count + tidy_layout(graph, context.log) if count else 0


# ---- what stands there ----------------------------------------------------------------------------------------------------


def _describe(graph: Graph, node: fx.Node) -> Attention | str | None:
    """Return the attention whose result a node is, the reason why it cannot be replaced, or None for any other node."""
    if node.op != "call_function":
        return None
    name = operator_name(node.target)
    found = _whole(node) if name == "aten.scaled_dot_product_attention" else _written_out(graph, node) if name == "aten.matmul" else None
    if not isinstance(found, Attention):
        return found
    return _shapes_refused(graph, found) or found


def _whole(node: fx.Node) -> Attention | str:
    a = bound_arguments(node)
    if a["dropout_p"]:
        return "it drops values: the model is in training mode"
    if rank(a["query"]) != 4:
        return f"its query has {rank(a['query'])} axes, not 4"
    width = static_size(a["query"], -1)
    scale = a["scale"] if a["scale"] is not None else 1 / math.sqrt(width) if width else None
    if not isinstance(scale, (int, float)):
        return "its scale is not a number"
    masks = [(a["attn_mask"], False)] if a["attn_mask"] is not None else []
    return Attention(node, a["query"], a["key"], a["value"], float(scale), masks, a["is_causal"])


def _written_out(graph: Graph, node: fx.Node) -> Attention | str | None:
    """Read matmul(softmax(scores), v); scores are matmul(q, k^T) with scales and masks in any order."""
    a = bound_arguments(node)
    softmax = a["self"]
    if not _is(softmax, "aten.softmax.int") or rank(softmax) != 4:
        return None
    if bound_arguments(softmax)["dim"] not in (-1, 3):
        return "its softmax is not over the last axis"
    if len(softmax.users) > 1:
        return "its weights have other users"
    found = Attention(node, softmax, softmax, a["other"], 1.0)
    scores = _read_scores(graph, bound_arguments(softmax)["self"], found)
    if scores is None:
        return "its scores are no product of two matrices with scales and masks"
    product = bound_arguments(scores)
    found.q = product["self"]
    key = product["other"]
    turned = _is(key, "aten.transpose.int") and bound_arguments(key)["dim0"] == 2
    found.k = bound_arguments(key)["self"] if turned else graph.call(aten.transpose.int, key, 2, 3, before=node, like=key)
    return found


def _is(node: Any, *names: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and operator_name(node.target) in names


def _read_scores(graph: Graph, node: fx.Node, found: Attention) -> fx.Node | None:
    """Walk from the softmax's input up to the product, gathering scales and masks in ``found``; return the product."""
    while not _is(node, "aten.matmul"):
        step = _read_step(graph, node, found)
        if step is None or (len(step.users) > 1 and not _is(step, "aten.matmul")):
            return None
        node = step
    return node if rank(node) == 4 else None


def _read_step(graph: Graph, node: fx.Node, found: Attention) -> fx.Node | None:
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    name = operator_name(node.target).removeprefix("aten.").partition(".")[0]
    reader = _STEPS.get(name)
    return reader(graph, bound_arguments(node), found) if reader else None


def _read_scale(graph: Graph, a: dict[str, Any], found: Attention) -> fx.Node | None:
    for x, other in ((a["self"], a["other"]), (a["other"], a["self"])):
        if (number := scalar(graph, other)) is not None and isinstance(x, fx.Node):
            found.scale *= number
            return x
    return None


def _read_divisor(graph: Graph, a: dict[str, Any], found: Attention) -> fx.Node | None:
    number = scalar(graph, a["other"])
    if not number:
        return None
    found.scale /= number
    return a["self"]


def _read_sum(graph: Graph, a: dict[str, Any], found: Attention) -> fx.Node | None:
    if a["alpha"] != 1:
        return None
    for x, mask in ((a["self"], a["other"]), (a["other"], a["self"])):
        if isinstance(mask, fx.Node) and _leads_to_product(x):
            found.masks.append((mask, False))
            return x
    return None


def _leads_to_product(node: Any) -> bool:
    while isinstance(node, fx.Node) and node.op == "call_function" and not _is(node, "aten.matmul"):
        node = node.args[0] if node.args else None
    return isinstance(node, fx.Node) and _is(node, "aten.matmul")


def _read_masked_fill(graph: Graph, a: dict[str, Any], found: Attention) -> fx.Node | None:
    value = scalar(graph, a["value"])
    if value is None or value > HIDES:
        return None
    found.masks.append((a["mask"], True))
    return a["self"]


def _read_where(graph: Graph, a: dict[str, Any], found: Attention) -> fx.Node | None:
    for x, other, hides in ((a["self"], a["other"], False), (a["other"], a["self"], True)):
        value = scalar(graph, other)
        if value is not None and value <= HIDES and isinstance(x, fx.Node):
            found.masks.append((a["condition"], hides))
            return x
    return None


_STEPS: dict[str, Callable[[Graph, dict[str, Any], Attention], fx.Node | None]] = {
    "mul": _read_scale, "div": _read_divisor, "add": _read_sum, "masked_fill": _read_masked_fill, "where": _read_where,
}  # fmt: skip


def _shapes_refused(graph: Graph, found: Attention) -> str:
    """Return the reason why ``qc.attention`` does not take these shapes, or ""."""
    if any(rank(node) != 4 for node in (found.q, found.k, found.v)):
        return "its operands have not 4 axes"
    if any(node.meta["val"].dtype != torch.float32 for node in (found.q, found.k, found.v)):
        return "its operands are not float32"
    q, k, v = (_sizes(graph, node) for node in (found.q, found.k, found.v))
    heads, kv_heads, width = (static_size(node, axis) for node, axis in ((found.q, 1), (found.k, 1), (found.q, 3)))
    if heads is None or kv_heads is None or width is None:
        return "its heads are not a fixed number"
    if k != v or q[0] != k[0] or q[3] != k[3]:
        return "queries, keys and values differ in batch or width"
    if heads % kv_heads or (kv_heads not in (1, heads) and not bound_arguments(found.root).get("enable_gqa")):
        return "its heads are no multiple of the keys' heads"
    return "it is causal from the start, and there are not as many queries as keys" if found.causal and q[2] != k[2] else ""


def _sizes(graph: Graph, node: fx.Node) -> tuple[str, ...]:
    return tuple(graph.symbols.text(size).removeprefix("int ") for size in node.meta["val"].shape)


# ---- what takes its place -------------------------------------------------------------------------------------------------


def _replace(graph: Graph, found: Attention, meanings: dict[Any, Meaning | str]) -> str:
    """Put ``qc.attention`` in the place of an attention; return "" or the reason why not."""
    meaning = Meaning(False, None)
    if found.masks:
        shape = (*_sizes(graph, found.q)[:3], _sizes(graph, found.k)[2])
        key = (*found.masks, shape)
        if key not in meanings:
            meanings[key] = find_meaning(graph, [MaskUse(node, hides, shape) for node, hides in found.masks])
        known = meanings[key]
        if isinstance(known, str):
            return known
        meaning = known
    _absorb_scales(graph, found)
    k, v = (_before_repeat(graph, node) for node in (found.k, found.v))
    if _sizes(graph, k) != _sizes(graph, v):
        k, v = found.k, found.v
    heads, kv_heads = static_size(found.q, 1), static_size(k, 1)
    q3, k3, v3 = (_join_heads(graph, node, found.root) for node in (found.q, k, v))
    mask = _key_mask(graph, meaning, found.root)
    attention = graph.call(
        qc.attention.default, q3, k3, v3, mask, heads, kv_heads, found.scale, found.causal or meaning.causal, None, meaning.window,
        before=found.root, name="attention",
    )  # fmt: skip
    batch, _, tokens, width = size_nodes(graph, found.q)
    split = graph.call(aten.view.default, attention, [batch, tokens, heads, width], before=found.root)
    graph.replace(found.root, graph.call(aten.transpose.int, split, 1, 2, before=found.root))
    return ""


def _join_heads(graph: Graph, node: fx.Node, before: fx.Node) -> fx.Node:
    """Return [batch, tokens, heads * d] of a node [batch, heads, tokens, d]."""
    batch, heads, tokens, width = size_nodes(graph, node)
    turned = graph.call(aten.transpose.int, node, 1, 2, before=before, like=node)
    return view(graph, turned, [batch, tokens, heads * width], before, like=node)


def _key_mask(graph: Graph, meaning: Meaning, before: fx.Node) -> fx.Node | None:
    """Return bool [batch, keys] of a mask's meaning; all attentions share one node."""
    if meaning.keys is None or meaning.keys.meta["val"].dtype == torch.bool:
        return meaning.keys
    for user in meaning.keys.users:
        if user.target is aten.ne.Scalar and user.args == (meaning.keys, 0):
            return user
    first = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr") and n.target is not aten.sym_size.int)
    return graph.call(aten.ne.Scalar, meaning.keys, 0, before=first, like=before)


_LAYOUT = ("aten.view", "aten.reshape", "aten.transpose.int", "aten.permute", "aten.clone")


def _absorb_scales(graph: Graph, found: Attention) -> None:
    """Take factors on q and k into the scale where nothing else reads the scaled tensor."""
    for node in (found.q, found.k):
        while _is(node, *_LAYOUT) and len(node.users) == 1:
            node = node.args[0]
        while _is(node, "aten.mul.Tensor", "aten.div.Tensor", "aten.mul.Scalar", "aten.div.Scalar") and len(node.users) == 1:
            read = _read_divisor if "div" in str(node.target) else _read_scale
            x = read(graph, bound_arguments(node), found)
            if x is None or graph.type_text(x) != graph.type_text(node):
                break
            if node is found.q:
                found.q = x
            else:
                node.replace_all_uses_with(x)
            node = x


def _before_repeat(graph: Graph, node: fx.Node) -> fx.Node:
    """Return [b, kv_heads, keys, d] where a node repeats each head of it n times, else the node itself."""
    inner = node
    while _is(inner, "aten.view", "aten.reshape", "aten.clone"):
        inner = inner.args[0]
    if _is(node, "aten.repeat_interleave.self_int") and bound_arguments(node)["dim"] in (1, -3):
        return node.args[0]
    if not _is(inner, "aten.expand") or not _is(inner.args[0], "aten.unsqueeze") or rank(inner) != 5:
        return node
    source = inner.args[0].args[0]
    (batch, heads, copies, keys, width), small = _sizes(graph, inner), _sizes(graph, source)
    joined = (batch, str(int(heads) * int(copies)) if heads.isdigit() and copies.isdigit() else "", keys, width)
    repeats = bound_arguments(inner.args[0])["dim"] in (2, -3) and small == (batch, heads, keys, width)
    return source if repeats and joined == _sizes(graph, node) else node
