"""What a block type of llama.cpp does to a matrix: ggml's own quantizer and gguf-py's dequantizer, rows padded to whole blocks."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch


def missing() -> str | None:
    """Return one line that says what is not installed, or None."""
    absent = [name for name in ("llama_cpp", "gguf") if find_spec(name) is None]
    return "llama.cpp is not installed: pip install llama-cpp-python gguf" if absent else None


def round_trip(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, int]:
    """Return a matrix f32[out, in] as blocks of a type say it, and their bytes.

    Args:
        weight: to quantize, without an importance matrix.
        kind: such as ``Q2_K``; rows are padded with zeros to a multiple of its 32 or 256 elements, which the bytes count.

    Raises:
        RuntimeError: ggml wrote another number of bytes.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    number = GGMLQuantizationType[kind]
    elements, size = GGML_QUANT_SIZES[number]
    out, inputs = weight.shape
    padded = np.ascontiguousarray(np.pad(weight.numpy(), ((0, 0), (0, -inputs % elements))), dtype=np.float32)
    blocks = np.empty((out, padded.shape[1] // elements * size), np.uint8)
    written = _quantizer()(int(number), padded.ctypes.data, blocks.ctypes.data, 0, out, padded.shape[1], None)
    if written != blocks.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes of {kind}, not {blocks.nbytes}")
    return torch.from_numpy(dequantize(blocks, number)[:, :inputs].copy()), blocks.nbytes


@cache
def _quantizer() -> ctypes._NamedFuncPointer:
    import llama_cpp

    library = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))))
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return function
