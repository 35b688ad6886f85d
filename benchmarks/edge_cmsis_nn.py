#!/usr/bin/env python
"""Instructions of a compiled network on a Cortex-M, beside the same network in calls of CMSIS-NN, both counted in the same way.

The artifact's integer graph is written a second time as calls of CMSIS-NN, with the same weights, multipliers and shapes, built with the
same flags and run by the same example. The codes after the last convolution must be equal bit for bit (CMSIS-NN built with its single
rounding); what comes after it, a mean, a linear layer and a softmax, is counted but not compared, since CMSIS-NN divides and exponentiates
in other ways. Instructions are no cycles. CMSIS-NN is not packaged: name a checkout of github.com/ARM-software/CMSIS-NN.

    python benchmarks/edge_cmsis_nn.py out/ --cmsis CMSIS-NN [--json]

``out/`` is what ``qcompile compile --target edge:cortex-m4`` wrote; chains of convolutions, mean, linear and softmax are understood.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from qcompile.backends.edge.firmware.emulate import Measured, measure
from qcompile.backends.edge.firmware.files import example_files, golden_header
from qcompile.backends.edge.processors import Processor, find_processor

from qcompile.artifact import load
from qcompile.errors import Refused
from qcompile.graph import Graph

FOLDERS = ("ConvolutionFunctions", "FullyConnectedFunctions", "PoolingFunctions", "SoftmaxFunctions", "NNSupportFunctions")
OTHER_TYPES = ("_f16", "_f32", "_s4", "_s64", "lstm", "_flt")
SCRATCH = 1 << 15  # more than any kernel asks for

OPTIONS = {  # how the library is built; its default rounds twice
    "CMSIS-NN, single rounding": "-DCMSIS_NN_USE_SINGLE_ROUNDING",
    "CMSIS-NN, double rounding": "",
    "CMSIS-NN, double rounding in assembly": "-DCMSIS_NN_USE_REQUANTIZE_INLINE_ASSEMBLY",
}

MODEL_H = """#ifndef MODEL_H
#define MODEL_H
#include <stddef.h>
#include <stdint.h>
#define MODEL_ARENA_BYTES @ARENA@
#define MODEL_ARENA_ALIGNMENT 16
#define MODEL_INPUT_COUNT 1
#define MODEL_OUTPUT_COUNT 1
typedef int8_t model_input_0_t;
typedef int8_t model_output_0_t;
int32_t model_init(void *arena, size_t arena_bytes);
int32_t model_run(const void *const inputs[MODEL_INPUT_COUNT], void *const outputs[MODEL_OUTPUT_COUNT], void *arena);
#endif
"""


class Writer:
    """Writes a chain of integer operators as C, layer by layer; values lie in two halves of the arena by turns."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.constants, self.calls = graph, [""], [""]
        self.at, self.shape = "inputs[0]", (0, 0, 0)
        self.last_convolution = [n for n in graph.nodes if str(n.target) == "qc.conv2d.default"][-1]
        self.largest = max(n.meta["val"].numel() for n in graph.nodes if n.op == "call_function")

    def array(self, ctype: str, values: np.ndarray) -> str:
        """Declare a constant and return its name."""
        name = f"c{len(self.constants)}"
        numbers = ", ".join(map(str, values.reshape(-1).tolist()))
        self.constants.append(f"static const {ctype} {name}[{values.size}] = {{{numbers}}};")
        return name

    def result(self, shape: tuple[int, int, int]) -> str:
        """Return where the next value goes."""
        self.shape = shape
        turn = len(self.calls) % 2
        return f"((int8_t *)arena + {turn * ((self.largest + 15) // 16 * 16)})"

    def write(self) -> str:
        """Return model.c; it copies the codes after the last convolution to the output, some hundred instructions of millions."""
        for node in self.graph.nodes:
            if node.op != "call_function":
                continue
            name = str(node.target).removesuffix(".default")
            arguments = _arguments(self.graph, node)
            if name == "qc.quantize":
                self.shape = tuple(node.meta["val"].shape[i] for i in (2, 3, 1))
            elif name == "aten.constant_pad_nd":  # below and to the right, which a convolution adds by itself
                if any(arguments["pad"][i] for i in (0, 2)):
                    raise Refused("padding above or to the left stands before a convolution", node=node.name)
            elif name in ("qc.conv2d", "qc.mean", "qc.linear", "qc.softmax"):
                getattr(self, name.removeprefix("qc."))(arguments, tuple(node.meta["val"].shape))
                if node is self.last_convolution:
                    self.calls.append(f"memcpy(outputs[0], {self.at}, {node.meta['val'].numel()});")
            elif name != "qc.dequantize":
                raise Refused("this benchmark knows no such operator of CMSIS-NN", node=node.name, operator=name)
        return "\n".join(
            ['#include "model.h"', '#include "arm_nnfunctions.h"', "#include <string.h>", *self.constants,
             "int32_t model_init(void *arena, size_t bytes) { (void)arena; return bytes < MODEL_ARENA_BYTES; }",
             "int32_t model_run(const void *const inputs[1], void *const outputs[1], void *arena) {",
             f"const cmsis_nn_context context = {{(int8_t *)arena + MODEL_ARENA_BYTES - {SCRATCH}, {SCRATCH}}};",
             "int32_t bad = 0;", *self.calls, "return bad;", "}", ""]
        )  # fmt: skip

    def conv2d(self, a: dict[str, Any], out: tuple[int, ...]) -> None:
        height, width, channels = self.shape
        weight = a["weight"].numpy()  # [out, in / groups, kernel height, kernel width]
        depthwise = a["groups"] > 1
        if depthwise and not a["groups"] == channels == weight.shape[0]:
            raise Refused("groups of several channels are not compared")
        own = self.array("int8_t", weight.transpose(1, 2, 3, 0) if depthwise else weight.transpose(0, 2, 3, 1))
        kernel, given, to = f"{weight.shape[2]}, {weight.shape[3]}", self.at, self.result((out[2], out[3], out[1]))
        low = a["out_zero_point"] if a["activation"] == "relu" else -128
        common = (
            f".input_offset = {-a['x_zero_point']}, .output_offset = {a['out_zero_point']}, "
            f".stride = {{{a['stride'][1]}, {a['stride'][0]}}}, "
            f".padding = {{{a['padding'][1]}, {a['padding'][0]}}}, .dilation = {{1, 1}}, .activation = {{{low}, 127}}"
        )
        kind, extra, filters = ("dw_conv", ", .ch_mult = 1", f"{{1, {kernel}, {out[1]}}}") if depthwise else (
            "conv", "", f"{{{out[1]}, {kernel}, {channels}}}")  # fmt: skip
        self.calls.append(f"""{{
  const cmsis_nn_{kind}_params params = {{{common}{extra}}};
  const cmsis_nn_per_channel_quant_params quant = {{{self.requantization(a)}}};
  const cmsis_nn_dims in = {{1, {height}, {width}, {channels}}}, filter = {filters}, bias = {{1, 1, 1, {out[1]}}};
  const cmsis_nn_dims result = {{1, {out[2]}, {out[3]}, {out[1]}}};
  bad |= arm_{"depthwise_conv" if depthwise else "convolve"}_wrapper_s8(&context, &params, &quant, &in, {given}, &filter, {own}, &bias,
      {self.array("int32_t", a["bias"].numpy())}, &result, {to});
}}""")
        self.at = to

    def requantization(self, a: dict[str, Any]) -> str:
        """CMSIS-NN has 31 bits behind the point and shifts to the left; its structure wants what is not const."""
        multiplier, shift = self.array("int32_t", a["multiplier"].numpy()), self.array("int32_t", 31 - a["shift"].numpy().astype(np.int32))
        return f"(int32_t *)(uintptr_t){multiplier}, (int32_t *)(uintptr_t){shift}"

    def mean(self, a: dict[str, Any], out: tuple[int, ...]) -> None:
        height, width, channels = self.shape
        given, to = self.at, self.result((1, 1, out[1]))
        self.calls.append(f"""{{
  const cmsis_nn_pool_params params = {{.stride = {{{width}, {height}}}, .padding = {{0, 0}}, .activation = {{-128, 127}}}};
  const cmsis_nn_dims in = {{1, {height}, {width}, {channels}}}, filter = {{1, {height}, {width}, 1}}, result = {{1, 1, 1, {channels}}};
  bad |= arm_avgpool_s8(&context, &params, &in, {given}, &filter, &result, {to});
}}""")
        self.at = to

    def linear(self, a: dict[str, Any], out: tuple[int, ...]) -> None:
        inputs = a["weight"].shape[1]
        given, to = self.at, self.result((1, 1, out[1]))
        self.calls.append(f"""{{
  const cmsis_nn_fc_params params = {{.input_offset = {-a["x_zero_point"]}, .filter_offset = 0, .output_offset = {a["out_zero_point"]},
      .activation = {{-128, 127}}}};
  const cmsis_nn_per_channel_quant_params quant = {{{self.requantization(a)}}};
  const cmsis_nn_dims in = {{1, 1, 1, {inputs}}}, filter = {{{inputs}, 1, 1, {out[1]}}}, result = {{1, 1, 1, {out[1]}}};
  bad |= arm_fully_connected_per_channel_s8(&context, &params, &quant, &in, {given}, &filter, {self.array("int8_t", a["weight"].numpy())},
      &result, {self.array("int32_t", a["bias"].numpy())}, &result, {to});
}}""")
        self.at = to

    def softmax(self, a: dict[str, Any], out: tuple[int, ...]) -> None:
        given, to = self.at, self.result(self.shape)
        self.calls.append(f"arm_softmax_s8({given}, 1, {out[-1]}, 1 << 30, 20, -100, {to});")
        self.at = to


def _arguments(graph: Graph, node: Any) -> dict[str, Any]:
    """Return an operator's arguments by name, constants in place of nodes; a zero point as a number."""
    values = {argument.name: value for argument, value in zip(node.target._schema.arguments, node.args, strict=False)} | node.kwargs
    found: dict[str, Any] = {}
    for name, value in values.items():
        constant = getattr(value, "op", "") == "get_attr"
        found[name] = graph.constant(value) if constant else value
        if name.endswith("zero_point") and isinstance(found[name], torch.Tensor):
            found[name] = int(found[name])
    return found


def write_cmsis_folder(graph: Graph, inputs: list[torch.Tensor], folder: Path, cmsis: Path, processor: Processor) -> None:
    """Write the second form of a network, with the library's sources beside it and golden codes of its last convolution."""
    writer = Writer(graph)
    source = writer.write()
    tapped = graph.copy()
    nodes = {n.name: n for n in tapped.nodes}
    first = next(n for n in tapped.nodes if str(n.target).startswith("qc.quantize"))
    tapped.output.args = ((nodes[first.name], nodes[writer.last_convolution.name]),)
    tapped.output_names = ["given", "codes"]
    tapped.module.recompile()
    given, codes = (value.permute(0, 2, 3, 1).contiguous().numpy() for value in tapped(*inputs))
    arena = (writer.largest + 15) // 16 * 16 * 2 + SCRATCH
    names = []
    (folder / "cmsis").mkdir()
    for part in FOLDERS:
        for path in sorted((cmsis / "Source" / part).glob("*.c")):
            if not any(word in path.name for word in OTHER_TYPES):
                shutil.copy(path, folder / "cmsis")
                names.append(f"cmsis/{path.name}")
    files = {"model.h": MODEL_H.replace("@ARENA@", str(arena)), "model.c": source, "golden.h": golden_header([[given]], [[codes]])}
    for name, text in {**files, **example_files(processor, ["model.c", *names])}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cmsis", type=Path, required=True, help="a checkout of CMSIS-NN")
    parser.add_argument("--optimize", default="-O2", help="the compiler's option, for both")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    processor = find_processor(json.loads((arguments.folder / "report.json").read_text())["target"].partition(":")[2])
    artifact = load(arguments.folder / "model.qc", target="reference")
    os.environ["OPTIMIZE"] = arguments.optimize
    rows: dict[str, Measured] = {"qcompile": measure(arguments.folder, processor)}
    include = f"-w -I{(arguments.cmsis / 'Include').resolve()}"
    with tempfile.TemporaryDirectory() as scratch:
        write_cmsis_folder(artifact.graph, artifact.golden_inputs, Path(scratch), arguments.cmsis, processor)
        for name, option in OPTIONS.items():
            os.environ["MORE"] = f"{include} {option}"
            rows[name] = measure(Path(scratch), processor)
    ours = rows["qcompile"].instructions or 0
    table = [
        {"name": name, "instructions": row.instructions, "ratio": round(ours / (row.instructions or 1), 3), "equal_codes": row.ok,
         "functions": dict(list(row.functions.items())[:8])}
        for name, row in rows.items()
    ]  # fmt: skip
    if arguments.json:
        print(json.dumps(table, indent=1))
        return
    print(f"{'':42} instructions  qcompile takes  codes")
    for line in table:
        print(f"{line['name']:42} {line['instructions']:12,}  {line['ratio']:14.3f}  {'equal' if line['equal_codes'] else 'others'}")


if __name__ == "__main__":
    main()
