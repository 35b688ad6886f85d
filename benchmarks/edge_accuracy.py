#!/usr/bin/env python
"""Print what integers alone cost in accuracy: ``python benchmarks/edge_accuracy.py [--only NAME ...] [--recipes NAME ...]``.

- ``kws``: DS-CNN keyword spotting, the thousand labelled inputs. There is no other data for it, so every eighth input calibrates and is not
  judged; ``top1_all`` counts them too.
- ``resnet8``: CIFAR-10 test pictures, calibrated on training pictures.
- ``mcunet``: the first pictures of the ImageNet sample, calibrated on every eighth of those after them.

Beside top-1 stand the bytes of weights by their formats (``weight_bytes``: bits of each code, without scales) and whether anything stayed
float. Graphs are compiled for the target ``reference`` and run by the meaning of their operators: integer codes are those of any target.
Data is read from ``QCOMPILE_DATA``, by default ``shared/data`` beside the repository.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import qcompile
from qcompile.formats import parse_scheme

RECIPES = ("w8a8-edge", "w4a8-edge")
EVERY = 8
JUDGED = {"mcunet": 200, "resnet8": 1000, "kws": 1000}
CALIBRATION = 128

Batches = list[tuple[torch.Tensor, torch.Tensor]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A trained net with judged and calibrating data, and data that is only counted in ``top1_all``."""

    net: torch.nn.Module
    inputs: tuple[torch.Tensor]
    shapes: Any
    judged: Batches
    calibration: list[tuple[torch.Tensor]]
    beside: Batches


def model_file(name: str) -> ModuleType:
    """Return a file of the folder ``models``."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", Path(__file__).parent / "models" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def kws(pictures: int) -> Task:
    """Return keyword spotting; every eighth input calibrates."""
    model = model_file("kws")
    ((x, labels),) = model.words(1000)
    x, labels = x[:pictures], labels[:pictures]
    calibrates = torch.arange(len(x)) % EVERY == 0
    calibration = [(part,) for part in x[calibrates].split(25)]
    judged = [(x[~calibrates], labels[~calibrates])]
    return Task(*model.kws(), judged, calibration, [(x[calibrates], labels[calibrates])])


def resnet8(pictures: int) -> Task:
    """Return ResNet8 of MLPerf Tiny; training pictures calibrate."""
    model = model_file("mlperf_tiny")
    judged = list(model.pictures(250, step=max(1, 10000 // pictures), count=pictures))
    calibration = [(x,) for x, _ in model.pictures(16, "train", CALIBRATION, 50000 // CALIBRATION)]
    return Task(*model.resnet8(), judged, calibration, [])


def mcunet(pictures: int) -> Task:
    """Return MCUNet; the first pictures of the sample are judged, every eighth of the rest calibrates."""
    data = model_file("data")
    judged = list(data.imagenet_batches(25, count=pictures))
    calibration = [(x,) for x, labels in data.imagenet_batches(16, step=EVERY) if int(labels.min()) >= pictures]
    return Task(*model_file("mcunet").mcunet(), judged, calibration[: CALIBRATION // 16], [])


TASKS: dict[str, Callable[[int], Task]] = {"kws": kws, "resnet8": resnet8, "mcunet": mcunet}


def right(run: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[int, int]:
    """Return how many answers are right, and of how many."""
    found, seen = 0, 0
    with torch.no_grad():
        for x, labels in batches:
            found += int((run(x).argmax(-1) == labels).sum())
            seen += len(labels)
    return found, seen


def row(model: str, recipe: str, run: Callable[[torch.Tensor], torch.Tensor], task: Task) -> Row:
    """Return top-1 of one form of a model."""
    (found, seen), (more, others) = right(run, task.judged), right(run, task.beside)
    beside = {"top1_all": 100 * (found + more) / (seen + others)} if others else {}
    return {"model": model, "recipe": recipe, "top1": 100 * found / seen, "judged": seen, **beside}


def weight_bytes(report: dict[str, Any]) -> int:
    """Return the bytes of all weights' codes, packed without gaps."""
    layers = [(layer["elements"], layer["weight"]) for layer in report["layers"]]
    return sum(math.ceil(count * (32 if weight == "float32" else parse_scheme(weight).bits) / 8) for count, weight in layers)


def rows(name: str, recipes: Sequence[str], pictures: int) -> Iterator[Row]:
    """Yield a row of the float model and one for each recipe."""
    task = TASKS[name](pictures)
    yield row(name, "float", task.net, task)
    for recipe in recipes:
        artifact = qcompile.compile(
            task.net, task.inputs, recipe=recipe, target="reference", calibration=task.calibration, dynamic_shapes=task.shapes
        )
        report = artifact.report
        found = row(name, recipe, artifact, task)
        yield found | {"weight_bytes": weight_bytes(report), "float_operators": len(report["float_ops"])}


def main() -> None:
    """Print the rows of the models asked for as they are found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help=f"names or files [{' '.join(RECIPES)}]")
    parser.add_argument("--pictures", type=int, help=f"how many inputs are judged [{JUDGED}]")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = []
    for name in options.only:
        for item in rows(name, options.recipes, options.pictures or JUDGED[name]):
            found.append(item)
            if not options.json:
                print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in item.items()), flush=True)
    if options.json:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
