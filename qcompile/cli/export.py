"""``qcompile export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qcompile.cli.main import as_json, print_json

_ENDINGS = {"onnx": ".onnx", "compressed-tensors": "", "gguf": ".gguf"}


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--format", "format_", type=click.Choice(list(_ENDINGS)), default="onnx", show_default=True)
@click.option(
    "--form",
    type=click.Choice(["qdq", "integer"]),
    default="qdq",
    show_default=True,
    help="onnx: qdq: float operators on DequantizeLinear; integer: MatMulInteger and ConvInteger, codes equal to the reference's.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The file, or folder, to write [ARTIFACT's name with the format's ending]."
)
@as_json()
def export(artifact: Path, format_: str, form: str, output: Path | None, json_: bool) -> None:
    """Write ARTIFACT for another tool: an ONNX model, or a language model with its codes as compressed-tensors folder or GGUF file."""
    from qcompile.artifact import load

    loaded = load(artifact, target="reference")
    output = output or artifact.with_suffix(_ENDINGS[format_])
    found: dict[str, Any]
    if format_ == "onnx":
        size, found = _export_onnx(loaded, form, output), {}
    else:
        size, found = _export_checkpoint(loaded, format_, output, str(artifact))
    if json_:
        return print_json({"file": str(output), "format": format_, "bytes": size, **found})
    click.echo(f"{output}: {size} bytes" + (f", {found['codes']} weights with their codes" if found else ""))
    for line in found.get("notes", []):
        click.echo(f"note: {line}", err=True)
    for name, reason in found.get("floats", {}).items():
        click.echo(f"as floats: {name}: {reason}", err=True)
    return None


def _export_onnx(loaded: Any, form: str, output: Path) -> int:
    from qcompile.files import write_atomic
    from qcompile.registry import find_target

    options = {} if form == "qdq" else {"form": form}  # targets of other formats know no forms
    data = find_target("onnx").export(loaded.graph, **options)
    write_atomic(output, data)
    return len(data)


def _export_checkpoint(loaded: Any, format_: str, output: Path, place: str) -> tuple[int, dict[str, Any]]:
    from qcompile.interchange.export import export_compressed_tensors, export_gguf

    write = export_gguf if format_ == "gguf" else export_compressed_tensors
    done = write(loaded, output, place)
    return done.bytes, {"codes": done.codes, "floats": done.floats, "notes": done.notes}
