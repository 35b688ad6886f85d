"""MCUNet-320kB: a MobileNetV2-type ImageNet net of 0.74 M parameters, batch normalisation not folded, ReLU6.

Input f32[batch,3,176,176]: shorter side to 201, centre 176, (x / 255 - 0.5) / 0.5. Output f32[batch,1000].
Float top-1 on the thousand-picture sample: 68.9 %. Source: Lin et al., MCUNet (2020); net description and weights by the authors.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import nn


def _folder() -> Path:
    data = os.environ.get("QCOMPILE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
    return Path(data) / "mcunet_imagenet"


def _layer(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, activation: bool = True) -> nn.Sequential:
    parts: list[tuple[str, nn.Module]] = [
        ("conv", nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)),
        ("bn", nn.BatchNorm2d(outputs, eps=1e-5)),
    ]
    return nn.Sequential(OrderedDict(parts + ([("act", nn.ReLU6())] if activation else [])))


class Block(nn.Module):
    """An inverted residual: expand 1x1 (unless the ratio is 1), depthwise, project 1x1 without activation."""

    def __init__(self, description: dict[str, Any]) -> None:
        super().__init__()
        conv = description["mobile_inverted_conv"]
        inputs, outputs = conv["in_channels"], conv["out_channels"]
        middle = conv["mid_channels"] or round(inputs * conv["expand_ratio"])
        parts: list[tuple[str, nn.Module]] = []
        if conv["expand_ratio"] != 1:
            parts.append(("inverted_bottleneck", _layer(inputs, middle, 1)))
        parts.append(("depth_conv", _layer(middle, middle, conv["kernel_size"], conv["stride"], groups=middle)))
        parts.append(("point_linear", _layer(middle, outputs, 1, activation=False)))
        self.mobile_inverted_conv = nn.Sequential(OrderedDict(parts))
        self.shortcut = description["shortcut"] is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.mobile_inverted_conv(x)
        return x + y if self.shortcut else y


class MCUNet(nn.Module):
    """The net of the authors' JSON description; its state-dict keys are those of their weight file."""

    def __init__(self, description: dict[str, Any]) -> None:
        super().__init__()
        first, head = description["first_conv"], description["classifier"]
        self.first_conv = _layer(first["in_channels"], first["out_channels"], first["kernel_size"], first["stride"])
        self.blocks = nn.Sequential(*(Block(block) for block in description["blocks"]))
        self.classifier = nn.Sequential(OrderedDict(linear=nn.Linear(head["in_features"], head["out_features"])))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.first_conv(x))
        return self.classifier(x.mean((2, 3)))


def mcunet() -> tuple[nn.Module, tuple[torch.Tensor], list[dict[int, str]]]:
    """Return the trained net and one example input f32[1,3,176,176]; the batch is dynamic."""
    folder = _folder()
    net = MCUNet(json.loads((folder / "mcunet-320kb-1mb_imagenet.json").read_text()))
    weights = torch.load(folder / "mcunet-320kb-1mb_imagenet.pth", weights_only=True, map_location="cpu")
    net.load_state_dict(weights["state_dict"])
    example = torch.rand(1, 3, 176, 176, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return net.eval(), (example,), [{0: "batch"}]
