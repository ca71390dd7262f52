"""Entry point of the model: a small feature pyramid network with heads shared by its levels.

After Lin et al., Feature Pyramid Networks, 2017, with concatenation in the place of addition, and Tian et al., FCOS,
2019, for the outputs: every location gives class scores and its distances to the four sides of the box.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def build(width: int = 16, classes: int = 10) -> nn.Module:
    """The untrained network: scenes ``[N, 1, 64, 64]`` to scores and offsets of A = 320 locations.

    Scores ``[N, classes, A]`` are in [0, 1]; offsets ``[N, 4, A]`` are explained at
    :func:`examples.detector.boxes.decode`. ``width`` scales all channels.
    """
    return DetectorNet(width, classes)


class DetectorNet(nn.Module):
    """Backbone with maps of stride 4, 8 and 16; a pyramid back to stride 4; heads on the maps of stride 4 and 8."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.stem = _conv_bn(1, width, stride=2)
        self.stride4 = _stage(width, 2 * width)
        self.stride8 = _stage(2 * width, 4 * width)
        self.stride16 = _stage(4 * width, 6 * width)
        self.lateral16 = _conv_bn(6 * width, 2 * width, kernel=1)
        self.lateral8 = _conv_bn(4 * width, 2 * width, kernel=1)
        self.lateral4 = _conv_bn(2 * width, 2 * width, kernel=1)
        self.merge8 = _conv_bn(4 * width, 2 * width)
        self.merge4 = _conv_bn(4 * width, 2 * width)
        self.head = Head(2 * width, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c4 = self.stride4(self.stem(x))
        c8 = self.stride8(c4)
        p16 = self.lateral16(self.stride16(c8))
        p8 = self.merge8(torch.cat([self.lateral8(c8), F.interpolate(p16, scale_factor=2, mode="nearest")], 1))
        finer = F.interpolate(p8, scale_factor=2, mode="bilinear", align_corners=False)
        p4 = self.merge4(torch.cat([self.lateral4(c4), finer], 1))
        scores, offsets = zip(*(self.head(level) for level in (p4, p8)), strict=True)
        return torch.cat(scores, 2), torch.cat(offsets, 2)


class Head(nn.Module):
    """Scores and offsets of one level; called for each level with the same weights, so it has no batch statistics."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.tower = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
        )
        self.classify = nn.Conv2d(channels, classes, 3, padding=1)
        self.offsets = nn.Conv2d(channels, 4, 3, padding=1)
        # Lin et al., Focal Loss, 2017: scores start near 0.01, as most locations show no item.
        nn.init.constant_(self.classify.bias, -math.log(99))  # type: ignore[arg-type]
        nn.init.constant_(self.offsets.bias, 2.0)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.tower(x)
        return [torch.sigmoid(self.classify(x)).flatten(2), self.offsets(x).flatten(2)]


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    """Half the resolution."""
    return nn.Sequential(_conv_bn(inputs, outputs, stride=2), _conv_bn(outputs, outputs))


def _conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )
