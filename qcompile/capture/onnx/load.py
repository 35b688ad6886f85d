"""Reading of ONNX files that may be damaged or hostile: every size is checked with Python integers before memory is taken.

External data is opened one path component at a time below the model's folder, never through a link, so that no name in the
file reaches anything outside it (CVE-2022-25882, CVE-2024-27318, CVE-2026-34446).
"""

from __future__ import annotations

import math
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError

from qcompile.errors import Refused

OLDEST_OPSET = 7

TORCH_DTYPES = {
    ir.DataType.FLOAT: torch.float32, ir.DataType.DOUBLE: torch.float64, ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16, ir.DataType.INT64: torch.int64, ir.DataType.INT32: torch.int32, ir.DataType.INT16: torch.int16,
    ir.DataType.INT8: torch.int8, ir.DataType.UINT8: torch.uint8, ir.DataType.BOOL: torch.bool,
}  # fmt: skip

# Narrow integers are kept one code per element; the importer remembers how many bits they have.
NARROW_DTYPES = {
    ir.DataType.INT4: (torch.int8, "int4"), ir.DataType.UINT4: (torch.uint8, "uint4"),
    ir.DataType.INT2: (torch.int8, "int2"), ir.DataType.UINT2: (torch.uint8, "uint2"),
}  # fmt: skip

# Fields of a TensorProto other than raw_data that may hold the elements, and how many of their entries make one element.
_TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")


def printable(text: object) -> str:
    """Return a name from a file as text that is safe to print: control characters are replaced."""
    return "".join(c if c.isprintable() else "?" for c in str(text))[:200]


def torch_dtype(dtype: ir.DataType | None, node: str) -> torch.dtype:
    """Return the torch dtype that holds values of an ONNX type.

    Raises:
        Refused: the type is a string, complex or another type without tensors here.
    """
    if dtype in TORCH_DTYPES:
        return TORCH_DTYPES[dtype]
    if dtype in NARROW_DTYPES:
        return NARROW_DTYPES[dtype][0]
    name = dtype.name.lower() if dtype is not None else "undefined"
    raise Refused(f"{name} tensors are not supported", node=printable(node), way_out="cast them to a supported type in the model")


def load_model(source: str | os.PathLike[str] | bytes | onnx.ModelProto) -> tuple[ir.Model, Path | None]:
    """Return the model and the folder that its external data lies in (None for a model from memory).

    Raises:
        Refused: the file is missing, is no ONNX model, or uses operator sets that are too old.
    """
    if isinstance(source, onnx.ModelProto):
        return _deserialize(source, "model"), None
    if isinstance(source, bytes):
        return _deserialize(_parse(source, "model"), "model"), None
    path = Path(source)
    return _deserialize(_parse(_read_file(path), str(path)), str(path)), path.resolve().parent


def _read_file(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Refused("not a regular file", node=printable(path), way_out="give the path of an .onnx file")
        return path.read_bytes()
    except OSError as error:
        raise Refused(f"the file cannot be read: {error.strerror}", node=printable(path), way_out="check the path") from error


def _parse(data: bytes, name: str) -> onnx.ModelProto:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise Refused("the file is no ONNX model or is cut short", node=printable(name), way_out="export it again") from error
    if not model.ir_version or not model.HasField("graph") or not model.opset_import:
        raise Refused("the file holds no ONNX graph", node=printable(name), way_out="export it again")
    return model


def _deserialize(model: onnx.ModelProto, name: str) -> ir.Model:
    _check_names(model.graph)
    try:
        loaded = ir.serde.deserialize_model(model)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise Refused(
            f"the ONNX model is not valid: {printable(lines[0])}", node=printable(name), way_out="run onnx.checker on it"
        ) from error
    version = loaded.opset_imports.get("", loaded.opset_imports.get("ai.onnx"))
    if version is not None and not OLDEST_OPSET <= version <= onnx.defs.onnx_opset_version():
        known = f"{OLDEST_OPSET} to {onnx.defs.onnx_opset_version()}"
        raise Refused(
            f"operator set {version} is not supported; known are {known}",
            node=printable(name),
            way_out="convert the model with onnx.version_converter",
        )
    return loaded


def _check_names(graph: onnx.GraphProto) -> None:
    """Refuse values that are defined twice or never: a graph in single assignment form has neither."""
    inputs = [value.name for value in graph.input]
    initializers = [tensor.name for tensor in graph.initializer] + [tensor.values.name for tensor in graph.sparse_initializer]
    defined = set(inputs) | set(initializers)
    if len(set(inputs)) != len(inputs) or len(set(initializers)) != len(initializers):
        raise Refused("two inputs or two initializers have one name", node=printable(graph.name))
    for node in graph.node:
        for output in filter(None, node.output):
            if output in defined:
                raise Refused(
                    f"the value '{printable(output)}' is defined twice", node=printable(node.name), operator=printable(node.op_type)
                )
            defined.add(output)
    for node in graph.node:
        if missing := [name for name in node.input if name and name not in defined]:
            reason = f"its input '{printable(missing[0])}' is defined nowhere"
            raise Refused(reason, node=printable(node.name or (node.output or [""])[0]), operator=printable(node.op_type))
    if missing := [value.name for value in graph.output if value.name not in defined]:
        raise Refused("the graph's output is defined nowhere", node=printable(missing[0]))


# ---- tensors --------------------------------------------------------------------------------------------------------------


def read_tensor(tensor: Any, name: str, folder: Path | None) -> torch.Tensor:
    """Return the elements of an initializer or a tensor attribute; int4 and int2 as one int8 or uint8 code per element.

    Raises:
        Refused: the type is not supported, the data has not the size that the dimensions ask for, values are not finite, or
            external data is missing or outside the model's folder.
    """
    label = printable(name)
    dtype = torch_dtype(tensor.dtype, name)
    shape = [int(size) for size in tensor.shape]
    if any(size < 0 for size in shape):
        raise Refused(f"the tensor has the negative size {min(shape)}", node=label)
    count = math.prod(shape)
    needed = (count * tensor.dtype.bitwidth + 7) // 8
    if isinstance(tensor, ir.ExternalTensor):
        value = _from_bytes(_read_external(tensor, needed, label, folder), tensor.dtype, shape, dtype)
    else:
        _check_inline(tensor, count, needed, label)
        value = _to_torch(np.asarray(tensor.numpy()), dtype).reshape(shape)
    _check_finite(value, label)
    return value


def _check_inline(tensor: Any, count: int, needed: int, label: str) -> None:
    proto = getattr(tensor, "raw", None)
    if not isinstance(proto, onnx.TensorProto):
        if count > 1 << 24:
            raise Refused("the tensor is not stored in the model", node=label)
        return
    if proto.HasField("raw_data"):
        if len(proto.raw_data) != needed:
            raise Refused(
                f"its dimensions ask for {needed} bytes, the file holds {len(proto.raw_data)}", node=label, way_out="export the model again"
            )
        return
    held = max(len(getattr(proto, field)) for field in _TYPED_FIELDS)
    per_entry = 8 // tensor.dtype.bitwidth if tensor.dtype.bitwidth < 8 else 1
    if held != -(-count // per_entry):
        raise Refused(
            f"its dimensions ask for {count} elements, the file holds {held * per_entry}", node=label, way_out="export the model again"
        )


def _to_torch(array: np.ndarray[Any, Any], dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    numpy_dtype = torch.empty(0, dtype=dtype).numpy().dtype
    return torch.from_numpy(np.array(array.astype(numpy_dtype, copy=False), order="C"))


def _from_bytes(data: bytes, kind: ir.DataType, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    proto = onnx.TensorProto(data_type=int(kind), dims=shape, raw_data=data)
    return _to_torch(np.asarray(ir.serde.deserialize_tensor(proto).numpy()), dtype).reshape(shape)


def _check_finite(value: torch.Tensor, label: str) -> None:
    """Refuse NaN, and infinity except as a limit (one element) or in a mask (every finite element is zero)."""
    if not value.dtype.is_floating_point or not value.numel():
        return
    if bool(value.isnan().any()):
        raise Refused("the tensor holds NaN", node=label, way_out="the weights are damaged: train or export again")
    infinite = value.isinf()
    if value.numel() > 1 and bool(infinite.any()) and bool((value[~infinite] != 0).any()):
        raise Refused("the tensor holds infinite values", node=label, way_out="the weights are damaged: train or export again")


def _read_external(tensor: ir.ExternalTensor, needed: int, label: str, folder: Path | None) -> bytes:
    """Return the bytes of a tensor stored beside the model."""
    location = os.fspath(tensor.location)
    if folder is None:
        raise Refused("its data is in another file and the model came without a folder", node=label, way_out="give the model's path")
    offset, length = int(tensor.offset or 0), int(tensor.length if tensor.length is not None else needed)
    if offset < 0 or length != needed:
        raise Refused(f"its dimensions ask for {needed} bytes, the file says {length} at {offset}", node=label)
    descriptor = _open_below(folder, location, label)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise Refused(f"its data file '{printable(location)}' is not a plain file of its own", node=label, way_out="copy the data file")
        if offset + length > status.st_size:
            raise Refused(f"its data file '{printable(location)}' is too short", node=label, way_out="export the model again")
        file.seek(offset)
        return file.read(length)


def _open_below(folder: Path, location: str, label: str) -> int:
    """Open a file by its components, none of them a link, ``..`` or absolute; return the descriptor."""
    parts = location.split("/")
    parts = [part for part in parts if part not in ("", ".")] if not location.startswith("/") else []
    if not parts or ".." in parts or any(c in location for c in "\\\0:"):
        raise Refused(
            f"its data path '{printable(location)}' leaves the model's folder", node=label, way_out="put the data beside the model"
        )
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for position, part in enumerate(parts):
            last = position == len(parts) - 1
            flags = os.O_RDONLY | os.O_NOFOLLOW | (os.O_NONBLOCK if last else os.O_DIRECTORY)
            inner = os.open(part, flags, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        return descriptor
    except OSError as error:
        os.close(descriptor)
        reason = f"its data file '{printable(location)}' cannot be opened: {error.strerror}"
        raise Refused(reason, node=label, way_out="put the data beside the model, not as a link") from error
