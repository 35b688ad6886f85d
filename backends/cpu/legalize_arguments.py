"""What the CPU's legalizers share: arguments of kernels, and the epilogue that a product's kernel can take over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from qcompile.backends.cpu.kernels.code_rounding import is_easy
from qcompile.backends.cpu.kernels.convolution_spec import Convolution
from qcompile.backends.cpu.kernels.matmul_epilogue import Epilogue
from qcompile.backends.cpu.kernels.matmul_spec import Linear
from qcompile.backends.cpu.kernels.quantization import code_dtype, code_range
from qcompile.backends.lowering.shapes import Size, dtype_name
from qcompile.backends.lowering.translate import Walk
from torch import fx

from qcompile.errors import Refused
from qcompile.formats import BFloat16, Integer, Scheme, Tensor, parse_scheme
from qcompile.graph.text import bound_arguments

aten, qc = torch.ops.aten, torch.ops.qc
Arguments = SimpleNamespace


# ---- arguments of kernels -------------------------------------------------------------------------------------------------


def product(sizes: list[Size]) -> Size:
    """Return the product of sizes, 1 for none."""
    total: Size = 1
    for size in sizes:
        total = total * size
    return total


def rows_of(walk: Walk, node: fx.Node) -> tuple[Any, Size, Size]:
    """Return a value as [rows, width], the rows, and the width."""
    shape = walk.shape(node)
    rows = product(shape[:-1])
    return walk.reshape(walk.plain(node), [rows, shape[-1]]), rows, shape[-1]


def flat(walk: Walk, node: fx.Node) -> Any:
    """Return a scale or zero point of any shape as one axis."""
    if walk.constant(node) is not None:
        return walk.packed(node, "flat", lambda t: t.reshape(-1))
    return walk.reshape(walk.plain(node), [product(walk.shape(node))])


def zero_or(walk: Walk, node: fx.Node | None) -> Any:
    """Return a zero point as int32 [1]; symmetric schemes have the constant 0."""
    return flat(walk, node) if node is not None else walk.parameter("zero", lambda: torch.zeros(1, dtype=torch.int32))


def is_plain_tensor(scheme: Scheme) -> bool:
    return isinstance(scheme.granularity, Tensor) and isinstance(scheme.format, Integer)


def has_easy_scale(walk: Walk, scale: fx.Node) -> bool:
    """Return whether a scale is a constant that the quick rounding to codes is right for."""
    value = walk.constant(scale)
    return value is not None and value.numel() == 1 and is_easy(float(value))


def name_of(node: fx.Node | tuple[fx.Node, ...]) -> str:
    """Return the name of a constant: that of the model's weight where it is one; of several, of the first."""
    node = node[0] if isinstance(node, tuple) else node
    return str(node.target) if node.op == "get_attr" else node.name


def constant_array(walk: Walk, node: fx.Node | None) -> Any:
    """Return a constant as a NumPy array, None for None."""
    if node is None:
        return None
    tensor = walk.constant(node)
    if tensor is None:
        raise Refused("must be a constant", node=node.name, operator=str(node.target))
    return tensor.numpy()


Weight = tuple[Any, Any, Any]  # codes or values, scale, zero point


def product_inputs(
    walk: Walk, spec: Linear | Convolution, a: Arguments, operands: tuple[Any, Any], pack: Callable[[], list[Any]]
) -> list[Any]:
    """Return the inputs of a linear or convolution kernel in the order of its arguments; ``pack`` makes its constants, once.

    ``operands`` are x and the residual (or None) in the layout that the kernel reads; ``a`` names the node's arguments as qc.linear does,
    weights and biases of layers that are computed together as tuples.
    """
    x, residual = operands

    def arrays() -> list[torch.Tensor]:
        return [torch.from_numpy(array) for array in pack()]

    inputs = [x]
    if spec.integer:
        inputs += [flat(walk, a.x_scale), *([flat(walk, a.x_zero_point)] if spec.x_affine else [])]
    inputs += walk.packed_together((spec, a.weight, a.bias), name_of(a.weight), arrays)
    inputs += [residual] if residual is not None else []
    return inputs + ([flat(walk, a.out_scale), zero_or(walk, a.out_zero_point)] if spec.epilogue.codes else [])


# ---- epilogues -----------------------------------------------------------------------------------------------------------


def quantized_epilogue(walk: Walk, a: Arguments) -> Epilogue | str:
    bias = "none" if a.bias is None else dtype_name(walk.fake(a.bias).dtype)
    if not a.out_scheme:
        return Epilogue(bias, a.activation, a.residual is not None)
    out = parse_scheme(a.out_scheme)
    if isinstance(out.format, BFloat16):
        return Epilogue(bias, a.activation, a.residual is not None, code_dtype(out))
    if not is_plain_tensor(out):
        return f"no kernel writes codes as '{out}'"
    return Epilogue(bias, a.activation, a.residual is not None, code_dtype(out), *code_range(out))


def first_quantize(node: fx.Node, *, bfloat16: bool = False) -> fx.Node | None:
    """Return the first user that makes codes which the producer's kernel can write itself: of 8 bits with constant scales.

    ``bfloat16``: the producer can also round to that.
    """
    for user in node.users:
        if user.target is qc.quantize.default and bound_arguments(user)["x"] is node:
            grid = grid_of(user)
            if bfloat16 and isinstance(grid.scheme.format, BFloat16):
                return user
            constant = all(p is None or p.op == "get_attr" for p in (grid.scale, grid.zero_point))
            if is_plain_tensor(grid.scheme) and grid.scheme.bits == 8 and constant:
                return user
    return None


@dataclass(frozen=True)
class Grid:
    """A scale (None where the format has none), a zero point (None: 0) and the scheme of codes."""

    scale: fx.Node | None
    zero_point: fx.Node | None
    scheme: Scheme

    def arguments(self, walk: Walk) -> list[Any]:
        """Return scale and zero point as a kernel's arguments."""
        return [] if self.scale is None else [flat(walk, self.scale), zero_or(walk, self.zero_point)]

    def is_bound(self, walk: Walk) -> bool:
        return self.scale is not None and walk.is_bound(self.scale) and (self.zero_point is None or walk.is_bound(self.zero_point))


def grid_of(quantize: fx.Node) -> Grid:
    """Return the grid of a qc.quantize or qc.dequantize."""
    a = bound_arguments(quantize)
    return Grid(a["scale"], a["zero_point"], parse_scheme(a["scheme"]))


_FLOAT_ACTIVATIONS = {aten.relu.default: "relu", aten.silu.default: "silu", aten.tanh.default: "tanh", aten.sigmoid.default: "sigmoid"}
_COPIES = (aten.clone.default, aten.detach.default, aten.alias.default)


def following(walk: Walk, node: fx.Node) -> tuple[list[fx.Node], str, fx.Node | None]:
    """Return the nodes after a product that its kernel can compute too, the activation, and the residual."""
    swallowed: list[fx.Node] = []
    activation, residual, last = "none", None, node
    while walk.is_inner(last) and len(last.users) == 1:
        (user,) = last.users
        if user.target in _COPIES and not user.kwargs:
            pass
        elif activation == "none" and residual is None and (name := activation_name(user)):
            activation = name
        elif activation == "none" and residual is not None and (name := activation_name(user)) in ("relu", "relu6"):
            activation = f"add_{name}"
        elif residual is None and (other := _residual_of(walk, user, last)) is not None:
            residual = other
        else:
            break
        swallowed.append(user)
        last = user
    return swallowed, activation, residual


def may_be_swallowed(node: fx.Node) -> bool:
    """Return whether a node is of those that ``following`` finds, after some product."""
    return node.target in (*_COPIES, aten.add.Tensor) or bool(activation_name(node))


def activation_name(node: fx.Node) -> str:
    """Return the dialect's name of an activation node, empty for another node."""
    if node.target is aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    if node.target is aten.hardtanh.default and list(node.args[1:]) == [0.0, 6.0]:
        return "relu6"
    return _FLOAT_ACTIVATIONS.get(node.target, "")


def _residual_of(walk: Walk, node: fx.Node, product_node: fx.Node) -> fx.Node | None:
    """Return the other operand of an addition, if it is there already and has the result's shape and dtype."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return None
    other = node.args[1] if node.args[0] is product_node else node.args[0]
    if not isinstance(other, fx.Node) or other is product_node or not walk.is_bound(other):
        return None
    here, there = walk.fake(product_node), walk.fake(other)
    same = isinstance(there, torch.Tensor) and there.dtype == here.dtype and tuple(there.shape) == tuple(here.shape)
    return other if same else None
