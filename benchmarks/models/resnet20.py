"""ResNet-20 for CIFAR-10 with option A shortcuts (every second pixel, zero channels appended): 0.27 M parameters.

Input f32[batch,3,32,32]: (x / 255 - mean) / deviation with ImageNet's mean and deviation. Output f32[batch,10].
Float top-1 on the JPEG test pictures: 81.0 %. Source: He et al. (2016), section 4.2; weights by Y. Idelbayev.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


def _folder() -> Path:
    data = os.environ.get("QCOMPILE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
    return Path(data) / "resnet_cifar10"


class Block(nn.Module):
    """Two 3x3 convolutions and the parameter-free shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.added:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added // 2, self.added // 2))
        return F.relu(y + x)


class ResNet(nn.Module):
    """Three stages of ``blocks`` blocks with 16, 32 and 64 channels; 3 blocks make ResNet-20, 5 make ResNet-32."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(blocks)))
        self.layer2 = nn.Sequential(*(Block(32 if i else 16, 32, 1 if i else 2) for i in range(blocks)))
        self.layer3 = nn.Sequential(*(Block(64 if i else 32, 64, 1 if i else 2) for i in range(blocks)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _trained(blocks: int, file: str) -> tuple[nn.Module, tuple[torch.Tensor], list[dict[int, str]]]:
    net = ResNet(blocks)
    weights = torch.load(_folder() / file, weights_only=True, map_location="cpu")["state_dict"]
    net.load_state_dict({name.removeprefix("module."): value.float() for name, value in weights.items()})
    return net.eval(), (torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)),), [{0: "batch"}]


def resnet20() -> tuple[nn.Module, tuple[torch.Tensor], list[dict[int, str]]]:
    """Return the trained ResNet-20 and one example input f32[1,3,32,32]; the batch is dynamic."""
    return _trained(3, "resnet20-12fca82f.th")


def resnet32() -> tuple[nn.Module, tuple[torch.Tensor], list[dict[int, str]]]:
    """Return the trained ResNet-32 (82.6 %) and one example input f32[1,3,32,32]; the batch is dynamic."""
    return _trained(5, "resnet32-d509ac18.th")
