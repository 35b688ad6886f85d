"""``qcompile bench``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from qcompile.cli.main import as_json, print_json, threads_option, trust_option
from qcompile.errors import Refused

SETTLE = 2  # calls after switching from another runtime that are not timed: its threads may still spin


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--against",
    default="",
    metavar="LIST",
    help="torch, onnxruntime, onnxruntime-int8, onnxruntime-static-int8, openvino, qcompile-float; joined by commas.",
)
@click.option("--model", metavar="MODEL", help="The float model [the one this file was compiled from on this machine].")
@click.option("--shape", metavar="SIZES", default="", help="Sizes of the symbols, such as batch=1,seq=128 [the golden inputs' sizes].")
@click.option("--rounds", type=click.IntRange(1, 10000), default=15, show_default=True, help="How often each runtime gets its turn.")
@click.option("--calls", type=click.IntRange(1, 10000), default=5, show_default=True, help="Timed calls a turn.")
@threads_option()
@trust_option()
@as_json()
def bench(
    artifact: Path,
    against: str,
    model: str | None,
    shape: str,
    rounds: int,
    calls: int,
    threads: int | None,
    trust_code: bool,
    json_: bool,
) -> None:
    """Time ARTIFACT and other runtimes on the same inputs, in turns; medians and ratios."""
    import os

    from qcompile.artifact import load
    from qcompile.capture.examples import resize_examples
    from qcompile.peers import make_peer

    threads = threads or len(os.sched_getaffinity(0))
    compiled = load(artifact, threads=threads, trust_code=trust_code)
    inputs = resize_examples(compiled.graph, compiled.golden_inputs, shape)
    contenders: dict[str, Callable[[Sequence[Any]], Any]] = {"qcompile": compiled.executable}
    names = [name.strip() for name in against.split(",") if name.strip()]
    if names:
        graph = _float_graph(artifact, model)
        contenders |= {name: make_peer(name, graph, inputs, threads) for name in names}
    times = measure(contenders, inputs, rounds, calls)
    runs: list[dict[str, Any]] = [{"name": name, **_summary(spent), "threads": threads} for name, spent in times.items()]
    mine = runs[0]["median_ms"]
    speedup = {run["name"]: round(run["median_ms"] / mine, 3) for run in runs[1:]}
    if json_:
        return print_json(
            {
                "runs": runs,
                "speedup": speedup,
                "inputs": {n.name: list(t.shape) for n, t in zip(compiled.graph.inputs, inputs, strict=True)},
            }
        )
    for run in runs:
        ratio = f"   qcompile is {speedup[run['name']]:.2f} times as fast" if run["name"] in speedup else ""
        click.echo(f"{run['name']:24} median {run['median_ms']:9.3f} ms   min {run['min_ms']:9.3f}   p90 {run['p90_ms']:9.3f}{ratio}")
    return None


def _float_graph(artifact: Path, model: str | None) -> Any:
    from qcompile.capture import capture
    from qcompile.source_notes import find_source

    model = model or find_source(artifact)
    if model is None:
        raise Refused("the float model is not known on this machine", node=str(artifact), way_out="give --model MODEL")
    return capture(model).graph


def measure(
    contenders: dict[str, Callable[[Sequence[Any]], Any]], inputs: Sequence[Any], rounds: int, calls: int
) -> dict[str, list[float]]:
    """Return milliseconds of every timed call, contenders taking turns so that drift of the machine meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run(inputs)
    for _ in range(rounds):
        for name, run in contenders.items():
            for call in range(SETTLE + calls):
                start = time.perf_counter()
                run(inputs)
                if call >= SETTLE:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _summary(spent: list[float]) -> dict[str, float]:
    ordered = sorted(spent)
    return {
        "median_ms": round(statistics.median(ordered), 4),
        "min_ms": round(ordered[0], 4),
        "p90_ms": round(ordered[int(0.9 * (len(ordered) - 1))], 4),
    }
