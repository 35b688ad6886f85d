"""Threads for kernels: each calling thread has a team of its own, which sleeps while nothing is called.

TVM's pool gives every thread its share of a kernel beforehand and then calls ``sched_yield`` until all are done. Where another library's
thread spins on a processor (ONNX Runtime's for 26 ms after a call), ours waits behind it for a time slice at every kernel: 30 ms for a
call of 2.5; and for 50 ms after each call it keeps a processor from everyone else. Here a kernel's tasks are claimed: the calling thread
does what nobody has begun, so a thread that comes late costs nothing but its help.

Code is made to launch its parallel loops here by ``connect``: it holds the address of the function that launches (the runtime's, at first)
in a variable, which ``connector`` sets. The team is written in LLVM's language, for TIR has no atomic operations. It is compiled once in a
process and never unloaded: its threads may run until the process ends.

A region is one parallel loop of one kernel. ``region`` holds its number in the upper 48 bits and the count of its tasks in the lower 16,
so it only grows. Task ``t`` belongs to whoever raises ``claimed`` of seat ``t`` to the region; ``finished`` is set after it ran. The
launching thread leaves a region when every task of it is finished: what a region's fields hold is theirs as long as one is not.
"""

from __future__ import annotations

import ctypes
import functools
import os
import tempfile
import threading
from string import Template
from typing import Any

import tvm
import tvm_ffi
from qcompile.backends.cpu.kernels.processor import machine
from tvm import tirx
from tvm.ir import StringImm
from tvm.support import cc

CONNECT = "qcompile_connect"
PAUSES = 2000  # checks with a pause between, about 100 us: a kernel that follows finds the team awake
YIELDS = 4000  # checks that let other threads go first, about 1 ms: so does the next call

_own = threading.local()  # how many threads the calling thread's team was given
_making = threading.Lock()

# What a processor does between two looks at a variable that another one will change; nothing where we know no word for it.
_PAUSE = {"x86_64": "pause", "aarch64": "isb", "arm64": "isb"}

_CONNECTOR = """
@__TVMBackendParallelLaunch = external global ptr

define i32 @qcompile_set_launcher(i64 %address) {
  %launcher = inttoptr i64 %address to ptr
  store ptr %launcher, ptr @__TVMBackendParallelLaunch
  ret i32 0
}
"""

_TEAM = """
%env = type { ptr, i32 }                                     ; TVMParallelGroupEnv: barrier (unused), tasks
%seat = type { i64, i64, ptr, i32, i64, [24 x i8] }          ; claimed, finished, team, number, thread: a cache line
%team = type { i64, ptr, ptr, %env, [24 x i8],               ; region, function, its data, its environment
               i32, i32, i32, i32, i32, i32, [40 x i8],      ; threads of a region, seats, asleep, stop, failed task + 1, avoided + 1
               [64 x i8], [64 x i8], [0 x %seat] }           ; mutex, condition, seats; seat 0 is the calling thread's

%any = type { i32, i32, i64 }                                 ; TVMFFIAny: kind (1: integer), -, value

@key = internal global i64 0

declare i32 @pthread_key_create(ptr, ptr)
declare ptr @pthread_getspecific(i64)
declare i32 @pthread_setspecific(i64, ptr)
declare i32 @pthread_create(ptr, ptr, ptr, ptr)
declare i32 @pthread_join(i64, ptr)
declare i32 @pthread_mutex_init(ptr, ptr)
declare i32 @pthread_mutex_lock(ptr)
declare i32 @pthread_mutex_unlock(ptr)
declare i32 @pthread_cond_init(ptr, ptr)
declare i32 @pthread_cond_wait(ptr, ptr)
declare i32 @pthread_cond_signal(ptr)
declare i32 @pthread_cond_broadcast(ptr)
declare i32 @sched_yield()
declare i32 @sched_getcpu()
declare i32 @sched_getaffinity(i32, i64, ptr)
declare i32 @pthread_setaffinity_np(i64, i64, ptr)
declare ptr @aligned_alloc(i64, i64)
declare void @free(ptr)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)

; ---- tasks of a region ----

; Return whether the calling thread may run the seat's task of the region.
define internal i1 @claim(ptr %seat, i64 %region) {
  %seen = load atomic i64, ptr %seat monotonic, align 64
  %open = icmp ult i64 %seen, %region
  br i1 %open, label %try, label %taken
try:
  %pair = cmpxchg ptr %seat, i64 %seen, i64 %region acq_rel monotonic
  %won = extractvalue { i64, i1 } %pair, 1
  ret i1 %won
taken:
  ret i1 false
}

; Run every task of the region that nobody has claimed, from task %first on and around.
define internal void @work(ptr %team, i64 %region, i32 %first) {
entry:
  %low = and i64 %region, 65535
  %tasks = trunc i64 %low to i32
  %function_at = getelementptr %team, ptr %team, i32 0, i32 1
  %data_at = getelementptr %team, ptr %team, i32 0, i32 2
  %env = getelementptr %team, ptr %team, i32 0, i32 3
  br label %each
each:
  %n = phi i32 [ 0, %entry ], [ %next, %done ]
  %place = add i32 %first, %n
  %task = urem i32 %place, %tasks
  %seat = getelementptr %team, ptr %team, i32 0, i32 14, i32 %task
  %mine = call i1 @claim(ptr %seat, i64 %region)
  br i1 %mine, label %run, label %done
run:
  %function = load ptr, ptr %function_at
  %data = load ptr, ptr %data_at
  %code = call i32 %function(i32 %task, ptr %env, ptr %data)
  %right = icmp eq i32 %code, 0
  br i1 %right, label %finish, label %fail
fail:
  %failed = getelementptr %team, ptr %team, i32 0, i32 9
  %number = add i32 %task, 1
  store atomic i32 %number, ptr %failed monotonic, align 4
  br label %finish
finish:
  %finished = getelementptr %seat, ptr %seat, i32 0, i32 1
  store atomic i64 %region, ptr %finished release, align 8
  br label %done
done:
  %next = add i32 %n, 1
  %more = icmp ult i32 %next, %tasks
  br i1 %more, label %each, label %out
out:
  ret void
}

; Wait until the seat's task of the region is finished; its thread may wait for this very processor.
define internal void @await(ptr %seat, i64 %region) {
entry:
  %finished = getelementptr %seat, ptr %seat, i32 0, i32 1
  br label %check
check:
  %n = phi i32 [ 0, %entry ], [ %next, %again ]
  %seen = load atomic i64, ptr %finished acquire, align 8
  %over = icmp eq i64 %seen, %region
  br i1 %over, label %out, label %wait
wait:
  %next = add i32 %n, 1
  %short = icmp ult i32 %n, $pauses
  br i1 %short, label %pause, label %yield
pause:
  call void asm sideeffect "$pause", "~{memory}"()
  br label %again
yield:
  call i32 @sched_yield()
  br label %again
again:
  br label %check
out:
  ret void
}

; In place of TVMBackendParallelLaunch: run the function on the calling thread's team, on this thread alone where it has none.
define internal i32 @launch(ptr %function, ptr %data, i32 %wanted) {
  %alone = alloca %env
  %key = load i64, ptr @key
  %team = call ptr @pthread_getspecific(i64 %key)
  %none = icmp eq ptr %team, null
  br i1 %none, label %single, label %count
count:
  %threads_at = getelementptr %team, ptr %team, i32 0, i32 5
  %tasks = load i32, ptr %threads_at
  %few = icmp ult i32 %tasks, 2
  br i1 %few, label %single, label %publish
single:
  store %env { ptr null, i32 1 }, ptr %alone
  %only = call i32 %function(i32 0, ptr %alone, ptr %data)
  ret i32 %only
publish:
  %function_at = getelementptr %team, ptr %team, i32 0, i32 1
  store ptr %function, ptr %function_at
  %data_at = getelementptr %team, ptr %team, i32 0, i32 2
  store ptr %data, ptr %data_at
  %tasks_at = getelementptr %team, ptr %team, i32 0, i32 3, i32 1
  store i32 %tasks, ptr %tasks_at
  %last = load atomic i64, ptr %team monotonic, align 64
  %number = and i64 %last, -65536
  %next = add i64 %number, 65536
  %low = zext i32 %tasks to i64
  %region = or i64 %next, %low
  ; The order of all: a thread that goes to sleep counts itself first and then looks at the region once more.
  store atomic i64 %region, ptr %team seq_cst, align 64
  %asleep_at = getelementptr %team, ptr %team, i32 0, i32 7
  %asleep = load atomic i32, ptr %asleep_at seq_cst, align 4
  %any = icmp ne i32 %asleep, 0
  br i1 %any, label %wake, label %own
wake:
  %mutex = getelementptr %team, ptr %team, i32 0, i32 12
  %condition = getelementptr %team, ptr %team, i32 0, i32 13
  call void @part(ptr %team)
  call i32 @pthread_mutex_lock(ptr %mutex)
  br label %signal
signal:
  %woken = phi i32 [ 1, %wake ], [ %woken_next, %signal ]
  call i32 @pthread_cond_signal(ptr %condition)
  %woken_next = add i32 %woken, 1
  %wake_more = icmp ult i32 %woken_next, %tasks
  br i1 %wake_more, label %signal, label %woke
woke:
  call i32 @pthread_mutex_unlock(ptr %mutex)
  br label %own
own:
  call void @work(ptr %team, i64 %region, i32 0)
  br label %join
join:
  %task = phi i32 [ 0, %own ], [ %task_next, %join ]
  %seat = getelementptr %team, ptr %team, i32 0, i32 14, i32 %task
  call void @await(ptr %seat, i64 %region)
  %task_next = add i32 %task, 1
  %more = icmp ult i32 %task_next, %tasks
  br i1 %more, label %join, label %result
result:
  %failed_at = getelementptr %team, ptr %team, i32 0, i32 9
  %failed = load atomic i32, ptr %failed_at monotonic, align 4
  %right = icmp eq i32 %failed, 0
  br i1 %right, label %out, label %again
again:
  ; Once more in this thread, so that the error's message is this thread's.
  store i32 0, ptr %failed_at
  %first = sub i32 %failed, 1
  %env = getelementptr %team, ptr %team, i32 0, i32 3
  %code = call i32 %function(i32 %first, ptr %env, ptr %data)
  ret i32 %code
out:
  ret i32 0
}

; ---- threads ----

; Keep the other threads off the calling one's processor. Linux may wake a thread where its waker runs; both then share that processor
; for many calls, though another one is free.
define internal void @part(ptr %team) {
entry:
  %mask = alloca [128 x i8], align 8
  %avoided_at = getelementptr %team, ptr %team, i32 0, i32 10
  %avoided = load i32, ptr %avoided_at
  %processor = call i32 @sched_getcpu()
  %mark = add i32 %processor, 1
  %known = icmp eq i32 %avoided, %mark
  %fits = icmp ult i32 %processor, 1024
  %odd = xor i1 %fits, true
  %nothing = or i1 %known, %odd
  br i1 %nothing, label %out, label %look
look:
  %code = call i32 @sched_getaffinity(i32 0, i64 128, ptr %mask)
  %right = icmp eq i32 %code, 0
  br i1 %right, label %change, label %out
change:
  %place = lshr i32 %processor, 3
  %byte_at = getelementptr i8, ptr %mask, i32 %place
  %byte = load i8, ptr %byte_at
  %low = and i32 %processor, 7
  %bit = shl i32 1, %low
  %bit8 = trunc i32 %bit to i8
  %others = xor i8 %bit8, -1
  %cleared = and i8 %byte, %others
  store i8 %cleared, ptr %byte_at
  store i32 %mark, ptr %avoided_at
  %seats_at = getelementptr %team, ptr %team, i32 0, i32 6
  %seats = load i32, ptr %seats_at
  br label %each
each:
  %number = phi i32 [ 1, %change ], [ %next, %set ]
  %more = icmp ult i32 %number, %seats
  br i1 %more, label %set, label %out
set:
  ; Refused where this is the only processor.
  %thread_at = getelementptr %team, ptr %team, i32 0, i32 14, i32 %number, i32 4
  %thread = load i64, ptr %thread_at
  call i32 @pthread_setaffinity_np(i64 %thread, i64 128, ptr %mask)
  %next = add i32 %number, 1
  br label %each
out:
  ret void
}

; The life of a thread: work, wait for the next region, sleep when none comes.
define internal ptr @member(ptr %seat) {
entry:
  %team_at = getelementptr %seat, ptr %seat, i32 0, i32 2
  %team = load ptr, ptr %team_at
  %number_at = getelementptr %seat, ptr %seat, i32 0, i32 3
  %number = load i32, ptr %number_at
  %asleep = getelementptr %team, ptr %team, i32 0, i32 7
  %stop_at = getelementptr %team, ptr %team, i32 0, i32 8
  %mutex = getelementptr %team, ptr %team, i32 0, i32 12
  %condition = getelementptr %team, ptr %team, i32 0, i32 13
  br label %check
check:
  %last = phi i64 [ 0, %entry ], [ %region, %new ], [ %last, %pause ], [ %last, %yield ], [ %last, %awake ]
  %n = phi i32 [ 0, %entry ], [ 0, %new ], [ %next, %pause ], [ %next, %yield ], [ 0, %awake ]
  %region = load atomic i64, ptr %team acquire, align 64
  %same = icmp eq i64 %region, %last
  br i1 %same, label %wait, label %new
new:
  call void @work(ptr %team, i64 %region, i32 %number)
  br label %check
wait:
  %next = add i32 %n, 1
  %short = icmp ult i32 %n, $pauses
  br i1 %short, label %pause, label %long
pause:
  call void asm sideeffect "$pause", "~{memory}"()
  br label %check
long:
  %longer = icmp ult i32 %n, $longest
  br i1 %longer, label %yield, label %sleep
yield:
  call i32 @sched_yield()
  br label %check
sleep:
  call i32 @pthread_mutex_lock(ptr %mutex)
  atomicrmw add ptr %asleep, i32 1 seq_cst
  br label %look
look:
  %now = load atomic i64, ptr %team seq_cst, align 64
  %quiet = icmp eq i64 %now, %last
  %stop = load i32, ptr %stop_at
  %stay = icmp eq i32 %stop, 0
  %asleep_still = and i1 %quiet, %stay
  br i1 %asleep_still, label %rest, label %rise
rest:
  call i32 @pthread_cond_wait(ptr %condition, ptr %mutex)
  br label %look
rise:
  atomicrmw sub ptr %asleep, i32 1 seq_cst
  call i32 @pthread_mutex_unlock(ptr %mutex)
  br i1 %stay, label %awake, label %leave
awake:
  br label %check
leave:
  ret ptr null
}

; Give the calling thread a team of this many threads, itself among them: fewer where the system grants fewer.
define i32 @__tvm_ffi_resize(ptr %self, ptr %arguments, i32 %count, ptr %result) {
  %value = getelementptr %any, ptr %arguments, i32 0, i32 2
  %wanted = load i64, ptr %value
  %threads = trunc i64 %wanted to i32
  %key = load i64, ptr @key
  %old = call ptr @pthread_getspecific(i64 %key)
  %none = icmp eq ptr %old, null
  br i1 %none, label %make, label %compare
compare:
  %seats_at = getelementptr %team, ptr %old, i32 0, i32 6
  %seats = load i32, ptr %seats_at
  %enough = icmp uge i32 %seats, %threads
  br i1 %enough, label %keep, label %replace
keep:
  %kept_at = getelementptr %team, ptr %old, i32 0, i32 5
  store i32 %threads, ptr %kept_at
  ret i32 0
replace:
  call i32 @pthread_setspecific(i64 %key, ptr null)
  call void @close(ptr %old)
  br label %make
make:
  %end = getelementptr %team, ptr null, i32 0, i32 14, i32 %threads
  %bytes = ptrtoint ptr %end to i64
  %team = call ptr @aligned_alloc(i64 64, i64 %bytes)
  %lacking = icmp eq ptr %team, null
  br i1 %lacking, label %fail, label %fill
fail:
  ret i32 0
fill:
  call void @llvm.memset.p0.i64(ptr %team, i8 0, i64 %bytes, i1 false)
  %mutex = getelementptr %team, ptr %team, i32 0, i32 12
  call i32 @pthread_mutex_init(ptr %mutex, ptr null)
  %condition = getelementptr %team, ptr %team, i32 0, i32 13
  call i32 @pthread_cond_init(ptr %condition, ptr null)
  br label %start
start:
  %number = phi i32 [ 1, %fill ], [ %number_next, %started ]
  %more = icmp ult i32 %number, %threads
  br i1 %more, label %seat, label %ready
seat:
  %place = getelementptr %team, ptr %team, i32 0, i32 14, i32 %number
  %team_at = getelementptr %seat, ptr %place, i32 0, i32 2
  store ptr %team, ptr %team_at
  %number_at = getelementptr %seat, ptr %place, i32 0, i32 3
  store i32 %number, ptr %number_at
  %thread_at = getelementptr %seat, ptr %place, i32 0, i32 4
  %code = call i32 @pthread_create(ptr %thread_at, ptr null, ptr @member, ptr %place)
  %refused = icmp ne i32 %code, 0
  br i1 %refused, label %ready, label %started
started:
  %number_next = add i32 %number, 1
  br label %start
ready:
  %have_at = getelementptr %team, ptr %team, i32 0, i32 5
  store i32 %number, ptr %have_at
  %count_at = getelementptr %team, ptr %team, i32 0, i32 6
  store i32 %number, ptr %count_at
  call i32 @pthread_setspecific(i64 %key, ptr %team)
  ret i32 0
}

; End the threads of a team; pthreads call this when the calling thread ends.
define internal void @close(ptr %team) {
  %mutex = getelementptr %team, ptr %team, i32 0, i32 12
  %condition = getelementptr %team, ptr %team, i32 0, i32 13
  %stop_at = getelementptr %team, ptr %team, i32 0, i32 8
  call i32 @pthread_mutex_lock(ptr %mutex)
  store i32 1, ptr %stop_at
  call i32 @pthread_cond_broadcast(ptr %condition)
  call i32 @pthread_mutex_unlock(ptr %mutex)
  %seats_at = getelementptr %team, ptr %team, i32 0, i32 6
  %seats = load i32, ptr %seats_at
  br label %each
each:
  %number = phi i32 [ 1, %0 ], [ %next, %join ]
  %more = icmp ult i32 %number, %seats
  br i1 %more, label %join, label %out
join:
  %thread_at = getelementptr %team, ptr %team, i32 0, i32 14, i32 %number, i32 4
  %thread = load i64, ptr %thread_at
  call i32 @pthread_join(i64 %thread, ptr null)
  %next = add i32 %number, 1
  br label %each
out:
  call void @free(ptr %team)
  ret void
}

; ---- for the process ----

; Return the address of launch. Called once.
define i32 @__tvm_ffi_start(ptr %self, ptr %arguments, i32 %count, ptr %result) {
  call i32 @pthread_key_create(ptr @key, ptr @close)
  store %any { i32 1, i32 0, i64 ptrtoint (ptr @launch to i64) }, ptr %result
  ret i32 0
}

; After a fork the calling thread's team has no threads any more. Its memory is lost, for nobody can say in what state it is.
define i32 @__tvm_ffi_forget(ptr %self, ptr %arguments, i32 %count, ptr %result) {
  %key = load i64, ptr @key
  call i32 @pthread_setspecific(i64 %key, ptr null)
  ret i32 0
}
"""


def connector() -> tirx.PrimFunc:
    """Return the function ``CONNECT(address)``: a module that holds it can be told who launches its parallel loops."""
    address = tirx.Var("address", "int64")
    call = tirx.Evaluate(tirx.call_extern("int32", "qcompile_set_launcher", address))
    body = tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", StringImm(_CONNECTOR), call)
    return tirx.PrimFunc([address], body).with_attr("global_symbol", CONNECT)


def connect(module: Any) -> None:
    """Let teams run the parallel loops of a module that holds a ``connector``."""
    module = getattr(module, "mod", module)
    if module.implements_function(CONNECT, True):
        module.get_function(CONNECT, True)(_teams().launcher)


def set_threads(threads: int) -> None:
    """Give the calling thread a team of this many threads, itself among them; the others end with it."""
    if getattr(_own, "threads", None) != threads:
        _teams().resize(threads)
        _own.threads = threads


@functools.cache
def library() -> bytes:
    """Return the code of teams as a shared library, for processes without a compiler.

    Raises:
        RuntimeError: it cannot be linked.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled, linked = os.path.join(folder, "team.o"), os.path.join(folder, "team.so")
        _compiled().write_to_file(compiled, "o")
        cc.create_shared(linked, [compiled])
        with open(linked, "rb") as file:
            return file.read()


def _compiled() -> Any:
    """Return the module of teams."""
    # Named here: the object would bear the name of the temporary file, another each time.
    text = (
        'source_filename = "team"\n'
        + _layout()
        + Template(_TEAM).substitute(pause=_PAUSE.get(machine(), ""), pauses=PAUSES, longest=PAUSES + YIELDS)
    )
    with tempfile.NamedTemporaryFile("w", suffix=".ll") as file:
        file.write(text)
        file.flush()
        return tvm_ffi.load_module(file.name)


class _Teams:
    """The compiled code of teams."""

    def __init__(self) -> None:
        module = _compiled()
        self.launcher: int = module["start"]()
        self.resize, self._forget = module["resize"], module["forget"]
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(module))  # threads may be in this code until the process has ended

    def forget(self) -> None:
        """Drop the calling thread's team, in a process that was forked: its threads are not there."""
        self._forget()
        _own.__dict__.clear()


@functools.cache
def _made() -> _Teams:
    teams = _Teams()
    os.register_at_fork(after_in_child=teams.forget)
    return teams


def _teams() -> _Teams:
    with _making:
        return _made()


def _layout() -> str:
    """Return the lines of LLVM text that name this machine, as TVM writes them for any function."""
    from qcompile.backends.lowering.translate import COMPILE_LOCK

    with COMPILE_LOCK:
        text = tvm.tirx.build(tvm.IRModule({CONNECT: connector()}), tvm.target.Target("llvm")).inspect_source("ll")
    return "".join(line + "\n" for line in text.splitlines() if line.startswith("target "))
