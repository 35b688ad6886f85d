#!/usr/bin/env python
"""Print how far smoothing and rotation push down the error that planted outliers cause: ``python benchmarks/outliers.py``.

The model is the wikilm decoder of the data folder with four gains of each normalization times 30 and the columns that read them divided
by 30: the float function is the same, the activations have outlier channels. Rounding is naive: one static scale for each activation
that a linear reads, found by minimum and maximum on the same tokens, one scale for each row of a weight.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from models.planted import plant_outliers
from qcompile.passes.rotate import Rotate
from qcompile.passes.smooth import Smooth
from torch import nn

from qcompile.capture.torch_export import capture_module
from qcompile.formats import choose_scale, parse_scheme, quantize_tensor
from qcompile.graph import Graph, Quantizer, Stage
from qcompile.graph.text import bound_arguments, operator_name
from qcompile.pipeline import Context, Pipeline
from qcompile.statistics import MinMax, collect


class Logits(nn.Module):
    """A causal language model as tokens -> logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


def naive_rounding(graph: Graph, weight_bits: int, activation_bits: int, data: list[tuple[torch.Tensor]]) -> Graph:
    """Return a copy with a static quantizer on each input of a linear and each of its rows rounded to nearest."""
    copy = graph.copy()
    copy.stage = Stage.SIMULATED
    weights, activations = parse_scheme(f"int{weight_bits} channel=0 sym"), parse_scheme(f"int{activation_bits} tensor sym")
    linears = [node for node in copy.nodes if node.op == "call_function" and operator_name(node.target) == "aten.linear"]
    inputs = {bound_arguments(node)["input"] for node in linears}
    ranges = collect(copy, [MinMax(node.name) for node in inputs], data)
    placed: dict[object, object] = {}
    for node in linears:
        x, w = bound_arguments(node)["input"], bound_arguments(node)["weight"]
        if x not in placed:
            found = ranges[MinMax(x.name)]
            quantizer = Quantizer(activations, *choose_scale(found["min"], found["max"], activations))
            placed[x] = copy.call_quantizer(quantizer, x, before=node, name=f"{x.name}.quantizer")
        node.replace_input_with(x, placed[x])
        copy.set_constant(copy.own_constant(w, node), quantize_tensor(copy.constant(w), weights).dequantize())
    copy.clean()
    return copy


def output_error(graph: Graph, bits: tuple[int, int], data: list[tuple[torch.Tensor]]) -> float:
    """Return the mean squared error of the logits against the float graph, relative to their power."""
    rounded = naive_rounding(graph, *bits, data)
    pairs = [(graph(*batch)[0], rounded(*batch)[0]) for batch in data]
    return sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(a.square().sum()) for a, _ in pairs)


def prepared(graph: Graph, passes: tuple[Smooth | Rotate, ...], data: list[tuple[torch.Tensor]]) -> Graph:
    """Return a copy after the passes."""
    copy = graph.copy()
    Pipeline(passes).run(copy, Context(target=None, calibration=data))  # type: ignore[arg-type]
    return copy


def main() -> None:
    """Print the table."""
    from transformers import LlamaForCausalLM

    folder = Path(os.environ.get("QCOMPILE_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    model = LlamaForCausalLM.from_pretrained(folder / "wikilm-5m", dtype=torch.float32)
    tokens = torch.randint(0, 4096, (2, 64), generator=torch.Generator().manual_seed(0))
    data = [(tokens,)]
    plain = capture_module(Logits(model), (tokens,), [{0: "batch", 1: "tokens"}])
    planted = plain.copy()
    plant_outliers(planted)
    rows = {"nothing": (), "smooth": (Smooth(),), "rotate": (Rotate(),), "rotate, not online": (Rotate(mlp=False),)}
    print(f"{'':20s} {'W8A8':>12s} {'W4A4':>12s}   relative squared error of the logits")
    print(f"{'no outliers':20s} " + " ".join(f"{output_error(plain, bits, data):12.3e}" for bits in ((8, 8), (4, 4))))
    for name, passes in rows.items():
        graph = prepared(planted, passes, data)
        print(f"{name:20s} " + " ".join(f"{output_error(graph, bits, data):12.3e}" for bits in ((8, 8), (4, 4))), flush=True)


if __name__ == "__main__":
    main()
