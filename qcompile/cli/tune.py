"""``qcompile tune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcompile.cli.main import as_json, check_folder, print_json
from qcompile.errors import Refused

if TYPE_CHECKING:
    from qcompile.kernel_tiles import TunedLayer, Tuning


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--shape",
    "shapes",
    metavar="SIZES",
    multiple=True,
    help="Sizes of the symbols, such as batch=1,seq=128; may be given again, no tile then loses at any [the golden inputs' sizes].",
)
@click.option("--seconds", type=click.IntRange(0, 86400), default=300, show_default=True, help="When no other tile is tried any more.")
@click.option("--again", is_flag=True, help="Try also what earlier searches on this machine have tried.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the artifact with its tiles in it.")
@as_json()
def tune(artifact: Path, shapes: tuple[str, ...], seconds: int, again: bool, output: Path | None, json_: bool) -> None:
    """Search for faster block sizes of ARTIFACT's kernels on this machine; results are kept in a table in the cache."""
    from qcompile.artifact import load
    from qcompile.capture.examples import resize_examples
    from qcompile.registry import find_target

    if output:
        check_folder(output)
    compiled = load(artifact)
    target = find_target(compiled.target)
    if not target.tunes:
        raise Refused(f"target {target.name} has no kernels to tune", node=str(artifact))
    batches = [resize_examples(compiled.graph, compiled.golden_inputs, shape) for shape in shapes or ("",)]
    progress = None if json_ else lambda line: click.echo(line, err=True)
    try:
        tuning = target.tune(compiled.graph, batches, seconds=seconds, again=again, progress=progress)
    except KeyboardInterrupt:  # tiles are kept once all that lead have won together
        raise KeyboardInterrupt("no tile of this search is kept; --seconds ends a search in time") from None
    if output:
        _write(artifact, output, compiled, tuning)
    if json_:
        return print_json(_content(tuning, output))
    for line in _lines(tuning, output):
        click.echo(line)
    return None


def _write(artifact: Path, output: Path, compiled: Any, tuning: Tuning) -> None:
    """Write the artifact with its tiles; native code in it is built anew with them."""
    from qcompile.native_code import build_native_code
    from qcompile.registry import find_target
    from qcompile.source_notes import find_source, remember_source

    source = find_source(artifact)
    compiled.tiles = compiled.tiles.updated(tuning.tiles())
    if compiled.native:
        compiled.native = build_native_code(find_target(compiled.target).with_tiles(compiled.tiles), compiled.graph)
    compiled.save(output)
    if source:
        remember_source(output, source)


def _content(tuning: Tuning, output: Path | None) -> dict[str, Any]:
    return {
        "machine": tuning.machine,
        "table": str(tuning.table),
        "artifact": str(output) if output else None,
        "default_ms": round(tuning.default_ms, 4),
        "tuned_ms": round(tuning.tuned_ms, 4),
        "layers": [{"name": name, **layer.model_dump()} for name, layer in sorted(tuning.layers.items())],
    }


def _lines(tuning: Tuning, output: Path | None) -> list[str]:
    lines = [_line(name, layer) for name, layer in sorted(tuning.layers.items(), key=lambda item: -item[1].default_us)]
    faster = sum(bool(layer.tile) for layer in tuning.layers.values())
    lines.append(
        f"{faster} of {len(lines)} kinds of layers are faster; a call takes {tuning.tuned_ms:.3f} ms, with default tiles "
        f"{tuning.default_ms:.3f} ms ({tuning.default_ms / tuning.tuned_ms:.3f} times as fast)"
    )
    return [*lines, f"table: {tuning.table} ({tuning.machine})", *([f"artifact: {output}"] if output else [])]


def _line(name: str, layer: TunedLayer) -> str:
    tile = ", ".join(f"{key} {value}" for key, value in sorted(layer.tile.items())) or f"default, {layer.tried} others tried"
    return f"{layer.default_us:9.1f} us -> {layer.us:9.1f} us  {name}: {tile}"
