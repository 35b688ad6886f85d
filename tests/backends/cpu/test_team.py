"""Teams of threads: every task once, on as many threads as asked, from any thread, asleep between calls, gone with their owner."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from qcompile.backends.cpu import team
from qcompile.backends.cpu.pipeline import COMPILE_LOCK
from tvm import tirx
from tvm.ir import StringImm

TASKS = Path("/proc/self/task")
needs_proc = pytest.mark.skipif(not TASKS.is_dir(), reason="needs /proc")


def _build(wrong: bool = False) -> Any:
    """Build ``count(counts int64 [n])``: a parallel loop that adds 1 to every count; if ``wrong``, it fails at a negative one."""
    n, i = tirx.Var("n", "int64"), tirx.Var("i", "int64")
    counts = tirx.decl_buffer((n,), "int64", name="counts")
    body: Any = tirx.BufferStore(counts, counts[i] + tirx.const(1, "int64"), [i])
    if wrong:
        body = tirx.SeqStmt(
            [tirx.AssertStmt(counts[i] >= tirx.const(0, "int64"), StringImm("ValueError"), [StringImm("is negative")]), body]
        )
    loop = tirx.For(i, tirx.const(0, "int64"), n, tirx.ForKind.PARALLEL, body)
    count = tirx.PrimFunc([counts], loop).with_attr("global_symbol", "count")
    with COMPILE_LOCK:
        module = tvm.tirx.build(tvm.IRModule({"count": count, team.CONNECT: team.connector()}), tvm.target.Target("llvm"))
    team.connect(module)
    return module["count"]


@pytest.fixture(scope="module")
def count() -> Any:
    return _build()


def _in_thread(work: Callable[[], None]) -> None:
    """Run in a thread, which has a team of its own; pass its exception on."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def _counted(count: Any, size: int, calls: int) -> np.ndarray:
    counts = np.zeros(size, np.int64)
    shown = tvm_ffi.from_dlpack(counts)
    for _ in range(calls):
        count(shown)
    return counts


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_every_task_runs_once(count: Any, threads: int, size: int) -> None:
    def work() -> None:
        team.set_threads(threads)
        assert set(_counted(count, size, 2000)) == {2000}

    _in_thread(work)


def test_a_team_grows_and_shrinks(count: Any) -> None:
    def work() -> None:
        for threads in (2, 4, 1, 3, 5, 2):
            team.set_threads(threads)
            assert set(_counted(count, 11, 200)) == {200}

    _in_thread(work)


def test_a_thread_without_a_team_works_alone(count: Any) -> None:
    def work() -> None:
        assert set(_counted(count, 7, 10)) == {10}

    _in_thread(work)


def test_threads_call_at_the_same_time(count: Any) -> None:
    wrong: list[int] = []

    def work(threads: int) -> None:
        team.set_threads(threads)
        if set(_counted(count, 13, 1000)) != {1000}:
            wrong.append(threads)

    callers = [threading.Thread(target=work, args=(1 + i % 3,)) for i in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_an_error_in_a_task_is_raised_in_the_calling_thread() -> None:
    count = _build(wrong=True)

    def work() -> None:
        team.set_threads(2)
        for place in (0, 7):
            counts = np.zeros(8, np.int64)
            counts[place] = -5
            with pytest.raises(ValueError, match="is negative"):
                count(tvm_ffi.from_dlpack(counts))
            assert set(_counted(count, 8, 100)) == {100}, "the team works on"

    _in_thread(work)


def _threads() -> set[str]:
    return {path.name for path in TASKS.iterdir()}


def _until(condition: Callable[[], bool]) -> bool:
    """Return whether a condition comes true within a time far beyond what it takes."""
    stop = time.monotonic() + 30
    while not condition() and time.monotonic() < stop:
        time.sleep(0.01)
    return condition()


@needs_proc
def test_a_team_ends_with_its_owner_and_sleeps_before(count: Any) -> None:
    team.set_threads(2)  # the code of teams is made
    before = _threads()

    def work() -> None:
        team.set_threads(4)
        own = _threads() - before - {str(threading.get_native_id())}
        assert len(own) == 3
        for _ in range(3):
            assert set(_counted(count, 9, 50)) == {50}
            assert _until(lambda: all((TASKS / name / "stat").read_text().rsplit(")", 1)[1].split()[0] == "S" for name in own))
            spent = [(TASKS / name / "schedstat").read_text() for name in own]
            time.sleep(0.05)
            assert [(TASKS / name / "schedstat").read_text() for name in own] == spent, "a thread that sleeps uses no processor"

    _in_thread(work)
    assert _until(lambda: _threads() <= before)


_FORK = """
import os, sys, warnings
sys.path.insert(0, sys.argv[1])
from test_team import _build, _counted, _threads, team
warnings.simplefilter("ignore")
count = _build()
team.set_threads(3)
assert set(_counted(count, 9, 100)) == {100}
child = os.fork()
if child == 0:
    assert set(_counted(count, 9, 100)) == {100}
    team.set_threads(3)
    assert set(_counted(count, 9, 100)) == {100}
    os._exit(10 * len(_threads()))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
assert set(_counted(count, 9, 100)) == {100}
"""


@needs_proc
def test_a_forked_process_gets_threads_of_its_own() -> None:
    command = [sys.executable, "-c", _FORK, os.fspath(Path(__file__).parent)]
    done = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    assert int(done.stdout) == 30
