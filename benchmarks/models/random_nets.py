"""Nets of well-known shape with seeded random weights: for speed and memory, never for accuracy.

Input f32[batch,3,224,224], any values near a unit normal. Batch normalisation statistics are set from one random batch, so
that activations keep a trained net's magnitude and int8 ranges are neither empty nor all in one code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs, momentum=None)
    )


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1; ReLU6 between."""

    def __init__(self, inputs: int, outputs: int, stride: int, ratio: int) -> None:
        super().__init__()
        middle = inputs * ratio
        self.expand = nn.Sequential(_conv(inputs, middle, 1), nn.ReLU6()) if ratio > 1 else nn.Identity()
        self.depthwise = nn.Sequential(_conv(middle, middle, 3, stride, middle), nn.ReLU6())
        self.project = _conv(middle, outputs, 1)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y


class MobileNetV2(nn.Module):
    """MobileNetV2 1.0 (Sandler et al., 2018, table 2): 3.5 M parameters, 0.6 billion operations."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(3, 32, 3, 2), nn.ReLU6()]
        inputs = 32
        table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
        for ratio, outputs, count, stride in table:
            for i in range(count):
                layers.append(InvertedResidual(inputs, outputs, stride if i == 0 else 1, ratio))
                inputs = outputs
        layers += [_conv(320, 1280, 1), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1 to four times the width, plus the shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.reduce, self.middle, self.widen = _conv(inputs, width, 1), _conv(width, width, 3, stride), _conv(width, 4 * width, 1)
        self.shortcut = _conv(inputs, 4 * width, 1, stride) if stride > 1 or inputs != 4 * width else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.widen(F.relu(self.middle(F.relu(self.reduce(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet50(nn.Module):
    """ResNet-50 with the stride in the 3x3 convolution: 25.6 M parameters, 8.2 billion operations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        layers: list[nn.Module] = []
        inputs = 64
        for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for i in range(count):
                layers.append(Bottleneck(inputs, width, stride if i == 0 else 1))
                inputs = 4 * width
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(2048, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.layers(self.stem(x)).mean((2, 3)))


def _seeded(make: type[nn.Module]) -> tuple[nn.Module, tuple[torch.Tensor], list[dict[int, str]]]:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        net = make()
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        net.train()(torch.randn(2, 3, 224, 224))
        return net.eval(), (torch.randn(1, 3, 224, 224),), [{0: "batch"}]


def mobilenet_v2() -> tuple[nn.Module, tuple[torch.Tensor], list[dict[int, str]]]:
    """Return MobileNetV2 1.0 with random weights and one example input f32[1,3,224,224]; the batch is dynamic."""
    return _seeded(MobileNetV2)


def resnet50() -> tuple[nn.Module, tuple[torch.Tensor], list[dict[int, str]]]:
    """Return ResNet-50 with random weights and one example input f32[1,3,224,224]; the batch is dynamic."""
    return _seeded(ResNet50)
