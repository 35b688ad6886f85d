"""One model under several recipes: compile each, judge all on the same data, and say what each costs.

The model is captured once. With a folder, artifacts are kept there under their recipes' names; ``compare.json`` beside them notes the
digest of everything each depends on, and one whose digest is still the same is not compiled again. A compile that was killed goes on at
its checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qcompile.artifact import Artifact, load
from qcompile.capture import Captured
from qcompile.compiler import Options, compile_key, finish, run_compile
from qcompile.errors import Refused
from qcompile.evaluation import evaluate
from qcompile.files import write_atomic
from qcompile.generation.speed import measure_speed
from qcompile.registry import names
from qcompile.source_notes import remember_source

NOTES = "compare.json"


@dataclass
class Row:
    """What one recipe made of the model; where it failed, ``reason`` says why in one line and what follows is None.

    Attributes:
        recipe: as it was given.
        label: short, and unlike the others'.
        reason: empty where all went well.
        reused: the artifact was there from an earlier comparison.
        compile_seconds: of its compile, capture left out.
        bytes: of the artifact.
        bits_per_weight: stored, scales included; mean over the layers, to two decimals.
        value: of the task.
        float_value: of the float model, on the same data.
        change: perplexity: value / float_value - 1; other tasks: value - float_value.
        kl: mean KL divergence in nats from the float model, where the task has it.
        top1_agreement: share of places where the most likely token is the float model's, where the task has it.
        prefill_tokens_per_s: see ``DecoderSpeed``; None where the model is no decoder.
        decode_tokens_per_s: likewise.
        peak_rss_mb: likewise.
        samples: how many were judged: tokens, pictures or pairs.
        unit: of ``value``.
    """

    recipe: str
    label: str
    reason: str = ""
    reused: bool = False
    compile_seconds: float | None = None
    bytes: int | None = None
    bits_per_weight: float | None = None
    value: float | None = None
    float_value: float | None = None
    change: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    peak_rss_mb: float | None = None
    samples: int | None = None
    unit: str = ""


@dataclass(frozen=True)
class Comparison:
    """What all recipes are judged by.

    Attributes:
        model: the captured model; it is the float one that figures stand beside.
        source: the text that names it.
        target: see ``qcompile targets``.
        calibration: the text that names the data, or None.
        task: see ``qcompile.evaluation.evaluate``.
        data: of the task.
        limit: the most samples.
        folder: where artifacts are.
        threads: worker threads, by default every core this process may use.
        speed: measure decoders' speed and memory too.
    """

    model: Captured
    source: str
    target: str
    calibration: str | None
    task: str
    data: str | None
    limit: int | None
    folder: Path
    threads: int | None = None
    speed: bool = True

    def rows(self, recipes: Sequence[str], progress: Callable[[str], None] = lambda line: None) -> list[Row]:
        """Return a row for each recipe; one that fails does not stop the others.

        Args:
            recipes: names, YAML files or texts of pipelines.
            progress: called with a line of text as work goes on.
        """
        rows = [Row(recipe, label) for recipe, label in zip(recipes, labels(recipes), strict=True)]
        for row in rows:
            try:
                self._fill(row, progress)
            except Refused as error:
                row.reason = str(error)
            except Exception as error:
                if os.environ.get("QCOMPILE_TRACEBACK"):
                    raise
                row.reason = f"internal error: {type(error).__name__}: {' '.join(str(error).split())}"
        return rows

    def _fill(self, row: Row, progress: Callable[[str], None]) -> None:
        path = self.folder / f"{row.label}.qc"
        artifact = self._artifact(row, path, progress)
        progress(f"{row.label}: judging")
        row.bytes, row.bits_per_weight = path.stat().st_size, round(artifact.report["bits_per_weight"], 2)
        result = evaluate(artifact, self.task, self.data, self.model, self.limit)
        row.value, row.float_value, row.samples, row.unit = result.value, result.float_value, result.samples, result.unit
        row.kl = result.value if self.task == "kl" else result.more.get("kl")
        row.top1_agreement = result.more.get("top1_agreement")
        if result.float_value is not None:
            row.change = result.value / result.float_value - 1 if self.task == "perplexity" else result.value - result.float_value
        if self.speed and self.task == "perplexity":
            progress(f"{row.label}: timing")
            found = measure_speed(path, threads=self.threads)
            row.prefill_tokens_per_s, row.decode_tokens_per_s = found.prefill_tokens_per_s, found.decode_tokens_per_s
            row.peak_rss_mb = found.peak_rss_mb

    def _artifact(self, row: Row, path: Path, progress: Callable[[str], None]) -> Artifact:
        """Return the artifact of a recipe, from the folder where it is still what it would be."""
        key = compile_key(self.model, recipe=row.recipe, target=self.target, calibration=self.calibration)
        notes = self._notes()
        if (note := notes.get(path.name)) and note.get("key") == key and path.is_file():
            try:
                artifact = load(path, threads=self.threads)
            except Refused:  # damaged: compiled again
                pass
            else:
                row.reused, row.compile_seconds = True, note["seconds"]
                return artifact
        progress(f"{row.label}: compiling")
        start = time.perf_counter()
        options = Options(output=path, resume=True, progress=lambda line: progress(f"{row.label}: {line}"))
        done = run_compile(self.model, recipe=row.recipe, target=self.target, calibration=self.calibration, options=options)
        row.compile_seconds = round(time.perf_counter() - start, 3)
        finish(done.artifact, path)
        remember_source(path, self.source)
        self._note({**notes, path.name: {"key": key, "seconds": row.compile_seconds}})
        done.artifact.threads = self.threads
        return done.artifact

    def _notes(self) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / NOTES).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _note(self, notes: dict[str, Any]) -> None:
        write_atomic(self.folder / NOTES, (json.dumps(notes, indent=1) + "\n").encode())


def split_recipes(texts: Sequence[str]) -> list[str]:
    """Return the recipes that texts name: each is a list of names and files joined by commas, or the text of one pipeline.

    Raises:
        Refused: there is none, or one stands twice.
    """
    found: list[str] = []
    for text in texts:
        parts = [part.strip() for part in re.findall(r"(?:[^,{]|\{[^}]*\})+", text) if part.strip()]  # commas in options separate nothing
        found += [text.strip()] if parts and all(map(_is_pass, parts)) else parts
    if not found:
        raise Refused("there is no recipe to compare", way_out="give --recipes NAME,NAME")
    if twice := [text for number, text in enumerate(found) if text in found[:number]]:
        raise Refused("the recipe is given twice", node=twice[0])
    return found


def _is_pass(text: str) -> bool:
    return re.split(r"[\s,{]", text.strip())[0] in names("pass")


def labels(recipes: Sequence[str]) -> list[str]:
    """Return for each recipe a name that a file may have: its own or its file's, for a pipeline its digest; unlike each other."""
    found: list[str] = []
    for recipe in recipes:
        digest = hashlib.sha256(recipe.encode()).hexdigest()[:8]
        name = f"pipeline-{digest}" if _is_pass(recipe) else re.sub(r"[^\w.-]", "_", Path(recipe).stem)
        found.append(f"{name}-{digest}" if name in found else name)
    return found


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as plain data."""
    return [asdict(row) for row in rows]
