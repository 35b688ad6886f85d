"""Linear layers; here those whose codes are places in a table of levels (``nf4``, ``codebook4``), with lookups in registers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from qcompile.backends.cpu.kernels.lookup import LEVELS
from qcompile.backends.cpu.kernels.matmul_codebook import STEP, CodebookLinear, codebook_linear, pack_codebook
from qcompile.backends.cpu.kernels.matmul_epilogue import Epilogue
from qcompile.backends.cpu.kernels.matmul_spec import Linear
from qcompile.backends.cpu.kernels.quantization import code_dtype
from qcompile.backends.cpu.legalize_arguments import Arguments, constant_array, flat, is_plain_tensor, name_of, quantized_epilogue, rows_of
from qcompile.backends.cpu.legalize_layers import Layer, call_linear, linear, linear_spec
from qcompile.backends.lowering.quantized import epilogue as emit_epilogue
from qcompile.backends.lowering.translate import Legalizer, Walk
from torch import fx

from qcompile.formats import Channel, Codebook, Group, Integer, Lookup, Scheme, Tensor, Token, decode, dequantize, parse_scheme


def _linear(walk: Walk, node: fx.Node, a: Arguments) -> Any:
    """qc.linear of codes of any format."""
    scheme = parse_scheme(a.weight_scheme)
    if not isinstance(scheme.format, Lookup):
        return linear(walk, node, a)
    grouped = isinstance(scheme.granularity, Group) and scheme.granularity.axis in (-1, 1)
    if not grouped and scheme.granularity not in (Tensor(), Channel(0)):
        return f"no kernel reads weights as '{scheme}'"
    epilogue = quantized_epilogue(walk, a)
    if isinstance(epilogue, str):
        return epilogue
    codes = scheme.format.unpack(walk.required_constant(a.weight), a.in_features)
    own = walk.constant(a.weight_table)
    if own is not None and len(own) > 1:
        spec = _spec_of_tables(a, scheme)
        return _widened(walk, node, a, codes, epilogue) if spec is None else _call_tables(walk, node, spec, a, codes, own)
    weight = (codes.numpy(), constant_array(walk, a.weight_scale), None)
    one = linear_spec(a, scheme, weight, epilogue, codebook=True)
    if isinstance(one, str):
        return _widened(walk, node, a, codes, epilogue)
    table = torch.tensor(scheme.format.levels) if own is None else own[0]
    return call_linear(walk, one, [Layer(node, a, weight)], torch.nn.functional.pad(table, (0, LEVELS - len(table))).numpy())


def _widened(walk: Walk, node: fx.Node, a: Arguments, codes: torch.Tensor, epilogue: Epilogue) -> Any:
    """Emit an ordinary product with the weight that the codes mean: bytes where the table holds bytes, else floats."""
    scheme = parse_scheme(a.weight_scheme)
    table = walk.constant(a.weight_table)
    if isinstance(scheme.format, Codebook):
        values = decode(codes, scheme, table, torch.float32).to(torch.int8)
        weight = (values.numpy(), constant_array(walk, a.weight_scale), None)
        spec = linear_spec(a, Scheme(Integer(8, True), scheme.granularity), weight, epilogue)
        if not isinstance(spec, str):
            walk.report(f"'{scheme}' runs with its weight looked up when it is packed: a byte for each code")
            return call_linear(walk, spec, [Layer(node, a, weight)])
    if a.x_scheme:
        return f"no kernel multiplies '{a.x_scheme}' by '{scheme}'"
    walk.report(f"'{scheme}' runs with its weight dequantized to float32")
    values = dequantize(codes, walk.required_constant(a.weight_scale), None, scheme, table)
    spec = Linear(a.in_features, len(codes), "float32", bits=32, epilogue=epilogue)
    return call_linear(walk, spec, [Layer(node, a, (values.numpy(), None, None))])


# ---- a table for each run of rows -----------------------------------------------------------------------------------------


def _spec_of_tables(a: Arguments, scheme: Scheme) -> CodebookLinear | None:
    """Return the kernel for tables of columns, or None where there is none for such groups or inputs."""
    group = scheme.granularity.size if isinstance(scheme.granularity, Group) else 0
    x = parse_scheme(a.x_scheme) if a.x_scheme else None
    out_features = int(a.weight.meta["val"].shape[0])
    if x is None:
        return None if group % STEP else CodebookLinear(a.in_features, out_features, "float32", tables="channel", group=group)
    per_token = isinstance(x.granularity, Token)
    if group or not (is_plain_tensor(x) or (per_token and isinstance(x.format, Integer))):
        return None
    return CodebookLinear(a.in_features, out_features, code_dtype(x), a.x_zero_point is not None, "channel", x_per_token=per_token)


def _call_tables(walk: Walk, node: fx.Node, spec: CodebookLinear, a: Arguments, codes: torch.Tensor, tables: torch.Tensor) -> Any:
    """Emit the product; what follows it is composed of generic operators."""
    x, rows, _ = rows_of(walk, a.x)

    def arrays() -> list[torch.Tensor]:
        each = tables.repeat_interleave(spec.out_features // len(tables), 0)
        padded = torch.nn.functional.pad(each, (0, LEVELS - each.shape[1])).unsqueeze(1).to(torch.int8 if spec.integer else torch.float32)
        scale = walk.required_constant(a.weight_scale).reshape(-1, 1 if not spec.group else spec.groups).expand(spec.out_features, -1)
        return [torch.from_numpy(part) for part in pack_codebook(spec, codes.numpy(), padded.numpy(), scale.numpy())]

    inputs = [x]
    if spec.integer:
        inputs += [flat(walk, a.x_scale), *([flat(walk, a.x_zero_point)] if spec.x_affine else [])]
    inputs += walk.packed_together((spec, a.weight, a.weight_table), name_of(a.weight), arrays)
    kernel = walk.kernel(spec, lambda: codebook_linear(spec), f"linear_{spec.x}_tables_{spec.in_features}x{spec.out_features}")
    y = walk.reshape(walk.call_kernel(kernel, inputs, ([rows, spec.out_features], "float32")), walk.shape(node))
    optional = {key: getattr(a, key) for key in ("residual", "out_scale", "out_zero_point", "bias")}
    values = {key: None if value is None else walk.plain(value) for key, value in optional.items()}
    after = SimpleNamespace(activation=a.activation, out_scheme=a.out_scheme, **values)
    return emit_epilogue(walk, y, after, after.bias)


LEGALIZE_LINEAR: dict[str, Legalizer] = {"qc.linear": _linear}
