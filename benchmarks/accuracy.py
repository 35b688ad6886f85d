#!/usr/bin/env python
"""Print what quantization costs in accuracy: ``python benchmarks/accuracy.py [--only NAME ...] [--pictures N] [--json]``.

- ``mcunet``: top-1 on the thousand-picture ImageNet sample: 8 bits by tensor, as it is and by the recipe ``dfq`` (no data), and ``w8a8``.
- ``resnet20``: top-1 on CIFAR-10, the same recipes, from the torch module and from an .onnx file.
- ``gptq``: the objective tr(E H E^T) of every linear layer of all-MiniLM-L6-v2, GPTQ against nearest rounding, 4 and 3 bits, groups of 128.
- ``rotation``: how far smoothing and rotation move the output of a float model, in float32 and float64.

Compiled for the target ``reference``, where every layer is integer and none stays float because it would be slower; run with the kernels
of ``cpu``, which give the same codes (``benchmarks/agreement.py``). Data is read from ``QCOMPILE_DATA``, by default ``shared/data``
beside the repository.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from qcompile.passes.rotate import Rotate
from qcompile.passes.smooth import Smooth

import qcompile
from qcompile.capture.torch_export import capture_module
from qcompile.pipeline import Context, Pass, Pipeline
from qcompile.recipe import Recipe, Schemes
from qcompile.registry import find_target

BY_TENSOR = "weight=int8 tensor sym; activation=uint8 tensor affine"
NAIVE = Recipe(
    name="naive",
    pipeline="canonicalize, fold-constants, fold-batch-norm, recognize-attention, assign-bits, insert-quantizers{range=model}, "
    "quantize-weights, materialize, fuse-epilogue",
    schemes=Schemes(linear=BY_TENSOR, conv2d=BY_TENSOR),
    needs_data=False,
)
CALIBRATION = 128  # pictures

Batches = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]]
Row = dict[str, Any]


def model_file(name: str) -> ModuleType:
    """Return a file of the folder ``models``."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", Path(__file__).parent / "models" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# ---- pictures -------------------------------------------------------------------------------------------------------------


def top1(run: Callable[[torch.Tensor], torch.Tensor], batches: Batches) -> tuple[float, int]:
    """Return the share of right answers in percent, and how many pictures there were."""
    right, seen = 0, 0
    with torch.no_grad():
        for pictures, labels in batches():
            right += int((run(pictures).argmax(-1) == labels).sum())
            seen += len(labels)
    return 100 * right / seen, seen


def on_cpu(artifact: qcompile.Artifact) -> qcompile.Artifact:
    """Return the same integer graph with the kernels of ``cpu``: the codes of the reference, sooner."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.qc"
        artifact.save(path)
        return qcompile.load(path, target="cpu")


def quantized_rows(
    model: str, source: Any, inputs: Any, shapes: Any, batches: Batches, calibration: list[tuple[torch.Tensor]]
) -> Iterator[Row]:
    """Yield the top-1 of a model by recipe."""
    for recipe in (NAIVE, "dfq", "w8a8"):
        data = calibration if recipe == "w8a8" else None
        artifact = qcompile.compile(source, inputs, recipe=recipe, target="reference", calibration=data, dynamic_shapes=shapes)
        value, seen = top1(on_cpu(artifact), batches)
        yield {"model": model, "recipe": recipe if isinstance(recipe, str) else recipe.name, "top1": value, "pictures": seen}


def mcunet(pictures: int) -> Iterator[Row]:
    """Yield the rows of MCUNet; ``w8a8`` is calibrated on every eighth picture of the sample, for want of others of ImageNet."""
    data, (net, inputs, shapes) = model_file("data"), model_file("mcunet").mcunet()

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return data.imagenet_batches(25, step=max(1, 1000 // pictures), count=pictures)  # type: ignore[no-any-return]

    value, seen = top1(net, batches)
    yield {"model": "mcunet", "recipe": "float", "top1": value, "pictures": seen}
    calibration = [(x,) for x, _ in data.imagenet_batches(16, step=8, count=CALIBRATION)]
    yield from quantized_rows("mcunet", net, inputs, shapes, batches, calibration)


def resnet20(pictures: int) -> Iterator[Row]:
    """Yield the rows of ResNet-20, calibrated on training pictures."""
    data, (net, inputs, shapes) = model_file("data"), model_file("resnet20").resnet20()

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return data.cifar10_batches(250, step=max(1, 10000 // pictures), count=pictures)  # type: ignore[no-any-return]

    value, seen = top1(net, batches)
    yield {"model": "resnet20", "recipe": "float", "top1": value, "pictures": seen}
    calibration = [(x,) for x, _ in data.cifar10_batches(16, "train", count=CALIBRATION, step=50000 // CALIBRATION)]
    yield from quantized_rows("resnet20", net, inputs, shapes, batches, calibration)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet20.onnx"
        model_file("onnx_file").write(net, inputs, path)
        yield from quantized_rows("resnet20.onnx", path, None, None, batches, calibration)


# ---- linear layers --------------------------------------------------------------------------------------------------------


def gptq(pictures: int) -> Iterator[Row]:
    """Yield, for 4 and 3 bits in groups of 128, on how many linear layers GPTQ has the smaller objective, and the ratios."""
    from qcompile.formats import parse_scheme, quantize_tensor
    from qcompile.graph.text import bound_arguments, operator_name
    from qcompile.solvers import gptq as solver
    from qcompile.solvers.gptq import row_errors
    from qcompile.statistics import Gram, collect

    models, data = model_file("minilm"), model_file("data")
    net, inputs, shapes = models.minilm()
    graph = capture_module(net, inputs, shapes)
    lines = [line for line in data.text("wikitext2/valid.txt").splitlines() if len(line) > 200][:64]
    batches = [models.tokenize(lines[i : i + 8]) for i in range(0, len(lines), 8)]
    layers = [node for node in graph.nodes if node.op == "call_function" and operator_name(node.target) == "aten.linear"]
    requests = {node: Gram(bound_arguments(node)["input"].name) for node in layers}
    statistics = collect(graph, list(dict.fromkeys(requests.values())), batches)
    for bits in (4, 3):
        scheme, ratios = parse_scheme(f"int{bits} group=128 sym"), []
        for node, request in requests.items():
            weight, found = graph.constant(bound_arguments(node)["weight"]), statistics[request]
            solved = solver.solve(weight, found, scheme, keep_better=False)
            errors = [float(row_errors(weight, q.dequantize(), found["gram"]).sum()) for q in (solved, quantize_tensor(weight, scheme))]
            ratios.append(errors[0] / errors[1])
        worst, mean = max(ratios), sum(ratios) / len(ratios)
        yield {"model": "minilm", "scheme": str(scheme), "layers": len(ratios), "gptq_better": sum(r < 1 for r in ratios),
               "ratio_mean": mean, "ratio_worst": worst}  # fmt: skip


# ---- equivalences ---------------------------------------------------------------------------------------------------------


def rotation(pictures: int) -> Iterator[Row]:
    """Yield the largest relative change of the logits of wikilm with planted outliers, by pass and by precision."""
    models = model_file("wikilm")
    for dtype in (torch.float32, torch.float64):
        net, inputs, shapes = models.wikilm_planted()
        graph = capture_module(net.to(dtype), inputs, shapes)
        passes: tuple[Pass, ...] = (Smooth(), Rotate(), Rotate(online=False))
        for item in passes:
            changed = graph.copy()
            context = Context(target=find_target("reference"), calibration=[inputs], example_inputs=inputs)  # type: ignore[arg-type]
            steps = Pipeline((item,)).run(changed, context)
            exact, found = graph(*inputs)[0].double(), changed(*inputs)[0].double()
            yield {"model": "wikilm planted", "pass": str(item), "dtype": str(dtype).removeprefix("torch."), "changes": steps[0].changes,
                   "relative_change": float((found - exact).norm() / exact.norm())}  # fmt: skip


SECTIONS: dict[str, Callable[[int], Iterator[Row]]] = {"mcunet": mcunet, "resnet20": resnet20, "gptq": gptq, "rotation": rotation}


def main() -> None:
    """Print the rows of the sections asked for as they are found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--pictures", type=int, default=1000, help="pictures behind each top-1 [1000]")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = itertools.chain.from_iterable(SECTIONS[name](options.pictures) for name in options.only)
    rows = []
    for row in found:
        rows.append(row)
        if not options.json:
            print(
                "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()), flush=True
            )
    if options.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
