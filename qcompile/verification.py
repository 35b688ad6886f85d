"""Verification: the layers of an artifact give, on this machine and target, the bits they gave when it was compiled."""

from __future__ import annotations

import math
from typing import Any

from qcompile.artifact import Artifact
from qcompile.pipeline import sqnr_db
from qcompile.probe import probe_digests
from qcompile.registry import find_target

# Layers must be equal bit for bit on every target. Between them stand float operators (normalization, softmax, GELU) whose sums or
# approximations may be others: a code flips at a rounding tie now and then, and the integer layers after it carry that on. Measured on
# MiniLM: 134 dB where no code flips, 34 dB where one does in the last block but one; a wrong kernel or weight gives less than 20.
OUTPUT_SQNR_DB = 30.0


def verify(artifact: Artifact) -> dict[str, Any]:
    """Replay probes (exact) and golden inputs (at least OUTPUT_SQNR_DB) on the artifact's target.

    Returns:
        ``ok``, ``first_mismatch`` (a name or None), ``layers`` (name, ok), ``outputs_sqnr_db`` (None where equal),
        ``outputs_bound_db``, ``target``.
    """
    target = find_target(artifact.target)
    expected = artifact.report["probes"]
    actual = probe_digests(artifact.graph, lambda graph, inputs: target.build(graph, threads=artifact.threads)(inputs))
    layers = [{"name": name, "ok": actual.get(name) == digest} for name, digest in expected.items()]
    outputs = artifact.executable(artifact.golden_inputs)
    quality = [sqnr_db(golden, output) for golden, output in zip(artifact.golden_outputs, outputs, strict=True)]
    wrong = [str(layer["name"]) for layer in layers if not layer["ok"]]
    wrong += [f"output {name}" for name, q in zip(artifact.graph.output_names, quality, strict=True) if not q >= OUTPUT_SQNR_DB]
    return {"ok": not wrong, "first_mismatch": wrong[0] if wrong else None, "layers": layers, "target": artifact.target,
            "outputs_sqnr_db": [None if math.isinf(q) and q > 0 else round(q, 2) for q in quality],
            "outputs_bound_db": OUTPUT_SQNR_DB}  # fmt: skip
