"""DS-CNN keyword spotting of MLPerf Tiny: a convolution 10x4 and four depthwise-separable ones of 64 channels, 12 words.

Input f32[batch,1,49,10]: MFCC features, 49 frames of 10. Output f32[batch,12], logits. Weights: the reference model's, before its
batch normalization was folded. Float top-1 on the thousand labelled inputs: 91.3 %. Source: Banbury et al. 2021 (MLPerf Tiny),
architecture of Zhang et al. 2017 (Hello Edge).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

CHANNELS, WORDS, BLOCKS = 64, 12, 4


def _folder() -> Path:
    return Path(os.environ.get("QCOMPILE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


class DSCNN(nn.Module):
    """Layers stand in the order of the weight file: each convolution before its batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        # SAME padding of 49 frames at stride 2 is 4 above and 5 below: one row more stands before the convolution.
        convolutions: list[nn.Module] = [nn.Conv2d(1, CHANNELS, (10, 4), 2, (4, 1))]
        for _ in range(BLOCKS):
            convolutions += [nn.Conv2d(CHANNELS, CHANNELS, 3, 1, 1, groups=CHANNELS), nn.Conv2d(CHANNELS, CHANNELS, 1)]
        self.convolutions = nn.ModuleList(convolutions)
        self.norms = nn.ModuleList(nn.BatchNorm2d(CHANNELS, eps=1e-3) for _ in convolutions)
        self.classifier = nn.Linear(CHANNELS, WORDS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (0, 0, 0, 1))
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = torch.relu(norm(convolution(x)))
        return self.classifier(x.mean((2, 3)))  # type: ignore[no-any-return]


def kws() -> tuple[nn.Module, tuple[torch.Tensor], list[dict[int, str]]]:
    """Return the trained net and one example input f32[1,1,49,10]; the batch is dynamic."""
    with np.load(_folder() / "mlperf_tiny" / "kws_dscnn_fp32.npz") as stored:
        weights = {name: torch.from_numpy(stored[name]) for name in stored.files}
    net = DSCNN()
    with torch.no_grad():
        for i, (convolution, norm) in enumerate(zip(net.convolutions, net.norms, strict=True)):
            layer, normed = f"l{2 * i}", f"l{2 * i + 1}"
            depthwise = weights.get(f"{layer}.depthwise_kernel")
            # TensorFlow has [height, width, in, out], and [height, width, channel, 1] of depthwise ones.
            kernel = weights[f"{layer}.kernel"].permute(3, 2, 0, 1) if depthwise is None else depthwise.permute(2, 3, 0, 1)
            convolution.weight.copy_(kernel)
            convolution.bias.copy_(weights[f"{layer}.bias"])
            for name, part in (("weight", "gamma"), ("bias", "beta"), ("running_mean", "moving_mean"), ("running_var", "moving_variance")):
                getattr(norm, name).copy_(weights[f"{normed}.{part}"])
        net.classifier.weight.copy_(weights["l18.kernel"].t())
        net.classifier.bias.copy_(weights["l18.bias"])
    example = torch.randn(1, 1, 49, 10, generator=torch.Generator().manual_seed(0)) * 20
    return net.eval(), (example,), [{0: "batch"}]


def words(size: int = 125) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the thousand labelled inputs in order: f32[n,1,49,10] and labels i64[n]."""
    with np.load(_folder() / "kws01_features" / "kws01.npz") as stored:
        codes, labels = stored["mfcc_int8"], stored["label"].astype(np.int64)
        features = (codes.astype(np.float32) - float(stored["zero_point"])) * np.float32(stored["scale"])
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        yield torch.from_numpy(features[part]).reshape(-1, 1, 49, 10), torch.from_numpy(labels[part])
