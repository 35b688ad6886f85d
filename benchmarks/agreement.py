#!/usr/bin/env python
"""The same integer graph on the reference, the CPU and ONNX Runtime: are the codes equal?

Two questions for each artifact:

- probes: every integer layer by itself, seeded codes in. The CPU and ONNX Runtime (BASIC) with the integer form must equal the reference
  bit for bit. With the QDQ form ONNX Runtime multiplies dequantized floats, so its result is rounded to the layer's own 8-bit grid
  first; a code may differ where a value lies on a rounding tie.
- codes: every value of codes inside the whole model, golden inputs in. Between layers stand float operators whose sums are ordered
  otherwise on each target.

Exit code 1 where a layer that must be equal is not.

    python benchmarks/agreement.py model.qc [more.qc ...] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from qcompile.backends.onnx import OnnxTarget

from qcompile.artifact import Artifact, load
from qcompile.formats import choose_scale, parse_scheme, quantize
from qcompile.graph import Graph
from qcompile.pipeline import sqnr_db
from qcompile.probe import probe_graph
from qcompile.registry import find_target
from qcompile.target import Executable

RUNS = ("cpu", "onnx integer", "onnx qdq")
EXACT = ("cpu", "onnx integer")


def build(run: str, graph: Graph) -> Executable:
    """Return a graph built for one of RUNS."""
    name, _, form = run.partition(" ")
    return OnnxTarget().build(graph, form=form) if form else find_target(name).build(graph)


def with_code_outputs(graph: Graph) -> tuple[Graph, list[str]]:
    """Return the graph with every operator's codes as outputs, and their names."""
    tapped = graph.copy()
    tensors = [n for n in tapped.nodes if n.op == "call_function" and isinstance(n.meta["val"], torch.Tensor)]
    nodes = [n for n in tensors if n.meta["val"].dtype in (torch.int8, torch.uint8)]
    tapped.output.args = ((*tapped.outputs, *nodes),)
    tapped.output_names = [*tapped.output_names, *(n.name for n in nodes)]
    tapped.module.recompile()
    return tapped, [n.name for n in nodes]


def compare_probes(artifact: Artifact, run: str) -> dict[str, Any]:
    """Count codes of the layers' probes that differ from the reference's."""
    probe, inputs, names = probe_graph(artifact.graph)
    if probe is None:
        return {"layers": 0, "equal_layers": 0, "codes": 0, "different": 0, "largest": 0}
    expected, actual = probe(*inputs), build(run, probe)(inputs)
    scheme = parse_scheme("uint8 tensor affine")
    different, total, equal, largest = 0, 0, 0, 0
    for a, b in zip(expected, actual, strict=True):
        scale, zero_point = choose_scale(a.min(), a.max(), scheme)
        step = (quantize(a, scale, zero_point, scheme).int() - quantize(b, scale, zero_point, scheme).int()).abs()
        wrong = int((a != b).sum()) if run in EXACT else int((step > 0).sum())
        different, total, equal, largest = different + wrong, total + a.numel(), equal + (wrong == 0), max(largest, int(step.max()))
    return {"layers": len(names), "equal_layers": equal, "codes": total, "different": different, "largest": largest}


def compare_codes(artifact: Artifact, run: str) -> dict[str, Any]:
    """Compare all codes inside the model, and its outputs, with the reference's."""
    tapped, names = with_code_outputs(artifact.graph)
    expected, actual = tapped(*artifact.golden_inputs), build(run, tapped)(artifact.golden_inputs)
    count = len(artifact.graph.outputs)
    steps = [(a.int() - b.int()).abs() for a, b in zip(expected[count:], actual[count:], strict=True)]
    total = sum(step.numel() for step in steps)
    return {
        "values": len(names),
        "codes": total,
        "different": int(sum((step > 0).sum() for step in steps)),
        "largest": int(max((step.max() for step in steps), default=0)),
        "outputs_sqnr_db": [round(min(sqnr_db(a, b), 999.0), 1) for a, b in zip(expected[:count], actual[:count], strict=True)],
    }


def main() -> None:
    """Print one line for each artifact and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifacts", nargs="+")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    loaded = [(path, load(path, target="reference")) for path in options.artifacts]
    rows: list[dict[str, Any]] = [
        {"artifact": path, "target": run, "probes": compare_probes(artifact, run), "model": compare_codes(artifact, run)}
        for path, artifact in loaded
        for run in RUNS
    ]
    if options.json:
        print(json.dumps(rows, indent=1))
    for row in rows if not options.json else []:
        p, m = row["probes"], row["model"]
        print(
            f"{row['artifact']} on {row['target']}: probes {p['equal_layers']}/{p['layers']} layers equal "
            f"({p['different']} of {p['codes']} values differ, by at most {p['largest']}); "
            f"whole model {m['different']} of {m['codes']} codes differ (at most {m['largest']}), outputs {m['outputs_sqnr_db']} dB"
        )
    if any(row["probes"]["different"] for row in rows if row["target"] in EXACT):
        sys.exit(1)


if __name__ == "__main__":
    main()
