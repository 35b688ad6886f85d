"""``qcompile verify``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from qcompile.cli.main import as_json, print_json, threads_option, trust_option


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--target", help="Verify on another target than the artifact's.")
@threads_option()
@trust_option()
@as_json()
def verify(artifact: Path, target: str | None, threads: int | None, trust_code: bool, json_: bool) -> None:
    """Replay the probes and golden inputs of ARTIFACT on this machine; exit code 1 names the first layer that differs."""
    from qcompile.artifact import load
    from qcompile.verification import verify as run

    result = run(load(artifact, target=target, threads=threads, trust_code=trust_code))
    if json_:
        print_json(result)
    else:
        equal = sum(layer["ok"] for layer in result["layers"])
        click.echo(
            f"{equal} of {len(result['layers'])} layers equal bit for bit on {result['target']}; outputs "
            + ", ".join(
                "equal" if q is None else f"{q:.1f} dB (at least {result['outputs_bound_db']:g})" for q in result["outputs_sqnr_db"]
            )
            + " against the reference"
        )
        click.echo("ok" if result["ok"] else f"FAILED, first mismatch: {result['first_mismatch']}")
    if not result["ok"]:
        sys.exit(1)
