"""Capture a checkpoint as the float graph of its model, with the codes of its weights in notes for ``keep-codes``.

    %w = const f32[8,64] @.. !{codes=@.., scale=@.., stored="int4 group=32 sym scale=f16"}
    %y = aten.linear(%x, %w)

The constant holds the values of the codes, so every pass sees an ordinary float model. What a scheme cannot say becomes operators:

- columns in another order (``desc_act``):  ``y = linear(index_select(x, -1, order), w)``
- minima m [out, groups]:                   ``y = linear(x, w) - linear(sums of x over each group, m)``

The second is ``sum_c (scale code_c - m_g) x_c`` with the sum over a group's inputs drawn out of the minimum's part.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from qcompile.capture.huggingface import capture_weights
from qcompile.errors import Refused
from qcompile.formats import Group
from qcompile.graph import Graph, tensor_digest
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.interchange.checkpoint import Checkpoint, StoredWeight

aten = torch.ops.aten


def capture_checkpoint(checkpoint: Checkpoint, place: str) -> tuple[Graph, tuple[torch.Tensor, ...]]:
    """Return the graph of a checkpoint's model and example inputs.

    Args:
        checkpoint: what a reader returned.
        place: file or folder, for messages.

    Raises:
        Refused: the architecture is not known, weights are missing, or a weight with codes is not multiplied as it is stored.
    """
    values = {name: w.dequantize() if isinstance(w, StoredWeight) else w for name, w in checkpoint.weights.items()}
    by_digest = {tensor_digest(values[name]): (name, weight) for name, weight in checkpoint.stored.items()}
    graph, examples = capture_weights(checkpoint.config, values, place)
    found = set()
    for node in graph.nodes:
        value = graph.constant(node)
        digest = "" if value is None else tensor_digest(value)
        if digest in by_digest:
            name, weight = by_digest[digest]
            _install(graph, node, weight, f"{place} {name}")
            found.add(name)
    same = {name for name, _ in by_digest.values()}  # weights that are equal bit for bit are one constant
    if missing := sorted(same - found):
        raise Refused("the model does not multiply with this weight as it is stored", node=f"{place} {missing[0]}")
    graph.clean()
    return graph, examples


def _install(graph: Graph, node: fx.Node, weight: StoredWeight, place: str) -> None:
    if weight.order is not None or weight.minimum is not None:
        for user in list(node.users):
            _rewrite(graph, node, user, weight, place)
    else:
        _note(node, weight)


def _note(node: fx.Node, weight: StoredWeight) -> None:
    quantized = weight.quantized
    node.meta["notes"] |= {"stored": str(quantized.scheme), "codes": quantized.codes, "scale": quantized.scale}
    if quantized.zero_point is not None:
        node.meta["notes"]["zero_point"] = quantized.zero_point


def _rewrite(graph: Graph, node: fx.Node, user: fx.Node, weight: StoredWeight, place: str) -> None:
    """Make one reader of a weight read its codes' own values, and compute what they leave out beside it."""
    operator = operator_name(user.target)
    if operator not in ("aten.linear", "aten.embedding") or (operator == "aten.embedding" and weight.order is not None):
        raise Refused(f"{operator} does not read a weight with minima, or with columns in an order of its own", node=place)
    name = str(node.target)
    scaled = graph.add_constant(f"{name}_scaled", weight.quantized.dequantize(), like=node)
    _note(scaled, weight)
    minimum = None if weight.minimum is None else graph.add_constant(f"{name}_minimum", weight.minimum, like=node)
    (_rewrite_linear if operator == "aten.linear" else _rewrite_embedding)(graph, user, scaled, minimum, weight)


def _rewrite_linear(graph: Graph, user: fx.Node, scaled: fx.Node, minimum: fx.Node | None, weight: StoredWeight) -> None:
    arguments = bound_arguments(user)
    x = arguments["input"]
    if weight.order is not None:
        order = graph.add_constant(f"{scaled.target}_order", weight.order, like=user)
        x = graph.call(aten.index_select.default, x, -1, order, before=user)
    result = graph.call(aten.linear.default, x, scaled, arguments["bias"], before=user)
    if minimum is not None:
        groups = graph.call(aten.unflatten.int, x, -1, _groups(weight), before=user)
        sums = graph.call(aten.sum.dim_IntList, groups, [-1], before=user)
        result = graph.call(aten.sub.Tensor, result, graph.call(aten.linear.default, sums, minimum, before=user), before=user)
    graph.replace(user, result)


def _rewrite_embedding(graph: Graph, user: fx.Node, scaled: fx.Node, minimum: fx.Node | None, weight: StoredWeight) -> None:
    assert minimum is not None
    indices = bound_arguments(user)["indices"]
    rows = graph.call(aten.embedding.default, scaled, indices, before=user)
    minima = graph.call(aten.unsqueeze.default, graph.call(aten.embedding.default, minimum, indices, before=user), -1, before=user)
    groups = graph.call(aten.unflatten.int, rows, -1, _groups(weight), before=user)
    graph.replace(user, graph.call(aten.flatten.using_ints, graph.call(aten.sub.Tensor, groups, minima, before=user), -2, -1, before=user))


def _groups(weight: StoredWeight) -> list[int]:
    granularity = weight.quantized.scheme.granularity
    assert isinstance(granularity, Group)
    return [weight.shape[1] // granularity.size, granularity.size]
