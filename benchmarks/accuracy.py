#!/usr/bin/env python
"""Print what quantization costs in accuracy: ``python benchmarks/accuracy.py [--only NAME ...]`` (``--help`` has the sizes).

- ``mcunet``: top-1 on the ImageNet sample: 8 bits by tensor, as it is and by the recipe ``dfq`` (no data), and ``w8a8``; every eighth
  picture of the sample calibrates and is not judged. ``mcunet-onnx``: ``dfq`` from an .onnx file.
- ``resnet20``: top-1 on CIFAR-10, the same recipes, from the torch module and from an .onnx file.
- ``gptq``: the objective tr(E H E^T) of every linear layer of all-MiniLM-L6-v2, GPTQ against nearest rounding, 4 and 3 bits, groups of 128;
  ``--layers`` prints a row for each layer.
- ``w4``: cosine of all-MiniLM-L6-v2's sentence embeddings to the float model's on STS-B test, all linear layers in 4 bits, by recipe;
  calibrated on WikiText-2 valid.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
EVERY = 8  # of the ImageNet sample, every eighth picture calibrates

Batches = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How many pictures and sentence pairs stand behind a figure, and whether layers are listed."""

    pictures: int
    pairs: int
    layers: bool


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
    model: str,
    source: Any,
    inputs: Any,
    shapes: Any,
    batches: Batches,
    calibration: list[tuple[torch.Tensor]],
    recipes: Sequence[str | Recipe] = (NAIVE, "dfq", "w8a8"),
) -> Iterator[Row]:
    """Yield the top-1 of a model by recipe."""
    for recipe in recipes:
        data = calibration if recipe == "w8a8" else None
        artifact = qcompile.compile(source, inputs, recipe=recipe, target="reference", calibration=data, dynamic_shapes=shapes)
        value, seen = top1(on_cpu(artifact), batches)
        yield {"model": model, "recipe": recipe if isinstance(recipe, str) else recipe.name, "top1": value, "pictures": seen}


@contextmanager
def onnx_file(net: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Iterator[Path]:
    """Give the path of a module's .onnx file, with batch normalization folded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model_file("onnx_file").write(net, inputs, path)
        yield path


def imagenet(options: Options) -> tuple[Batches, list[tuple[torch.Tensor]]]:
    """Return the judged pictures of the sample, and every eighth picture, which calibrates and is not judged."""
    data = model_file("data")

    def judged() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield batches; classes stand in order, so the label tells the place in the sample."""
        step = max(1, 1000 // options.pictures)
        step += step % EVERY == 0  # else all would be pictures that calibrate
        for pictures, labels in data.imagenet_batches(25, step=step, count=options.pictures):
            kept = labels % EVERY != 0
            if kept.any():
                yield pictures[kept], labels[kept]

    calibration = [(x,) for x, _ in data.imagenet_batches(16, step=EVERY, count=CALIBRATION)]
    return judged, calibration


def mcunet(options: Options) -> Iterator[Row]:
    """Yield the rows of MCUNet."""
    net, inputs, shapes = model_file("mcunet").mcunet()
    batches, calibration = imagenet(options)
    value, seen = top1(net, batches)
    yield {"model": "mcunet", "recipe": "float", "top1": value, "pictures": seen}
    yield from quantized_rows("mcunet", net, inputs, shapes, batches, calibration)


def mcunet_onnx(options: Options) -> Iterator[Row]:
    """Yield the rows of MCUNet from a file without notes of batch normalization."""
    net, inputs, _ = model_file("mcunet").mcunet()
    batches, calibration = imagenet(options)
    with onnx_file(net, inputs) as path:
        yield from quantized_rows("mcunet.onnx", path, None, None, batches, calibration, ("float", "dfq", "w8a8"))


def resnet20(options: Options) -> Iterator[Row]:
    """Yield the rows of ResNet-20, calibrated on training pictures."""
    data, (net, inputs, shapes) = model_file("data"), model_file("resnet20").resnet20()

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return data.cifar10_batches(250, step=max(1, 10000 // options.pictures), count=options.pictures)  # type: ignore[no-any-return]

    value, seen = top1(net, batches)
    yield {"model": "resnet20", "recipe": "float", "top1": value, "pictures": seen}
    calibration = [(x,) for x, _ in data.cifar10_batches(16, "train", count=CALIBRATION, step=50000 // CALIBRATION)]
    yield from quantized_rows("resnet20", net, inputs, shapes, batches, calibration)
    with onnx_file(net, inputs) as path:
        yield from quantized_rows("resnet20.onnx", path, None, None, batches, calibration)


# ---- linear layers --------------------------------------------------------------------------------------------------------


def gptq(options: Options) -> Iterator[Row]:
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
            if options.layers:
                yield {"model": "minilm", "scheme": str(scheme), "layer": bound_arguments(node)["weight"].target, "ratio": ratios[-1]}
        mean = sum(ratios) / len(ratios)
        yield {"model": "minilm", "scheme": str(scheme), "layers": len(ratios), "gptq_better": sum(r < 1 for r in ratios),
               "ratio_mean": mean, "ratio_best": min(ratios), "ratio_worst": max(ratios)}  # fmt: skip


def w4(options: Options) -> Iterator[Row]:
    """Yield cosine to the float model and Spearman's correlation by recipe, on the first pairs of STS-B test."""
    from qcompile.capture import capture
    from qcompile.evaluation import evaluate

    models, folder = model_file("minilm"), model_file("data").data_folder()
    reference, pairs = capture(str(models.folder()), None, None), folder / "stsb_en" / "stsb-en-test.csv"
    for recipe in ("w4a16", "w4a16-awq", "w4a8"):
        text = f"text:{folder / 'wikitext2' / 'valid.txt'}"
        artifact = qcompile.compile(str(models.folder()), recipe=recipe, target="reference", calibration=text)
        linear = [layer for layer in artifact.report["layers"] if layer["op"].endswith("linear")]
        found = evaluate(on_cpu(artifact), "sts", str(pairs), reference, options.pairs)
        yield {"model": "minilm", "recipe": recipe, "pairs": found.samples, "low_bit": sum(x["weight"].startswith("int4") for x in linear),
               "linear": len(linear), **found.more, "spearman": found.value, "spearman_float": found.float_value}  # fmt: skip


# ---- equivalences ---------------------------------------------------------------------------------------------------------


def rotation(options: Options) -> Iterator[Row]:
    """Yield the largest relative change of the logits of wikilm with planted outliers, by pass and by precision."""
    models = model_file("wikilm")
    for dtype in (torch.float32, torch.float64):
        net, inputs, shapes = models.wikilm_planted()
        graph = capture_module(net.to(dtype), inputs, shapes)
        passes: tuple[Pass, ...] = (Smooth(), Rotate(), Rotate(mlp=False))
        for item in passes:
            changed = graph.copy()
            context = Context(target=find_target("reference"), calibration=[inputs], example_inputs=inputs)  # type: ignore[arg-type]
            steps = Pipeline((item,)).run(changed, context)
            exact, found = graph(*inputs)[0].double(), changed(*inputs)[0].double()
            yield {"model": "wikilm planted", "pass": str(item), "dtype": str(dtype).removeprefix("torch."), "changes": steps[0].changes,
                   "relative_change": float((found - exact).norm() / exact.norm())}  # fmt: skip


SECTIONS: dict[str, Callable[[Options], Iterator[Row]]] = {
    "mcunet": mcunet, "mcunet-onnx": mcunet_onnx, "resnet20": resnet20, "gptq": gptq, "w4": w4, "rotation": rotation,
}  # fmt: skip


def main() -> None:
    """Print the rows of the sections asked for as they are found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--pictures", type=int, default=1000, help="pictures behind each top-1 [1000]")
    parser.add_argument("--pairs", type=int, default=300, help="sentence pairs behind each cosine [300]; the test set has 1379")
    parser.add_argument("--layers", action="store_true", help="a row for each layer in gptq")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sizes = Options(options.pictures, options.pairs, options.layers)
    found = itertools.chain.from_iterable(SECTIONS[name](sizes) for name in options.only)
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
