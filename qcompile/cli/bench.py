"""``qcompile bench``."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcompile.cli.main import as_json, print_json, threads_option, trust_option
from qcompile.errors import Refused

if TYPE_CHECKING:
    from qcompile.target import Limits, OperatorTime

SETTLE = 2  # calls at the start of a turn that are not timed: they wake the runtime's own threads
REST_SECONDS, REST_SHARE, LONGEST_REST = 0.01, 0.1, 1.0  # see ``_rest``
LONGEST_NAME = 48  # columns for the name of a kernel

Run = Callable[[Sequence[Any]], Any]


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--against",
    default="",
    metavar="LIST",
    help="torch, torch-compile, onnxruntime, onnxruntime-int8, onnxruntime-static-int8, onnxruntime-int4, openvino, openvino-int8, "
    "openvino-qdq, qcompile-float; joined by commas.",
)
@click.option("--model", metavar="MODEL", help="The float model [the one this file was compiled from on this machine].")
@click.option("--shape", metavar="SIZES", default="", help="Sizes of the symbols, such as batch=1,seq=128 [the golden inputs' sizes].")
@click.option("--rounds", type=click.IntRange(1, 10000), default=15, show_default=True, help="How often each runtime gets its turn.")
@click.option("--calls", type=click.IntRange(1, 10000), default=5, show_default=True, help="Timed calls a turn.")
@click.option("--operators", is_flag=True, help="Also time every kernel and compare it with what this machine can do, measured.")
@click.option("--memory", is_flag=True, help="Also measure the peak memory of a process of its own for each runtime.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a picture of the times, .png or .svg.")
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
    operators: bool,
    memory: bool,
    plot: Path | None,
    threads: int | None,
    trust_code: bool,
    json_: bool,
) -> None:
    """Time ARTIFACT and other runtimes on the same inputs, in turns; medians and ratios."""
    import os

    from qcompile.artifact import load
    from qcompile.capture.examples import resize_examples
    from qcompile.peers import Contender, make_peer
    from qcompile.registry import find_target

    threads = threads or len(os.sched_getaffinity(0))
    compiled = load(artifact, threads=threads, trust_code=trust_code)
    inputs = resize_examples(compiled.graph, compiled.golden_inputs, shape)
    contenders = {"qcompile": Contender(compiled.executable, artifact)}
    names = [name.strip() for name in against.split(",") if name.strip()]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if names:
            graph = _float_graph(artifact, model)
            contenders |= {name: make_peer(name, graph, inputs, threads, folder) for name in names}
        times = measure({name: contender.run for name, contender in contenders.items()}, inputs, rounds, calls)
        runs: list[dict[str, Any]] = [{"name": name, **_summary(spent), "threads": threads} for name, spent in times.items()]
        if memory:
            _add_memory(runs, contenders, inputs, threads, folder)
    mine = runs[0]["median_ms"]
    speedup = {run["name"]: round(run["median_ms"] / mine, 3) for run in runs[1:]}
    limits, rows = None, None
    if operators and hasattr(compiled.executable, "operator_times"):
        rows, limits = compiled.executable.operator_times(inputs), find_target(compiled.target).limits(threads)
    if plot is not None:
        from qcompile.cli.bench_plot import plot_runs

        plot_runs(runs, plot, f"{artifact.name} {shape}".strip())
    if json_:
        return print_json(
            {
                "runs": runs,
                "speedup": speedup,
                "inputs": {n.name: list(t.shape) for n, t in zip(compiled.graph.inputs, inputs, strict=True)},
                "limits": asdict(limits) if limits else None,
                "operators": [operator_row(row, rows, limits) for row in rows] if rows is not None else None,
            }
        )
    for line in _run_lines(runs, speedup):
        click.echo(line)
    if rows is not None:
        for line in _operator_lines(rows, limits, mine):
            click.echo(line)
    elif operators:
        click.echo(f"target {compiled.target} has no kernels to time")
    return None


def _float_graph(artifact: Path, model: str | None) -> Any:
    from qcompile.capture import capture
    from qcompile.source_notes import find_source

    model = model or find_source(artifact)
    if model is None:
        raise Refused("the float model is not known on this machine", node=str(artifact), way_out="give --model MODEL")
    return capture(model).graph


def measure(contenders: Mapping[str, Run], inputs: Sequence[Any], rounds: int, calls: int) -> dict[str, list[float]]:
    """Return milliseconds of every timed call, contenders taking turns so that drift of the machine meets all alike.

    A turn begins when the process rests: threads that spin after the call before would be counted against whoever comes next.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run(inputs)
    for _ in range(rounds):
        for name, run in contenders.items():
            _rest()
            for call in range(SETTLE + calls):
                start = time.perf_counter()
                run(inputs)
                if call >= SETTLE:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _rest() -> None:
    """Wait until no thread of this process works or spins: all use less than a tenth of a processor for 10 ms. At most a second."""
    stop = time.perf_counter() + LONGEST_REST
    used, share = time.process_time(), 1.0
    while share > REST_SHARE and time.perf_counter() < stop:
        time.sleep(REST_SECONDS)
        before, used = used, time.process_time()
        share = (used - before) / REST_SECONDS


def _summary(spent: list[float]) -> dict[str, float]:
    ordered = sorted(spent)
    return {
        "median_ms": round(statistics.median(ordered), 4),
        "min_ms": round(ordered[0], 4),
        "p90_ms": round(ordered[math.ceil(0.9 * (len(ordered) - 1))], 4),
    }


def _add_memory(runs: list[dict[str, Any]], contenders: Mapping[str, Any], inputs: Sequence[Any], threads: int, folder: Path) -> None:
    import numpy as np

    from qcompile.peers.memory import peak_memory

    arrays = {f"input{i:03}": value.numpy() for i, value in enumerate(inputs)}
    np.savez(folder / "inputs.npz", **arrays)
    for run in runs:
        path = contenders[run["name"]].path
        run["peak_memory_bytes"] = peak_memory(run["name"], path, threads, folder / "inputs.npz") if path else None


# ---- tables ---------------------------------------------------------------------------------------------------------------


def operator_row(row: OperatorTime, rows: Sequence[OperatorTime], limits: Limits | None) -> dict[str, Any]:
    """Return a kernel's time, its share of all, its rates, and the percentage of the limit that is nearer: arithmetic or memory.

    Bytes that lie in a cache come faster than memory gives them: such a kernel may stand above 100 % of that limit.
    """
    seconds = row.milliseconds / 1e3
    gops = row.operations / seconds / 1e9 if row.operations is not None and seconds else None
    gb_per_s = row.bytes / seconds / 1e9 if row.bytes and seconds else None
    share = row.milliseconds / (sum(other.milliseconds for other in rows) or 1)
    found: dict[str, Any] = {**asdict(row), "share": share, "gops": gops, "gb_per_s": gb_per_s, "percent_of_limit": None, "limit": None}
    if limits is not None:
        peak = limits.integer_gops if row.integer else limits.float32_gflops
        near = {"memory": (gb_per_s or 0) / limits.read_gb_per_s, "arithmetic": gops / peak if gops and peak else 0.0}
        limit = max(near, key=near.__getitem__)
        if near[limit]:
            found |= {"percent_of_limit": 100 * near[limit], "limit": limit}
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}


def _run_lines(runs: Sequence[dict[str, Any]], speedup: Mapping[str, float]) -> list[str]:
    lines = []
    for run in runs:
        ratio = f"   qcompile is {speedup[run['name']]:.2f} times as fast" if run["name"] in speedup else ""
        memory = f"   peak {run['peak_memory_bytes'] / 1e6:6.0f} MB" if run.get("peak_memory_bytes") else ""
        lines.append(
            f"{run['name']:24} median {run['median_ms']:9.3f} ms   min {run['min_ms']:9.3f}   p90 {run['p90_ms']:9.3f}{memory}{ratio}"
        )
    return lines


def _operator_lines(rows: Sequence[OperatorTime], limits: Limits | None, median: float) -> list[str]:
    lines = [""]
    if limits:
        int8 = f", {limits.int8_gops:.0f} GOPS int8" if limits.int8_gops else ""
        int8 += f", {limits.tile_gops:.0f} in tiles" if limits.tile_gops else ""
        floats = f"{limits.float32_gflops:.0f} GFLOPS float32"
        lines.append(f"This machine, {limits.threads} threads: reads {limits.read_gb_per_s:.1f} GB/s, {floats}{int8}")
    lines.append(f"{'kernel':{LONGEST_NAME}} {'calls':>5} {'ms':>8} {'share':>6} {'GOPS':>7} {'GB/s':>6}  of limit")
    for row in rows:
        found = operator_row(row, rows, limits)
        gops = f"{found['gops']:7.0f}" if found["gops"] is not None else " " * 7
        read = f"{found['gb_per_s']:6.1f}" if found["gb_per_s"] is not None else " " * 6
        limit = f"{found['percent_of_limit']:5.0f} % {found['limit']}" if found["limit"] else ""
        head = f"{row.kernel[:LONGEST_NAME]:{LONGEST_NAME}} {row.calls:5} {row.milliseconds:8.3f} {100 * found['share']:5.1f}%"
        lines.append(f"{head} {gops} {read}  {limit}".rstrip())
    lines += _total_lines(rows, limits, median)
    return lines


def _total_lines(rows: Sequence[OperatorTime], limits: Limits | None, median: float) -> list[str]:
    """Return the whole model's arithmetic over the median of its calls."""
    total = sum(row.operations or 0 for row in rows)
    integer = sum(row.operations or 0 for row in rows if row.integer)
    percent = ""
    if limits and limits.integer_gops:
        ideal = (integer / limits.integer_gops + (total - integer) / limits.float32_gflops) / 1e6  # milliseconds
        percent = f", {100 * ideal / median:.0f} % of the arithmetic limit"
    return [f"{total / 1e9:.3f} billion operations in {median:.3f} ms: {total / median / 1e6:.0f} GOPS{percent}"] if total else []
