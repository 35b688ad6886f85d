"""Which instruction set is used, and what happens to code on a processor that lacks its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import tvm
from qcompile.backends.cpu.build import build
from qcompile.backends.cpu.executable import Executable
from qcompile.backends.cpu.interface import INTERFACE
from qcompile.backends.cpu.kernels import isa as instruction_sets
from qcompile.backends.cpu.kernels.matmul_spec import Linear

from qcompile.capture.torch_export import capture_module
from qcompile.errors import Refused


def test_each_set_holds_a_register_block_of_rows() -> None:
    for name, found in instruction_sets.SETS.items():
        for integer in (True, False):
            rows = found.block_rows(1, integer)
            assert rows >= 4, name
            assert (rows + 1) * found.parts < found.registers, name


@pytest.mark.parametrize(
    ("mcpu", "name"),
    [
        ("sapphirerapids", "amx"),
        ("znver4", "avx512bf16"),
        ("rocketlake", "avx512vnni"),
        ("skylake-avx512", "avx512"),
        ("alderlake", "avxvnni"),
        ("haswell", "avx2"),
        ("nehalem", "portable"),
    ],
)
def test_the_best_set_of_a_processor(mcpu: str, name: str) -> None:
    if instruction_sets.machine() != "x86_64":
        pytest.skip("the processors of this test are of x86-64")
    assert instruction_sets.detect(mcpu) == name


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    best = instruction_sets.detect()
    assert not instruction_sets.cannot_run(best)
    monkeypatch.setenv(instruction_sets.CHOICE, instruction_sets.PORTABLE)
    assert instruction_sets.detect() == instruction_sets.PORTABLE
    assert Linear(8, 8).isa == instruction_sets.PORTABLE
    monkeypatch.setenv(instruction_sets.CHOICE, "mmx")
    with pytest.raises(Refused, match="no known instruction set"):
        instruction_sets.detect()
    foreign = instruction_sets.NEON if instruction_sets.machine() == "x86_64" else instruction_sets.AVX2
    monkeypatch.setenv(instruction_sets.CHOICE, foreign)
    with pytest.raises(Refused, match="this machine is"):
        instruction_sets.detect()


@pytest.fixture
def half_hidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[frozenset[str]]:
    """Let the operating system tell of a processor with AVX2 and no more, whatever its model; yield its LLVM features."""
    if instruction_sets.machine() != "x86_64":
        pytest.skip("the flags of this test are of x86-64")
    cached = (
        instruction_sets._best_here,
        instruction_sets.features_here,
    )
    features = frozenset(instruction_sets.required_features(instruction_sets.target_description(isa=instruction_sets.AVX2)))
    flags = frozenset(instruction_sets.FLAGS["x86_64"][name] for name in features)
    monkeypatch.setattr(instruction_sets, "_system_flags", lambda: flags)
    for function in cached:
        function.cache_clear()
    yield features
    for function in cached:
        function.cache_clear()


def test_a_virtual_machine_may_hide_what_the_model_has(half_hidden: frozenset[str]) -> None:
    if not instruction_sets.features_of({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()}) >= {"avx2", "fma"}:
        pytest.skip("this processor's model has no AVX2 to begin with")
    assert instruction_sets.detect() == instruction_sets.AVX2
    assert half_hidden.issuperset(instruction_sets.required_features(instruction_sets.target_description()))
    assert instruction_sets.missing_features(["avx2", "avx512f"]) == ["avx512f"]


@pytest.fixture(scope="module")
def executable() -> Executable:
    """Return a built float layer."""
    torch.manual_seed(0)
    graph = capture_module(torch.nn.Linear(48, 33), (torch.randn(4, 48),))
    return build(graph.module, threads=1)


def test_chosen_code_says_what_it_needs_and_computes_the_same(executable: Executable, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(instruction_sets.SETS[instruction_sets.detect()].features) <= set(executable.interface.features)
    monkeypatch.setenv(instruction_sets.CHOICE, instruction_sets.PORTABLE)
    torch.manual_seed(0)
    plain = build(capture_module(torch.nn.Linear(48, 33), (torch.randn(4, 48),)).module, threads=1)
    assert not {"avx2", "fma", "dotprod"} & set(plain.interface.features)
    x = torch.randn(4, 48)
    assert torch.allclose(plain(x)[0], executable(x)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"features": ["amx-int8", "sve9"]}, "uses .*sve9, which this processor lacks"), ({"machine": "s390x"}, "is for s390x")],
)
def test_code_for_another_processor_is_refused(executable: Executable, tmp_path: Path, change: dict[str, object], message: str) -> None:
    executable.save(tmp_path / "code")
    place = tmp_path / "code" / INTERFACE
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    with pytest.raises(Refused, match=message):
        Executable.load(tmp_path / "code")
