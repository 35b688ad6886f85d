"""MLPerf Tiny's keyword spotting on a Cortex-M4 without an operating system: its accuracy, memory and flash."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from qcompile.backends.edge.firmware.emulate import measure, run_inputs
from qcompile.backends.edge.processors import PROCESSORS

import qcompile
from qcompile.formats import parse_scheme, quantize
from qcompile.registry import find_target

pytestmark = [pytest.mark.edge, pytest.mark.slow]
M4 = PROCESSORS["cortex-m4"]
CALIBRATING = 150  # words, the last; the others are judged


def test_words_are_named_as_in_float(repository: Path, data_folder: Path, tmp_path: Path) -> None:
    """Half a point of the 850 words is four. The reference's .tflite has the same weights in 8 bits: flash is no more than that file."""
    for tool in ("gcc", "make", *M4.tools):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed ('make edge-tools')")
    spec = importlib.util.spec_from_file_location("benchmark_kws", repository / "benchmarks" / "models" / "kws.py")
    assert spec is not None
    assert spec.loader is not None
    kws = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kws)
    net, example, _ = kws.kws()
    words, labels = (torch.cat(parts) for parts in zip(*kws.words(), strict=True))
    artifact = qcompile.compile(net, example, recipe="w8a8-edge", target="edge", calibration=[(x[None],) for x in words[-CALIBRATING:]])
    find_target("edge:cortex-m4").write_folder(artifact.graph, artifact.golden_inputs, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    found = measure(tmp_path, M4)
    assert (found.ok, found.arena_high_water) == (True, report["arena_bytes"])
    assert report["flash_bytes"] <= (data_folder / "mlperf_tiny" / "kws_ref_model.tflite").stat().st_size
    words, labels = words[:-CALIBRATING], labels[:-CALIBRATING]
    first = next(node for node in artifact.graph.nodes if str(node.target) == "qc.quantize.default")
    scale, zero_point = (artifact.graph.constant(node) for node in first.args[1:3])
    codes = quantize(words, scale, zero_point, parse_scheme("int8 tensor affine")).numpy()
    answers = np.frombuffer(run_inputs(tmp_path, M4, codes.tobytes()), np.int8).reshape(len(words), -1)
    with torch.no_grad():
        exact = int((net(words).argmax(-1) == labels).sum())
    assert int((answers.argmax(-1) == labels.numpy()).sum()) >= exact - 4
