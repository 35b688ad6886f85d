"""A TIR function as a C function: TVM's ``c`` target prints its body, the signature is written here.

TVM prints functions of its packed calling convention, with headers of its runtime. Kernels here are called by nobody but the model's own
schedule, so they take plain pointers and sizes: each buffer argument becomes a pointer before TVM prints it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import tvm
from qcompile.backends.lowering.translate import SCHEDULED
from tvm import s_tir, tirx
from tvm.ir import PointerType, PrimType

from qcompile.errors import Refused

_C = {"int8": "int8_t", "uint8": "uint8_t", "int16": "int16_t", "int32": "int32_t", "int64": "int64_t", "uint32": "uint32_t",
      "float32": "float", "bool": "uint8_t"}  # fmt: skip


_OWN = {"expf": "qc_expf"}  # functions of C's library -> those of runtime.h


@dataclass(frozen=True)
class Function:
    """A C function.

    Attributes:
        name: in C.
        declaration: ``static void name(..)`` without a semicolon.
        body: with its braces.
    """

    name: str
    declaration: str
    body: str

    @property
    def text(self) -> str:
        return f"{self.declaration} {self.body}\n"


def passes(simplify: bool) -> list[Any]:
    """Return the passes from a TIR function to loops over flat buffers, in order.

    ``simplify`` is for functions that TVM made. It would put the values of ``let`` back where they are used.
    """
    return [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.LowerMatchBuffer(),
        *([s_tir.transform.StmtSimplify()] if simplify else []),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.NarrowDataType(32),
        tirx.transform.StorageRewrite(),
        tirx.transform.UnrollLoop(),
        *([tirx.transform.StmtSimplify(), tirx.transform.RemoveNoOp()] if simplify else []),
        tirx.transform.LowerIntrin(),
    ]


def print_function(function: tirx.PrimFunc, name: str, written: Collection[int]) -> Function:
    """Return the C of a function; ``written`` are those of its buffers that it writes, the others are read.

    Raises:
        Refused: it calls something that no C has without a library.
    """
    target = tvm.target.Target({"kind": "c"})
    module = tvm.IRModule({name: function.with_attr("global_symbol", name)})
    with target:
        module = tvm.transform.Sequential([tirx.transform.BindTarget(target), *passes(SCHEDULED not in (function.attrs or {}))])(module)
    lowered = module[name]
    parameters, declarations, words = [], [], []
    for parameter in lowered.params:
        if tirx.is_buffer_var(parameter):
            dtype = str(parameter.ty.dtype)
            pointer = tirx.Var(parameter.name, PointerType(PrimType(dtype)))
            parameters.append(pointer)
            declarations.append(tirx.DeclBuffer(parameter, data=pointer))
            words.append(f"{'' if len(declarations) - 1 in written else 'const '}{_C[dtype]} *{{}}")
        else:
            parameters.append(parameter)
            words.append(f"{_C[str(parameter.ty.dtype)]} {{}}")
    body = tirx.SeqStmt([*declarations, lowered.body])
    plain = tirx.PrimFunc(parameters, body, PrimType("void"), attrs=lowered.attrs)
    try:
        text = tvm.get_global_func("target.build.c")(tvm.IRModule({name: plain}), target).inspect_source()
    except tvm.error.InternalError as error:
        found = re.search(r'name="tirx\.(\w+)"', str(error))
        raise Refused(f"no C for {found[1] if found else str(error).splitlines()[-1]}", node=name) from error
    found = re.search(rf"^TVM_DLL void {name}\(([^)]*)\) (\{{.*)", text, re.MULTILINE | re.DOTALL)
    assert found, text
    names = [parameter.split()[-1].lstrip("*") for parameter in found[1].split(", ")]
    body = re.sub(rf"\b({'|'.join(_OWN)})\(", lambda call: f"{_OWN[call[1]]}(", found[2].rstrip())
    foreign = set(re.findall(r"\b(\w+f)\(", body)) - set(_OWN.values())
    if foreign:
        raise Refused(f"no C for {', '.join(sorted(foreign))} without a library of mathematics", node=name)
    unread = "".join(f"  (void){its};\n" for its in names if not re.search(rf"\b{its}\b", body))
    signature = ", ".join(word.format(its) for word, its in zip(words, names, strict=True))
    return Function(name, f"static void {name}({signature})", body.replace("{\n", "{\n" + unread, 1))
