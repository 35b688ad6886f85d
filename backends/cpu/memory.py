"""Memory that kernels read and write: in large pages where the system has them, constants in one piece.

A kernel that reads weights from memory spends a part of its time on finding pages of 4 KiB, and the processor's own reading ahead ends
with each of them. On one machine two threads read 38 GB/s from pages of 2 MiB, 32 from small ones. NumPy asks Linux for large pages
(``madvise``) for arrays from 4 MiB on; where the system refuses, or another system runs, they are ordinary memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from qcompile.graph.file_tensor import FileTensor

ALIGNMENT = 64  # bytes; kernels load whole 512-bit vectors, and TVM refuses less
LARGE = 4 << 20  # bytes: less than this has no large pages


def allocate(size: int) -> np.ndarray[Any, Any]:
    """Return ``size`` new bytes on an address that is a multiple of 64."""
    memory = np.empty(size + ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return memory[first : first + size]


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor contiguous and on an address that is a multiple of 64; copied only if it is not so already.

    One in a file is read: mapped, its pages would count as memory beside the copy.
    """
    if isinstance(tensor, FileTensor):
        tensor = tensor.read()
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    # Not torch's copy: it wakes threads of its own, which then stand in the way of the kernels' (ResNet-50: 11.9 ms instead of 4.6).
    try:
        np.copyto(copy.numpy(), tensor.numpy())
    except (TypeError, RuntimeError):  # a dtype that NumPy does not have
        copy.copy_(tensor)
    return copy


def place(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors, each ``aligned``: together in one piece of memory if they have ``LARGE`` bytes, else where they are.

    Tensors in files are read one by one: none is in memory twice.
    """
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    ends = np.cumsum([-(-size // ALIGNMENT) * ALIGNMENT for size in sizes], dtype=np.int64)
    if not tensors or ends[-1] < LARGE:
        return [aligned(tensor) for tensor in tensors]
    memory, placed, start = allocate(int(ends[-1])), [], 0
    for tensor, size, end in zip(tensors, sizes, ends.tolist(), strict=True):
        memory[start : start + size] = aligned(tensor).reshape(-1).view(torch.uint8).numpy()
        placed.append(torch.from_numpy(memory[start : start + size]).view(tensor.dtype).view(tensor.shape))
        start = end
    return placed
