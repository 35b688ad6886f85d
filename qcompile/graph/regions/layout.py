"""Where the channels of a producer lie inside a value: a layout, and how views and transposes carry it along.

The value projection of grouped-query attention gives [batch, tokens, kv_heads * d]; after ``view``, ``transpose`` and ``expand`` the same
channels stand in [batch, kv_heads, groups, tokens, d], and the output projection reads them as [batch, tokens, heads * d]. A layout
splits every axis into *atoms* (size, stride): the channel of an element is the sum of index * stride over all its atoms. Stride 0 says
that an index has nothing to do with the channel: batch, tokens, repeated heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Atom = tuple[Any, int]  # size (an int or a symbolic int), stride
Axis = tuple[Atom, ...]
Layout = tuple[Axis, ...]


def channel_layout(shape: Sequence[Any], axis: int) -> Layout:
    """Return the layout of a value whose channels are the indices of one axis."""
    axis %= len(shape)
    return tuple(((size, int(i == axis)),) for i, size in enumerate(shape))


def channel_axis(layout: Layout) -> int | None:
    """Return the one axis that channels lie on, or None where they lie on several axes."""
    axes = [i for i, axis in enumerate(layout) if any(stride for _, stride in axis)]
    return axes[0] if len(axes) == 1 else None


def axis_channels(axis: Axis) -> torch.Tensor | None:
    """Return the channel of each index of an axis, i64 [size]; None where its size is symbolic."""
    index = torch.zeros(1, dtype=torch.int64)
    for size, stride in axis:
        if not isinstance(size, int):
            return None
        index = (index.unsqueeze(1) + torch.arange(size) * stride).flatten()
    return index


def view_layout(layout: Layout, shape: Sequence[Any]) -> Layout | None:
    """Return the layout after a view to this shape, or None where an axis would cut through channels unevenly."""
    atoms = [atom for axis in layout for atom in axis if not _equal(atom[0], 1)]
    axes: list[Axis] = []
    for size in shape:
        taken: list[Atom] = []
        while not _equal(_product(taken), size):
            parts = _split(atoms.pop(0), size, _product(taken)) if atoms else None
            if parts is None:
                return None
            taken.append(parts[0])
            atoms = parts[1:] + atoms
        axes.append(tuple(taken) or ((1, 0),))
    return None if atoms else tuple(axes)


def _split(atom: Atom, wanted: Any, have: Any) -> list[Atom] | None:
    """Return the atom whole, or as the outer part that completes ``have`` to ``wanted`` and the inner rest; None where neither fits."""
    size, stride = atom
    if not all(isinstance(each, int) for each in (size, wanted, have)) or wanted % (have * size) == 0:
        return [atom]
    outer = wanted // have
    if wanted % have or size % outer:
        return None
    inner = size // outer
    return [(outer, stride * inner), (inner, stride)]


def expand_layout(layout: Layout, shape: Sequence[Any]) -> Layout:
    """Return the layout after broadcasting to this shape: an axis of size 1 that grows repeats its channels."""
    padded = (((1, 0),),) * (len(shape) - len(layout)) + layout
    return tuple(
        axis if _equal(size, 1) or not _equal(_product(axis), 1) else ((size, 0),) for axis, size in zip(padded, shape, strict=True)
    )


def repeat_heads(axis: Axis, kv_heads: int, times: int) -> Axis | None:
    """Return an axis [kv_heads * d] with each head repeated, [kv_heads * times * d]; None where it is not made of whole heads."""
    size = _product(axis)
    split = view_layout((axis,), (kv_heads, size // kv_heads)) if isinstance(size, int) else None
    return (*split[0], (times, 0), *split[1]) if split else None


def _equal(a: Any, b: Any) -> bool:
    """Compare sizes, by their text where one is symbolic: comparing symbols themselves would add guards."""
    return a == b if isinstance(a, int) and isinstance(b, int) else str(a) == str(b)


def _product(atoms: Sequence[Atom]) -> Any:
    product: Any = 1
    for size, _ in atoms:
        product = size if _equal(product, 1) else product * size
    return product
