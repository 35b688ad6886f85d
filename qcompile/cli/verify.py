"""``qcompile verify``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from qcompile.cli.main import as_json, print_json, threads_option, trust_option
from qcompile.errors import Refused

SHOWN_FUNCTIONS = 8


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--target", help="Verify on another target than the artifact's.")
@click.option("--qemu", is_flag=True, help="ARTIFACT is a folder of C for a target edge:..; run its example on the emulated processor.")
@click.option("--sanitize", is_flag=True, help="With --qemu: run it on this machine, with address and undefined-behaviour sanitizers.")
@threads_option()
@trust_option()
@as_json()
def verify(artifact: Path, target: str | None, qemu: bool, sanitize: bool, threads: int | None, trust_code: bool, json_: bool) -> None:
    """Replay the probes and golden inputs of ARTIFACT on this machine; exit code 1 names the first layer that differs."""
    if qemu:
        ok = _verify_folder(artifact, sanitize, json_)
    elif artifact.is_dir():
        raise Refused("this is a folder", node=str(artifact), way_out="--qemu builds its example and runs it")
    else:
        ok = _verify_artifact(artifact, target, threads, trust_code, json_)
    if not ok:
        sys.exit(1)


def _verify_artifact(artifact: Path, target: str | None, threads: int | None, trust_code: bool, json_: bool) -> bool:
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
    return bool(result["ok"])


def _verify_folder(folder: Path, sanitize: bool, json_: bool) -> bool:
    from qcompile.registry import find_target

    try:
        target = json.loads((folder / "report.json").read_text(encoding="utf-8"))["target"].partition(":")[0]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        way_out = "name a folder that compile --target edge:.. wrote"
        raise Refused("there is no folder of C with a report.json", node=str(folder), way_out=way_out) from None
    result = find_target(target).verify_folder(folder, sanitize=sanitize)
    if json_:
        print_json(result)
    else:
        _print_measured(result)
    return bool(result["ok"])


def _print_measured(result: dict[str, Any]) -> None:
    place = result["emulator"] or "this machine, with sanitizers"
    if result["cases"] is not None:
        click.echo(f"{result['equal']} of {result['cases']} golden inputs equal bit for bit on {place}")
        click.echo(f"arena_high_water {result['arena_high_water']} of {result['arena_bytes']} bytes planned")
    if result["stack_high_water"] is not None:
        click.echo(f"stack_high_water {result['stack_high_water']} bytes")
        click.echo(f"flash            {result['code_bytes']} bytes of code, {result['weights_bytes']} of weights")
    if result["instructions"]:
        click.echo(f"instructions     {result['instructions']}")
        for name, count in list(result["functions"].items())[:SHOWN_FUNCTIONS]:
            click.echo(f"  {100 * count / result['instructions']:5.1f} %  {name}")
    click.echo("ok" if result["ok"] else f"FAILED, first mismatch: {result['first_mismatch'] or 'the arena is larger than planned'}")
