"""Take a checkpoint out of an artifact: its configuration, and each weight of the model with its codes.

The graph of an artifact is not the model's code any more: passes have folded and fused. Names come from constants, which keep theirs, and
whether they still say the model is tried out: ``check_agrees`` captures what was written as the model that its configuration names, and
compares its outputs on the golden inputs with the artifact's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.fx as fx

from qcompile.artifact import Artifact
from qcompile.capture.huggingface import described_model
from qcompile.errors import Refused
from qcompile.formats import Quantized, parse_scheme
from qcompile.graph import Graph
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.interchange.checkpoint import Checkpoint, StoredWeight
from qcompile.interchange.install import capture_checkpoint
from qcompile.pipeline import sqnr_db

AGREEMENT_DB = 80.0  # float32 rounding of products in another order; a changed weight or activation in codes shows far below

# Operators over packed codes -> names of their arguments: codes, scale, zero point, table, scheme, and the unpacked size.
_STORED = {
    "qc.linear": ("weight", "weight_scale", "weight_zero_point", "weight_table", "weight_scheme", "in_features"),
    "qc.embedding": ("weight", "scale", "zero_point", "", "scheme", "size"),
    "qc.dequantize": ("codes", "scale", "zero_point", "table", "scheme", "size"),
}
_WRAPPER = "model."  # what capture puts before the model's own names


def collect_checkpoint(artifact: Artifact, place: str) -> Checkpoint:
    """Return the checkpoint of an artifact that was compiled from a Hugging Face model.

    Args:
        artifact: is not changed.
        place: its file, for messages.

    Raises:
        Refused: it holds no configuration, its activations are quantized, or weights of the model are not in it under their names.
    """
    if not artifact.config:
        raise Refused(
            "the artifact holds no configuration of a Hugging Face model", node=place, way_out="compile it from a Hugging Face folder"
        )
    expected = described_model(artifact.config, place)
    found = _constants(artifact.graph, place, expected.shapes)
    weights: dict[str, torch.Tensor | StoredWeight] = {}
    config = dict(artifact.config)
    for name, shape in expected.shapes.items():
        weight = found.get(name)
        if weight is None and name in expected.tied and expected.tied[name] in found:
            continue  # stored once, under the other name
        if weight is None or tuple(weight.shape) != shape:
            reason = "is not there" if weight is None else f"is {list(weight.shape)}, the model's is {list(shape)}"
            raise Refused(f"the weight {name} {reason}: a pass has changed the model's parts", node=place)
        weights[name] = weight
    if any(name in weights and source in weights and not _equal(weights[name], weights[source]) for name, source in expected.tied.items()):
        config["tie_word_embeddings"] = False  # table and head were quantized each in its own way
    else:
        weights = {name: weight for name, weight in weights.items() if expected.tied.get(name) not in weights}
    return Checkpoint(config, weights, artifact.tokenizer, artifact.end_tokens)


def check_agrees(artifact: Artifact, read: Callable[[], Checkpoint], place: str) -> None:
    """Compare the model that was written with the artifact on its golden inputs.

    Raises:
        Refused: outputs differ by more than the order of float sums.
    """
    graph, _ = capture_checkpoint(read(), place)
    found = graph(*artifact.golden_inputs)
    worst = min(sqnr_db(a, b) for a, b in zip(artifact.golden_outputs, found, strict=True))
    if worst < AGREEMENT_DB:
        raise Refused(
            f"the format cannot say what the artifact computes: outputs would agree to {worst:.1f} dB only",
            node=place,
            way_out="leave out passes that rotate, or that quantize activations or the cache",
        )


def _constants(graph: Graph, place: str, names: Collection[str]) -> dict[str, torch.Tensor | StoredWeight]:
    """Return the float constants and the weights with codes, by the model's names.

    Equal constants are one in a graph, and so are table and head where they are tied: the module that an operator comes from tells which
    weight it reads, and the constant's own name where that is none of the model's.
    """
    found: dict[str, torch.Tensor | StoredWeight] = {}
    for node in graph.nodes:
        operator = operator_name(node.target) if node.op == "call_function" else ""
        if operator in ("qc.quantize", "qc.quantize_dynamic"):
            raise Refused("activations or the cache are quantized; these formats hold weights alone", node=f"{place} {node.name}")
        if operator in _STORED:
            own, weight = _stored(graph, node, operator)
            reader = node if operator != "qc.dequantize" else next(iter(node.users))
            found[_module_name(reader, "weight", names) or own] = weight
        if node.op != "call_function" or not hasattr(node.target, "_schema"):
            continue
        for part in ("weight", "bias"):
            value = graph.constant(bound_arguments(node).get(part))
            if value is not None and value.is_floating_point() and (name := _module_name(node, part, names)):
                found[name] = value
    for node in graph.nodes:
        if node.op == "get_attr" and (value := graph.constant(node)) is not None:
            found.setdefault(_own_name(node), value)
    return found


def _module_name(node: fx.Node, part: str, names: Collection[str]) -> str:
    """Return the name of a parameter of the module that a node comes from, or "" where the model has none of it."""
    name = f"{node.meta.get('scope', '')}.{part}".removeprefix(_WRAPPER)
    return name if name in names else ""


def _stored(graph: Graph, node: fx.Node, operator: str) -> tuple[str, StoredWeight]:
    arguments = bound_arguments(node)
    codes, scale, zero_point, table, scheme, size = (arguments.get(name) if name else None for name in _STORED[operator])
    tensors = [graph.constant(value) for value in (codes, scale, zero_point, table)]
    packed, parsed = tensors[0], parse_scheme(str(scheme))
    assert packed is not None
    assert tensors[1] is not None
    whole = packed if size is None else parsed.format.unpack(packed, int(size))
    name = _own_name(codes).rpartition("_codes")[0]
    return name, StoredWeight(Quantized(whole, tensors[1], tensors[2], parsed, tensors[3]))


def _own_name(node: Any) -> str:
    return str(node.target).removeprefix(_WRAPPER)


def _equal(a: torch.Tensor | StoredWeight, b: torch.Tensor | StoredWeight) -> bool:
    if isinstance(a, StoredWeight) != isinstance(b, StoredWeight):
        return False
    if isinstance(a, StoredWeight) and isinstance(b, StoredWeight):
        return str(a.quantized.scheme) == str(b.quantized.scheme) and torch.equal(a.dequantize(), b.dequantize())
    return torch.equal(a, b)  # type: ignore[arg-type]
