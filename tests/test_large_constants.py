"""Constants that stay in files through a compile, and weights that are solved one by one: the same bytes as in memory, and nothing lost."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from qcompile.passes import quantize_weights

import qcompile
from qcompile import checkpoint
from qcompile.artifact import Artifact
from qcompile.compiler import Options, check_finite, finish, run_compile
from qcompile.formats import packing, parse_scheme
from qcompile.graph import Graph, file_tensor
from qcompile.graph.file_tensor import FileTensor
from qcompile.graph.graph import node_name
from qcompile.registry import find_solver
from qcompile.safetensors_file import Content, open_path

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64,
          torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]  # fmt: skip


@pytest.fixture
def in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every constant for a large one, and read and solve in small pieces."""
    for module in (file_tensor, checkpoint):
        monkeypatch.setattr(module, "LARGE", 1)
    monkeypatch.setattr(file_tensor, "CHUNK", 24)
    monkeypatch.setattr(file_tensor, "KEPT", 0)
    monkeypatch.setattr(packing, "_AT_ONCE", 16)
    monkeypatch.setattr(quantize_weights, "ROWS_AT_ONCE", 16)


def compiled(tiny: Any, output: Path | None, recipe: str, *, resume: bool = False) -> Artifact:
    module, examples, sizes = tiny.mlp()
    data = [(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)),)]
    options = Options(output=output, resume=resume)
    made = run_compile(
        module, examples, recipe=recipe, target="reference", calibration=data, dynamic_shapes=sizes, options=options
    ).artifact
    if output:
        finish(made, output)
    return made


def solving(solver: str) -> str:
    """Return a pipeline with this solver, groups of 4 so that there are several in a row."""
    first = "canonicalize, fold-constants, smooth, assign-bits{scheme=w4a8-g4-dynamic}, insert-quantizers"
    return f"{first}, quantize-weights{{solver={solver}}}, materialize, fuse-epilogue"


@pytest.mark.parametrize("solver", ["nearest", "mse", "gptq"])
@pytest.mark.usefixtures("in_files")
def test_a_compile_in_files_gives_the_bytes_of_one_in_memory(
    tiny: Any, tmp_path: Path, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lying = compiled(tiny, tmp_path / "model.qc", solving(solver))
    assert all(isinstance(value, FileTensor) for value in lying.graph.constants.values() if value.numel() > 64)
    assert any(isinstance(value, FileTensor) for value in lying.graph.constants.values())
    monkeypatch.undo()
    held = compiled(tiny, None, solving(solver))
    assert not any(isinstance(value, FileTensor) for value in held.graph.constants.values())
    assert held.digest() == lying.digest()
    assert list(tmp_path.iterdir()) == [tmp_path / "model.qc"]
    assert torch.equal(lying(*lying.golden_inputs), held(*held.golden_inputs))  # the checkpoints are gone, its constants are not


@pytest.mark.usefixtures("in_files")
def test_a_loaded_artifact_reads_its_constants_from_the_file(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.qc"
    made = compiled(tiny, path, solving("nearest"))
    loaded = qcompile.load(path)
    assert all(isinstance(value, FileTensor) for value in loaded.graph.constants.values())
    loaded.save(path)  # over the file that it reads
    path.rename(tmp_path / "elsewhere.qc")
    assert torch.equal(loaded(*loaded.golden_inputs), made(*made.golden_inputs))
    assert loaded.digest() == qcompile.load(tmp_path / "elsewhere.qc").digest()


class Killed(BaseException):
    pass


def killed_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the process, as far as a test can, when so many weights are solved."""
    save, saved = checkpoint.FinishedParts.save, []

    def counted(self: Any, name: str, *others: Any) -> None:
        save(self, name, *others)
        saved.append(name)
        if len(saved) == count:
            raise Killed

    monkeypatch.setattr(checkpoint.FinishedParts, "save", counted)


def solved_layers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    kind = quantize_weights._Solver
    install, found = kind.install, list[str]()

    def recorded(self: Any, graph: Graph, weight: Any, *others: Any) -> None:
        found.append(weight.name)
        install(self, graph, weight, *others)

    monkeypatch.setattr(kind, "install", recorded)
    return found


@pytest.mark.parametrize("solver", ["nearest", "gptq"])
@pytest.mark.parametrize("damage", ["", "line", "tensor"])
def test_a_killed_compile_loses_no_solved_weight(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solver: str, damage: str
) -> None:
    compiled(tiny, tmp_path / "whole.qc", solving(solver))
    output = tmp_path / "model.qc"
    with monkeypatch.context() as patch:
        killed_after(1, patch)
        with pytest.raises(Killed):
            compiled(tiny, output, solving(solver))
    (parts,) = (tmp_path / "model.qc.partial").glob("*.parts")
    if damage == "line":
        parts.write_text(parts.read_text()[:-9])
    elif damage == "tensor":
        for path in parts.parent.glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with monkeypatch.context() as patch:
        solved = solved_layers(patch)
        compiled(tiny, output, solving(solver), resume=True)
    assert len(solved) == (2 if damage else 1)
    assert output.read_bytes() == (tmp_path / "whole.qc").read_bytes()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["model.qc", "whole.qc"]


@pytest.mark.parametrize("solver", ["nearest", "mse", "gptq"])
@pytest.mark.parametrize("scheme", ["int4 group=4 sym", "uint3 channel=0 affine"])
def test_solvers_by_rows_treat_rows_apart(solver: str, scheme: str) -> None:
    weight = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    statistics = {"gram": x.T @ x / 40, "rows": torch.tensor(40)}
    solve = find_solver(solver)
    assert sys.modules[solve.__module__].BY_ROWS
    whole = solve(weight, statistics, parse_scheme(scheme))
    parts = [solve(weight[i : i + 4], statistics, parse_scheme(scheme)) for i in (0, 4, 8)]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
    assert torch.equal(whole.scale, torch.cat([part.scale for part in parts]))


@pytest.mark.parametrize("shape", [(7, 9), (3, 2, 5), (1, 40), (40,)], ids=str)
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_codes_are_packed_by_rows_as_at_once(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], bits: int) -> None:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    whole = packing.pack(codes, bits)
    monkeypatch.setattr(packing, "_AT_ONCE", 10)
    assert torch.equal(packing.pack(codes, bits), whole)
    assert torch.equal(packing.unpack(whole, bits, True, shape[-1]), codes)


def test_content_is_what_the_library_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_tensor, "CHUNK", 24)
    tensors = {f'{"ä" * i}"{dtype}': torch.ones(i, 3).to(dtype) for i in (2, 0, 4) for dtype in DTYPES} | {"single": torch.tensor(2.5)}
    expected = safetensors.torch.save(tensors)
    (tmp_path / "file").write_bytes(expected)
    for given in (tensors, open_path(tmp_path / "file")):
        assert b"".join(bytes(part) for part in Content(given).parts()) == expected
        assert len(Content(given)) == len(expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_in_a_file_that_is_not_finite_is_named(
    tiny_artifact: Callable[..., Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    monkeypatch.setattr(file_tensor, "CHUNK", 24)
    graph: Graph = tiny_artifact("mlp", "float").graph.copy()
    node = max((n for n in graph.nodes if n.op == "get_attr"), key=lambda n: graph.constant(n).numel())  # type: ignore[union-attr]
    damaged: Sequence[Any] = graph.constant(node).half()  # type: ignore[union-attr,assignment]
    damaged[-1, -1] = value  # type: ignore[index]
    safetensors.torch.save_file({"w": damaged}, tmp_path / "file")  # type: ignore[dict-item]
    graph.set_constant(node, open_path(tmp_path / "file", widen=True)["w"])
    with pytest.raises(qcompile.Refused, match=rf"{node_name(node)}: the weight holds"):
        check_finite(graph)
