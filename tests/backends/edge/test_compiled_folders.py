"""What compile writes, on the instruction sets it is for: codes of the reference bit for bit, memory as planned, nothing undefined."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from qcompile.backends.edge.boundary import in_memory
from qcompile.backends.edge.firmware.emulate import measure, run_inputs
from qcompile.backends.edge.lower import lower
from qcompile.backends.edge.processors import PROCESSORS
from torch import nn

import qcompile
from qcompile import Artifact
from qcompile.registry import find_target

pytestmark = pytest.mark.edge
BATCHES = 4
STACK_BYTES = 512  # registers and a few numbers: values lie in the arena
ROW_PADDING = 3  # bytes: rows of odd length are multiplied in whole words; what fills the last is read, times zero, and never written


class Residual(nn.Module):
    """Sizes that nothing divides: strides, a large depthwise kernel, a sum, ReLU6, a mean, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 3, 2, 1)
        self.depthwise = nn.Conv2d(7, 7, 5, 1, 2, groups=7)
        self.mix = nn.Conv2d(7, 7, 1)
        self.down = nn.Conv2d(7, 10, (3, 2), (1, 2), (0, 1))
        self.classifier = nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.stem(x))
        x = x + self.mix(F.relu(self.depthwise(x)))
        return self.classifier(F.relu(self.down(x)).mean((2, 3)))


class Blocks(nn.Module):
    """Channels in fours, as kernels with products in pairs want them; pooling and a hard swish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, 1, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, 2, 1, groups=8)
        self.mix = nn.Conv2d(8, 12, 1)
        self.classifier = nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.hardswish(self.stem(x)), 2)
        x = F.avg_pool2d(F.relu(self.mix(F.relu(self.depthwise(x)))), 2)
        return torch.softmax(self.classifier(x.mean((2, 3))), -1)


class Dense(nn.Module):
    """Linear layers with functions of one value between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(13, 32), nn.Linear(32, 9), nn.Linear(9, 13)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.sigmoid(self.second(torch.tanh(self.first(x)))))


class Shortcut(nn.Module):
    """A shortcut that drops every second pixel and adds channels of zeros: operators without kernels of their own, fused into one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))
        return F.relu(self.second(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))


NETS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (1, 3, 13, 11)),
    "blocks": (Blocks, (1, 1, 12, 14)),
    "dense": (Dense, (1, 13)),
    "shortcut": (Shortcut, (1, 1, 24, 24)),
}

Compiled = Callable[[str], Artifact]


@pytest.fixture(scope="module")
def compiled(_own_cache: None) -> Compiled:
    """Return the artifact of a net, made once; its graph is the same for every processor."""
    made: dict[str, Artifact] = {}

    def of(name: str) -> Artifact:
        if name not in made:
            kind, shape = NETS[name]
            torch.manual_seed(7)
            net = kind().eval()
            generator = torch.Generator().manual_seed(8)
            batches = [(torch.randn(shape, generator=generator),) for _ in range(8)]
            made[name] = qcompile.compile(net, batches[0], recipe="w8a8-edge", target="edge", calibration=batches)
        return made[name]

    return of


def write(artifact: Artifact, folder: Path, processor: str) -> dict[str, Any]:
    for tool in ("gcc", "make", *PROCESSORS[processor].tools):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed ('make edge-tools')")
    find_target(f"edge:{processor}").write_folder(artifact.graph, artifact.golden_inputs, folder)
    return json.loads((folder / "report.json").read_text())


def random_codes(artifact: Artifact) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
    """Return input codes over their whole range, the two extremes among them, and the output codes of the meaning."""
    program = lower(artifact.graph, frozenset())
    cases = []
    for number in range(BATCHES):
        case = []
        for port in program.inputs:
            limits = torch.iinfo(getattr(torch, port.dtype))
            shape = artifact.golden_inputs[len(case)].shape
            values = torch.randint(limits.min, limits.max + 1, shape, generator=torch.Generator().manual_seed(number))
            extreme = {0: limits.min, 1: limits.max}.get(number)
            case.append((values if extreme is None else torch.full_like(values, extreme)).to(getattr(torch, port.dtype)))
        cases.append(case)
    return cases, [list(program.graph(*case)) for case in cases]


def bytes_of(cases: list[list[torch.Tensor]]) -> bytes:
    return b"".join(np.ascontiguousarray(in_memory(value).numpy()).tobytes() for case in cases for value in case)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_every_processor(compiled: Compiled, tmp_path: Path, processor: str) -> None:
    """The net of odd sizes: golden inputs, arena, stack and sections are those of the report; then codes of the whole range."""
    artifact = compiled("residual")
    report = write(artifact, tmp_path, processor)
    found = measure(tmp_path, PROCESSORS[processor])
    assert (found.ok, found.mismatch) == (True, None)
    assert report["arena_bytes"] - ROW_PADDING <= (found.arena_high_water or 0) <= report["arena_bytes"]
    assert report["stack_bytes"] <= (found.stack_high_water or 0) <= report["stack_bytes"] + 128
    assert found.sizes
    assert (found.sizes.code, found.sizes.variables) == (report["code_bytes"], 0)
    assert report["flash_bytes"] == found.sizes.code + found.sizes.weights
    inputs, outputs = random_codes(artifact)
    assert run_inputs(tmp_path, PROCESSORS[processor], bytes_of(inputs)) == bytes_of(outputs)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("processor", ["cortex-m4", "cortex-m0+"])
def test_every_net(compiled: Compiled, tmp_path: Path, processor: str, name: str) -> None:
    report = write(compiled(name), tmp_path, processor)
    found = measure(tmp_path, PROCESSORS[processor])
    assert (found.ok, found.mismatch) == (True, None)
    assert report["stack_bytes"] <= STACK_BYTES
    padding = 0 if name in ("blocks", "shortcut") else ROW_PADDING
    assert report["arena_bytes"] - padding <= (found.arena_high_water or 0) <= report["arena_bytes"]
    inputs, outputs = random_codes(compiled(name))
    assert run_inputs(tmp_path, PROCESSORS[processor], bytes_of(inputs)) == bytes_of(outputs)


@pytest.mark.parametrize("name", NETS)
def test_sanitizers_have_nothing_to_say(compiled: Compiled, tmp_path: Path, name: str) -> None:
    write(compiled(name), tmp_path, "x86-64")
    assert measure(tmp_path, PROCESSORS["x86-64"], sanitize=True).ok
    inputs, outputs = random_codes(compiled(name))
    assert run_inputs(tmp_path, PROCESSORS["x86-64"], bytes_of(inputs), sanitize=True) == bytes_of(outputs)


def test_the_same_graph_gives_the_same_bytes(compiled: Compiled, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write(compiled("blocks"), tmp_path / folder, "cortex-m4")
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert files
    assert all((tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes() for path in files)
