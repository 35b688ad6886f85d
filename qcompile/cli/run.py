"""``qcompile run``."""

from __future__ import annotations

from pathlib import Path

import click

from qcompile.cli.main import as_json, print_json, threads_option, trust_option
from qcompile.errors import Refused


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--input",
    "input_",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="FILE.npz (arrays named like the inputs) or FILE.npy [the golden inputs].",
)
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="FILE.npz for the outputs.")
@click.option("--target", help="Run on another target, such as reference.")
@threads_option()
@trust_option()
@as_json()
def run(
    artifact: Path, input_: Path | None, output: Path | None, target: str | None, threads: int | None, trust_code: bool, json_: bool
) -> None:
    """Run ARTIFACT on arrays from a file and print or write the outputs."""
    import io

    import numpy as np

    from qcompile.artifact import load
    from qcompile.files import write_atomic

    model = load(artifact, target=target, threads=threads, trust_code=trust_code)
    inputs = (
        _read(input_, [node.name for node in model.graph.inputs])
        if input_
        else dict(zip((n.name for n in model.graph.inputs), (t.numpy() for t in model.golden_inputs), strict=True))
    )
    result = model(**inputs)
    outputs = dict(zip(model.graph.output_names, result if isinstance(result, tuple) else (result,), strict=True))
    if output:
        buffer = io.BytesIO()
        np.savez(buffer, **outputs)
        write_atomic(output, buffer.getvalue())
    summary = [
        {
            "name": name,
            "dtype": str(array.dtype),
            "shape": list(array.shape),
            "mean": float(array.mean()),
            "min": float(array.min()),
            "max": float(array.max()),
        }
        for name, array in outputs.items()
    ]
    if json_:
        return print_json({"outputs": summary})
    for item in summary:
        click.echo(f"{item['name']}: {item['dtype']}{item['shape']} mean {item['mean']:.5g} min {item['min']:.5g} max {item['max']:.5g}")
    return None


def _read(path: Path, names: list[str]) -> dict[str, object]:
    """Read arrays without pickle.

    Raises:
        Refused: no such file, or not NumPy's.
    """
    import numpy as np

    if not path.is_file():
        raise Refused("there is no such file", node=str(path))
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {names[0]: loaded}
        return {name: loaded[name] for name in loaded.files}
    except (ValueError, OSError, EOFError, KeyError) as error:
        raise Refused(f"no NumPy file, or a damaged one: {' '.join(str(error).split())}", node=str(path)) from error
    except Exception as error:  # zipfile and zlib raise errors of their own
        raise Refused(f"no NumPy file, or a damaged one: {type(error).__name__}", node=str(path)) from error
