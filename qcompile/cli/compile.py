"""``qcompile compile``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcompile.cli.main import as_json, check_folder, print_json
from qcompile.errors import Refused
from qcompile.files import map_large_blocks

if TYPE_CHECKING:
    from qcompile.target import MemoryLimits


@click.command()
@click.argument("model")
@click.option("--recipe", help="Name, YAML file, or pipeline text [w8a8; stored, where MODEL's weights have codes already].")
@click.option("--target", default="cpu", show_default=True, help="See 'qcompile targets'.")
@click.option("--calibrate", metavar="DATA", help="FILE.npz, FILE.npy, text:FILE, images:FOLDER?resize=..&crop=.., or random.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The artifact to write [MODEL's name with .qc]; a folder for edge targets."
)
@click.option("--size", "sizes", multiple=True, metavar="NAME=N", help="Fix a symbolic size of the model, such as batch=1.")
@click.option(
    "--context", type=click.IntRange(min=2), help="For a decoder and an edge target: write the step of one token, for texts so long."
)
@click.option("--board", default="", help="A board whose memories the model must fit into, for edge targets.")
@click.option("--arena-limit", metavar="BYTES", help="Most memory for values, such as 256K, for edge targets.")
@click.option("--flash-limit", metavar="BYTES", help="Most memory for constants and code, for edge targets.")
@click.option("--resume", is_flag=True, help="Go on where a killed compile stopped.")
@click.option("--check", is_flag=True, help="Hold every pass to what it says it keeps.")
@click.option("--dump", type=click.Path(path_type=Path, file_okay=False), help="Write the graph's text after every pass to this folder.")
@click.option("--diff", "diff_", is_flag=True, help="Print what every pass changed in the graph's text.")
@click.option("--print-after", metavar="PASS", help="Print the graph after this pass.")
@click.option("--stop-after", metavar="PASS", default="", help="End the pipeline after this pass.")
@click.option("--time", "time_", is_flag=True, help="Print the time of every pass and rule.")
@click.option("--why-not", metavar="NODE", help="Print why rules did not fire at this node.")
@click.option("--dry-run", is_flag=True, help="Print predicted size, memory, kernels and float leftovers; write nothing.")
@click.option("--bisect", is_flag=True, help="Name the pass that loses most of the model's outputs; write nothing.")
@click.option("--kernel-times", type=click.Path(path_type=Path, dir_okay=False), help="Table of measured kernel times to use and extend.")
@click.option("--native", is_flag=True, help="Store the target's code for this machine too; the file then differs from machine to machine.")
@as_json()
def compile(model: str, recipe: str | None, target: str, calibrate: str | None, output: Path | None, **flags: Any) -> None:
    """Compile MODEL (.onnx, .pt2, .gguf, Hugging Face folder, python:FILE_OR_MODULE:FUNCTION) to an artifact."""
    from qcompile.capture.sizes import parse_sizes
    from qcompile.checkpoint import Checkpoints
    from qcompile.compiler import Options, finish, run_compile

    start = time.perf_counter()
    map_large_blocks()
    if flags["dry_run"]:
        from qcompile.plan import plan

        return _print_plan(plan(model, recipe=recipe, target=target), flags["json_"])
    writes = not flags["bisect"] and not flags["stop_after"]
    output, folder = _places(output, model, target, writes)
    tracer = _Tracer(flags)
    options = Options(
        output=output if writes else None,
        resume=flags["resume"],
        check=flags["check"] or flags["bisect"],
        dump=flags["dump"],
        stop_after=flags["stop_after"],
        progress=None if flags["json_"] else lambda line: click.echo(line, err=True),
        observers=(tracer,),
        kernel_times=flags["kernel_times"],
        hold_promises=not flags["bisect"],
        native=flags["native"] and writes,
        sizes=parse_sizes(flags["sizes"]),
        limits=_limits(flags),
    )
    try:
        done = run_compile(model, recipe=recipe, target=target, calibration=calibrate, options=options)
        told = _write_folder(done, folder, flags["context"]) if folder and writes else {}
    except Refused:
        if folder and writes:
            Checkpoints.discard(output)
            if not any(folder.iterdir()):
                folder.rmdir()
        raise
    if flags["why_not"]:
        for line in done.context.log.why_not(flags["why_not"]) or [f"no rule was tried at {flags['why_not']}"]:
            click.echo(line, err=flags["json_"])
    if flags["time_"] or flags["bisect"]:
        _print_steps(done, flags)
    if not writes:
        return None
    size = finish(done.artifact, output)
    _remember(output, model)
    return _print_done(done, output, size, time.perf_counter() - start, told, flags["json_"])


def _write_folder(done: Any, folder: Path, context: int | None) -> dict[str, Any]:
    from qcompile.generation.entries import one_token_step

    artifact = done.artifact
    graph = one_token_step(artifact.graph, context) if context else artifact.graph
    told: dict[str, Any] = done.context.target.write_folder(graph, artifact.golden_inputs, folder)
    return told


def _places(output: Path | None, model: str, target: str, writes: bool) -> tuple[Path, Path | None]:
    """Return the artifact to write and the folder around it, which is None where the target writes no folder; it is made here."""
    from qcompile.registry import find_target

    output = output or Path(_default_name(model))
    check_folder(output)
    if not find_target(target).writes_folder:
        if output.is_dir():
            raise Refused("this is a folder", node=str(output), way_out="name a file to write, such as model.qc")
        return output, None
    folder = output.with_suffix("") if output.suffix == ".qc" else output
    if folder.exists() and not folder.is_dir():
        raise Refused("this is a file", node=str(folder), way_out="name a folder to write")
    if writes:
        folder.mkdir(exist_ok=True)
    return folder / "model.qc", folder


def _limits(flags: dict[str, Any]) -> MemoryLimits | None:
    from qcompile.target import MemoryLimits

    arena, flash = (parse_bytes(flags[name]) if flags[name] else None for name in ("arena_limit", "flash_limit"))
    return MemoryLimits(flags["board"], arena, flash) if flags["board"] or arena or flash else None


def parse_bytes(text: str) -> int:
    """Parse ``262144``, ``256K``, ``1M``: K is 1024.

    Raises:
        Refused: the text is none of these.
    """
    unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:].upper(), 1)
    number = text[:-1] if unit > 1 else text
    if not (number.isdigit() and int(number)):
        raise Refused("this is no number of bytes", node=text, way_out="write 262144, 256K or 1M")
    return int(number) * unit


def _default_name(model: str) -> str:
    stem = model.rsplit(":", 1)[-1] if model.startswith("python:") else Path(model).name
    return f"{Path(stem).stem or 'model'}.qc"


class _Tracer:
    """Prints texts and differences as the passes run."""

    def __init__(self, flags: dict[str, Any]) -> None:
        self.flags, self.before = flags, ""

    def __call__(self, number: int, item: Any, graph: Any, step: Any) -> None:
        wanted = self.flags["print_after"] == item.name()
        if not wanted and not self.flags["diff_"]:
            return
        from qcompile.graph import print_graph

        text = print_graph(graph)
        if wanted:
            click.echo(text, err=self.flags["json_"])
        if self.flags["diff_"] and self.before:
            import difflib

            for line in difflib.unified_diff(self.before.splitlines(), text.splitlines(), "before", item.name(), lineterm="", n=0):
                click.echo(line, err=self.flags["json_"])
        self.before = text


def _print_steps(done: Any, flags: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("pass", "changes", "seconds", "keeps (dB)", box=None)
    for step in done.steps:
        table.add_row(step.text, str(step.changes), f"{step.seconds:.3f}", "" if step.sqnr_db is None else f"{step.sqnr_db:.1f}")
    console = Console(stderr=flags["json_"])
    console.print(table)
    if flags["time_"]:
        rules = Table("rule", "tried", "matched", "seconds", box=None)
        for name, tried in sorted(done.context.log.tried.items(), key=lambda item: -done.context.log.seconds[item[0]]):
            rules.add_row(name, str(tried), str(done.context.log.matched[name]), f"{done.context.log.seconds[name]:.3f}")
        console.print(rules)
    measured = [step for step in done.steps if step.sqnr_db is not None]
    if flags["bisect"] and measured:
        worst = min(measured, key=lambda step: step.sqnr_db)
        click.echo(f"the pass that loses most is {worst.text}: it keeps {worst.sqnr_db:.1f} dB", err=flags["json_"])


def _print_plan(plan: dict[str, Any], json_: bool) -> None:
    if json_:
        return print_json(plan)
    _print_warnings(plan["warnings"])
    click.echo(
        f"artifact     about {plan['bytes'] / 1e6:.1f} MB "
        f"({plan['bits_per_weight']:.2f} bits per weight; float {plan['float_bytes'] / 1e6:.1f} MB)"
    )
    click.echo(f"memory       about {plan['peak_memory_bytes'] / 1e6:.0f} MB while compiling")
    for kernel in plan["kernels"]:
        click.echo(f"kernel       {kernel['count']:3d} x {kernel['op']} {kernel['weight']} / {kernel['activation']}")
    click.echo(
        f"float        {len(plan['float_ops'])} operators stay float: {', '.join(sorted({item['op'] for item in plan['float_ops']}))}"
    )
    return None


def _print_done(done: Any, output: Path, size: int, seconds: float, told: dict[str, Any], json_: bool) -> None:
    report = done.artifact.report
    if json_:
        return print_json(
            {
                "artifact": str(output),
                "bytes": size,
                "seconds": round(seconds, 3),
                "recipe": done.context.recipe.name,
                "target": done.artifact.target,
                "bits_per_weight": report["bits_per_weight"],
                "weight_bytes": report["bytes"],
                "float_bytes": report["float_bytes"],
                "warnings": report["warnings"],
                **({"folder": str(output.parent), **{key: told[key] for key in _TOLD}} if told else {}),
            }
        )
    _print_warnings(report["warnings"])
    low = sum(layer["weight"] != "float32" for layer in report["layers"])
    click.echo(f"{output}: {size / 1e6:.2f} MB in {seconds:.1f} s, recipe {done.context.recipe.name}, target {done.artifact.target}")
    click.echo(
        f"{low} of {len(report['layers'])} layers in low bits, {report['bits_per_weight']:.2f} bits per weight, "
        f"constants {100 * report['bytes'] / max(report['float_bytes'], 1):.1f} % of float32"
    )
    if told:
        figures = f"an arena of {told['arena_bytes']} bytes, {told['weights_bytes']} bytes of weights, {told['macs']} MACs"
        click.echo(f"{output.parent}: C with {figures}")
    return None


_TOLD = ("arena_bytes", "weights_bytes", "macs")


def _print_warnings(warnings: list[str]) -> None:
    for line in warnings:
        click.echo(f"warning: {line}", err=True)


def _remember(output: Path, model: str) -> None:
    """Note where the float model lies, so that bench and evaluate find it; the artifact itself names no path."""
    from qcompile.source_notes import remember_source

    remember_source(output, model)
