"""``qcompile export``."""

from __future__ import annotations

from pathlib import Path

import click

from qcompile.cli.main import as_json, print_json


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--format", "format_", type=click.Choice(["onnx"]), default="onnx", show_default=True)
@click.option(
    "--form",
    type=click.Choice(["qdq", "integer"]),
    default="qdq",
    show_default=True,
    help="qdq: float operators on DequantizeLinear; integer: MatMulInteger and ConvInteger, codes equal to the reference's.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="The file to write [ARTIFACT's name with the format's ending]."
)
@as_json()
def export(artifact: Path, format_: str, form: str, output: Path | None, json_: bool) -> None:
    """Write ARTIFACT as an ONNX model that ONNX Runtime runs."""
    from qcompile.artifact import load
    from qcompile.files import write_atomic
    from qcompile.registry import find_target

    output = output or artifact.with_suffix(f".{format_}")
    options = {} if form == "qdq" else {"form": form}  # targets of other formats know no forms
    data = find_target(format_).export(load(artifact, target="reference").graph, **options)
    write_atomic(output, data)
    if json_:
        return print_json({"file": str(output), "format": format_, "bytes": len(data)})
    return click.echo(f"{output}: {len(data)} bytes")
