"""Tokens per second and peak memory of a compiled decoder, in a process of its own.

The process loads the artifact and nothing else. One before it builds the kernels, which the second finds in the cache: neither a float
model nor a compiler's work stands in the memory that is measured.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qcompile.errors import Refused
from qcompile.generation.generator import Generator
from qcompile.peers.memory import high_water_bytes

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 128, 32, 5


@dataclass(frozen=True)
class DecoderSpeed:
    """What one text costs.

    Attributes:
        prefill_tokens_per_s: of a prompt of ``prompt_tokens``, median of the rounds.
        decode_tokens_per_s: of ``new_tokens`` after it, one by one, choosing them included; median of the rounds.
        prompt_tokens: 128, or half of the context where that is less.
        new_tokens: 32, or what the context has left.
        cache_bytes: what the text's caches took.
        peak_rss_mb: the most memory of the process, its libraries included, in MiB.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prompt_tokens: int
    new_tokens: int
    cache_bytes: int
    peak_rss_mb: float


def measure_speed(artifact: Path, *, target: str | None = None, threads: int | None = None, trust_code: bool = False) -> DecoderSpeed:
    """Return the speed of a compiled decoder.

    Args:
        artifact: the file.
        target: run on another target than the artifact's.
        threads: worker threads, by default every core this process may use.
        trust_code: see ``qcompile.load``.

    Raises:
        Refused: the artifact is no decoder, or its process failed.
    """
    given = [str(artifact), target or "", str(threads or ""), "trust" if trust_code else ""]
    _run("build", given)
    return DecoderSpeed(**_run("measure", given))


def _run(task: str, given: list[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", __name__, task, *given], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]
        raise Refused(f"its speed could not be measured: {last}", node=given[0])
    found: dict[str, Any] = json.loads(lines[-1])
    if "refused" in found:
        raise Refused(found["refused"])
    return found


def _measure(generator: Generator) -> DecoderSpeed:
    context = generator.model.context
    count = min(PROMPT_TOKENS, max(context // 2, 1))
    new = min(NEW_TOKENS, context - count + 1)
    numbers = random.Random(0)
    speeds = []
    for _ in range(1 + ROUNDS):
        prompt = [numbers.randrange(generator.vocabulary) for _ in range(count)]
        generator.generate(prompt, max_tokens=new, ignore_end=True)
        speeds.append((generator.speed.prefill_tokens_per_s, generator.speed.decode_tokens_per_s))
    prefill, decode = (round(statistics.median(side), 2) for side in zip(*speeds[1:], strict=True))
    return DecoderSpeed(prefill, decode, count, new, generator.cache_bytes, round(high_water_bytes() / 2**20, 1))


def _main(task: str, path: str, target: str, threads: str, trust: str) -> None:
    try:
        generator = Generator.open(path, target=target or None, threads=int(threads) if threads else None, trust_code=bool(trust))
        generator.model.build()
        found = asdict(_measure(generator)) if task == "measure" else {}
    except Refused as error:
        found = {"refused": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
