"""Read the models' data folder: pictures with labels, sentence pairs with scores, token streams.

The folder is QCOMPILE_DATA, or ``shared/data`` beside the repository. Nothing of it is part of the project.
"""

from __future__ import annotations

import csv
import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

CIFAR10_MEAN, CIFAR10_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as these nets were trained
MCUNET_MEAN, MCUNET_DEVIATION = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def data_folder() -> Path:
    """Return the data folder.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = Path(os.environ.get("QCOMPILE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    if not folder.is_dir():
        raise FileNotFoundError(f"the data folder {folder} is absent; set QCOMPILE_DATA")
    return folder


def _normalized(picture: Image.Image, mean: tuple[float, ...], deviation: tuple[float, ...]) -> torch.Tensor:
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255  # [height, width, 3]
    values = (pixels - np.float32(mean)) / np.float32(deviation)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))  # [3, height, width]


def _batches(items: Iterator[tuple[torch.Tensor, int]], size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    pictures: list[torch.Tensor] = []
    labels: list[int] = []
    for picture, label in items:
        pictures.append(picture)
        labels.append(label)
        if len(labels) == size:
            yield torch.stack(pictures), torch.tensor(labels)
            pictures, labels = [], []
    if labels:
        yield torch.stack(pictures), torch.tensor(labels)


def imagenet_batches(
    size: int = 50, resize: int = 201, crop: int = 176, count: int = 1000, step: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (f32[n,3,crop,crop], i64[n]) of the thousand-picture ImageNet sample, one picture per class.

    Args:
        size: pictures in a batch.
        resize: length of the shorter side before the centre is cut out (bilinear).
        crop: height and width of the cut.
        count: how many pictures at most.
        step: take every ``step``-th class; a sample over all classes when it is above one.
    """
    folder = data_folder() / "imagenet_sample1000"

    def items() -> Iterator[tuple[torch.Tensor, int]]:
        with (folder / "labels.csv").open(newline="") as lines:
            rows = list(csv.DictReader(lines))[::step][:count]
        for row in rows:
            picture = Image.open(folder / row["file"]).convert("RGB")
            scale = resize / min(picture.size)
            picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BILINEAR)
            left, top = (picture.width - crop) // 2, (picture.height - crop) // 2
            yield _normalized(picture.crop((left, top, left + crop, top + crop)), MCUNET_MEAN, MCUNET_DEVIATION), int(row["index"])

    return _batches(items(), size)


def cifar10_batches(
    size: int = 250, split: str = "test", count: int | None = None, step: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (f32[n,3,32,32], i64[n]) of CIFAR-10; labels are the places of the class names in alphabetical order.

    ``step`` takes every ``step``-th picture: the archive is sorted by class, so its head alone holds one class.
    """
    with zipfile.ZipFile(data_folder() / "cifar10_jpeg" / f"{split}.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        classes = sorted({name.split("/")[-2] for name in names})

        def items() -> Iterator[tuple[torch.Tensor, int]]:
            for name in names[::step][:count]:
                picture = Image.open(io.BytesIO(archive.read(name)))
                yield _normalized(picture, CIFAR10_MEAN, CIFAR10_DEVIATION), classes.index(name.split("/")[-2])

        yield from _batches(items(), size)


def sentence_pairs(split: str = "test") -> tuple[list[str], list[str], np.ndarray]:
    """Return the first sentences, the second sentences and the scores f64[n] (0 to 5) of STS-B, ``dev`` or ``test``."""
    with (data_folder() / "stsb_en" / f"stsb-en-{split}.csv").open(newline="", encoding="utf-8") as lines:
        rows = list(csv.reader(lines))
    return [row[0] for row in rows], [row[1] for row in rows], np.array([float(row[2]) for row in rows])


def text(name: str) -> str:
    """Return one text file of the data folder, such as ``wikitext2/test.txt``."""
    return (data_folder() / name).read_text(encoding="utf-8")
