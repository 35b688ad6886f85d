"""Weights of codebooks, ternary ones and points of pyramids, from a recipe to every target and through the artifact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import qcompile
from qcompile.errors import Refused
from qcompile.formats import LayerScheme, parse_scheme
from qcompile.graph import parse_graph, print_graph, tensor_digest
from qcompile.probe import probe_digests
from qcompile.recipe import Recipe, Schemes
from qcompile.registry import find_target

ROWS = 7
# scheme, solver -> stored bits of a weight of the second layer, and the kernel's name on the CPU
CASES = {
    "nf4 in groups": ("nf4", "nearest", 4 + 32 / 128, "linear_float32_codebook4_256x64"),
    "nf4 in small groups, gptq": ("nf4-g32", "gptq", 4 + 32 / 32, "linear_float32_codebook4_256x64"),
    "learned table": ("codebook4", "kmeans", 4 + 32 / 256 + 128 / 16384, "linear_float32_codebook4_256x64"),
    "learned table, codes by token": ("codebook4-a8-dynamic", "kmeans", 4 + 32 / 256 + 128 / 16384, "linear_int8_codebook4_256x64"),
    "three bits, static codes": ("codebook3-a8", "kmeans", 3 + 32 / 256 + 64 / 16384, "linear_uint8_codebook4_256x64"),
    "the format's own bytes": ("codebook4-a8-g64-dynamic", "mse", 4 + 32 / 64, "linear_int8_codebook4_256x64"),
    "tables of rows": ("codebook4", "kmeans, table_rows=2", 4 + 32 / 256 + 32 * 128 / 16384, "linear_float32_tables_256x64"),
    "tables of rows, codes": ("codebook4-a8", "kmeans, table_rows=2", 4 + 32 / 256 + 32 * 128 / 16384, "linear_uint8_tables_256x64"),
    "tables of rows in groups, codes": ("codebook2-a8-g64", "kmeans, table_rows=2", 2 + 0.5 + 32 * 32 / 16384, "linear_uint8_w8_256x64"),
    "tables of rows in small groups": ("codebook2-g64", "kmeans, table_rows=2", 2 + 0.5 + 32 * 32 / 16384, "linear_float32_w8_256x64"),
    "ternary": ("ternary", "mse", 8 * 52 / 256 + 32 / 256, "linear_float32_w2_256x64"),
    "pyramid": ("weight=pvq8k6g3 channel=0 sym; activation=float", "pvq", 18 / 8 + 32 / 256, "linear_float32_w8_256x64"),
    "pyramid in groups, a short run": (
        "weight=pvq12k9g3 group=64 sym; activation=float",
        "pvq",
        8 * 75 / 256 + 32 / 64,
        "linear_float32_w8_256x64",
    ),
    "pyramid, codes": (
        "weight=pvq8k6g3 channel=0 sym; activation=int8 token sym dynamic",
        "pvq",
        18 / 8 + 32 / 256,
        "linear_int8_w8_256x64",
    ),
    "ternary, codes": ("ternary-a8-dynamic", "mse", 8 * 52 / 256 + 32 / 256, "linear_int8_ternary_256x64"),
}


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(80, 256), nn.GELU(), nn.Linear(256, 64), nn.ReLU()).eval()


def _compile(scheme: str, solver: str) -> qcompile.Artifact:
    passes = ["canonicalize", "assign-bits", "insert-quantizers", f"quantize-weights{{solver={solver}}}", "materialize", "fuse-epilogue"]
    recipe = Recipe(name="test", pipeline=passes, schemes=Schemes(linear=scheme))
    batches = [(torch.randn(64, 80),) for _ in range(6)]
    shapes = [{0: "batch"}]
    return qcompile.compile(_model(), (torch.randn(ROWS, 80),), recipe=recipe, target="cpu", calibration=batches, dynamic_shapes=shapes)


@pytest.mark.parametrize("name", CASES)
def test_every_target_gives_what_the_reference_gives(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes agree exactly up to GELU and float sums; the bound is a rounding of the largest output for each of k + 44 terms."""
    monkeypatch.setattr("qcompile.backends.cpu.legalize_layers._TERNARY_CODES", 0)
    scheme, solver, bits, kernel = CASES[name]
    artifact = _compile(scheme, solver)
    artifact.save(tmp_path / "model.qc")
    x = torch.randn(ROWS, 80)
    outputs = {target: qcompile.load(tmp_path / "model.qc", target=target)(x) for target in ("reference", "cpu", "onnx")}
    bound = 300 * 2.0**-24 * float(outputs["reference"].abs().max())
    if "a8" in scheme or "int8" in scheme:  # a code on the other side of a tie, after GELU: a step of the next layer's input
        bound = 0.02 * float(outputs["reference"].abs().max())
    for target in ("cpu", "onnx"):
        assert float((outputs[target] - outputs["reference"]).abs().max()) <= bound, target
    layer = artifact.report["layers"][1]
    assert layer["bits_per_weight"] == pytest.approx(bits, abs=1e-4)
    for target in map(find_target, ("cpu", "onnx") if "a8" in scheme or "int8" in scheme else ()):
        digests = probe_digests(artifact.graph, lambda graph, inputs, target=target: target.build(graph)(inputs))
        assert digests == artifact.report["probes"]
    calls = qcompile.load(tmp_path / "model.qc").executable.built.kernel_calls(x)
    assert any(called.startswith(kernel) for called, _ in calls), calls


def test_text_holds_tables_before_and_after_materializing() -> None:
    graph = _compile("codebook4", "kmeans, table_rows=2").graph
    text = print_graph(graph)
    assert "weight_table=%" in text
    constants = {tensor_digest(t)[:16]: t for t in graph.constants.values()}
    assert print_graph(parse_graph(text, constants)) == text


def _damage(artifact: qcompile.Artifact, ending: str, change, path: Path) -> None:
    """Save the artifact with one constant changed, all digests right."""
    name = next(name for name in artifact.graph.constants if name.endswith(ending))
    value = artifact.graph.constants[name].clone()
    change(value)
    parent, _, leaf = name.rpartition(".")
    artifact.graph.module.get_submodule(parent).register_buffer(leaf, value)
    artifact.save(path)


def test_an_artifact_with_a_damaged_table_is_refused(tmp_path: Path) -> None:
    artifact = _compile("codebook4", "kmeans")
    _damage(artifact, "_table", lambda t: t[0, 3:5].copy_(torch.tensor([9, -9])), tmp_path / "model.qc")
    with pytest.raises(Refused, match="the levels of a table do not ascend"):
        qcompile.load(tmp_path / "model.qc")


def test_an_artifact_with_damaged_ternary_bytes_is_refused(tmp_path: Path) -> None:
    artifact = _compile("ternary", "mse")
    _damage(artifact, "_codes", lambda t: t[2, 3].fill_(243), tmp_path / "model.qc")
    with pytest.raises(Refused, match="below 243"):
        qcompile.load(tmp_path / "model.qc")


@pytest.mark.parametrize(
    ("operator", "weight", "activation", "reason"),
    [
        ("qc.linear", "nf4 group=128 sym", "int8 token sym dynamic", "no kernel for qc.linear"),
        ("qc.linear", "int8 channel=0 sym", "nf4 token sym dynamic", "rounds activations to integers, not to nf4"),
        ("qc.conv2d", "codebook4 channel=0 sym", "uint8 tensor affine", "no kernel for qc.conv2d"),
    ],
)
def test_what_the_cpu_has_no_kernel_for_is_refused(operator: str, weight: str, activation: str, reason: str) -> None:
    assert reason in str(find_target("cpu").supports(operator, LayerScheme(parse_scheme(weight), parse_scheme(activation))))
    assert find_target("cpu").supports("qc.linear", LayerScheme(parse_scheme("codebook4 group=64 sym"), None)) is None


@pytest.mark.parametrize("granularity", ["channel=0", "tensor"])
def test_an_embedding_of_pyramids_gathers_rows_of_points(granularity: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 37), nn.Linear(37, 8)).eval()
    passes = ["canonicalize", "assign-bits", "insert-quantizers", "quantize-weights{solver=pvq}", "materialize", "fuse-epilogue"]
    scheme = f"weight=pvq8k6g3 {granularity} sym; activation=float"
    recipe = Recipe(name="test", pipeline=passes, schemes=Schemes(linear=scheme, embedding=scheme), needs_data=False)
    places = torch.tensor([[0, 49, 7], [1, 3, 3]])
    artifact = qcompile.compile(model, (places,), recipe=recipe, target="cpu")
    assert [layer["op"] for layer in artifact.report["layers"]] == ["qc.embedding", "qc.linear"]
    scales = 32 / (37 if granularity == "channel=0" else 50 * 37)
    assert artifact.report["layers"][0]["bits_per_weight"] == pytest.approx(8 * 12 / 37 + scales, abs=1e-4)
    expected = find_target("reference").build(artifact.graph)([places])[0]
    torch.testing.assert_close(artifact(places), expected, rtol=1e-6, atol=1e-6)


def test_a_head_that_shares_its_weight_with_the_embedding_counts_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner = nn.Embedding(50, 48), nn.Linear(48, 48, bias=False)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.inner(self.table(tokens)), self.table.weight)

    torch.manual_seed(0)
    table, passes = "weight=int8 channel=0 sym; activation=float", ["assign-bits", "insert-quantizers", "quantize-weights", "materialize"]
    schemes = Schemes(linear=table, embedding=table, layers={"inner*": "weight=int4 channel=0 sym; activation=float"})
    recipe = Recipe(name="test", pipeline=passes, schemes=schemes, needs_data=False)
    artifact = qcompile.compile(Tied().eval(), (torch.tensor([[1, 2]]),), recipe=recipe, target="reference")
    bits = 50 * (48 * 8 + 32) + 48 * (48 * 4 + 32)
    assert artifact.report["bits_per_weight"] == pytest.approx(bits / (98 * 48), abs=1e-4)
    assert artifact.report["bytes"] == bits / 8


def test_solvers_of_single_codes_leave_pyramids_to_least_squared_error() -> None:
    artifact = _compile("weight=pvq8k6g3 channel=0 sym; activation=float", "gptq")
    assert [text for _, text in artifact.report["notes"] if "not by gptq: that is not for pvq8k6g3" in text]
