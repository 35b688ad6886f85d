"""Commands that list what exists, printed from the declarations."""

from __future__ import annotations

import inspect as python_inspect
from typing import Any

import click

from qcompile.cli.main import as_json, print_json


def _show(rows: list[dict[str, Any]], json_: bool) -> None:
    if json_:
        return print_json(rows)
    width = max((len(str(row["name"])) for row in rows), default=0)
    for row in rows:
        click.echo(f"{row['name']!s:{width}}  {row['summary']}")
    return None


def _first_line(item: Any) -> str:
    return (python_inspect.getdoc(item) or "").split("\n")[0]


@click.command()
@as_json()
def passes(json_: bool) -> None:
    """List the passes with stage, promise and options."""
    import dataclasses

    from qcompile.registry import find_pass, names

    rows = []
    for name in names("pass"):
        kind = find_pass(name)
        options = {f.name: f.default for f in dataclasses.fields(kind) if f.name != "options"}
        gives = kind.gives or kind.stage
        rows.append(
            {
                "name": name,
                "summary": _first_line(kind),
                "stage": kind.stage.value,
                "gives": gives.value,
                "keeps": str(kind.keeps),
                "options": options,
            }
        )
    _show(rows, json_)


@click.command()
@as_json()
def recipes(json_: bool) -> None:
    """List the recipes that ship."""
    from qcompile.recipe import load_recipe, recipe_names

    found = [load_recipe(name) for name in recipe_names()]
    _show(
        [
            {"name": r.name, "summary": r.summary, "pipeline": r.pipeline, "needs_data": r.needs_data, "schemes": r.schemes.model_dump()}
            for r in found
        ],
        json_,
    )


@click.command()
@as_json()
def targets(json_: bool) -> None:
    """List the targets and the kernels each has."""
    import dataclasses

    from qcompile.registry import find_target, names

    found = [find_target(name) for name in names("target")]
    _show([{"name": t.name, "summary": t.summary, "kernels": [dataclasses.asdict(k) for k in t.kernels]} for t in found], json_)
    if not json_:
        for target in found:
            for kernel in target.kernels:
                bits = ",".join(map(str, kernel.weight_bits))
                weight = f"{'/'.join(kernel.formats)} weight bits {bits} by {'/'.join(kernel.weight_granularity)}"
                click.echo(f"  {target.name}: {kernel.operator} {weight}, {kernel.activation} activations")


@click.command()
@as_json()
def formats(json_: bool) -> None:
    """List the element formats."""
    from qcompile.formats import BFloat16, Codebook, Format, Integer, NormalFloat, Pyramid, Ternary

    rows = []
    for signed in (True, False):
        for bits in range(1, 9):
            format = Integer(bits, signed)
            rows.append(
                {
                    "name": format.name,
                    "summary": f"{bits}-bit {'signed' if signed else 'unsigned'} integer, {format.lowest:g} to {format.highest:g}",
                    "bits": bits,
                    "lowest": format.lowest,
                    "highest": format.highest,
                }
            )
    others: list[tuple[Format, str]] = [(Ternary(), "-1, 0 and 1, five in a byte")]
    others += [(NormalFloat(bits), f"NormalFloat: {2**bits} quantiles of the normal distribution, -1 to 1") for bits in (2, 3, 4)]
    others += [
        (Codebook(bits), f"{2**bits} levels of one byte, those of a table that the weight brings or of NormalFloat")
        for bits in (1, 2, 3, 4)
    ]
    others.append((Pyramid(8, 6, 3), "runs of 8 weights: integer points of 6 pulses times a gain of 3 bits; other numbers likewise"))
    others.append((BFloat16(), "upper half of a float32, without a scale; denormal numbers count as zero"))
    rows += [
        {"name": format.name, "summary": summary, "bits": format.bits, "lowest": format.lowest, "highest": format.highest}
        for format, summary in others
    ]
    _show(rows, json_)


@click.command()
@as_json()
def solvers(json_: bool) -> None:
    """List the solvers of quantize-weights: the statistics each takes, and its options."""
    import sys

    from qcompile.registry import find_solver, names, solver_options

    rows = []
    for name in names("solver"):
        module = sys.modules[find_solver(name).__module__]
        rows.append(
            {
                "name": name,
                "summary": _first_line(module),
                "needs": list(getattr(module, "NEEDS", ())),
                "uses": list(getattr(module, "USES", ())),
                "options": {key: parameter.default for key, parameter in solver_options(name).items()},
            }
        )
    _show(rows, json_)


@click.command()
@as_json()
def methods(json_: bool) -> None:
    """List the published methods: piece, whether it works here, and the command that shows it."""
    from qcompile.methods import read_methods

    rows = [
        {
            "name": m.name,
            "summary": f"{m.status:8} piece {m.piece}  {m.command}".rstrip(),
            "number": m.number,
            "piece": m.piece,
            "status": m.status,
            "command": m.command,
        }
        for m in read_methods()
    ]
    _show(rows, json_)
