"""Instruction sets that the kernels are written for, and the TVM target of a machine."""

from __future__ import annotations

import functools
import os
from typing import Any

import tvm
from tvm.target import codegen

# TVM's thread pool would pin the calling thread to one core, for good and for every other library in the process (measured:
# sched_getaffinity shrinks from two cores to one at the first parallel kernel). The pool reads this when it starts.
os.environ.setdefault("TVM_BIND_THREADS", "0")

PORTABLE = "portable"
AVX512_VNNI = "avx512vnni"
KNOWN = (AVX512_VNNI, PORTABLE)

_VNNI_FEATURES = ("avx512f", "avx512bw", "avx512vl", "avx512vnni")


@functools.cache
def detect(mcpu: str | None = None, mattr: str | None = None) -> str:
    """Return the best instruction set of ``KNOWN`` for an LLVM processor name (default: this machine's)."""
    target = tvm.target.Target(target_description(mcpu, mattr))
    has = functools.partial(codegen.target_has_features, target=target)
    return AVX512_VNNI if "x86" in codegen.llvm_get_system_triple() and all(has(name) for name in _VNNI_FEATURES) else PORTABLE


def target_description(mcpu: str | None = None, mattr: str | None = None, threads: int | None = None) -> dict[str, Any]:
    """Return the TVM target, as a dict, for an LLVM processor name; without one, for the machine this runs on."""
    description: dict[str, Any] = {"kind": "llvm", "mcpu": mcpu or codegen.llvm_get_system_cpu(), "num-cores": threads or thread_count()}
    if mattr:
        description["mattr"] = mattr.split(",")
    return description


def thread_count() -> int:
    """Return the threads that kernels are split for: ``TVM_NUM_THREADS``, else the processors this process may use."""
    return int(os.environ.get("TVM_NUM_THREADS", "0")) or len(os.sched_getaffinity(0))


def check(isa: str) -> str:
    """Return ``isa``.

    Raises:
        ValueError: it is not one of ``KNOWN``.
    """
    if isa not in KNOWN:
        raise ValueError(f"unknown instruction set '{isa}'; known are {', '.join(KNOWN)}")
    return isa
