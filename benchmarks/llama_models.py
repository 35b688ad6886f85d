#!/usr/bin/env python
"""A decoder compiled here beside llama.cpp with the same weights: bits, perplexity, tokens per second, memory.

    python benchmarks/llama_models.py                                  # wikilm-5m of the data folder
    python benchmarks/llama_models.py --random 22 --no-perplexity      # the shape of TinyLlama, 1.1 billion random weights

llama.cpp (package llama-cpp-python) quantizes an F16 file made of the same folder by its own tool; without the package only our rows are
printed. Perplexity is over the same windows of the same tokens on both sides: the row F16 shows that the conversion is right. A K type
needs rows of a multiple of 256 and falls back where they have another length: the last column says what the file holds. Bits are those of
everything stored, over the weights of the model, a tied head counted once.

Every contender has a process of its own; they take turns: a prompt, then tokens one by one; medians are printed, in brackets the best turn.
llama.cpp runs with weights repacked for this processor (its default) and, as ``plain``, without. Where the default fails at a prompt (it
does on some processors with AMX), it gets a second try with the prompt token by token, which tells its speed of decoding alone.
Perplexity is that of plain weights.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from models.data import data_folder
from models.llama_gguf import quantize, stored_bits, write_f16
from models.random_llama import write_folder

import qcompile
from qcompile.generation.text import read_tokenizer
from qcompile.perplexity import Windows, read_windows

REST = 0.05  # seconds before a turn, for threads of the one before to fall asleep


@dataclass
class Contender:
    """One file in one runtime, in a process of its own; ``failed`` where it ended."""

    name: str
    runtime: str
    path: Path
    bits: float
    holds: str = ""
    seconds: list[dict[str, float]] = field(default_factory=list)
    perplexity: float | None = None
    memory: int = 0
    failed: bool = False
    process: Any = None

    def start(self, threads: int, context: int) -> None:
        """Begin to load it; what it prints beside its answers goes nowhere."""
        script = Path(__file__).with_name("decoder_turns.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), self.runtime, str(self.path), str(threads), str(context)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1,
        )  # fmt: skip

    def wait(self) -> None:
        """Return when it is loaded."""
        self.failed = self._answer() is None

    def ask(self, **question: Any) -> Any:
        """Return the answer to one question; None from a process that has ended."""
        if self.failed:
            return None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
        except BrokenPipeError:
            self.failed = True
            return None
        answer = self._answer()
        self.failed = answer is None
        return answer

    def _answer(self) -> Any:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        return None

    def stop(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


@click.command(help=__doc__)
@click.option("--folder", type=click.Path(path_type=Path, exists=True), help="A Llama-type Hugging Face folder [wikilm-5m].")
@click.option("--random", "layers", type=int, help="TinyLlama's shape with so many layers and random weights, in place of a folder.")
@click.option("--recipes", default="w4a16,w4a8,w8a8-dynamic", show_default=True, help="Joined by commas.")
@click.option("--calibrate", help="Data for recipes that need it [WikiText-2 valid, or random].")
@click.option("--types", default="F16,Q8_0,Q4_0,Q4_K_M,Q2_K", show_default=True, help="llama.cpp's types, joined by commas.")
@click.option("--windows", default=40, show_default=True, help="Windows of 512 tokens for the perplexity; 0: all of the text.")
@click.option("--perplexity/--no-perplexity", default=True)
@click.option("--prompt", default=128, show_default=True, help="Tokens of the prompt of a turn.")
@click.option("--new", default=32, show_default=True, help="Tokens decoded in a turn.")
@click.option("--rounds", default=9, show_default=True, help="Turns of each contender; 0: no times.")
@click.option("--threads", type=int, help="[every processor this process may use]")
@click.option("--cpu-time", is_flag=True, help="Tokens per second of a processor, not of the clock: for a busy machine, with one thread.")
@click.option("--keep", type=click.Path(path_type=Path), help="Keep the files in this folder and use them again.")
def main(
    folder: Path | None, layers: int | None, keep: Path | None, recipes: str, calibrate: str | None, types: str, **options: Any
) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as spare:
        place = keep or Path(spare)
        place.mkdir(exist_ok=True)
        if layers:
            folder = place / "model"
            if not (folder / "config.json").exists():
                write_folder(folder, layers)
        folder = folder or data_folder() / "wikilm-5m"
        count, threads = _weights(folder), options.pop("threads") or len(os.sched_getaffinity(0))
        data = calibrate or ("random" if layers else f"text:{data_folder() / 'wikitext2' / 'valid.raw.txt'}?length=512")
        contenders = [_ours(folder, recipe, data, place, count) for recipe in recipes.split(",") if recipe]
        if find_spec("llama_cpp") and find_spec("gguf"):
            contenders += [c for kind in types.split(",") for c in _theirs(folder, kind, place, threads)]
        else:
            click.echo("llama.cpp is not installed: pip install llama-cpp-python gguf")
        _run(contenders, folder, threads, **options)


def _weights(folder: Path) -> int:
    """Return how many weights the matrices of a folder have."""
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118 - no mapping
            total += sum(rest[0] * rest[1] for rest in shapes if len(rest) == 2)
    return total


def _ours(folder: Path, recipe: str, data: str, place: Path, weights: int) -> Contender:
    path = place / f"{Path(recipe).stem}.qc"
    if not path.exists():
        start = time.perf_counter()
        qcompile.compile(folder, recipe=recipe, calibration=data).save(path)
        click.echo(f"{recipe}: compiled in {time.perf_counter() - start:.1f} s", err=True)
    report = qcompile.load(path).report
    schemes = [layer["weight"] for layer in report["layers"]]
    holds = ", ".join(f"{scheme} {schemes.count(scheme)}" for scheme in sorted(set(schemes)))
    return Contender(f"qcompile {Path(recipe).stem}", "qcompile", path, 8 * report["bytes"] / weights, holds)


def _theirs(folder: Path, kind: str, place: Path, threads: int) -> list[Contender]:
    source, path = place / "F16.gguf", place / f"{kind}.gguf"
    if not source.exists():
        write_f16(folder, source)
    if not path.exists():
        _quantize_quietly(source, path, kind, threads)
    bits, holds = stored_bits(path)
    made = [Contender(f"llama.cpp {kind}", "llama.cpp", path, bits, holds)]
    return made if kind == "F16" else [*made, Contender(f"llama.cpp {kind} plain", "llama.cpp-plain", path, bits, holds)]


def _quantize_quietly(source: Path, path: Path, kind: str, threads: int) -> None:
    """Quantize with llama.cpp's many lines of log left out."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)
    quantize(source, path, kind, threads)


def _run(
    contenders: list[Contender],
    folder: Path,
    threads: int,
    *,
    windows: int,
    perplexity: bool,
    prompt: int,
    new: int,
    rounds: int,
    cpu_time: bool,
) -> None:
    judged = _text(folder, windows) if perplexity else None
    judges = {c.name for c in contenders if c.runtime != "llama.cpp" or c.name == "llama.cpp F16"}
    for contender in contenders:
        contender.start(threads, max(512, prompt + new))
    for contender in contenders:
        contender.wait()
        if judged and contender.name in judges and (found := contender.ask(likelihood=judged)):
            contender.perplexity = math.exp(found["nats"] / found["tokens"])
        if not rounds:
            contender.stop()
    for number in range(rounds + 1 if rounds else 0):
        for contender in contenders:
            time.sleep(REST)
            found = contender.ask(turn=[prompt, new])
            if contender.failed and not number and contender.runtime == "llama.cpp":
                contender.name, contender.runtime = f"{contender.name} one by one", "llama.cpp-single"
                contender.start(threads, max(512, prompt + new))
                contender.wait()
                contender.ask(turn=[prompt, new])
            if found and number:
                contender.seconds.append(found)
    for contender in contenders if rounds else []:
        contender.memory = (contender.ask(memory=0) or {"bytes": 0})["bytes"]
        contender.stop()
    for line in table(contenders, prompt, new, " cpu" if cpu_time else ""):
        click.echo(line)


def _text(folder: Path, windows: int) -> dict[str, Any]:
    """Return WikiText-2 test as what ``Windows`` takes."""
    tokenizer = read_tokenizer((folder / "tokenizer.json").read_bytes())
    found: Windows = read_windows(data_folder() / "wikitext2" / "test.raw.txt", tokenizer, 512, None, windows or None)
    tokens = list(found.tokens)[: windows * found.stride or None]
    return {"tokens": tokens, "context": found.context, "stride": found.stride, "opening": list(found.opening), "limit": windows or None}


def table(contenders: list[Contender], prompt: int, new: int, clock: str) -> list[str]:
    """Return one line for each contender; tokens per second are medians, and in brackets the best turn's."""
    lines = [f"{'':28} bits/weight  perplexity  {f'prefill {prompt} tokens/s':>22}  {'decode tokens/s':>18}  peak MiB  holds"]
    for c in contenders:
        if c.failed:
            lines.append(f"{c.name:32} {c.bits:7.2f}  its process ended before it answered; {c.holds}")
            continue
        judged = f"{c.perplexity:10.4f}" if c.perplexity else " " * 10
        rates = []
        for key, size in (("prefill", prompt), ("decode", new)):
            spent = [turn[key + clock] for turn in c.seconds]
            known = spent and not (key == "prefill" and c.runtime == "llama.cpp-single")
            rates.append(f"{size / statistics.median(spent):.0f} ({size / min(spent):.0f})" if known else "")
        lines.append(f"{c.name:32} {c.bits:7.2f}  {judged}  {rates[0]:>22}  {rates[1]:>18}  {c.memory / 2**20:8.0f}  {c.holds}")
    return lines


if __name__ == "__main__":
    main()
