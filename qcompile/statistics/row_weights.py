"""What each row of a layer's input counts in the layer's objective: token weights from the float model.

- ``attention``: a token counts as much as the attention that it receives in its block, summed over heads and queries, mapped from its
  smallest and largest value in the text to ``least`` .. 1, and divided by its mean (RSQ, Sung et al. 2025, section 4.2: "attention
  concentration"). A block is what its attention's queries, keys and values are projected by, and every product after it up to the
  next ones. The paper takes the maps of the model quantized so far; these are the float model's, so that one sweep finds them all.
- ``gradient``: a row counts (dL/dz)^2, the mean over a run of output channels, L being the mean cross entropy of the next token and z the
  layer's output: the block diagonal of the Fisher information that GuidedQuant (Kim et al. 2025, arXiv 2505.07004, equation 7) keeps,
  averaged over each of so many runs of channels. Scaled to mean 1 over a layer, so that damping means what it does without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx

from qcompile.errors import Refused
from qcompile.graph import dialect
from qcompile.graph.graph import Graph, node_name
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.statistics.collectors import RowWeights
from qcompile.statistics.regions import product_count
from qcompile.statistics.sweep import Data, FloatInterpreter

ATTENTIONS = ("qc.attention", "aten.scaled_dot_product_attention")


class FloatModel(FloatInterpreter):
    """Runs the float model so that gradients flow: operators of the dialect have no derivative of their own, their meanings do."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(dialect.MEANINGS.get(target, target), args, kwargs)


def attention_weights(graph: Graph, layers: Sequence[fx.Node], data: Data, least: float = 0.005) -> dict[fx.Node, RowWeights]:
    """Return the weights of each layer's rows by the attention that their tokens receive.

    Args:
        graph: with quantizers, which are passed over.
        layers: products; their inputs are [batch, tokens, channels].
        data: batches of the graph's inputs.
        least: weight of the token that receives least, before the division by the mean.

    Raises:
        Refused: the model has no attention that is an operator of its own (``recognize-attention`` makes it one).
    """
    blocks = _blocks(graph)
    if not blocks:
        raise Refused("no attention in the graph to weigh tokens by", way_out="put recognize-attention into the pipeline")
    received: dict[fx.Node, list[torch.Tensor]] = {attention: [] for attention in blocks.values()}

    class Recorder(FloatModel):
        def run_node(self, n: fx.Node) -> Any:
            if n not in received:
                return super().run_node(n)
            name = "v" if operator_name(n.target) == "qc.attention" else "value"
            v = bound_arguments(n)[name]
            with torch.enable_grad():
                self.env[v] = self.env[v].detach().requires_grad_()
                out = super().run_node(n)
                # The derivative of the sum of all outputs by a token's values is the attention that it receives.
                (mass,) = torch.autograd.grad(out.sum(), self.env[v])
            mass = mass.sum(-1) if mass.ndim == 3 else mass.sum((1, 3))
            received[n].append(_scaled(mass, least).reshape(-1, 1))
            return out.detach()

    with torch.no_grad():
        for batch in data.batches(graph):
            Recorder(graph.module, garbage_collect_values=False).run(*batch)
    return {
        layer: RowWeights(f"attention({node_name(blocks[layer])}, least={least:g})", tuple(received[blocks[layer]]))
        for layer in layers
        if layer in blocks
    }


def _blocks(graph: Graph) -> dict[fx.Node, fx.Node]:
    """Return the attention of the block in which each product stands."""
    found: dict[fx.Node, fx.Node] = {}
    waiting: list[fx.Node] = []
    latest: fx.Node | None = None
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if operator_name(node.target) in ATTENTIONS:
            own = _projections(graph, node)
            rest = [layer for layer in waiting if layer not in own]
            found |= dict.fromkeys(own, node) | dict.fromkeys(rest, latest or node)
            waiting, latest = [], node
        elif product_count(graph, node):
            waiting.append(node)
    return found | (dict.fromkeys(waiting, latest) if latest else {})


def _projections(graph: Graph, attention: fx.Node) -> set[fx.Node]:
    """Return the products that queries, keys and values come from, with no product between."""
    found: set[fx.Node] = set()
    waiting, seen = list(attention.all_input_nodes), set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if product_count(graph, node):
            found.add(node)
        else:
            waiting += node.all_input_nodes
    return found


def _scaled(mass: torch.Tensor, least: float) -> torch.Tensor:
    """Return [batch, tokens] mapped to least .. 1 in each row, then to mean 1."""
    low, high = mass.amin(1, keepdim=True), mass.amax(1, keepdim=True)
    weights = least + (1 - least) * (mass - low) / (high - low).clamp(min=1e-30)
    return weights / weights.mean(1, keepdim=True)


# ---- gradients ------------------------------------------------------------------------------------------------------------


def gradient_weights(graph: Graph, layers: Sequence[fx.Node], data: Data, groups: int = 1) -> dict[fx.Node, RowWeights]:
    """Return the weights of each layer's rows by the squared gradient of the end loss, one column for each run of output channels.

    Args:
        graph: of a language model: tokens [batch, tokens] to logits [batch, tokens, vocabulary]; its quantizers are passed over.
        layers: linears.
        data: batches of the graph's inputs.
        groups: runs of output channels, each with weights of its own; a layer whose channels they do not divide takes one.

    Raises:
        Refused: the model is no language model.
    """
    squares: dict[fx.Node, list[torch.Tensor]] = {layer: [] for layer in layers}
    for outputs, tokens, values in _runs_with_gradients(graph, set(layers), data):
        if outputs.ndim != 3 or tokens.shape != outputs.shape[:2] or tokens.dtype.is_floating_point:
            raise Refused("gradients are those of a language model: tokens [batch, tokens] to logits [batch, tokens, vocabulary]")
        loss = torch.nn.functional.cross_entropy(outputs[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        for layer, gradient in zip(values, torch.autograd.grad(loss, list(values.values())), strict=True):
            runs = groups if gradient.shape[-1] % groups == 0 else 1
            squares[layer].append(gradient.square().unflatten(-1, (runs, -1)).mean(-1).flatten(0, -2))
    found = {}
    for layer, batches in squares.items():
        mean = torch.cat(batches).mean().clamp(min=1e-30)
        found[layer] = RowWeights(f"gradient({node_name(layer)}, groups={groups})", tuple(batch / mean for batch in batches))
    return found


def _runs_with_gradients(
    graph: Graph, layers: set[fx.Node], data: Data
) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict[fx.Node, torch.Tensor]]]:
    """Yield for each batch the first output, the first input and the layers' outputs, with what autograd needs between them."""

    class Recorder(FloatModel):
        def __init__(self, module: fx.GraphModule) -> None:
            super().__init__(module)
            self.values: dict[fx.Node, torch.Tensor] = {}

        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in layers:
                self.values[n] = value if value.requires_grad else value.requires_grad_()
            return value

    for batch in data.batches(graph):
        with torch.enable_grad():
            recorder = Recorder(graph.module)
            outputs = recorder.run(*batch)
            yield outputs[0], batch[0], recorder.values


def weigher(kind: str, groups: int) -> Callable[[Graph, Sequence[fx.Node], Data], dict[fx.Node, RowWeights]]:
    """Return the function that gives weights of this kind.

    Raises:
        Refused: the kind is neither ``attention`` nor ``gradient``.
    """
    if kind == "attention":
        return attention_weights
    if kind == "gradient":
        return lambda graph, layers, data: gradient_weights(graph, layers, data, groups)
    raise Refused(f"rows count equally, by attention or by gradient, not '{kind}'")
