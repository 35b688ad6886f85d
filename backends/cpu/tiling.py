"""Which tiles a layer's kernel may have, which are worth trying, and the name of the layer in a table of tiles.

A layer is named by what the best tile depends on: operator, sizes, schemes, and for linear layers the class of row counts
(``any`` where it is known only at the call); layers that one product computes have the name of their product. Processor, instruction
set and threads name the machine, one level above in the table. A tile is written as the fields of ``matmul_spec.Tile`` or
``convolution_spec.Blocks``. Depthwise convolutions have none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, TypeVar

import torch
from qcompile.backends.cpu.joined_layers import joined
from qcompile.backends.cpu.kernels import tiles
from qcompile.backends.cpu.kernels.convolution_spec import Blocks, Convolution
from qcompile.backends.cpu.kernels.isa import SETS
from qcompile.backends.cpu.kernels.matmul_spec import Linear, Tile
from qcompile.backends.lowering.translate import Walk
from torch import fx

from qcompile.graph.text import bound_arguments, operator_name

MOST_TRIED = 12
_ROW_CLASSES = (8, 64, 512)  # few rows have a kernel body of their own; above, weights are read again for every task of rows
_WORDS = (128, 64, 256, 512, 1024)
_PACKED_BYTES = (32 << 10, 64 << 10, 128 << 10, 192 << 10, 256 << 10, 512 << 10, 768 << 10, 1 << 20, 2 << 20)
_ROW_STEP = 4  # ``matmul`` cuts the rows of a task to a multiple
_LINEAR, _CONVOLUTION = ("qc.linear", "aten.linear"), ("qc.conv2d", "aten.conv2d", "aten.convolution")

Spec = TypeVar("Spec", bound=Linear | Convolution)


class Tiling:
    """The tiles of one build, and what its legalizers tell of the kernels they make.

    Args:
        chosen: tiles by the names of layers.

    Attributes:
        specs: the spec with its own tile of every layer that may have another.
        kernels: the layer of each kernel, by the kernel's name.
    """

    def __init__(self, chosen: Mapping[str, Mapping[str, int]] | None = None) -> None:
        self.chosen = dict(chosen or {})
        self.specs: dict[str, Linear | Convolution] = {}
        self.kernels: dict[str, str] = {}

    def cut(self, node: fx.Node, spec: Linear | Convolution) -> Linear | Convolution:
        """Return the spec of a node's kernel with the tile chosen for it, or as it is where there is none that fits."""
        name = layer_name(node)
        self.specs.setdefault(name, spec)
        return with_tile(spec, self.chosen.get(name, {})) or spec


def cut(walk: Walk, node: fx.Node, spec: Spec) -> Spec:
    """Return the spec of a node's kernel, cut as the walk's tiling says."""
    return walk.tiling.cut(node, spec) if walk.tiling is not None else spec


def note(walk: Walk, node: fx.Node, kernel: Any) -> None:
    """Note that a kernel (a global variable) computes a node."""
    if walk.tiling is not None:
        walk.tiling.kernels.setdefault(kernel.name_hint, layer_name(node))


# ---- names ----------------------------------------------------------------------------------------------------------------


def layer_name(node: fx.Node) -> str:
    """Return a node's name in a table of tiles; empty for nodes that are no layer."""
    operator = operator_name(node.target) if node.op == "call_function" else ""
    if operator not in (*_LINEAR, *_CONVOLUTION):
        return ""
    a = bound_arguments(node)
    x, weight = _shape(a.get("x") or a.get("input")), _shape(a["weight"])
    schemes = f"weight {a.get('weight_scheme') or 'float32'}; x {a.get('x_scheme') or 'float32'}"
    if operator in _LINEAR:
        outputs = sum(_shape(layer)[-1] for layer in joined(node))
        return f"{operator} {x[-1]}x{outputs}, {_row_class(x[:-1])} rows; {schemes}"
    if len(x) != 4 or len(weight) != 4:
        return ""
    kernel = f"{weight[2]}x{a.get('kernel_width', weight[3])}"
    geometry = ", ".join(f"{key} {_pair(a[key])}" for key in ("stride", "padding", "dilation"))
    return f"{operator} {kernel}, {x[1]} to {_shape(node)[1]} of {x[2]}x{x[3]}, {geometry}, groups {a['groups']}; {schemes}"


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _pair(value: Any) -> str:
    return value if isinstance(value, str) else f"{value[0]}x{value[-1]}"


def _row_class(sizes: tuple[Any, ...]) -> str:
    if any(isinstance(size, torch.SymInt) for size in sizes):
        return "any"
    rows, least = math.prod(sizes), 1
    for most in _ROW_CLASSES:
        if rows <= most:
            return f"{least}-{most}"
        least = most + 1
    return f"{least} or more"


# ---- what fits ------------------------------------------------------------------------------------------------------------


def with_tile(spec: Linear | Convolution, tile: Mapping[str, int]) -> Linear | Convolution | None:
    """Return the spec with another tile; None where these are not the sizes of a tile, or not of one that its kernel can have."""
    if any(size < 1 for size in tile.values()):
        return None
    return _linear_with(spec, tile) if isinstance(spec, Linear) else _convolution_with(spec, tile)


def _linear_with(spec: Linear, tile: Mapping[str, int]) -> Linear | None:
    if set(tile) != {"rows", "vectors", "words", "packed_bytes"}:
        return None
    assert spec.tile is not None  # its own, where it was given none
    wanted = Tile(**tile, threads=spec.tile.threads)
    try:
        found = replace(spec, tile=wanted)
    except ValueError:
        return None
    registers = spec.tiled or (wanted.vectors <= 4 and wanted.rows <= SETS[spec.isa].block_rows(wanted.vectors, spec.integer))
    sizes = wanted.words in _WORDS and wanted.packed_bytes in _PACKED_BYTES
    return found if registers and sizes and found.task_rows % _ROW_STEP == 0 else None


def _convolution_with(spec: Convolution, tile: Mapping[str, int]) -> Convolution | None:
    if set(tile) != {"rows", "vectors", "packed_bytes"} or tile["packed_bytes"] not in _PACKED_BYTES:
        return None
    rows, vectors = tile["rows"], tile["vectors"]
    if spec.tiled:
        blocks = 1 if rows <= tiles.ROWS else 2
        fits = vectors <= 2 and rows % blocks == 0 and rows // blocks <= min(tiles.ROWS, spec.plan.line)
    else:
        fits = vectors <= 4 and rows <= SETS[spec.isa].block_rows(vectors, spec.integer)
    return replace(spec, blocks=Blocks(**tile)) if fits else None


# ---- what is worth trying -------------------------------------------------------------------------------------------------


def candidates(spec: Linear | Convolution) -> list[dict[str, int]]:
    """Return tiles that cut a layer's work otherwise than its own tile does, the likeliest first; the same ones each time."""
    default, proposed = _linear_tiles(spec) if isinstance(spec, Linear) else _convolution_tiles(spec)
    found: list[dict[str, int]] = []
    seen = {_effect(spec, default)}
    for tile in proposed:
        cut = with_tile(spec, tile)
        if cut is not None and _effect(cut, tile) not in seen:
            seen.add(_effect(cut, tile))
            found.append(tile)
    return found[:MOST_TRIED]


def _effect(spec: Linear | Convolution, tile: Mapping[str, int]) -> tuple[Any, ...]:
    """Return what of a tile makes a difference to a layer: sizes larger than the whole layer are as good as the whole."""
    if isinstance(spec, Linear):
        return tile["rows"], tile["vectors"], min(spec.stretch, spec.words), spec.task_rows
    return tile["rows"], tile["vectors"], spec.tasks


def _linear_tiles(spec: Linear) -> tuple[dict[str, int], list[dict[str, int]]]:
    """Return a linear layer's own tile, and others: other register blocks, then other sizes of what stays in the caches."""
    assert spec.tile is not None
    default = {key: value for key, value in asdict(spec.tile).items() if key != "threads"}
    blocks = list(itertools.product((2 * tiles.ROWS, tiles.ROWS), (2, 1))) if spec.tiled else _register_blocks(spec)
    others = [{"rows": rows, "vectors": vectors} for rows, vectors in blocks]
    others += [{"words": words} for words in _WORDS] + [{"packed_bytes": size} for size in reversed(_PACKED_BYTES)]
    return default, [{**default, **other} for other in others]


def _convolution_tiles(spec: Convolution) -> tuple[dict[str, int], list[dict[str, int]]]:
    """Return a convolution's own tile, and others: the register blocks with the least padding, then other tasks."""
    default = {"rows": spec.tile[0], "vectors": spec.tile[1], "packed_bytes": spec.packed_bytes}
    if spec.tiled:  # tiles may have fewer than sixteen rows
        rows = [*range(2 * tiles.ROWS, tiles.ROWS, -2), *range(tiles.ROWS, 5, -1)]
        blocks = sorted(itertools.product(rows, (2, 1)), key=lambda block: _padding(spec, *block))
    else:
        predicted = spec.register_blocks()
        best = {vectors: sorted(choice for choice in predicted if choice[2] == vectors)[:3] for _, _, vectors in predicted}
        blocks = [(rows, vectors) for _, rows, vectors in sorted(itertools.chain(*best.values()))]
    others = [{"rows": rows, "vectors": vectors} for rows, vectors in blocks[: MOST_TRIED - 4]]
    others += [{"packed_bytes": size} for size in (64 << 10, 128 << 10, 256 << 10, 512 << 10)]
    return default, [{**default, **other} for other in others]


def _register_blocks(spec: Linear) -> list[tuple[int, int]]:
    """Return (rows, vectors) that fill the registers, and those with two or four rows less, where the rest divides better."""
    found = []
    for vectors in (1, 2, 3, 4):
        most = min(SETS[spec.isa].block_rows(vectors, spec.integer), 28)
        found += [(rows, vectors) for rows in (most, most - most % 2, most - most % 4, most // 8 * 4) if rows > 0]
    return list(dict.fromkeys(found))


def _padding(spec: Convolution, rows: int, vectors: int) -> float:
    """Return how much larger than the layer its tiles are, rounded so that small differences decide nothing."""
    rows //= 1 if rows <= tiles.ROWS else 2
    columns = -(-spec.group_outputs // (tiles.COLUMNS * vectors)) * tiles.COLUMNS * vectors
    return round(-(-spec.plan.line // rows) * rows / spec.plan.line * columns / spec.group_outputs, 1)
