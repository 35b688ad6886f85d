"""``qcompile inspect`` and ``qcompile diff``."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from pathlib import Path
from typing import Any

import click

from qcompile.cli.main import as_json, print_json, threads_option, trust_option

WIDTH = 170  # a line holds a layer's name and both schemes
COLUMNS = (("layer", 30), ("op", 12), ("weight", 18), ("activation", 19), ("bits", 5), ("SQNR dB", 7), ("ms", 6), ("reason", 20))


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--times/--no-times", default=True, help="Measure the time of every layer's kernel on the golden inputs.")
@click.option("--graph", "graph_", is_flag=True, help="Print the graph's text instead.")
@threads_option()
@trust_option()
@as_json()
def inspect(artifact: Path, times: bool, graph_: bool, threads: int | None, trust_code: bool, json_: bool) -> None:
    """Show for each layer of ARTIFACT its scheme, bits, error, time and the reason where it stayed float."""
    from qcompile.artifact import load
    from qcompile.graph import print_graph

    model = load(artifact, threads=threads, trust_code=trust_code)
    if graph_:
        return click.echo(print_graph(model.graph))
    measured = _layer_times(model) if times else {}
    layers = [
        {key: layer[key] for key in ("name", "op", "weight", "activation", "bits_per_weight", "sqnr_db", "reason")}
        | {"ms": measured.get(layer["node"])}
        for layer in model.report["layers"]
    ]
    if json_:
        return print_json(
            {
                "entries": _entries(model),
                "layers": layers,
                "float_ops": model.report["float_ops"],
                "bits_per_weight": model.report["bits_per_weight"],
                "bytes": artifact.stat().st_size,
                "weight_bytes": model.report["bytes"],
                "float_bytes": model.report["float_bytes"],
                "recipe": model.recipe,
                "pipeline": model.pipeline,
                "target": model.target,
                "notes": model.report["notes"],
                "warnings": model.report.get("warnings", []),  # artifacts of older versions have none
            }
        )
    return _print_layers(artifact, model, layers)


def _layer_times(model: Any) -> dict[str, float]:
    """Return milliseconds by node where the target can tell them apart."""
    layer_times = getattr(model.executable, "layer_times", None)
    return dict(layer_times(model.golden_inputs)) if layer_times else {}


def _entries(model: Any) -> list[dict[str, Any]]:
    """Return name, inputs and outputs of the graph and, for a decoder, of the entries that continue a text from caches."""
    from qcompile.errors import Refused
    from qcompile.generation.entries import decoder_entries, longest_text

    graphs = {"main": model.graph}
    with contextlib.suppress(Refused):  # no decoder
        made = decoder_entries(model.graph, longest_text(model.graph))
        graphs |= {"prefill": made.prefill, "decode": made.decode}
    return [
        {
            "name": name,
            "inputs": [{"name": n.name, "type": str(t)} for n, t in zip(graph.inputs, graph.input_types, strict=True)],
            "outputs": [{"name": n, "type": graph.type_text(o)} for n, o in zip(graph.output_names, graph.outputs, strict=True)],
        }
        for name, graph in graphs.items()
    ]


def _signature(values: list[dict[str, str]]) -> str:
    """Return names and types, neighbours of one type together: a decoder has caches for every layer."""
    found = []
    for kind, run in itertools.groupby(values, lambda value: value["type"]):
        names = [value["name"] for value in run]
        found += [f"{names[0]} .. {names[-1]} {kind}"] if len(names) > 2 else [f"{name} {kind}" for name in names]
    return ", ".join(found)


def _print_layers(artifact: Path, model: Any, layers: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(*(Column(name, no_wrap=True, min_width=width) for name, width in COLUMNS), box=None)
    for layer in layers:
        sqnr, ms = layer["sqnr_db"], layer["ms"]
        table.add_row(
            layer["name"],
            layer["op"],
            layer["weight"],
            layer["activation"],
            f"{layer['bits_per_weight']:.2f}",
            "" if sqnr is None else f"{sqnr:.1f}",
            "" if ms is None else f"{ms:.3f}",
            layer["reason"],
        )
    console = Console(width=max(WIDTH, shutil.get_terminal_size().columns))
    console.print(table)
    kinds = sorted({item["op"] for item in model.report["float_ops"]})
    console.print(f"{len(model.report['float_ops'])} float operators: {', '.join(kinds)}")
    for line in model.report.get("warnings", []):
        console.print(f"warning: {line}", markup=False)
    for node, text in model.report["notes"]:
        console.print(f"note: {node}: {text}", markup=False)
    for entry in _entries(model):
        inputs, outputs = (_signature(entry[side]) for side in ("inputs", "outputs"))
        console.print(f"entry {entry['name']}({inputs}) -> {outputs}", markup=False)
    console.print(
        f"{artifact}: {artifact.stat().st_size} bytes, {model.report['bits_per_weight']:.2f} bits per weight, "
        f"target {model.target}, pipeline: {model.pipeline}"
    )


@click.command()
@click.argument("left", type=click.Path(path_type=Path))
@click.argument("right", type=click.Path(path_type=Path))
@as_json()
def diff(left: Path, right: Path, json_: bool) -> None:
    """Compare the layers of two artifacts, and their outputs on the golden inputs of LEFT."""
    from qcompile.artifact import load
    from qcompile.pipeline import sqnr_db

    a, b = load(left, target="reference"), load(right, target="reference")
    rows = _differences(a.report["layers"], b.report["layers"])
    same_inputs = [str(t) for t in a.graph.input_types] == [str(t) for t in b.graph.input_types]
    quality = [sqnr_db(x, y) for x, y in zip(a.golden_outputs, b.graph(*a.golden_inputs), strict=False)] if same_inputs else []
    content = {
        "layers": rows,
        "outputs_sqnr_db": [None if q == float("inf") else round(q, 2) for q in quality],
        "bits_per_weight": [a.report["bits_per_weight"], b.report["bits_per_weight"]],
        "bytes": [left.stat().st_size, right.stat().st_size],
    }
    if json_:
        return print_json(content)
    for row in rows:
        click.echo(f"{row['name']}: {row['left']} -> {row['right']}")
    click.echo(
        f"{len(rows)} layers differ; bits per weight {a.report['bits_per_weight']} -> {b.report['bits_per_weight']}; "
        f"bytes {left.stat().st_size} -> {right.stat().st_size}"
    )
    for name, value in zip(a.graph.output_names, quality, strict=False):
        click.echo(f"{name}: " + ("equal bit for bit" if value == float("inf") else f"{value:.1f} dB"))
    return None


def _differences(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def words(layer: dict[str, Any] | None) -> str:
        return f"{layer['weight']} / {layer['activation']}" if layer else "absent"

    a, b = {layer["name"]: layer for layer in left}, {layer["name"]: layer for layer in right}
    names = list(dict.fromkeys([*a, *b]))
    return [{"name": n, "left": words(a.get(n)), "right": words(b.get(n))} for n in names if words(a.get(n)) != words(b.get(n))]
