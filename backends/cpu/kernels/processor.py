"""What this machine's processor has, by its operating system: all that running finished code needs to know, without a compiler."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

CHOICE = "QCOMPILE_CPU"  # environment variable with a name of ``isa.KNOWN``
VECTOR_BITS = 256  # of scalable vectors (SVE) that code is made for

# LLVM feature -> the flag of /proc/cpuinfo, for every feature that code of vectors and loops may use. Others (system instructions) do
# not occur in kernels, so they are never a reason to refuse code.
_SAME_X86 = "sse sse2 ssse3 avx avx2 fma f16c bmi2 popcnt movbe adx aes gfni vaes vpclmulqdq avx512f avx512bw avx512cd avx512dq avx512vl"
X86_FLAGS = {name: name for name in (*_SAME_X86.split(), "avx512ifma", "avx512vbmi")} | {
    "sse3": "pni",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "bmi": "bmi1",
    "lzcnt": "abm",
    "pclmul": "pclmulqdq",
    "sha": "sha_ni",
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avxvnni": "avx_vnni",
    "avxvnniint8": "avx_vnni_int8",
    "avxifma": "avx_ifma",
    "amx-int8": "amx_int8",
    "amx-bf16": "amx_bf16",
    "amx-tile": "amx_tile",
}
_ARM_FLAGS = {
    "neon": "asimd",
    "dotprod": "asimddp",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "fullfp16": "asimdhp",
    "lse": "atomics",
    "rdm": "asimdrdm",
    "crc": "crc32",
    "sve": "sve",
    "sve2": "sve2",
}
FLAGS = {"x86_64": X86_FLAGS, "aarch64": _ARM_FLAGS}


def machine() -> str:
    """Return this machine's architecture, ``x86_64`` or ``aarch64`` where it is one of these."""
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def thread_count() -> int:
    """Return the threads that kernels are split for: ``TVM_NUM_THREADS``, else the processors this process may use."""
    return int(os.environ.get("TVM_NUM_THREADS", "0")) or len(os.sched_getaffinity(0))


def features() -> frozenset[str] | None:
    """Return the LLVM features that this process may use, of those that code can need; None where the system does not tell."""
    flags = system_flags()
    return permitted(frozenset(name for name, flag in FLAGS.get(machine(), {}).items() if flag in flags)) if flags else None


def permitted(features: frozenset[str]) -> frozenset[str]:
    """Return those of the processor's features that this process may use, and vectors of the length that code is made for."""
    if not _tiles_permitted(features):
        features = frozenset(name for name in features if not name.startswith("amx-"))
    return features if _scalable_bits() == VECTOR_BITS else features - {"sve", "sve2"}


def _scalable_bits() -> int:
    """Return the length of this machine's scalable vectors (SVE); 0 where it has none."""
    if machine() != "aarch64" or platform.system() != "Linux":
        return 0
    get_vector_length, length_mask = 51, 0xFFFF  # of prctl, which answers in bytes
    found = ctypes.CDLL(None).prctl(get_vector_length, 0, 0, 0, 0)
    return 8 * (found & length_mask) if found > 0 else 0


def _tiles_permitted(features: frozenset[str]) -> bool:
    """Return whether the operating system lets this process use tile registers: Linux wants to be asked, once for all threads.

    Code with tiles in it is made, or loaded (``missing_features``), only after this; a tile instruction without it kills the process.
    """
    if "amx-tile" not in features or platform.system() != "Linux":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)


def system_flags() -> frozenset[str]:
    """Return the flags of the first processor in /proc/cpuinfo; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    named = (line.partition(":") for line in lines)
    return frozenset(next((flags.split() for name, _, flags in named if name.strip() in ("flags", "Features")), []))
