"""The command group, exit codes and the one place where errors become a line of text.

Exit codes: 0 fine, 1 a check failed, 2 wrong use or bad input, 3 interrupted (a compile can be resumed).
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from qcompile.errors import Refused
from qcompile.nearest import nearest_name

# Command -> (module under qcompile.cli, one line for the overview). The modules are imported when a command runs.
COMMANDS = {
    "compile": ("compile", "Compile a model to a quantized artifact."),
    "run": ("run", "Run an artifact on arrays from a file."),
    "generate": ("generate", "Continue texts with a compiled language model."),
    "tune": ("tune", "Search for faster block sizes of an artifact's kernels on this machine."),
    "bench": ("bench", "Time an artifact side by side with other runtimes."),
    "evaluate": ("evaluate", "Measure an artifact's accuracy against data or its float model."),
    "compare": ("compare", "Compile a model by several recipes and print what each loses and costs."),
    "inspect": ("inspect", "Show layers, schemes, errors and float operators."),
    "diff": ("inspect", "Compare two artifacts layer by layer."),
    "verify": ("verify", "Replay an artifact's probes and golden inputs on this machine."),
    "export": ("export", "Write an artifact in another format, such as ONNX."),
    "passes": ("lists", "List the passes."),
    "recipes": ("lists", "List the recipes."),
    "targets": ("lists", "List the targets and their kernels."),
    "formats": ("lists", "List the element formats."),
    "solvers": ("lists", "List the solvers of quantize-weights and their options."),
    "methods": ("lists", "List the published methods and which of them work."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"qcompile.cli.{COMMANDS[cmd_name][0]}")
        command = getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise Refused(f"unknown command '{args[0]}'", way_out=nearest_name(args[0], COMMANDS))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="qcompile")
def cli() -> None:
    r"""Compile trained networks to low-bit artifacts, run them, and see what was lost.

    \b
    qcompile compile MODEL --recipe w8a8 --calibrate DATA -o model.qc
    qcompile evaluate model.qc --task sts --data pairs.csv
    qcompile bench model.qc --against torch,onnxruntime

    MODEL is an .onnx file, a .pt2 file, a Hugging Face folder, or python:FILE_OR_MODULE:FUNCTION.
    """


def main() -> NoReturn:
    """Run the command line and exit."""
    # Importing torch and TVM and tracing a model make a million objects that stay: looking through them for garbage again and again,
    # and once more at the end, took a sixth of a compile.
    gc.set_threshold(50_000, 10, 10)
    atexit.register(gc.freeze)
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except Refused as error:
        code = fail(str(error))
    except click.ClickException as error:
        code = fail(error.format_message())
    except (click.Abort, KeyboardInterrupt) as stop:
        kept = str(stop.__cause__ or stop) or "'qcompile compile --resume' goes on where it stopped"
        click.echo(f"qcompile: interrupted; {kept}", err=True)
        code = 3
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if os.environ.get("QCOMPILE_TRACEBACK"):
            raise
        code = fail(f"internal error, please report it: {type(error).__name__}: {error} (QCOMPILE_TRACEBACK=1 shows where)")
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def fail(message: str) -> int:
    """Print one line of error, control characters made visible, and return the exit code for bad input."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(message.split()))
    click.echo(f"qcompile: {line}", err=True)
    return 2


def check_folder(output: Path) -> None:
    """Raise Refused where no file can be written, before work for it starts."""
    if not output.parent.is_dir():
        raise Refused("there is no such folder", node=str(output.parent))
    if not os.access(output.parent, os.W_OK):
        raise Refused("the folder cannot be written", node=str(output.parent))


def as_json(flag: Any = None) -> Any:
    """Return the ``--json`` option that every command has."""
    return click.option("--json", "json_", is_flag=True, help="Print one JSON document instead of text.")


def print_json(content: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(content, indent=1))


def trust_option() -> Any:
    """Return the ``--trust-code`` option of every command that runs an artifact."""
    return click.option("--trust-code", is_flag=True, help="Run the artifact's native code although this user did not build it here.")


def threads_option() -> Any:
    """Return the ``--threads`` option."""
    return click.option("--threads", type=click.IntRange(1, 1024), help="Worker threads [every core this process may use].")
